"""Guidance: denoisers made of denoisers, for every solver, and for likelihood and encoding too."""

from .classifier import Classifier, classifier
from .classifier_free import classifier_free
from .inverse import colorize, dps, dps_normed, inpaint, linear_inverse, pigdm
from .scales import Scale, ho_salimans, interval, ramp

__all__ = [
    "Classifier",
    "Scale",
    "classifier",
    "classifier_free",
    "colorize",
    "dps",
    "dps_normed",
    "ho_salimans",
    "inpaint",
    "interval",
    "linear_inverse",
    "pigdm",
    "ramp",
]
