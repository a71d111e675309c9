"""Hostile networks against every solver, by enumeration: each run ends at once, with a clear error or a
status for every row, and within its limit of calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoresde import grids, solvers
from scoresde.denoiser import Denoiser
from scoresde.noise import Noise
from scoresde.sde import VPSDE
from scoresde.solvers.base import Samples

pytestmark = pytest.mark.usefixtures("unchecked")

VP = VPSDE()
STEPS, LIMIT = 4, 300
NOT_FINITE = "network returned NaN or Inf"
STATUS = {"ok", "call limit reached", "step underflow", NOT_FINITE}
SOLVERS = solvers.examples()
every_solver = pytest.mark.parametrize("name", SOLVERS)


class Hostile(nn.Module):
    """`answer(x, k)` for the k-th call, k = 1, 2, ..."""

    def __init__(self, answer: Callable[[Tensor, int], Any]) -> None:
        super().__init__()
        self.answer, self.calls = answer, 0

    def forward(self, x: Tensor, time: Tensor) -> Any:
        self.calls += 1
        return self.answer(x, self.calls)


def limited(solver: Any) -> Any:
    """The solver, with another call limit if it has one."""
    if hasattr(solver, "control"):
        return replace(solver, control=replace(solver.control, max_calls=LIMIT))
    return replace(solver, max_calls=LIMIT) if hasattr(solver, "max_calls") else solver


def run(name: str, answer: Callable[[Tensor, int], Any]) -> tuple[Hostile, Callable[[], Samples]]:
    """The network and what runs the solver on it."""
    solver, network = limited(SOLVERS[name]), Hostile(answer)
    model, noise = Denoiser(network, VP, "data"), Noise.of(0, batch=3)
    return network, lambda: solver.solve(model, noise.prior((3, 2)), grids.karras(VP, STEPS), noise=noise)


def most_calls(name: str) -> int:
    """What a run may cost."""
    solver = SOLVERS[name]
    return solver.calls(STEPS) if hasattr(solver, "calls") else LIMIT


def bad_from(x: Tensor, k: int, first: int, value: float) -> Tensor:
    """One bad number in the second sample, from the call `first` on."""
    out = 0.3 * x
    if k >= first:
        out[1, 0] = value
    return out


@every_solver
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_end_the_run_at_once(name: str, first: int, value: float) -> None:
    """In the same call if it is an error; a solver with a status lets the sample go and finishes others."""
    network, go = run(name, lambda x, k: bad_from(x, k, first, value) if len(x) == 3 else 0.3 * x)
    try:
        found = go()
    except FloatingPointError as error:
        assert "NaN or Inf" in str(error) and "t = " in str(error)
        assert network.calls == first
    else:
        status = [found.status] * 3 if isinstance(found.status, str) else found.status
        assert status[1] == NOT_FINITE and set(status) <= {"ok", NOT_FINITE}
        assert bool(found.x[1].isfinite().all()) and found.network_calls == network.calls <= LIMIT


@every_solver
def test_what_is_always_nan_makes_one_call(name: str) -> None:
    network, go = run(name, lambda x, k: torch.full_like(x, math.nan))
    try:
        found = go()
    except FloatingPointError as error:
        assert "NaN or Inf" in str(error)
    else:
        assert found.status == NOT_FINITE and bool(found.x.isfinite().all())
    assert network.calls == 1


class BrokenError(Exception):
    pass


def broken(x: Tensor, k: int) -> Tensor:
    raise BrokenError("the network broke")


WRONG: dict[str, tuple[Callable[[Tensor, int], Any], type[Exception], str]] = {
    "a row too few": (lambda x, k: x[1:], ValueError, r"\(3, 2\), found \(2, 2\)"),
    "one column": (lambda x, k: x[:, :1], ValueError, r"\(3, 2\), found \(3, 1\)"),
    "an axis more": (lambda x, k: x[None], ValueError, r"\(3, 2\), found \(1, 3, 2\)"),
    "a number": (lambda x, k: x.mean(), ValueError, r"\(3, 2\), found \(\)"),
    "nothing": (lambda x, k: None, ValueError, r"\(3, 2\), found NoneType"),
    "a pair": (lambda x, k: (x, x), ValueError, r"\(3, 2\), found tuple"),
    "an exception": (broken, BrokenError, "the network broke"),
}


@every_solver
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_shapes_and_exceptions_are_seen_in_the_first_call(name: str, kind: str) -> None:
    answer, error, message = WRONG[kind]
    network, go = run(name, answer)
    with pytest.raises(error, match=message):
        go()
    assert network.calls == 1


@every_solver
def test_other_dtypes_are_cast(name: str) -> None:
    """float64 from a float32 network, bfloat16, and whole numbers: the state keeps its own."""
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        network, go = run(name, lambda x, k, dtype=dtype: (2 * x).clamp(-3, 3).to(dtype))
        found = go()
        assert found.x.dtype == torch.float32 and bool(found.x.isfinite().all())
        assert 0 < network.calls <= most_calls(name)
        assert {found.status} <= STATUS or set(found.status) <= STATUS


@every_solver
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_noise_for_an_answer_ends(name: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    network, go = run(name, lambda x, k: scale * torch.randn(x.shape, generator=generator))
    try:
        found = go()
    except FloatingPointError:
        pass
    else:
        assert bool(found.x.isfinite().all()) or NOT_FINITE in found.status
        assert {found.status} <= STATUS or set(found.status) <= STATUS
    assert network.calls <= most_calls(name)
