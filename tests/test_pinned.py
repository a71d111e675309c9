"""Every table solver gives what it gave when the other tests here had confirmed it: its card, its calls, and
samples on three processes to nine digits, in pinned_solvers.json. A change of any of them is meant, or wrong.

`python -m tests.test_pinned` in the folder above writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scoresde import grids, solvers
from scoresde.noise import Noise
from scoresde.sde import EDM, VPSDE, LinearSDE, Rectified
from scoresde.solvers.base import TableSolver
from scoresde.solvers.reversible import Reversible

if __name__ == "__main__":
    from tests.protocol import Wavy, regular, table_solvers
else:
    from protocol import Wavy, regular, table_solvers

pytestmark = pytest.mark.usefixtures("unchecked")

FILE = Path(__file__).parent / "pinned_solvers.json"
VP = VPSDE()
MORE: list[TableSolver | Reversible] = [
    *(solvers.sde_dpmpp(p, 0.4, single) for p in (1, 2) for single in (False, True)),
    solvers.sde_dpmpp(3, 0.0),
    solvers.dpm(2, rule="bh2"),
    *(solvers.dpm_fast(stored) for stored in ("noise", "data")),
    solvers.unipc(2, stored="noise"),
    solvers.sa(2, 3, 0.7, "flow"),
    solvers.sa(),
    solvers.er_sde(2),
    *(solvers.exponential(p, corrector=c) for p, c in ((2, 1), (3, 2), (1, 3))),
    solvers.exponential(2, rule="bh1", tau=0.6),
    solvers.exponential(3, stored="velocity", tau=0.6, variable="t"),
    solvers.edm(2.0, 0.3, 4.0, 1.1),
    solvers.restart(((0.2, 0.5, 2, 1), (1.0, 3.0, 1, 2))),
    *(solvers.reversible(p) for p in (1, 2)),
    solvers.reversible(2, 0.7),
    *(make(rule="score_sde") for make in (solvers.ddpm, solvers.euler_maruyama, solvers.reverse_diffusion)),
]
SOLVERS = {repr(solver): solver for solver in [*table_solvers().values(), *MORE]}


def cases(solver: TableSolver | Reversible) -> dict[str, tuple[LinearSDE, Any]]:
    """Processes and grids: in the middle, to sigma = 0, from alpha = 0."""
    if dict(getattr(solver, "options", ())).get("rule") == "score_sde":
        return {"historical": (VP, torch.linspace(1, 0.01, 25, dtype=torch.float64))}
    return {
        "vp": (VP, regular(VP, 6)),
        "edm to 0": (EDM(), grids.karras(EDM(), 6, 0.0)),
        "rectified from 1": (Rectified(), grids.uniform(Rectified(), 5, 0.01)),
    }


def found(solver: TableSolver | Reversible) -> dict[str, Any]:
    card, noise = solver.card, Noise.of(1, batch=2, dtype=torch.float64)
    pinned: dict[str, Any] = {
        "card": [card.order, card.weak_order, card.calls_per_step, card.stochastic, card.reference,
                 sorted(card.properties), card.final, card.memory],
        "steps for 60 calls": solver.steps_for(60),
    }  # fmt: skip
    for key, (sde, grid) in cases(solver).items():
        x = noise.prior((2, 2)) * float(sde.prior_std)
        try:
            samples = solver.solve(Wavy(sde), x, grid, noise=noise)
        except ValueError:
            pinned[key] = "refused"
            continue
        pinned[key] = [samples.network_calls, *(float(f"{v:.9g}") for v in samples.x.flatten().tolist())]
    return pinned


@pytest.fixture(scope="module")
def pinned() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def test_pinned_solvers_are_all(pinned: dict[str, Any]) -> None:
    assert list(pinned) == list(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_pinned(name: str, pinned: dict[str, Any]) -> None:
    values, expected = found(SOLVERS[name]), pinned[name]
    assert set(values) == set(expected)
    for key, value in values.items():
        numbers = key not in ("card", "steps for 60 calls") and value != "refused"
        assert value == (pytest.approx(expected[key], rel=1e-8, abs=1e-9) if numbers else expected[key]), key


if __name__ == "__main__":
    rows = (f"{json.dumps(name)}: {json.dumps(found(solver))}" for name, solver in SOLVERS.items())
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
