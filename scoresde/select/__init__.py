"""Choosing: which solver, on which grid, for my model and a number of network calls?"""

from .candidates import GRIDS, Candidate, pool

__all__ = [
    "GRIDS",
    "Candidate",
    "pool",
]
