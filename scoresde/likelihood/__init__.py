"""Likelihoods of a model, and how far to trust them."""

from .density import LogProb, bits_per_dim, dequantize, log_prob
from .divergence import Divergence, Exact, Hutchinson, HutchPP, Orthogonal, gaussian, rademacher

__all__ = [
    "Divergence",
    "Exact",
    "HutchPP",
    "Hutchinson",
    "LogProb",
    "Orthogonal",
    "bits_per_dim",
    "dequantize",
    "gaussian",
    "log_prob",
    "rademacher",
]
