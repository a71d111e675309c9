"""Property tests for schedules, processes, discretizations, denoisers and solvers: ours, and a user's own.

Checks are plain functions that raise AssertionError with the worst case, the measured number and the bound;
`strategies` draws the cases with hypothesis (`pip install scoresde[testing]`).
"""

from . import failure, profiles, strategies

__all__ = ["failure", "profiles", "strategies"]
