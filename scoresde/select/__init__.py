"""Choosing: which solver, on which grid, for my model and a number of network calls?"""

from .candidates import GRIDS, Candidate, pool
from .compare import Budget, compare
from .comparison import Comparison, rank_agreement
from .recommend import DensityRule, Ranked, Recommendation, recommend
from .surrogate import Surrogate, gaussian_surrogate, kernel_surrogate, mixture_surrogate
from .tune import Tuned, tune, tune_for

__all__ = [
    "GRIDS",
    "Budget",
    "Candidate",
    "Comparison",
    "DensityRule",
    "Ranked",
    "Recommendation",
    "Surrogate",
    "Tuned",
    "compare",
    "gaussian_surrogate",
    "kernel_surrogate",
    "mixture_surrogate",
    "pool",
    "rank_agreement",
    "recommend",
    "tune",
    "tune_for",
]
