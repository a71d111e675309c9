"""Outputs that are not finite are found and named, on the CPU and on other devices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from protocol import Wavy, regular

from scoresde import VPSDE, solvers
from scoresde.noise import Noise
from scoresde.solvers import base
from scoresde.solvers import watch as module
from scoresde.solvers.watch import Outputs, States, Watch

VP = VPSDE()
GOOD = torch.tensor([-3e38, 0.0, 3e38])  # their sum of squares overflows
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", BAD)
def test_the_first_bad_output(wrong: float, dtype: torch.dtype, device: torch.device) -> None:
    good = GOOD.clamp(-6e4, 6e4).to(device, dtype)
    outputs = Outputs()
    assert outputs.first_bad() is None
    for expected in (None, None, 2, 2, 2):
        out = good.clone()
        if len(outputs.largest) in (2, 4):
            out[1] = wrong
        outputs(out)
        assert outputs.first_bad() == expected
    outputs = Outputs()
    outputs(good[:0])
    assert outputs.first_bad() is None
    outputs(torch.full_like(good, wrong))
    assert outputs.first_bad() == 1


def test_large_outputs_are_finite(device: torch.device) -> None:
    outputs = Outputs()
    outputs(GOOD.to(device))
    assert outputs.first_bad() is None


@pytest.mark.parametrize("place", [0, 2, 3, 6, 7, None])
def test_long_runs_keep_blocks(place: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three here; the number of the first bad one is that of the call."""
    monkeypatch.setattr(module, "BLOCK", 3)
    outputs = Outputs()
    for k in range(8):
        outputs(torch.tensor([math.nan if place is not None and k in (place, 7) else 1.0]))
    assert outputs.first_bad() == place
    assert [len(block) for block in outputs.blocks] == [3, 3] and len(outputs.largest) == 2


def watch_of(where: str) -> Watch:
    """One as on a device that is not read before the end, or on the CPU."""
    watch = Watch("it", torch.zeros(1))
    assert watch.outputs is None
    watch.outputs = Outputs() if where == "elsewhere" else None
    return watch


def test_the_watch_elsewhere_reads_nothing_before_the_end() -> None:
    watch = watch_of("elsewhere")
    good, bad = torch.zeros(2), torch.tensor([0.0, math.inf])
    for k, out in enumerate((good, bad, good, bad)):
        watch(out, k / 10)
    with pytest.raises(FloatingPointError, match=r"it: .* at call 2, t = 0\.1; check the model"):
        watch.finish()
    assert isinstance(Watch("it", torch.zeros(1, device="meta")).outputs, Outputs)


def test_the_watch_of_the_cpu_raises_at_once() -> None:
    watch = watch_of("cpu")
    watch(torch.zeros(2), 0.5)
    with pytest.raises(FloatingPointError, match=r"it: .* at call 2, t = 0\.25; check the model"):
        watch(torch.tensor([0.0, math.nan]), 0.25)


@pytest.mark.parametrize("where", ["elsewhere", "cpu"])
def test_the_watch_counts(where: str) -> None:
    watch = watch_of(where)
    for k in range(3):
        watch(torch.zeros(2), k / 10)
    assert watch.finish() == 3


class Broken(Wavy):
    """Right until the third call."""

    def __init__(self, wrong: float) -> None:
        super().__init__(VP)
        self.wrong, self.calls = wrong, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out = super().forward(x, t)
        if self.calls == 3:
            out.flatten()[1] = self.wrong
        return out


SOLVERS = [
    solvers.dpmpp(2),
    solvers.ddpm(),
    solvers.reversible(2),
    solvers.predictor_corrector(solvers.ddpm()),
    solvers.annealed_langevin(),
]


@pytest.mark.parametrize("wrong", BAD)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_solvers_name_the_call(solver: Any, wrong: float, device: torch.device) -> None:
    """At once on the CPU, after the last one elsewhere."""
    model, x = Broken(wrong), torch.ones(2, 3, dtype=torch.float64, device=device)
    noise = Noise.of(0, batch=2, device=device, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"NaN or Inf at call 3(, t = | of \d+, t = )0\.\d+"):
        solver.solve(model, x, regular(VP, 4), noise=noise)
    assert (model.calls == 3) == (device.type == "cpu")


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("bad", [*range(7), None])
def test_states_wait_for_each_other(bad: int | None, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at a time here, two such looks in a block; large ones do not wait, and are not copied."""
    if not small:
        monkeypatch.delattr(torch, "stack")
    monkeypatch.setattr(module, "TOGETHER", 3)
    monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(module, "SMALL", 6 if small else 5)
    states = States()
    for k in range(7):
        states(torch.full((2, 3), math.inf if k == bad else -3e38))  # whose squares overflow
        assert len(states.waiting) == ((k + 1) % 3 if small else 0)
    assert states.first_bad() == bad
    assert not states.waiting and [len(block) for block in states.blocks] == ([6] if small else [2, 2, 2])


def test_states_without_numbers_are_finite() -> None:
    states = States()
    assert states.first_bad() is None
    for _ in range(2):
        states(torch.ones(0, 3))
    assert states.first_bad() is None


def test_tables_on_a_device_name_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `execute`, without a device: what it has seen is asked for after the run."""
    seen: list[States] = []

    class Kept(States):
        def __init__(self) -> None:
            super().__init__()
            seen.append(self)

    run = base.run
    monkeypatch.setattr(base, "States", Kept)
    monkeypatch.setattr(base, "check_finite", lambda table, k, x, F: None)
    monkeypatch.setattr(base, "run", lambda *args, before, after: run(*args, before=before, after=seen[-1]))
    with pytest.raises(FloatingPointError, match=r"ddim: .* at call 3 of 4, t = 0\.\d+; check the model"):
        solvers.ddim().solve(Broken(math.nan), torch.ones(2, 3, dtype=torch.float64), regular(VP, 4))
    assert sum(map(len, seen[0].largest)) == 4
