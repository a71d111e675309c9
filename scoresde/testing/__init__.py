"""Property tests for schedules, processes, discretizations, denoisers, solvers, guidance and likelihoods:
ours, and a user's own.

Checks are plain functions that raise AssertionError with the worst case, the measured number and the bound;
they need neither pytest nor hypothesis. `scoresde.testing.strategies` draws the cases, and
`scoresde.testing.profiles` says how many, with hypothesis (`pip install scoresde[testing]`).
"""

from . import failure, orders
from .black_box import SameLaw, check_same_law, check_sampler_exact_law, sampler_law
from .certify import Certificate, certify
from .chain_checks import check_discretization
from .denoiser_checks import check_denoiser
from .guidance_checks import check_guidance, check_interval
from .likelihood_checks import check_bound, check_divergence, check_likelihood
from .process_checks import check_schedule, check_sde
from .solver_checks import (
    check_batch,
    check_invariances,
    check_order,
    check_rotation,
    check_row_order,
    check_scaling,
    check_strong_order,
    check_tableau,
    check_time_change,
    check_weak_order,
)

__all__ = [
    "Certificate",
    "SameLaw",
    "certify",
    "check_batch",
    "check_bound",
    "check_denoiser",
    "check_discretization",
    "check_divergence",
    "check_guidance",
    "check_interval",
    "check_invariances",
    "check_likelihood",
    "check_order",
    "check_rotation",
    "check_row_order",
    "check_same_law",
    "check_sampler_exact_law",
    "check_scaling",
    "check_schedule",
    "check_sde",
    "check_strong_order",
    "check_tableau",
    "check_time_change",
    "check_weak_order",
    "failure",
    "orders",
    "sampler_law",
]
