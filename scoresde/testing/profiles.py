"""Hypothesis profiles: quick while writing, ci for every change, fresh and nightly for the search.

quick and ci draw the same cases every time, so that a red run can be repeated; fresh (as many as ci) and
nightly draw new ones, or those of `--hypothesis-seed`, and print the blob that repeats a failure.
"""

from __future__ import annotations

import os

import hypothesis

EXAMPLES = {"quick": 5, "ci": 30, "fresh": 30, "nightly": 2000}
REPEATABLE = ("quick", "ci")
VARIABLE = "HYPOTHESIS_PROFILE"


def register() -> None:
    """Register the profiles with hypothesis, under their names."""
    for name, examples in EXAMPLES.items():
        repeatable: dict = {"derandomize": True, "database": None} if name in REPEATABLE else {}
        hypothesis.settings.register_profile(
            name,
            hypothesis.settings.get_profile("default"),  # not whatever is loaded now
            max_examples=examples,
            deadline=None,
            print_blob=True,
            # it measures the machine, not the code: on a loaded one it would be a false alarm
            suppress_health_check=[hypothesis.HealthCheck.too_slow],
            **repeatable,
        )


def load(name: str | None = None) -> None:
    """Register them and load one: `name`, or what the environment variable HYPOTHESIS_PROFILE says, or ci.

    Raises ValueError for another name.
    """
    chosen = name or os.environ.get(VARIABLE, "ci")
    if chosen not in EXAMPLES:
        raise ValueError(f"expected a profile of {sorted(EXAMPLES)}, found {chosen!r}; see {VARIABLE}")
    register()
    hypothesis.settings.load_profile(chosen)
