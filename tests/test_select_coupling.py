"""Distances of laws from samples that share their noise with true ones."""

from __future__ import annotations

import math

import pytest
import torch

from scoresde import EDM, VPSDE, Rectified, SubVPSDE, grids, solvers
from scoresde.laws import Gaussian, Mixture
from scoresde.select import coupling
from scoresde.select.coupling import LEVELS, clocks_of, fine_tables, increments, law_distances
from scoresde.select.tables import run_stack, stack

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of calls of small functions

SDE = VPSDE()
END = float(SDE.default_end)


def generator(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def coupled(sde, tables, n, dim=1, rows=60, seed=0, device="cpu"):
    """The normals of the fine tables' rows and those of every table's, made on the device; the clocks of
    both."""
    fine, drawn = fine_tables(sde, rows, float(tables[0].times[-1])), normal(rows, n, dim, seed=seed)
    clocks, motion = clocks_of(sde, fine, tables), fine.motion(drawn.to(device))
    found = torch.stack(list(increments(fine, motion, clocks, generator(seed + 1, device))))
    return fine, drawn, clocks, found.cpu()


@pytest.mark.parametrize("sde", [SDE, SubVPSDE(), EDM(0.01, 2.0), Rectified()])
def test_fine_tables_get_their_own_noise(sde, device):
    tables = fine_tables(sde, 60, float(sde.default_end)).tables
    _, drawn, clocks, found = coupled(sde, tables, 5, device=device)
    assert clocks.level.tolist() == list(range(len(LEVELS)))
    for level in range(len(LEVELS)):
        assert found[:, level].numpy() == pytest.approx(drawn.numpy(), abs=1e-7)


def test_a_step_over_two_gets_their_sum(device):
    fine = fine_tables(SDE, 60, END)
    half = grids.Grid.of(SDE, fine.tables[0].times[::2])
    tables = [solvers.exponential(2, stored="data", tau=tau).tableau(SDE, half) for tau in LEVELS]
    _, drawn, clocks, found = coupled(SDE, tables, 4, device=device)
    assert clocks.level.tolist() == list(range(len(LEVELS)))
    steps = fine.log_clock.exp().diff()  # (L, F)
    both = steps.sqrt()[:, :, None, None] * drawn
    wanted = (both[:, ::2] + both[:, 1::2]) / (steps[:, ::2] + steps[:, 1::2]).sqrt()[:, :, None, None]
    assert found.transpose(0, 1).numpy() == pytest.approx(wanted.numpy(), abs=1e-9)


def test_noise_of_any_table_is_standard_normal_and_of_one_path(alpha_ledger):
    """Variances and correlations of 29 rows at 20000 samples within 7 standard errors; together, the steps of
    the path add up to the fine tables'."""
    named = [solvers.sde_dpmpp(3), solvers.er_sde(2), solvers.sa(2, 3, 0.3), solvers.euler_maruyama()]
    spacings = [grids.log_snr, grids.quadratic, grids.uniform, grids.karras]
    tables = [s.tableau(SDE, g(SDE, 29)) for s, g in zip(named, spacings, strict=True)]
    n = 20_000
    fine, drawn, clocks, found = coupled(SDE, tables, n, rows=40)
    eye = torch.eye(29, dtype=torch.float64)
    for i, z in enumerate(found[..., 0].unbind(1)):
        assert float((z @ z.T / n - eye).abs().max()) < 7 * math.sqrt(2 / n)
        assert float(z.mean(1).abs().max()) < 7 / math.sqrt(n)
        steps = clocks.values[i].diff().sqrt()
        whole = fine.motion(drawn)[-1, clocks.level[i], :, 0]
        assert (steps @ z).numpy() == pytest.approx(whole.numpy(), rel=1e-9)
    alpha_ledger.spend(4 * 29 * 16 * math.erfc(7 / math.sqrt(2)), "noise that tables share")


def test_rows_from_data_to_noise_get_noise_of_their_own(alpha_ledger):
    """Churn goes back and forth: what it adds is independent of what was there."""
    n, table = 20_000, solvers.edm(churn=4.0).tableau(SDE, grids.karras(SDE, 9))
    back = table.times.diff() > 0
    assert int(back.sum()) > 3
    _, _, _, found = coupled(SDE, [table], n, rows=40)
    z = found[:, 0, :, 0]
    assert float((z @ z.T / n - torch.eye(len(z), dtype=torch.float64)).abs().max()) < 7 * math.sqrt(2 / n)
    alpha_ledger.spend(len(z) * (len(z) + 1) / 2 * math.erfc(7 / math.sqrt(2)), "noise of churn")


def few_tables(sde):
    listed = [
        solvers.ddpm(),
        solvers.er_sde(2),
        solvers.sde_dpmpp(2),
        solvers.sde_dpmpp(2, 0.1, rule="bh2"),
        solvers.exponential(2, stored="flow", variable="sigma", tau=0.5**0.5),
        solvers.reverse_diffusion(),
    ]
    return [
        s.tableau(sde, g(sde, n)) for s in listed for g in (grids.quadratic, grids.log_snr) for n in (4, 8)
    ]


@pytest.mark.parametrize("sde", [SDE, EDM(0.01, 2.0)])
def test_distances_on_a_gaussian_are_the_exact_ones(monkeypatch, sde, device, alpha_ledger):
    """Along a line, where they are the same: to 2 % (groups are finite) and 9 standard errors over 32 groups
    (Student's t with 31 degrees: 4e-10 for each of 24); half of these see an eighth."""
    monkeypatch.setattr(coupling, "GROUPS", 32)
    law, gaussian = Mixture([1.0], [[0.7]], 0.3), Gaussian([0.7], 0.3)
    tables, wanted = few_tables(sde), gaussian.marginal(sde, float(sde.default_end))
    found, exact = law_distances(sde, law.to(device), tables, 32768, generator(3, device)), []
    assert found.squares.device.type == found.errors.device.type == device.type
    for table in tables:
        got = table.law(gaussian, sde)
        squares = (got.mean - wanted.mean) ** 2 + (got.variance.sqrt() - wanted.variance.sqrt()) ** 2
        exact.append(float(squares))
    exact = torch.tensor(exact, dtype=torch.float64, device=device)
    assert bool(((found.squares - exact).abs() < 0.02 * exact + 9 * found.errors).all())
    assert float((found.errors / exact).median()) < 1 / 8 / 9
    alpha_ledger.spend(24 * 4e-10, "distances of laws on a Gaussian")


def blobs():
    """Four modes in three dimensions, each with its own covariance."""
    roots = 0.3 * normal(4, 3, 3, seed=5)
    return Mixture([0.1, 0.2, 0.3, 0.4], normal(4, 3, seed=6), roots @ roots.mT)


def test_distances_are_the_same_on_another_device_and_in_other_parts(monkeypatch, device, alpha_ledger):
    """Of tables that are clearly off, from other noise, along a line: within 9 standard errors over 32
    groups."""
    monkeypatch.setattr(coupling, "GROUPS", 32)
    law, tables = Mixture([0.3, 0.7], [[-1.0], [0.6]], [0.02, 0.1]), few_tables(SDE)[::2]
    one = law_distances(SDE, law, tables, 4096, generator(3))
    monkeypatch.setattr(coupling, "NUMBERS", 2**11)  # five tables a part
    monkeypatch.setattr(coupling, "MANY", 2**11)
    two = law_distances(SDE, law.to(device), tables, 4096, generator(4, device))
    spread = (one.errors.square() + two.errors.cpu().square()).sqrt()
    assert bool(((one.squares - two.squares.cpu()).abs() < 9 * spread).all())
    assert float((spread / one.squares).median()) < 0.1
    alpha_ledger.spend(12 * 4e-10, "distances of laws on two devices")


def test_a_law_and_a_generator_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="one device, found meta and cpu"):
        law_distances(SDE, blobs().to("meta"), few_tables(SDE), 64, generator(0))


@pytest.mark.cuda
def test_rows_wait_for_nothing():
    """Once all numbers are there, which the first row sees to."""
    tables, calls = few_tables(SDE), []
    fine = fine_tables(SDE, 40, END)
    motion, clocks = fine.motion(normal(40, 6, 3).cuda()), clocks_of(SDE, fine, tables)
    model = blobs().to("cuda").denoiser(SDE)

    def denoise(x, t):
        calls.append(len(x))
        torch.cuda.set_sync_debug_mode("default" if len(calls) == 1 else "error")
        return model(x, t)

    noise = increments(fine, motion, clocks, generator(0, "cuda"))
    try:
        found = run_stack(stack(tables), denoise, motion[0, 0], noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 8
    assert bool(found.isfinite().all())


def test_sharing_the_noise_is_worth_ten_times_the_samples(monkeypatch):
    """Standard errors of the squares, at 30 steps, with the noise of the fine tables and without."""
    law = Mixture([0.3, 0.7], [[-1.0, 0.5], [0.6, -0.2]], [0.02, 0.1])
    tables = [solvers.er_sde(2).tableau(SDE, grids.quadratic(SDE, 30))]
    shared = law_distances(SDE, law, tables, 2048, generator(0)).errors

    def alone(fine, motion, clocks, made):
        for _ in clocks.values.T[1:]:
            yield torch.randn(1, *motion.shape[2:], generator=made, dtype=motion.dtype)

    monkeypatch.setattr(coupling, "increments", alone)
    assert float(shared) < law_distances(SDE, law, tables, 2048, generator(0)).errors / 10


def test_distance_and_error_between_groups_by_hand():
    apart = normal(5, 1, 3, 2, seed=4) + 0.3

    def mean_product(parts):
        pairs = [(a * b).mean() for i, a in enumerate(parts) for j, b in enumerate(parts) if i != j]
        return float(sum(pairs)) / len(pairs)

    groups = list(apart[:, 0])
    whole = mean_product(groups)
    without = [mean_product(groups[:i] + groups[i + 1 :]) for i in range(5)]
    found = coupling.between_groups(apart)
    assert float(found.squares) == pytest.approx(whole, rel=1e-12)
    jackknife = math.sqrt(4 / 5 * sum((w - whole) ** 2 for w in without))
    assert float(found.errors) == pytest.approx(jackknife, rel=1e-12)


def test_a_table_that_diverges_is_infinitely_far_and_spoils_no_other():
    law = Mixture([0.5, 0.5], [[-1.0], [1.0]], 0.1)
    good = solvers.er_sde(2).tableau(SDE, grids.quadratic(SDE, 8))
    bad = type(good)(good.times, good.skip, 1e200 * good.out, good.keep, good.mix, good.noise)
    found = law_distances(SDE, law, [good, bad], 256, generator(0))
    assert not found.squares[1].isfinite()
    assert 0 < float(found.squares[0]) < 1
