"""`compare`: what it measures against plain computations, its table, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import itertools
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scoresde import (
    EDM,
    VESDE,
    VPSDE,
    Denoiser,
    Rectified,
    SubVPSDE,
    checkpoint,
    digits,
    grids,
    metrics,
    sample,
    schedules,
    solvers,
)
from scoresde.denoiser import BaseDenoiser
from scoresde.laws import Gaussian, Mixture
from scoresde.networks import MLP
from scoresde.noise import Noise
from scoresde.select import GRIDS, Budget, Candidate, Comparison, compare, rank_agreement, references
from scoresde.select.compare import _too_dear
from scoresde.select.comparison import About, LeftOut, Row, by_seconds
from scoresde.select.jobs import Job
from scoresde.select.measures import Label, Laws, Paired, _resamples, rms_distance
from scoresde.select.runs import How, Runner

SDE = VPSDE()
F64 = torch.float64


def ring(modes: int = 8) -> Mixture:
    angle = 2 * math.pi * torch.arange(modes, dtype=F64) / modes
    means = torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(torch.full((modes,), 1 / modes, dtype=F64), means, 0.01)


MODEL = ring().denoiser(SDE)
SOME = {"quadratic": grids.quadratic, "uniform": grids.uniform}
HALFWAY = solvers.ddim().tableau(SDE, grids.uniform(SDE, 5, 0.5))
run = partial(compare, MODEL, shape=(2,), n=64)


class Counting(torch.nn.Module):
    """A network that counts its calls, and may be interrupted at one."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.inner = MLP(2, 8, 1)
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.inner(x, label)


# ---- what is measured


def test_rows_are_distances_to_the_reference(unchecked):
    """Everything of a row from the samples themselves."""
    found = run([solvers.ddim(), solvers.dpmpp(2)], SOME, (5, 10), seed=3)
    assert len(found.rows) == 8
    truth = sample(MODEL, (64, 2), solvers.adaptive_ode(1e-9, 1e-9, max_calls=9999), seed=3).x
    flip = 0.4 * float((truth - truth.mean(0)).square().mean().sqrt())
    assert found.about.flip == pytest.approx(flip, rel=1e-3)
    for row in found.rows:
        solver, grid = {"ddim()": solvers.ddim(), "dpmpp(2)": solvers.dpmpp(2)}[row.solver], SOME[row.grid]
        x = sample(MODEL, (64, 2), solver, steps=row.budget, grid=grid, seed=3).x
        d = ((x - truth) ** 2).mean(1).sqrt()
        near = d[d <= flip]
        assert row.error == pytest.approx(float((near**2).mean().sqrt()), abs=2e-4)
        assert row.flips == pytest.approx(1 - len(near) / 64, abs=1 / 64 + 1e-9)
        assert row.median == pytest.approx(float(d.median()), abs=2e-4)
        assert row.calls == row.budget and row.seconds > 0
        # The state and the outputs that the table keeps: 64 x 2 numbers of 8 bytes each.
        assert row.memory == {"ddim()": 2, "dpmpp(2)": 3}[row.solver] * 64 * 2 * 8
        assert row.low <= row.error <= row.high


def test_the_reference_knows_its_error(unchecked):
    found = run([solvers.dpmpp(2)], SOME, (10,))
    truth = sample(MODEL, (64, 2), solvers.adaptive_ode(1e-9, 1e-9, max_calls=9999)).x
    given = run([solvers.dpmpp(2)], SOME, (10,), reference=truth)
    assert given.about.reference == "given"
    assert 0 < found.about.reference_error < 1e-3
    half = sample(MODEL, (64, 2), references.USUAL.solver, steps=50, grid=references.USUAL.grid).x
    d = rms_distance(half, truth)
    assert d.max() < found.about.flip
    assert given.about.reference_error == pytest.approx(float(d.square().mean().sqrt()))
    assert found.about.reference_error == pytest.approx(given.about.reference_error, rel=0.2)
    for one, other in zip(found.rows, given.rows, strict=True):
        assert one.error == pytest.approx(other.error, abs=found.about.reference_error)
    assert references.planned(None, (5, 50), SDE, 1e-3).calls == 200 + 100
    assert references.planned(None, (5, 24), SDE, 1e-3).calls == 100 + 50
    by_solver = run([solvers.dpmpp(2)], SOME, (10,), reference=solvers.adaptive_ode(1e-8, 1e-8))
    assert by_solver.rows[0].error == pytest.approx(given.rows[0].error, abs=1e-5)
    by_table = run(
        [solvers.dpmpp(2)], SOME, (10,), reference=Candidate(solvers.heun(), grids.quadratic, "squares")
    )
    assert "heun() on squares, 100 calls" in by_table.about.reference
    # A bad reference is found out.
    bad = run([solvers.dpmpp(2)], SOME, (10,), reference=solvers.ddim())
    assert bad.about.reference_error > 10 * found.about.reference_error
    poor = run([solvers.dpmpp(3)], SOME, (60,), reference=solvers.ddim())
    assert "runs are within" in str(poor) and "the reference's own error" in str(poor)


@pytest.mark.parametrize(
    "sde", [VPSDE(), SubVPSDE(), VESDE(), EDM(), Rectified()], ids=lambda sde: type(sde).__name__
)
@pytest.mark.parametrize("end", [None, 0.0])
def test_every_process_has_a_reference(sde, end, unchecked):
    model = Gaussian([0.5, -0.5], 0.25).denoiser(sde)
    found = compare(model, [solvers.dpmpp(2)], SOME, (10,), shape=(2,), n=16, end=end)
    assert len(found.rows) == 2 and found.about.reference_error < 1e-3
    assert min(row.error for row in found.rows) < 0.3


def test_flips_are_left_out_and_count():
    reference = torch.zeros(8, 2, dtype=F64)
    measure = Paired(reference, rms_distance, flip=0.5)
    x = torch.tensor([[0.3, 0.4]] * 6 + [[3.0, 4.0], [0.0, 0.0]], dtype=F64)
    record = {"calls": 5, "seconds": 0.1, "memory": None, **measure(x)}
    (row,) = measure.rows([(Label("s", "g", 5), record)])
    assert row.error == pytest.approx(math.sqrt(6 / 7 * 0.125))
    assert (row.flips, row.median) == (0.125, pytest.approx(math.sqrt(0.125)))
    assert row.score == row.median + 0.125  # more than one in ten
    assert replace(row, flips=0.1).score == row.median
    assert replace(row, flips=None, median=None).score == row.error
    assert row.low < row.error <= row.high + 1e-12
    edge = Paired(reference, rms_distance, flip=float(rms_distance(x, reference)[0]))
    (kept,) = edge.rows([(Label("s", "g", 5), record)])
    assert kept.flips == 0.125  # as far as the threshold is near
    none = Paired(reference, rms_distance, flip=0.01)
    (lost,) = none.rows([(Label("s", "g", 5), {**record, **none(x + 9)})])
    assert lost.error == lost.low == lost.high == math.inf and lost.flips == 1


def test_intervals_cover_the_error(alpha_ledger):
    """The bootstrap's interval of a root mean square of half-normals holds the true one about 19 times in 20;
    that of half the width much less often."""
    from scipy import stats

    n, trials, hits, narrow, width = 400, 200, 0, 0, 0.0
    draws = torch.randn(trials, n, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    measure = Paired(torch.zeros(n, 1, dtype=F64), rms_distance, None)
    cost = {"calls": 5, "seconds": 0.1, "memory": None}
    for x in draws:
        (row,) = measure.rows([(Label("s", "g", 5), {**cost, **measure(x)})])
        assert row.flips is None
        hits += row.low <= 1 <= row.high
        width += (row.high - row.low) / trials
        narrow += row.error - (row.error - row.low) / 2 <= 1 <= row.error + (row.high - row.error) / 2
    alpha_ledger.spend(1e-9, "bootstrap intervals of 95 % hold at least 80 % of the time")
    assert stats.binomtest(hits, trials, 0.9, alternative="less").pvalue > 1e-9
    assert width == pytest.approx(2 * 1.96 / math.sqrt(2 * n), rel=0.05)  # of a normal estimate
    assert stats.binomtest(narrow, trials, 0.9, alternative="less").pvalue < 1e-9


def test_wins_compare_the_same_resamples():
    """A run that is better on every sample always wins, though the intervals overlap; equal ones share."""
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    measure = Paired(torch.zeros_like(x), rms_distance, None)
    cost = {"calls": 5, "seconds": 0.1, "memory": None}
    records = [(Label(f"{c}", "g", 5), {**cost, **measure(c * x)}) for c in (1.0, 0.99, -0.99)]
    rows = {row.solver: row for row in measure.rows(records)}
    assert [rows[name].wins for name in ("1.0", "0.99", "-0.99")] == [0, 1, 1]
    assert rows["1.0"].low < rows["0.99"].high


def test_few_bad_samples_do_not_lose():
    """The median decides, not the root mean square."""
    measure = Paired(torch.zeros(50, 1, dtype=F64), rms_distance, None)
    cost = {"calls": 5, "seconds": 0.1, "memory": None}
    even, tailed = torch.full((50, 1), 0.2, dtype=F64), torch.full((50, 1), 0.1, dtype=F64)
    tailed[:2] = 9.0
    found = measure.rows(
        [(Label(s, "g", 5), {**cost, **measure(x)}) for s, x in (("e", even), ("t", tailed))]
    )
    rows = {row.solver: row for row in found}
    assert rows["t"].error > rows["e"].error and rows["t"].score < rows["e"].score
    assert (rows["t"].wins, rows["e"].wins) == (1, 0)


def test_wins_are_of_the_medians_of_resamples():
    """Against medians of the samples that the resamples draw, one by one."""
    d = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = Paired(torch.zeros(8, 1, dtype=F64), rms_distance, None)._medians(d)
    counts = torch.cat(list(_resamples(8))).long()
    assert found.shape == (3, 1000) and bool((counts.sum(1) == 8).all())
    for i, drawn in enumerate(counts[:50]):
        assert found[:, i].equal(d.repeat_interleave(drawn, dim=1).median(1).values)


def test_a_metric_of_ones_own(unchecked):
    def largest(x: Tensor, reference: Tensor) -> Tensor:
        return (x - reference).abs().flatten(1).amax(1)

    found = run([solvers.ddim()], SOME, (10,), metric=largest)
    usual = run([solvers.ddim()], SOME, (10,))
    assert found.about.measure == "largest to the reference" and found.about.flip is None
    assert all(row.flips is None for row in found.rows)
    assert found.rows[0].error > usual.rows[0].error
    with pytest.raises(ValueError, match=r"distances of shape \(64,\), found \(\)"):
        run([solvers.ddim()], SOME, (10,), metric=lambda x, y: 1.0)


def test_who_wins_is_by_the_score_with_many_flips():
    """The median of the first is better, but it loses two in five samples."""
    measure = Paired(torch.zeros(50, 1), rms_distance, flip=0.5)
    distances = [[1.0] * 20 + [0.1] * 30, [0.2] * 50]
    records = [{"distances": d, "calls": 5, "seconds": 1.0, "memory": None} for d in distances]
    first, second = measure.rows([(Label(s, "g", 5), r) for s, r in zip("ab", records, strict=True)])
    assert first.median < second.median and first.score > second.score
    assert (first.wins, second.wins) == (0, 1)


# ---- distances between laws


def test_distance_to_data():
    data = ring().sample(300, generator=torch.Generator().manual_seed(0))
    listed = [solvers.ddpm(), solvers.ddim()]
    found = run(listed, {"uniform": grids.uniform}, (5, 20), data=data, n=100)
    assert found.about.measure == "energy distance"
    lowest = metrics.floor(metrics.energy_distance, data, 100)
    assert (found.about.floor, found.about.floor_std) == lowest
    assert found.about.resolution == lowest.mean + 2 * lowest.std
    for row in found.rows:
        solver = {"ddpm()": solvers.ddpm(), "ddim()": solvers.ddim()}[row.solver]
        x = sample(MODEL, (100, 2), solver, steps=row.budget, grid=grids.uniform).x
        assert row.error == pytest.approx(metrics.energy_distance(x, data))
        assert row.flips is row.median is row.wins is None
        assert row.low < row.error < row.high
    few = {row.solver: row for row in found.ranking(5)}
    assert few["ddpm()"].low > found.about.resolution  # five steps of it are far off


def test_metrics_for_sets_of_one_size():
    data = ring().sample(64, generator=torch.Generator().manual_seed(0))
    found = run([solvers.ddpm()], SOME, (10,), data=data, metric=metrics.wasserstein)
    lowest = metrics.floor(metrics.wasserstein, data, 32, against=32)
    assert found.about.floor == lowest.mean and found.rows[0].error > 0


def test_the_jackknife_is_exact_for_a_mean(alpha_ledger):
    """For the mean of n numbers in ten equal groups it is Student's interval of the groups' means."""
    from scipy import stats

    x, data = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(9, 1)
    measure = Laws(data, lambda a, b: float(a.mean() - b.mean()))
    (row,) = measure.rows([(Label("s", "g", 5), {"calls": 5, "seconds": 1.0, "memory": None, **measure(x)})])
    groups = x.view(10, 5).mean(1).numpy()
    low, high = stats.t.interval(0.95, 9, groups.mean(), stats.sem(groups))
    assert (row.error, row.low, row.high) == pytest.approx((groups.mean(), low, high), rel=1e-5)


@pytest.mark.parametrize("n", [20, 21, 41, 99])
def test_the_jackknife_has_ten_groups_of_nearly_one_size(n):
    """Whatever n: 21 samples were seven groups of three, 41 eight of five and one of one."""
    sizes: list[tuple[int, int]] = []
    measure = Laws(torch.zeros(n, 1), lambda a, b: float(sizes.append((len(a), len(b))) or 0.0))
    assert len(measure(torch.zeros(n, 1))["without"]) == 10
    assert sizes.pop() == (n, n)
    assert {size for pair in sizes for size in pair} <= {n - n // 10 - 1, n - n // 10}
    assert sum(n - mine for mine, _ in sizes) == n


# ---- what may be compared


def test_all_kinds_of_entries(unchecked):
    table = solvers.dpmpp(2).tableau(SDE, grids.karras(SDE, 7))
    late = replace(table, times=torch.cat([torch.tensor([0.95]), table.times[1:]]), start=SDE.t_max)
    named = {
        "mine": solvers.dpmpp(2),
        "placed": Candidate(solvers.unipc(2), grids.log_snr, "log_snr"),
        "table": table,
        "late": late,
        "adaptive": solvers.adaptive_ode(1e-2, 1e-2),
        "pairs": solvers.reversible(2),
        "two": solvers.heun(),
    }
    found = run(named, {"quadratic": grids.quadratic}, (9, 10))
    rows = {(row.name, row.budget): row for row in found.rows}
    adaptive = sample(MODEL, (64, 2), solvers.adaptive_ode(1e-2, 1e-2)).network_calls
    assert set(rows) == {
        *(
            (name, c)
            for name in ("mine on quadratic", "placed on log_snr", "pairs on quadratic")
            for c in (9, 10)
        ),
        *(("two on quadratic", c) for c in (9, 10)),
        ("table", 7),
        ("late", 7),
        ("adaptive", adaptive),
    }
    assert rows["adaptive", adaptive].calls == adaptive
    assert rows["two on quadratic", 9].calls == 8
    x = sample(MODEL, (64, 2), solvers.dpmpp(2), steps=7, grid=grids.karras).x
    given = run(table, calls=(5,), reference=x)
    assert given.rows[0].error == 0 and given.rows[0].name == table.name
    assert run(Candidate(solvers.ddim(), grids.uniform, "even"), calls=(5,)).rows[0].name == "ddim() on even"


def test_what_does_not_fit_is_named():
    found = run([solvers.dpmpp(3, singlestep=True), solvers.ddim()], SOME, (2, 6))
    assert {(item.solver, item.budget) for item in found.left_out} == {("dpmpp(3, singlestep=True)", 2)}
    assert "expected at least" in found.left_out[0].why
    assert "Left out" in str(found)


class Hole(torch.nn.Module):
    """A network that returns NaN at t = 1/2."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * torch.where(t == 0.5, math.nan, 0.5).to(x)[:, None]


def test_a_failing_run_does_not_end_it():
    model, through = Denoiser(Hole(), SDE, predicts="data"), partial(grids.power, exponent=1.0)
    on = {"even": lambda sde, steps, end: grids.uniform(sde, 2, 0.0), "power": grids.quadratic}
    found = compare(model, [solvers.ddim()], on, (2,), shape=(2,), n=8, end=0.0)
    assert [row.grid for row in found.rows] == ["power"] and through
    assert "failed: " in found.left_out[0].why and "NaN or Inf at call 2 of 2" in found.left_out[0].why


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 1}, ValueError, "n of at least 2"),
        ({"calls": ()}, ValueError, "numbers of network calls"),
        ({"calls": (0,)}, ValueError, "numbers of network calls"),
        ({"calls": 5}, ValueError, "numbers of network calls"),
        ({"solvers": []}, ValueError, "at least one solver"),
        ({"solvers": [solvers.ddim]}, TypeError, "expected solvers, Candidates or Tableaus"),
        ({"solvers": [solvers.ddpm()]}, ValueError, "deterministic solvers, found ddpm"),
        ({"solvers": [solvers.ddim(), solvers.ddim()]}, ValueError, r"found ddim\(\) twice; give a mapping"),
        ({"end": 2.0}, ValueError, "expected an end"),
        (
            {"solvers": solvers.ddim().tableau(SDE, grids.uniform(SDE, 5, 0.5))},
            ValueError,
            "give that as end",
        ),
        ({"reference": torch.zeros(3, 2)}, ValueError, r"reference of shape \(64, 2\)"),
        ({"reference": torch.full((64, 2), math.nan)}, ValueError, "a finite reference"),
        ({"flip": 0.0}, ValueError, "expected flip > 0, found 0.0"),
        ({"flip": math.nan}, ValueError, "expected flip > 0, found nan"),
        ({"reference": solvers.ddim}, TypeError, "as reference"),
        ({"data": torch.zeros(99, 2), "reference": solvers.ddim()}, ValueError, "give one"),
        ({"data": torch.zeros(99, 2), "n": 19}, ValueError, "n of at least 20"),
        ({"budget": Budget(calls=100)}, ValueError, "more than the reference's 150 network calls"),
        ({"batch": 0}, ValueError, "a batch of at least one"),
        ({"shape": 2}, ValueError, "the shape of one sample, such as"),
        ({"shape": (0,)}, ValueError, "the shape of one sample, such as"),
        ({"data": torch.zeros(99, 3)}, ValueError, r"samples of shape \(2,\), found \(3,\)"),
        ({"data": [[0.0, 0.0]] * 99}, TypeError, "a tensor .* as data, found list"),
        ({"budget": "60"}, TypeError, "seconds or Budget.* as budget, found '60'"),
        ({"budget": math.nan}, TypeError, "seconds or Budget.* as budget, found nan"),
        ({"budget": Budget(seconds=math.nan)}, TypeError, "seconds or Budget.* as budget, found Budget"),
        ({"budget": Budget(calls=math.nan)}, TypeError, "seconds or Budget.* as budget, found Budget"),
        ({"reference": solvers.ddpm()}, ValueError, r"a deterministic reference, found ddpm\(\)"),
        ({"reference": solvers.adaptive_sde()}, ValueError, "a deterministic reference"),
        (
            {"reference": Candidate(solvers.ddpm(), grids.uniform, "uniform")},
            ValueError,
            "a deterministic ref",
        ),
        ({"metric": lambda x, y: 0.0}, ValueError, r"distances of shape \(64,\)"),
    ],
)
def test_what_cannot_be_compared(unchecked, options, error, message):
    """Which is said before the model is called."""

    class Untouched(BaseDenoiser):
        sde, device, dtype = SDE, torch.device("cpu"), torch.float32

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise AssertionError("called")

    usual = {"solvers": [solvers.ddim()], "calls": (5,), "shape": (2,), "n": 64}
    with pytest.raises(error, match=message):
        compare(Untouched(), **{**usual, **options})
    with pytest.raises(TypeError, match="expected a denoiser as model"):
        compare(MLP(2, 8, 1), shape=(2,))


# ---- cost


def twice(x: Tensor, reference: Tensor) -> Tensor:
    return 2 * rms_distance(x, reference)


def test_parts_of_a_batch_change_nothing():
    condition = {"label": torch.arange(10) % 3}

    class Shifted(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            assert len(label) == len(x)
            return 0.5 * x + label[:, None]

    model = Denoiser(Shifted(), SDE, predicts="data")
    options = {"shape": (2,), "n": 10, "condition": condition, "dtype": F64}
    whole, parts = (compare(model, [solvers.ddim()], SOME, (5,), **options, batch=b) for b in (None, 4))
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert (one.error, one.calls) == (pytest.approx(other.error), other.calls)
    assert parts.about.calls == 3 * whole.about.calls


def test_budgets_leave_out_the_dearest(unchecked):
    found = run(
        [solvers.ddim(), solvers.dpmpp(2)], SOME, (5, 10, 40), budget=Budget(calls=240 + 4 * 5 + 2 * 10)
    )
    assert found.about.calls == 240 + 4 * 5 + 2 * 10
    assert [row.budget for row in found.rows] == [5] * 4 + [10] * 2
    assert len(found.left_out) == 6 and "beyond 280 network calls" in found.left_out[0].why
    with pytest.raises(ValueError, match="the 150 calls of the reference fit into, found its seconds spent"):
        run([solvers.ddim()], SOME, (5,), budget=1e-9)


def test_a_budget_of_no_seconds_finds_what_is_kept(tmp_path: Path):
    """Also its reference. What is not there is left out, and after a pause it is not thought to be slow."""
    network = Counting()
    again = partial(compare, Denoiser(network, SDE), [solvers.ddim()], SOME, shape=(2,), n=16, cache=tmp_path)
    again((5,))
    none = again((5, 10), budget=0)
    assert [row.budget for row in none.rows] == [5, 5] and none.about.calls == 0
    assert "beyond 0 seconds" in none.left_out[0].why and "Left out" in str(none)
    slow = Pause(network)
    model = Denoiser(slow, SDE)
    later = partial(compare, model, [solvers.ddim()], SOME, shape=(2,), n=16, cache=tmp_path / "slow")
    later((5,), budget=60.0)
    slow.seconds = 0.4  # of the fingerprint
    found = later((5, 20), budget=20.0)
    assert not found.left_out and found.about.calls == 2 * 20


class Pause(torch.nn.Module):
    """The first calls take a while."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.seconds, self.calls = inner, 0.0, 0

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.calls = self.calls + 1 if self.seconds else 0
        time.sleep(self.seconds if self.calls <= 4 else 0.0)
        return self.inner(x, label)


def test_the_cache_tells_guidance_apart(tmp_path: Path):
    """That differs between the times of the fingerprint, or there is no telling by the output at all."""

    class At(BaseDenoiser):
        def __init__(self, low: float, high: float, shown: str) -> None:
            super().__init__()
            self.sde, self.range, self.shown = SDE, (low, high), shown

        def extra_repr(self) -> str:
            return self.shown

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t = torch.as_tensor(t, dtype=x.dtype)
            inside = (self.range[0] <= t) & (t < self.range[1])
            return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), 0.5 * x, 0.1 * x)

    def calls(*model: object) -> int:
        return compare(At(*model), solvers.ddim(), SOME, (5,), shape=(2,), n=8, cache=tmp_path).about.calls

    assert calls(0.3, 0.5, "") == 160 and calls(0.3, 0.5, "") == 0
    assert calls(0.3, 0.4, "") == 160  # the fingerprint once saw t = 0.36 and 0.68 only
    assert calls(0.5, 0.501, "") == 160 and calls(0.5, 0.501, "f at 0x7f01") == 160
    assert calls(0.5, 0.501, "f at 0x7f02") == 0  # another process' address


def test_other_states_of_a_learned_schedule_have_other_tables():
    sde = VPSDE(schedule=schedules.Learned())
    candidate = Candidate(solvers.dpmpp(2), grids.uniform, "uniform")
    before = candidate.table(sde, 5)
    with torch.no_grad():
        for parameter in sde.schedule.parameters():
            parameter.add_(0.5)
    after = candidate.table(sde, 5)
    assert not torch.allclose(before.mix, after.mix, rtol=1e-3)
    assert torch.equal(after.mix, solvers.dpmpp(2).tableau(sde, grids.uniform(sde, 5)).mix)
    assert candidate.table(SDE, 5) is candidate.table(SDE, 5)


def test_the_cache_makes_nothing_twice(tmp_path: Path):
    network = Counting()
    model = Denoiser(network, SDE)
    again = partial(
        compare, model, [solvers.ddim(), solvers.dpmpp(2)], SOME, shape=(2,), n=16, cache=tmp_path
    )
    first = again((5, 10))
    assert first.about.calls == network.calls - 4 == 150 + 2 * 2 * 15  # four for the fingerprint
    network.calls = 0
    second = again((5, 10))
    assert second.rows == first.rows and second.about.calls == 0 and network.calls == 4
    more = again((5, 10, 20))
    assert [row for row in more.rows if row.budget < 20] == list(first.rows)
    assert more.about.calls == 4 * 20
    # Whatever changes the samples or their distances is another run; what counts as a flip is not.
    for options in ({"seed": 1}, {"n": 17}, {"end": 0.01}, {"dtype": F64}, {"metric": twice}):
        assert again((5,), **options).about.calls > 0, options
    assert again((5,), flip=9.0).about.calls == 0
    with torch.no_grad():
        list(network.parameters())[-1].add_(1e-4)
    assert again((5,)).about.calls > 0
    # A damaged record is made again.
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:-5])
    assert again((5,)).about.calls == 4 * 5
    assert not list(tmp_path.glob(".*"))


def test_the_cache_knows_conditions(tmp_path: Path):
    """A label of a sample that the fingerprint does not see makes another run."""

    class Labelled(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return 0.5 * x + label[:, None]

    label = torch.arange(10) % 3
    again = partial(
        compare, Denoiser(Labelled(), SDE, predicts="data"), [solvers.ddim()], SOME, (5,), shape=(2,), n=10,
        cache=tmp_path,
    )  # fmt: skip
    assert again(condition={"label": label}).about.calls == 150 + 2 * 5
    assert again(condition={"label": label}).about.calls == 0
    label[7] = 0
    assert again(condition={"label": label}).about.calls == 150 + 2 * 5


def test_seconds_are_foreseen(monkeypatch: pytest.MonkeyPatch):
    """After 100 calls in 10 s, 30 calls in two parts take 6 s more."""
    run = Runner(MODEL, (10, 2), 0, 1e-3, None, 5)
    ticks = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: float(next(ticks)))
        run(How(solvers.ddim(), grids.uniform(SDE, 4), ""))
    assert run.calls == 8 and run.seconds == next(ticks) - 1
    run.calls, run.seconds = 100, 10.0
    job = Job(Label("s", "g", 30), How(solvers.ddim(), torch.ones(2), ""), 30, None, False)
    monkeypatch.setattr(time, "perf_counter", lambda: 110.0)
    assert _too_dear(job, run, Budget(seconds=15.9), 100.0) == "beyond 15.9 seconds"
    assert _too_dear(job, run, Budget(seconds=16.1), 100.0) is None
    assert _too_dear(job, run, Budget(calls=159), 100.0) == "beyond 159 network calls"
    assert _too_dear(job, run, Budget(calls=160), 100.0) is None


def test_interrupted_and_resumed(tmp_path: Path):
    """Ctrl-C in the middle of a run: what is done is kept, and the same call again makes the rest."""
    network = Counting(stop_at=4 + 150 + 5 + 3)
    again = partial(
        compare, Denoiser(network, SDE), [solvers.ddim()], SOME, (5, 6), shape=(2,), n=16, cache=tmp_path
    )
    part = again()
    assert part.about.interrupted and [row.budget for row in part.rows] == [5]
    assert [item.why for item in part.left_out] == ["interrupted"] * 3
    whole = again()
    assert not whole.about.interrupted and whole.about.calls == 5 + 6 + 6
    assert part.rows[0].seconds in [row.seconds for row in whole.rows]
    fresh = compare(Denoiser(Counting(), SDE), [solvers.ddim()], SOME, (5, 6), shape=(2,), n=16)
    assert [row.error for row in whole.rows] == [row.error for row in fresh.rows]
    with pytest.raises(KeyboardInterrupt):
        compare(Denoiser(Counting(stop_at=3), SDE), [solvers.ddim()], SOME, (5,), shape=(2,), n=16)


def test_progress_is_shown(capsys):
    run([solvers.ddim()], SOME, (5,), progress=True)
    assert "call" in capsys.readouterr().err


# ---- the table


def about(**options) -> About:
    setting = {
        "n": 10, "shape": (2,), "seed": 0, "end": 0.001, "measure": "m", "flip": 0.1, "reference": "r",
        "reference_error": None, "floor": None, "floor_std": None, "calls": 9, "seconds": 1.0,
        "device": "cpu",
    }  # fmt: skip
    return About(**{**setting, **options})


def row(solver: str, calls: int, error: float, seconds: float = 1.0, budget: int | None = None) -> Row:
    return Row(solver, "g", budget or calls, calls, seconds, 64, error, error / 2, 2 * error, 0.0, error, 0.5)


def test_fronts_are_what_nothing_dominates():
    rows = [row("a", 5, 0.5, 3), row("b", 5, 0.4, 2), row("c", 10, 0.4, 1), row("d", 10, 0.3, 4),
            replace(row("e", 20, math.inf, 0.5), median=3.0, flips=1.0),
            replace(row("g", 1, 0.6, 0.1), median=math.inf, flips=0.6),
            row("f", 9, 0.2, 9, budget=10)]  # fmt: skip
    table = Comparison(tuple(rows), about())
    assert [r.solver for r in table.front()] == ["b", "f"]
    assert [r.solver for r in table.front(by_seconds)] == ["c", "d", "f"]
    assert [r.solver for r in table.rows] == ["g", "b", "a", "f", "d", "c", "e"]
    assert table.best(5).solver == "b" and table.best(9).solver == table.best(99).solver == "f"
    assert table.budgets() == [1, 5, 10, 20]
    with pytest.raises(ValueError, match="at most 0 calls"):
        table.best(0)
    # Below the resolution the cheapest is as good as the best.
    blurred = Comparison(tuple(rows), about(reference_error=0.45))
    assert [r.solver for r in blurred.front()] == ["b"]
    noisy = Comparison(tuple(rows), about(floor=0.3, floor_std=0.05))
    assert [r.solver for r in noisy.front()] == ["b"]


def test_the_table_prints(capsys):
    rows = [row(f"solver{i}", 5, 0.1 * (i + 1)) for i in range(8)]
    table = Comparison((*rows, row("late", 19, 0.01, budget=20)), about(), (LeftOut("x", "g", 5, "why not"),))
    lines = [line for line in str(table).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5 + 1 and len({len(line) for line in lines}) == 1
    assert "solver4" in lines[6] and "19 of 20" in lines[7] and "calls" in lines[7]
    assert "Left out (why not): x on g with 5 calls" in str(table)
    assert len(table.table().splitlines()) == 2 + 9
    assert "Non-dominated in calls: 5 calls: solver0 on g (0.1); 19 calls: late on g (0.01)" in str(table)
    lost = Comparison((replace(rows[0], flips=0.125),), about())
    assert "5 calls: solver0 on g (0.1, 12.5 % flips)" in str(lost)
    assert "flips" not in Comparison((replace(rows[0], median=None, flips=None),), about()).table()


def test_json_and_csv_keep_everything():
    rows = (
        row("a", 5, 0.5),
        replace(row("b", 5, math.inf), median=1.0),
        replace(row("c", 5, 0.25), flips=None, memory=None),
        replace(row("d", 5, 0.25), flips=0.6, median=math.inf),
        replace(row("e", 6, math.inf), flips=None, median=None, wins=None),
    )
    table = Comparison(rows, about(reference_error=1e-7), (LeftOut("x", "", 5, 'why, "not"\n'),))
    text = table.to_json()
    assert Comparison.from_json(text) == table
    assert text.count("\n") < 12 and "Infinity" not in text and json.loads(text)["format"]
    parsed = list(csv.DictReader(table.to_csv().splitlines()))
    assert [float(line["error"]) for line in parsed] == [0.25, 0.5, math.inf, 0.25, math.inf]
    assert parsed[0]["memory"] == "" and parsed[1]["solver"] == "a"
    for wrong in ("", "{}", "[]", '{"format": "else"}', text.replace("median", "middle"), text[:-4]):
        with pytest.raises(ValueError, match=r"JSON written by Comparison\.to_json"):
            Comparison.from_json(wrong)


def test_rank_agreement():
    names = "abcde"
    one = Comparison(tuple(row(s, 5, 0.1 * (i + 1)) for i, s in enumerate(names)), about())
    same = Comparison(tuple(row(s, 5, 0.3 * (i + 1) ** 2) for i, s in enumerate(names)), about())
    turned = Comparison(tuple(row(s, 5, 1 / (i + 1)) for i, s in enumerate(names)), about())
    swapped = Comparison(tuple(row(s, 5, float("21345"[i])) for i, s in enumerate(names)), about())
    assert rank_agreement(one, same) == {5: pytest.approx(1)}
    assert rank_agreement(one, turned) == {5: pytest.approx(-1)}
    assert rank_agreement(one, swapped) == {5: pytest.approx(1 - 6 * 2 / (5 * 24))}
    assert rank_agreement(one, Comparison((row("a", 6, 1.0),), about())) == {}
    assert math.isnan(rank_agreement(one, Comparison((row("a", 5, 1.0),), about()))[5])


def test_ranks_are_stable_over_seeds(unchecked):
    """Some solvers on all usual grids."""
    listed = [solvers.ddim(), solvers.dpm(2), solvers.dpmpp(2), solvers.unipc(3), solvers.deis(2)]
    one, other = (run(listed, n=256, calls=(5, 10), seed=seed) for seed in (0, 1))
    assert len(one.rows) == 2 * 5 * 6
    assert min(rank_agreement(one, other).values()) > 0.95


@pytest.mark.slow
def test_ranks_on_digits_are_stable_over_seeds(unchecked):
    """A trained network: some solvers on three grids, two seeds."""
    pytest.importorskip("sklearn")
    model = checkpoint.load(Path(__file__).parents[1] / "benchmarks" / "digits.safetensors")
    listed = [
        *(solvers.ddim(), solvers.heun(), solvers.dpmpp(2), solvers.dpmpp(3), solvers.unipc(3)),
        *(solvers.deis(3), solvers.exponential(3, stored="flow", variable="sigma")),
    ]
    on = {name: GRIDS[name] for name in ("quadratic", "log_snr", "power(exponent=3)")}
    options = {"shape": digits.SHAPE, "n": 48, "condition": {"label": digits.labels(48)}}
    one, other = (compare(model, listed, on, (5, 10), seed=seed, **options) for seed in (0, 1))
    assert min(rank_agreement(one, other).values()) >= 0.9


def test_errors_on_a_gaussian_are_exact(unchecked):
    """There the flow is x_end = alpha m + s (x_1 - alpha_1 m)/s_1 with s^2 = alpha^2 v + sigma^2."""
    law = Gaussian([0.5, -0.5], 0.25)
    model = law.denoiser(SDE)
    found = compare(model, [solvers.dpmpp(2)], {"squares": grids.quadratic}, (20,), shape=(2,), n=100)
    drawn = sample(model, (100, 2), solvers.dpmpp(2), grid=grids.quadratic, steps=20)
    start = Noise.of(0, batch=100, dtype=F64).prior((100, 2))
    one, end = law.marginal(SDE, 1.0), law.marginal(SDE, drawn.end)
    exact = end.mean + (end.variance / one.variance).sqrt() * (start - one.mean)
    (row,) = found.rows
    assert row.flips == 0 and found.about.reference_error < 1e-5
    assert row.error == pytest.approx(float((drawn.x - exact).square().mean().sqrt()), rel=1e-3)
