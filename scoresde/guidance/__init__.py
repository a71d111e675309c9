"""Guidance: denoisers made of denoisers, for every solver, and for likelihood and encoding too."""

from .classifier import Classifier, classifier
from .classifier_free import classifier_free
from .scales import Scale, ho_salimans, interval, ramp

__all__ = ["Classifier", "Scale", "classifier", "classifier_free", "ho_salimans", "interval", "ramp"]
