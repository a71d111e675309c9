"""Choosing: which solver, on which grid, for my model and a number of network calls?"""

from .candidates import GRIDS, Candidate, pool
from .compare import Budget, compare
from .comparison import Comparison, rank_agreement

__all__ = [
    "GRIDS",
    "Budget",
    "Candidate",
    "Comparison",
    "compare",
    "pool",
    "rank_agreement",
]
