"""Choosing: which solver, on which grid, for my model and a number of network calls?"""

from .candidates import GRIDS, STOCHASTIC_GRIDS, Candidate, pool
from .compare import Budget, compare
from .comparison import Comparison, rank_agreement
from .recommend import recommend
from .recommendation import DensityRule, Ranked, Recommendation
from .surrogate import Surrogate, gaussian_surrogate, kernel_surrogate, mixture_surrogate
from .tune import Tuned, tune, tune_for

__all__ = [
    "GRIDS",
    "STOCHASTIC_GRIDS",
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
