"""Likelihoods of a model and their lower bounds, and how far to trust them."""

from .bound import (
    DiscreteDecoder,
    Elbo,
    GaussianDecoder,
    along,
    by_log_snr,
    diffusion_term,
    elbo,
    learned_step_term,
    log_normal_mass,
    posterior_variance,
    prior_term,
    step_term,
    transition_variance,
)
from .density import LogProb, bits_per_dim, dequantize, log_prob
from .divergence import Divergence, Exact, Hutchinson, HutchPP, Orthogonal, gaussian, rademacher

__all__ = [
    "DiscreteDecoder",
    "Divergence",
    "Elbo",
    "Exact",
    "GaussianDecoder",
    "HutchPP",
    "Hutchinson",
    "LogProb",
    "Orthogonal",
    "along",
    "bits_per_dim",
    "by_log_snr",
    "dequantize",
    "diffusion_term",
    "elbo",
    "gaussian",
    "learned_step_term",
    "log_normal_mass",
    "log_prob",
    "posterior_variance",
    "prior_term",
    "rademacher",
    "step_term",
    "transition_variance",
]
