"""`sample`: reproducible whatever the batch, its order, the process, the thread or the dtype; clear errors;
nothing left behind.
"""

from __future__ import annotations

import cmath
import inspect
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import pytest
import torch
from torch import Tensor, nn

import scoresde
from scoresde import grids, networks, sampling, solvers
from scoresde.denoiser import BaseDenoiser, Denoiser
from scoresde.grids import Grid
from scoresde.laws import Gaussian
from scoresde.networks import UNet
from scoresde.noise import Noise
from scoresde.sampling import decode, default_grid, encode, make_grid, sample, slerp
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE, like
from scoresde.solvers.base import Samples, TableSolver, execute
from scoresde.tableau import Step

VP = VPSDE()
TABLES = protocol.table_solvers()
SOME = {
    repr(s): s
    for s in (solvers.ddpm(), solvers.dpmpp(3), solvers.unipc(2), solvers.sa(), solvers.heun(), solvers.edm())
}


class Normal(BaseDenoiser):
    """E[x_0 | x_t] of N(0.3, 0.4) in every coordinate, element by element; counts its calls."""

    def __init__(self, sde: LinearSDE = VP) -> None:
        super().__init__()
        self.sde, self.calls = sde, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return 0.3 + like(alpha * 0.4 / (alpha**2 * 0.4 + sigma**2), x) * (x - like(alpha * 0.3, x))


class Returns(BaseDenoiser):
    """Whatever a function makes of (x, k-th call)."""

    def __init__(self, make, sde: LinearSDE = VP) -> None:
        super().__init__()
        self.sde, self.make, self.calls = sde, make, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.make(x, self.calls)


class Pixelwise(nn.Module):
    """A small network with weights, that looks at one element at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        assert x.dtype == self.gain.dtype and time.dtype in (torch.float32, torch.float64)
        return self.gain * x.tanh() + sum(cond.values(), torch.zeros_like(x))


def unet(dropout: float = 0.0) -> UNet:
    torch.manual_seed(0)
    net = UNet(1, base=8, multipliers=(1, 2), blocks=1, heads=1, dropout=dropout)
    for parameter in net.parameters():  # the last layers of a new network are zero
        nn.init.normal_(parameter, std=0.1)
    return net


# Sample i of seed s


@pytest.mark.parametrize("name", TABLES)
def test_a_sample_is_a_function_of_seed_and_id(name: str) -> None:
    """Bit for bit in batches of 1, 7 and 64 and in any order, for an element-wise denoiser."""
    draw = partial(sample, Normal(), solver=TABLES[name], steps=3, seed=11)
    whole = draw(shape=(64, 3)).x
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(shape=(64, 3), ids=order).x, whole[order])
    assert torch.equal(draw(shape=(7, 3), ids=range(20, 27)).x, whole[20:27])
    assert torch.equal(draw(shape=(1, 3), ids=[5]).x, whole[5:6])
    assert torch.equal(draw(shape=(7, 3)).x, whole[:7])
    assert draw(shape=(0, 3)).x.shape == (0, 3)
    assert not torch.equal(draw(shape=(7, 3), seed=12).x, whole[:7])
    assert (whole.unique(dim=0).shape[0]) == 64


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_sampling as t
first, last = int(sys.argv[1]), int(sys.argv[2])
out = t.two_models(range(first, last))
torch.save(out, sys.argv[3])
"""


def two_models(ids: range) -> dict[str, Tensor]:
    """Samples of an element-wise model and of a small U-Net."""
    shape = (len(ids), 1, 8, 8)
    return {
        "elementwise": sample(Normal(), shape, solvers.ddpm(), steps=6, seed=3, ids=ids).x,
        "unet": sample(
            Denoiser(unet(), VP, "velocity"), shape, solvers.sde_dpmpp(2), steps=6, seed=3, ids=ids
        ).x,
    }


def test_split_over_processes(tmp_path: Path) -> None:
    whole = two_models(range(64))
    root = str(Path(scoresde.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    running = []
    for first, last in ((0, 25), (25, 64)):
        out = tmp_path / f"{first}.pt"
        command = [
            sys.executable,
            "-c",
            SCRIPT.format(tests=str(Path(__file__).parent)),
            str(first),
            str(last),
            str(out),
        ]
        running.append((subprocess.Popen(command, env=environment), first, last, out))
    for process, first, last, out in running:
        assert process.wait(timeout=120) == 0
        part = torch.load(out, weights_only=True)
        assert torch.equal(part["elementwise"], whole["elementwise"][first:last])
        torch.testing.assert_close(part["unet"], whole["unet"][first:last], rtol=1e-5, atol=1e-5)


def test_batches_of_a_network() -> None:
    """To 1e-5: kernels of torch round differently for different batch sizes."""
    model = Denoiser(unet(), VP, "velocity")
    whole = sample(model, (64, 1, 8, 8), solvers.ddpm(), steps=5).x
    order = torch.arange(63, -1, -1)
    for ids in (torch.arange(1), torch.arange(30, 37), order):
        part = sample(model, (len(ids), 1, 8, 8), solvers.ddpm(), steps=5, ids=ids).x
        torch.testing.assert_close(part, whole[ids], rtol=1e-5, atol=1e-5)


def test_global_randomness_is_neither_used_nor_moved() -> None:
    for name, solver in SOME.items():
        torch.manual_seed(1)
        np.random.seed(1)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        first = sample(Normal(), (3, 2), solver, steps=4).x
        assert (
            torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
        ), name
        torch.manual_seed(2)
        sample(Normal(), (5, 2), solvers.ddpm(), steps=7, seed=9)
        assert torch.equal(sample(Normal(), (3, 2), solver, steps=4).x, first), name


def test_threads_share_a_solver() -> None:
    """Eight threads, one solver object, one model: as one after the other."""
    for solver in (solvers.sa(), solvers.heun()):
        model = Normal()
        alone = [sample(model, (4, 2), solver, steps=6, seed=s).x for s in range(8)]
        found: dict[int, list[Tensor]] = {}

        def work(s: int, solver=solver, model=model, found=found) -> None:
            found[s] = [sample(model, (4, 2), solver, steps=6, seed=s).x for _ in range(3)]

        threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(x, alone[s]) for s in range(8) for x in found[s])


def test_solvers_hold_no_state_of_a_run() -> None:
    """A second run, and one after a run that broke off, are like the first."""

    def breaks(step: Step) -> None:
        if step.k == 2:
            raise KeyboardInterrupt

    for solver in (solvers.dpmpp(3), solvers.unipc(3), solvers.adams(4), solvers.sa()):
        first = sample(Normal(), (2, 2), solver, steps=6).x
        with pytest.raises(KeyboardInterrupt):
            sample(Normal(), (2, 2), solver, steps=6, callback=breaks)
        sample(Normal(EDM()), (3, 1), solver, steps=4, end=0.0)
        assert torch.equal(sample(Normal(), (2, 2), solver, steps=6).x, first)


# Device and dtype


def test_device_and_dtype(device: torch.device, dtype: torch.dtype) -> None:
    model = Denoiser(Pixelwise(), VP, "data").to(device, dtype)
    found = sample(model, (3, 2), solvers.ddpm(), steps=4)
    assert found.x.device.type == device.type and found.x.dtype == torch.promote_types(dtype, torch.float32)
    for wanted in (torch.float32, torch.float64):
        assert sample(model, (3, 2), solvers.sa(), steps=4, dtype=wanted).x.dtype == wanted
    cpu = sample(model.cpu(), (3, 2), solvers.ddpm(), steps=4).x
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.x.cpu(), cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("predicts", ["data", "noise", "velocity", "flow"])
@pytest.mark.parametrize(
    ("network", "state"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_dtype_of_the_network(predicts: str, network: torch.dtype, state: torch.dtype) -> None:
    """The state follows the network, but never below float32; results agree to the network's own rounding."""
    model = Denoiser(Pixelwise(), VP, predicts)
    exact = sample(model.double(), (5, 2), solvers.dpmpp(2), steps=5, seed=4)
    found = sample(model.to(network), (5, 2), solvers.dpmpp(2), steps=5, seed=4)
    assert exact.x.dtype == torch.float64 and found.x.dtype == state
    gap = (found.x.double() - exact.x).abs().max() / exact.x.abs().max()
    assert gap <= {torch.float64: 0, torch.float32: 1e-5, torch.bfloat16: 0.1}[network]


@pytest.mark.parametrize("wrong", [torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_states_are_float32_or_float64(wrong: torch.dtype) -> None:
    model = Normal()
    with pytest.raises(TypeError, match=f"float32 or float64, found {wrong}"):
        sample(model, (1, 2), solvers.ddim(), dtype=wrong)
    assert model.calls == 0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SOME else pytest.mark.slow) for n in TABLES]
)
def test_float32_keeps_up_over_1000_steps(name: str, unchecked) -> None:
    """Same normals, same coefficients: float32 stays within 2e-6 of float64 (root mean square, relative).

    A row rounds the state once, to about 2^-24 / 3^(1/2) of it, and roundings add up like a random walk:
    about 1e-6 after a thousand rows; singlestep solvers have up to three, annealed Langevin five a step.
    """
    solver = TABLES[name]
    grid, model = grids.quadratic(VP, 1000), Normal()
    table = solver.tableau(VP, grid)
    results = []
    for dtype in (torch.float64, torch.float32):
        noise = Noise.of(2, batch=1, dtype=dtype)
        drawn = [noise(row, (1, 256)) for row in range(7)]
        once = execute(
            table, model, noise.prior((1, 256)), noise=lambda k, shape, z=drawn: z[k % 7].roll(k // 7, 1)
        )
        results.append(once.x.double())
    gap = (results[0] - results[1]).square().mean().sqrt() / results[0].square().mean().sqrt()
    assert float(gap) < 2e-6


# Grids, ends, shapes, conditions


@pytest.mark.parametrize("sde", [VP, SubVPSDE(), VESDE(), EDM(), Rectified()], ids=repr)
def test_what_grid_is_used(sde: LinearSDE) -> None:
    model, draw = Normal(sde), partial(sample, shape=(2, 1), solver=solvers.ddim(), steps=5)
    spaced = grids.karras(sde, 5, rho=3.0)
    ways = [
        draw(model, grid=partial(grids.karras, rho=3.0)),
        draw(model, grid=spaced),
        draw(model, grid=spaced.t),
        draw(model, grid=spaced, end=sde.default_end),
        draw(model, grid=spaced, steps=77),
        draw(model, grid=lambda sde, steps, end: grids.karras(sde, steps, end, rho=3.0)),
    ]
    assert all(torch.equal(ways[0].x, way.x) for way in ways)
    assert all(way.end == sde.default_end and way.network_calls == 5 for way in ways)
    default = draw(model)
    expected = grids.karras if sde.prior_std > 1 else grids.quadratic
    assert torch.equal(draw(model, grid=expected).x, default.x)
    assert torch.equal(default_grid(sde, 9).t, expected(sde, 9).t)
    assert torch.equal(make_grid(sde, None, 6, None).t, expected(sde, 6).t)
    to_zero = sde.alpha(0.0) * 0 + sde.sigma(0.0) == 0
    if to_zero:
        last = draw(model, end=0.0)
        assert last.end == 0 and torch.equal(draw(model, grid=expected(sde, 5, 0.0)).x, last.x)


@pytest.mark.parametrize("sde", [EDM(0.002, 1.0), VESDE(0.01, 1.0)], ids=repr)
def test_the_default_grid_does_not_follow_from_the_largest_noise(sde: LinearSDE) -> None:
    """A largest noise level of 1 is not that of a process which gives up its signal for it."""
    assert torch.equal(default_grid(sde, 9).t, grids.karras(sde, 9).t)


def test_the_prior_and_the_end() -> None:
    """The state starts as prior_std times the noise's own prior, and finishes with the denoised data at
    end=0.
    """
    seen: list[Step] = []
    for sde in (VP, EDM(), VESDE()):
        seen.clear()
        drawn = sample(
            Normal(sde),
            (3, 2),
            solvers.dpmpp(2),
            steps=4,
            end=0.0 if sde is not VESDE() else None,
            seed=5,
            callback=seen.append,
        )
        start = Noise.of(5, batch=3).prior((3, 2)) * sde.prior_std
        assert torch.equal(seen[0].x, start) and seen[0].t == sde.t_max
        if float(sde.sigma(0.0)) == 0:
            assert torch.allclose(drawn.x, seen[-1].denoised, atol=1e-6) and drawn.end == 0
    assert isinstance(drawn, Samples) and drawn.seed == 5 and drawn.status == "ok" and drawn.seconds > 0


def test_conflicts_and_mistakes_are_named_before_the_first_call() -> None:
    model = Normal()
    draw = partial(sample, model, (2, 3), solvers.ddpm())
    grid = grids.uniform(VP, 5)
    cases = [
        (
            partial(draw, grid=grid, end=0.0),
            ValueError,
            r"ends at end=0.0, found one that ends at 0\.001; give one of the two",
        ),
        (partial(draw, grid=grid.t, end=0.5), ValueError, "give one of the two"),
        (partial(draw, end=2.0), ValueError, "expected an end in"),
        (partial(draw, end=math.nan), ValueError, "expected an end in"),
        (partial(draw, steps=0), ValueError, "whole number of steps"),
        (partial(draw, steps=-1), ValueError, "whole number of steps"),
        (partial(draw, grid=torch.tensor([1.0, 0.5, 0.5])), ValueError, "strictly decreasing"),
        (partial(draw, grid=grids.uniform(Rectified(), 5, 0.1)), ValueError, "grid made for"),
        (partial(draw, ids=[1]), ValueError, "expected 2 ids for batch=2, found 1"),
        (partial(draw, ids=[1, 2, 3]), ValueError, "expected 2 ids"),
        (partial(draw, ids=torch.zeros(2)), TypeError, "int64 sample ids"),
        (partial(draw, seed=2**64), ValueError, "seed"),
        (partial(sample, model, (3,), solvers.ddpm()), ValueError, r"shape \(batch, \.\.\.\)"),
        (partial(sample, model, (), solvers.ddpm()), ValueError, r"shape \(batch, \.\.\.\)"),
        (partial(sample, model, (2, -1), solvers.ddpm()), ValueError, "whole numbers"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    assert model.calls == 0


@pytest.mark.parametrize("shape", [(2, 2.5), (2, True), (True, 2), (2, "3")])
def test_sizes_are_whole_numbers(shape, unchecked) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        sample(Normal(), shape, solvers.ddpm())


@pytest.mark.parametrize("steps", [2.5, True, "3"])
def test_steps_are_whole_numbers(steps, unchecked) -> None:
    with pytest.raises(ValueError, match="whole number of steps"):
        sample(Normal(), (2, 2), solvers.ddpm(), steps=steps)


@pytest.mark.parametrize("turn", [sample, encode, decode])
def test_what_does_not_fit_is_named(turn, unchecked) -> None:
    state: Any = (2, 3) if turn is sample else torch.zeros(2, 3)
    fits = {"model": Normal(), "solver": solvers.ddim(), "grid": None, "condition": None, "callback": None}
    cases = [
        ("model", nn.Linear(1, 1), "expected a denoiser as model, such as"),
        ("solver", "ddim", "expected a solver object such as"),
        ("solver", solvers.ddim, "expected a solver object such as"),
        ("solver", TableSolver, "expected a solver object such as"),
        ("condition", ["shift"], "expected a mapping from names to values as condition, found"),
        ("callback", 3, "expected a function of a Step as callback, found 3"),
        ("grid", "karras", "expected a function such as grids.karras, a Grid, or .* found 'karras'"),
    ]
    for name, wrong, words in cases:
        given = {**fits, name: wrong}
        with pytest.raises(TypeError, match=words):
            turn(given.pop("model"), state, given.pop("solver"), **given)
    if turn is sample:
        for wrong in ("gpu7", 2.5, [1]):
            with pytest.raises(ValueError, match="expected a device such as 'cpu' or 'cuda:0', found"):
                sample(Normal(), state, solvers.ddim(), device=wrong)
        with pytest.raises(ValueError, match=r"expected a shape .*, found 3"):
            sample(Normal(), 3, solvers.ddim())
        return
    for wrong, kind, words in (
        ([[1.0]], TypeError, "expected a tensor of shape"),
        (torch.zeros(2, 3).int(), TypeError, "expected a floating state"),
        (torch.zeros(3), ValueError, r"expected a state of shape \(batch, \.\.\.\), found \(3,\)"),
    ):
        with pytest.raises(kind, match=words):
            turn(Normal(), wrong, solvers.ddim())
    assert turn(Normal(), state, solvers.ddim()).network_calls == 20


def test_a_start_far_from_the_prior_is_told() -> None:
    """KL(N(alpha, sigma^2) || N(0, prior_std^2)) above 1e-3, x_0 = 1."""

    def gap(sde: LinearSDE, t: float) -> float:
        signal, noise = float(sde.alpha(t) / sde.prior_std) ** 2, float(sde.sigma(t) / sde.prior_std) ** 2
        return 0.5 * (signal + noise - 1 - math.log(noise))

    def start(sde: LinearSDE, level: float) -> float:
        low, high = 1e-3 * sde.t_max, sde.t_max
        for _ in range(60):
            low, high = (
                ((low + high) / 2, high) if gap(sde, (low + high) / 2) > level else (low, (low + high) / 2)
            )
        return low

    for sde in (VP, EDM()):
        for level, warns in ((1.5e-3, True), (0.9e-3, False)):
            t = start(sde, level)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                sample(Normal(sde), (1, 1), solvers.ddim(), grid=torch.tensor([t, 0.5 * t]).double())
            assert len(told) == warns
            if warns:
                words = f"starts at t = {t:g} .* alpha = {float(sde.alpha(t)):.3g}, .* of 0.0015 nats"
                assert re.search(words, str(told[0].message)) and told[0].category is UserWarning
    grid = torch.tensor([1e-200, 1e-201], dtype=torch.float64)
    with pytest.warns(UserWarning, match="inf nats"):
        sample(Normal(SubVPSDE()), (1, 1), solvers.ddim(), grid=grid)


def test_the_warning_is_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wrappers that check annotations here."""
    monkeypatch.setattr(sampling, "_check_prior", inspect.unwrap(sampling._check_prior))
    grid = torch.tensor([0.5, 0.1], dtype=torch.float64)
    with pytest.warns(UserWarning, match="starts at t = 0.5") as told:
        inspect.unwrap(sample)(Normal(VP), (1, 1), solvers.ddim(), grid=grid)
    assert told[0].filename == __file__


def test_condition_is_passed_on() -> None:
    model = Denoiser(Pixelwise(), VP, "data")
    shift = torch.full((2, 3), 0.25)
    plain = sample(model, (2, 3), solvers.ddim(), steps=3, end=0.0)
    moved = sample(model, (2, 3), solvers.ddim(), steps=3, end=0.0, condition={"shift": shift})
    assert not torch.allclose(plain.x, moved.x)
    given = sample(model.given(shift=shift), (2, 3), solvers.ddim(), steps=3, end=0.0)
    assert torch.equal(given.x, moved.x)
    with pytest.raises(TypeError, match="shift"):
        sample(Normal(), (2, 3), solvers.ddim(), condition={"shift": shift})


# What a run reports


@pytest.mark.parametrize("name", TABLES)
def test_calls_are_counted(name: str) -> None:
    solver = TABLES[name]
    for end in (None, 0.0):
        model = Normal()
        found = sample(model, (2, 2), solver, steps=4, end=end, grid=grids.karras)
        assert found.network_calls == model.calls <= solver.calls(4)
        assert found.x.isfinite().all() and found.status == "ok" and found.seed == 0


def test_callback_and_path() -> None:
    model, grid = Normal(), grids.quadratic(VP, 5)
    steps: list[Step] = []

    def watch(step: Step) -> Tensor | None:
        steps.append(step)
        return None if step.k == 1 else step.x.clone()

    for solver in (solvers.dpmpp(2), solvers.heun(), solvers.ddpm()):
        steps.clear()
        found = sample(model, (3, 2), solver, grid=grid, callback=watch)
        table = solver.tableau(VP, grid)
        assert [s.k for s in steps] == list(range(len(table))) and [s.t for s in steps] == table.times[
            :-1
        ].tolist()
        assert len(found.path) == len(table) - 1 and torch.equal(found.path[1], steps[2].x)
        for s in steps:
            torch.testing.assert_close(s.denoised, model(s.x, torch.tensor(s.t, dtype=torch.float64)))
        assert torch.equal(sample(model, (3, 2), solver, grid=grid).x, found.x)
        assert sample(model, (3, 2), solver, grid=grid).path == ()


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_callbacks_see_the_denoised_state_of_networks(predicts: str) -> None:
    model, seen = Denoiser(Pixelwise(), VP, predicts), []
    sample(model, (2, 2), solvers.ddim(), steps=3, callback=seen.append)
    for step in seen:
        torch.testing.assert_close(step.denoised, model(step.x, step.t), rtol=1e-4, atol=1e-5)


def test_progress_bar(capsys) -> None:
    model = Normal()
    for solver, calls in ((solvers.ddim(), 5), (solvers.heun(), 10)):
        found = sample(model, (2, 2), solver, steps=5, progress=True)
        assert f"/{calls} [" in capsys.readouterr().err
        kept = sample(model, (2, 2), solver, steps=5, progress=True, callback=lambda step: step.k)
        assert kept.path == tuple(range(calls)) and torch.equal(kept.x, found.x)
        assert torch.equal(sample(model, (2, 2), solver, steps=5).x, found.x)
    with pytest.raises(ZeroDivisionError):
        sample(model, (2, 2), solvers.ddim(), steps=5, progress=True, callback=lambda step: 1 / 0)
    assert sample(model, (2, 2), solvers.ddim(), progress=False).network_calls == 20
    assert "step" not in capsys.readouterr().out


def test_what_the_bar_is_told(monkeypatch) -> None:
    """One tick a call, out of the calls to come; the bar does not stay."""
    told: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            told.append(options)
            self.n = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            told.append("gone")

        def update(self, by: int) -> None:
            self.n += by
            told.append(self.n)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    sample(Normal(), (2, 2), solvers.ddim(), steps=3, progress=True)
    assert told == [{"total": 3, "unit": "call", "leave": False}, 1, 2, 3, "gone"]
    told.clear()
    other = next(s for s in protocol.examples().values() if not hasattr(s, "calls"))
    sample(Normal(), (2, 2), other, steps=3, progress=True)
    assert told[0]["total"] is None and told[1:3] == [1, 2]
    told.clear()
    sample(Normal(), (2, 2), solvers.ddim(), steps=3)
    assert told == []


# Failing networks


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_is_named(value: float) -> None:
    """At the call where it happens, not later; one element of one sample is enough."""

    def breaks(x: Tensor, call: int) -> Tensor:
        out = 0.1 * x
        if call == 3:
            out[1, 0] = value
        return out

    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.1], dtype=torch.float64)
    for solver in (solvers.ddpm(), solvers.dpmpp(3), solvers.sa()):
        model = Returns(breaks)
        with pytest.raises(FloatingPointError, match=rf"{solver.name}.*NaN or Inf at call 3 of 4, t = 0\.5;"):
            sample(model, (2, 2), solver, grid=t)
        assert model.calls == 3
    # large numbers are no fault, even if their sum is too large
    big = sample(
        Returns(lambda x, call: torch.full_like(x, 3e38)),
        (2, 2),
        solvers.ddim(),
        grid=t[-2:],
        dtype=torch.float32,
    )
    assert big.x.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:1],
        lambda x: x[:, :1],
        lambda x: x.expand(5, *x.shape),
        lambda x: x.mean(),
        lambda x: x[..., :-1],
        lambda x: x[..., None],
    ],
)
def test_outputs_of_another_shape_do_not_broadcast(make) -> None:
    for solver in (solvers.ddim(), solvers.ddpm(), solvers.dpmpp(2)):
        model = Returns(lambda x, call: make(x))
        with pytest.raises(ValueError, match=r"its input's \(2, 3, 4\), found"):
            sample(model, (2, 3, 4), solver, steps=5)
        assert model.calls == 1


def test_integer_images_are_refused() -> None:
    image = torch.randint(0, 255, (2, 1, 4, 4), dtype=torch.uint8)
    for model in (
        Normal(),
        Denoiser(Pixelwise(), VP, "data"),
        Gaussian(torch.zeros(1, 4, 4), 1.0).denoiser(VP),
    ):
        with pytest.raises(TypeError, match=r"expected a floating state, found torch\.uint8"):
            encode(model, image, solvers.ddim(), steps=3)
        with pytest.raises(TypeError, match="scale integer"):
            solvers.ddim().solve(model, image, grids.uniform(VP, 3))


def test_predicted_noise_without_signal_is_refused() -> None:
    """Zero terminal SNR: data and flow are fine there, predicted noise says nothing of the data."""
    sde = Rectified()
    for predicts in ("data", "velocity", "flow"):
        assert (
            sample(Denoiser(Pixelwise(), sde, predicts), (2, 2), solvers.dpmpp(2), steps=4).x.isfinite().all()
        )
    for solver in (solvers.dpmpp(2), solvers.ddpm()):
        with pytest.raises(ValueError, match="without signal"):
            sample(Denoiser(Pixelwise(), sde, "noise"), (2, 2), solver, steps=4)


# Nothing left behind


def test_dropout_is_off_and_modes_are_restored() -> None:
    model = Denoiser(unet(dropout=0.5), VP, "velocity").train()
    parts = list(model.modules())
    parts[3].eval()
    modes = [part.training for part in parts]
    draw = partial(sample, model, (2, 1, 8, 8), solvers.ddim(), steps=3)
    first = draw().x
    assert [part.training for part in parts] == modes and any(modes) and not all(modes)
    assert torch.equal(draw().x, first)
    inside: list[bool] = []
    draw(callback=lambda step: inside.append(any(part.training for part in parts)))
    assert inside == [False] * 3
    with pytest.raises(ZeroDivisionError):
        draw(callback=lambda step: 1 / 0)
    assert [part.training for part in parts] == modes
    assert torch.equal(sample(model.eval(), (2, 1, 8, 8), solvers.ddim(), steps=3).x, first)
    assert not any(part.training for part in parts)


def test_no_graph_is_kept() -> None:
    model = Denoiser(unet(), VP, "velocity")
    path: list[Tensor] = []
    found = sample(
        model, (1, 1, 8, 8), solvers.heun(), steps=3, callback=lambda step: path.append(step.denoised)
    )
    for value in (found.x, *path):
        assert not value.requires_grad and value.grad_fn is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    with torch.inference_mode():
        assert torch.equal(sample(model, (1, 1, 8, 8), solvers.heun(), steps=3).x, found.x)


# Encoding


def test_encode_and_decode() -> None:
    model, x = Normal(), torch.tensor([[0.2, -0.7], [1.0, 0.3]], dtype=torch.float64)
    calls = {"steps": 60, "grid": grids.log_snr}
    latent = encode(model, x, solvers.dpmpp(3), **calls)
    assert latent.end == 1 and latent.network_calls == 60 and latent.x.dtype == torch.float64
    back = decode(model, latent, solvers.dpmpp(3), **calls)
    assert back.end == 1e-3 and (back.x - x).abs().max() < 2e-3
    assert torch.equal(decode(model, latent.x, solvers.dpmpp(3), **calls).x, back.x)
    exact = solvers.reversible(2)
    again = decode(model, encode(model, x, exact, **calls), exact, **calls)
    assert (again.x - x).abs().max() < 1e-9
    both = encode(model, x, exact, **calls)
    for other in (solvers.dpmpp(3), solvers.adaptive_ode(), solvers.scipy_ode()):  # from the first half
        assert torch.equal(decode(model, both, other, **calls).x, decode(model, both.x, other, **calls).x)
    seen: list[int] = []
    encode(model, x, solvers.ddim(), steps=3, callback=lambda step: seen.append(step.k))
    decode(model, x, solvers.ddim(), steps=3, callback=lambda step: seen.append(step.k))
    assert seen == [0, 1, 2] * 2
    net = Denoiser(Pixelwise(), VP, "data").double()
    shift = torch.full((2, 2), 0.25, dtype=torch.float64)
    backwards = make_grid(VP, grids.log_snr, 3, None).reversed()
    for turn in (encode, decode):
        with pytest.raises(ValueError, match="from noise to data, found a reversed one"):
            turn(model, x, solvers.ddim(), grid=backwards)
        with pytest.raises(TypeError, match=r"float32 or float64, found torch.float16"):
            turn(model, x.half(), solvers.ddim(), steps=3)
        plain, moved = (turn(net, x, solvers.ddim(), steps=3, condition=c) for c in (None, {"shift": shift}))
        assert not torch.allclose(plain.x, moved.x)


@pytest.mark.parametrize(
    "name", [n for n, s in protocol.examples().items() if not isinstance(s, TableSolver)]
)
def test_other_solvers_answer_sample_too(name: str) -> None:
    """Solvers that are no tables: reproducible, batch-independent, counted and finite."""
    solver = protocol.examples()[name]
    if "torchsde" in name or "scipy" in name:
        pytest.skip("couples the samples of a batch by design; tested with its own room")
    model = Normal()
    steps = solver.steps_for(max(40, 2 * solver.card.calls_per_step))
    found = sample(model, (5, 2), solver, steps=min(steps, 8))
    assert found.x.isfinite().all() and found.network_calls == model.calls > 0
    assert torch.equal(sample(Normal(), (2, 2), solver, steps=min(steps, 8), ids=[3, 1]).x, found.x[[3, 1]])


def test_a_function_may_return_times_for_a_grid() -> None:
    def times(sde: LinearSDE, steps: int, end: float | None) -> Tensor:
        return grids.uniform(sde, steps, end).t

    model, x = Normal(), torch.ones(2, 1)
    for turn, given in ((sample, (2, 1)), (encode, x), (decode, x)):
        options = {"solver": solvers.ddim(), "steps": 4}
        found, expected = (turn(model, given, grid=grid, **options) for grid in (times, grids.uniform))
        assert torch.equal(found.x, expected.x)
    with pytest.raises(TypeError, match="expected a Grid or a tensor of decreasing times, found None"):
        sample(model, (2, 1), solvers.ddim(), grid=lambda *options: None)


def test_grid_objects_are_reusable() -> None:
    grid = Grid.of(VP, torch.tensor([1.0, 0.5, 0.2]))
    assert torch.equal(
        sample(Normal(), (1, 1), solvers.ddim(), grid=grid).x,
        sample(Normal(), (1, 1), solvers.ddim(), grid=grid).x,
    )


def test_slerp_runs_along_the_great_circle():
    """Equal angles for equal weights, norms in between, the ends exactly; in the dtype of the latents."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, 40, generator=generator, dtype=torch.float64)
    w = torch.linspace(0, 1, 5, dtype=torch.float64)
    path = slerp(a, b, w)
    assert path.shape == (5, 5, 3, 40)
    assert torch.allclose(path[0], a, rtol=0, atol=1e-12) and torch.allclose(path[-1], b, rtol=0, atol=1e-12)
    unit = slerp(*(z / z.flatten(1).norm(dim=1).view(-1, 1, 1) for z in (a, b)), w).flatten(2)
    assert torch.allclose(unit.norm(dim=2), torch.ones(5, 5).double())
    cosines = (unit[1:] * unit[:-1]).sum(2)
    assert torch.allclose(cosines, cosines[:1].expand(4, 5))
    assert float((slerp(a, b, 0.5).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)).min()) > 0.9
    assert float((0.5 * (a + b)).flatten(1).norm(dim=1).max() / a.flatten(1).norm(dim=1).min()) < 0.9
    assert torch.equal(slerp(a, b, 0.25)[2:3], slerp(a[2:3], b[2:3], 0.25))
    assert slerp(a.float(), b.float(), 0.5).dtype == torch.float32


def test_slerp_of_latents_of_different_norms():
    """Half an angle of 45 degrees: both with the weight sin(22.5)/sin(45)."""
    a, b = torch.tensor([[[3.0, 0.0]], [[1.0, 1.0]]], dtype=torch.float64)
    weight = math.sin(math.pi / 8) / math.sin(math.pi / 4)
    assert torch.allclose(slerp(a, b, 0.5), weight * (a + b), rtol=1e-14)


def test_slerp_without_an_angle():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0, 4.0], [1.0, 1.0], [-1.0, 0.0]])
    expected = torch.tensor([[1.25, 2.5], [0.25, 0.25], [0.5, 0.0]])
    found = slerp(a, b, 0.25)
    assert torch.allclose(found[[0, 2]], expected[[0, 2]]) and bool(found.isfinite().all())
    for wrong in ((a, b[:2], 0.5), (a[0], b[0], 0.5), (a, b, torch.zeros(2, 2))):
        with pytest.raises(ValueError, match="expected"):
            slerp(*wrong)


def test_slerp_of_very_small_angles():
    """The great circle from 1e-6 on; rounding never takes the cosine out of its range."""

    def turned(theta: float) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor([[v.real, v.imag]], dtype=torch.float64) for v in (1 + 0j, cmath.exp(1j * theta))
        )

    a, b = turned(1.5e-6)
    assert abs(float(slerp(a, b, 0.5).norm()) - 1) < 1e-14  # the straight line is 2.8e-13 shorter
    a, b = turned(0.5e-6)
    assert torch.equal(slerp(a, b, 0.25), 0.75 * a + 0.25 * b)
    a = torch.randn(200, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for factor in (3.0, -3.0):
        torch.testing.assert_close(slerp(a, factor * a, 0.25), (0.75 + 0.25 * factor) * a)


def test_encode_slerp_decode():
    """Between two data points of a Gaussian, on the ellipse that its flow makes of the circle."""
    law, sde = Gaussian(torch.zeros(2), torch.tensor([0.04, 1.0])), VP
    model, solver = law.denoiser(sde), solvers.adaptive_ode(1e-8, 1e-8)
    x = torch.tensor([[0.2, 0.0], [0.0, 1.0]], dtype=torch.float64)
    latents = encode(model, x, solver).x
    middle = decode(model, slerp(latents[:1], latents[1:], 0.5), solver).x
    variances = sde.alpha(1e-3) ** 2 * torch.tensor([0.04, 1.0]).double() + sde.sigma(1e-3) ** 2
    spread = (middle.square() / variances).sum()
    ends = (x.square() / variances).sum(1)
    assert float(ends.min()) - 1e-3 < float(spread) < float(ends.max()) + 1e-3


def test_numbers_of_numpy_and_lists_as_conditions(unchecked) -> None:
    torch.manual_seed(0)
    model = Denoiser(networks.MLP(2, classes=3), VPSDE())
    options = {"steps": 2, "condition": {"label": torch.tensor([0, 1, 2])}}
    wanted = sample(model, (3, 2), solvers.ddim(), **options).x
    for label in ([0, 1, 2], np.array([0, 1, 2])):
        found = sample(
            model, (np.int64(3), np.int64(2)), solvers.ddim(), steps=np.int64(2), condition={"label": label}
        )
        assert torch.equal(found.x, wanted)
    with pytest.raises(TypeError, match=r"label: expected a tensor of integers .* found 1; give torch\.full"):
        sample(model, (3, 2), solvers.ddim(), steps=2, condition={"label": 1})
    with pytest.raises(TypeError, match=r"state in float32 or float64, found .float64."):
        sample(model, (3, 2), solvers.ddim(), dtype="float64")


def test_conditions_that_are_no_numbers_reach_the_network_as_they_are() -> None:
    """Prompts, for example, or arrays of objects."""
    seen = []

    class Prompted(BaseDenoiser):
        sde = VPSDE()

        def forward(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
            seen.append(cond)
            return 0.5 * x

    texts, objects, several = ["a cat", "a dog"], np.array([None, "b"], dtype=object), [torch.zeros(2)] * 2
    cond = {"texts": texts, "objects": objects, "several": several, "strength": 0.5}
    sample(Prompted(), (2, 3), solvers.ddim(), steps=1, condition=cond)
    assert all(seen[0][name] is value for name, value in cond.items())
