"""Every fault that was found in other libraries, as a test that this one does not have it.

The names carry the row of the fault catalogue: A the ends of the schedule, B batch and randomness, C state
and threads, D solvers that do not end, E wrong inputs, F checkpoints and training, G and H the rest.
"""

from __future__ import annotations

import math
import time

import torch

from benchmarks import bad_inputs
from benchmarks.bad_inputs import Case, judge
from scoresde import VPSDE

# ---- wrong inputs, by the hundred


def test_bad_inputs_end_in_an_error_that_says_what_was_expected(unchecked):
    outcomes = [judge(case) for case in bad_inputs.cases()]
    assert len(outcomes) >= 400
    unclear = [outcome for outcome in outcomes if outcome.kind != "clear"]
    assert not unclear


def test_what_is_silent_obscure_or_endless_is_not_called_clear(monkeypatch):
    monkeypatch.setattr(bad_inputs, "LIMIT", 0.05)

    def late(x):
        for _ in range(2):
            bad_inputs.Linear()(x, x)
        return VPSDE().alpha(-1.0)

    planted = {
        "silent": lambda: VPSDE().alpha(0.5),
        "hang": lambda: time.sleep(1),
        "clear": lambda: VPSDE().alpha(-1.0),
    }
    assert {judge(Case(kind, call)).kind for kind, call in planted.items()} == set(planted)
    for call in (
        lambda: torch.zeros(2) @ torch.zeros(3),  # torch's own error
        lambda: math.sqrt(-1),  # a ValueError, but not ours
        lambda: VPSDE().alpha,  # fine, and then
        lambda: late(torch.zeros(1)),  # clear, after two network calls
    ):
        assert judge(Case("planted", call)).kind in ("obscure", "silent")
