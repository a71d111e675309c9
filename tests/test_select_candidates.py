"""The pool: distinct tables, what the benchmarks found best, names, calls that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from scoresde import EDM, VPSDE, Rectified, grids, solvers
from scoresde.select import (
    GRIDS,
    STOCHASTIC_GRIDS,
    Candidate,
    gaussian_surrogate,
    pool,
    recommend,
)
from scoresde.select.candidates import solver_name
from scoresde.solvers.exponential import er_noise_level

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SDE = VPSDE()


def by_name(name: str) -> str:
    """The benchmarks' names of grids as ours."""
    name = re.sub(r"[Pp]ower ([\d.]+)", r"power(exponent=\1)", name)
    name = re.sub(r"[Kk]arras ([\d.]+)", r"karras(rho=\1)", name)
    return name.replace("log-SNR", "log_snr")


@pytest.mark.parametrize("stochastic", [False, True])
def test_no_two_solvers_have_the_same_tables(stochastic):
    listed = list(dict.fromkeys(c.solver for c in pool(stochastic)))
    grid, forms = grids.power(SDE, 9, exponent=2.3), []
    for solver in listed:
        form = solver.tableau(SDE, grid).canonical()
        numbers = torch.cat([form.times, form.a, form.B.flatten(), form.C.abs().flatten()])
        twins = [s for s, n in forms if len(n) == len(numbers) and torch.allclose(n, numbers, 0, 1e-10)]
        assert not twins, (solver, twins)
        forms.append((solver, numbers))
    assert all(solver.card.stochastic == stochastic for solver in listed)
    names = [c.name for c in pool(stochastic)]
    assert len(set(names)) == len(names) == len(listed) * len(STOCHASTIC_GRIDS if stochastic else GRIDS)


@pytest.mark.parametrize(("stem", "stochastic"), [("accuracy", False), ("accuracy_sde", True)])
def test_what_won_in_the_benchmarks_is_in_the_pool(stem, stochastic):
    from benchmarks.accuracy import name_of

    known = {(name_of(c.solver), c.grid_name) for c in pool(stochastic)}
    seen = 0
    for file in RESULTS.glob(f"{stem}_*.json"):
        if stochastic == ("_sde" in file.stem):
            for row in json.loads(file.read_text())["rows"]:
                if row["ours"]["error"] < 1.12 * row["ours"].get("floor", 0):  # by chance
                    continue
                won = row["ours"]["solver"], by_name(row["ours"]["grid"])
                assert won in known, (file.name, row["calls"], won)
                seen += 1
    assert seen > 20


def test_names_are_short():
    karras = GRIDS["karras(rho=5)"]
    assert Candidate(solvers.unipc(3), karras, "karras(rho=5)").name == "unipc(3) on karras(rho=5)"
    assert solver_name(solvers.ddim()) == "ddim()"
    assert solver_name(solvers.sde_dpmpp(2, 0.1)) == "sde_dpmpp(2, eta=0.1)"
    family = solvers.exponential(2, corrector=3, stored="flow", tau=er_noise_level)
    assert solver_name(family) == "exponential(2, corrector=3, stored='flow', tau=er_noise_level)"
    assert solver_name(solvers.adaptive_ode()) == repr(solvers.adaptive_ode())


def test_a_table_takes_the_calls_that_there_are():
    for candidate in pool()[:: len(GRIDS)] + pool(True)[:: len(GRIDS)]:
        for calls in (1, 7):
            table = candidate.table(SDE, calls)
            assert table is None or len(table) <= calls
            assert (table is None) == (candidate.solver.calls(1) > calls)
    heun = Candidate(solvers.heun(), grids.uniform, "uniform")
    assert heun.table(SDE, 1) is None
    assert len(heun.table(SDE, 7)) == 6
    assert heun.table(SDE, 7) is heun.table(SDE, 7)
    assert float(heun.table(SDE, 6, end=0.01).times[-1]) == 0.01


def test_tables_without_finite_coefficients_are_left_out_and_wrong_ends_are_named():
    for sde in (Rectified(), EDM()):
        tables = [c.table(sde, 8) for c in pool()[::11]]
        assert sum(t is not None for t in tables) > len(tables) / 2
    with pytest.raises(ValueError, match="expected an end"):
        pool()[0].table(SDE, 8, end=2.0)


@pytest.mark.parametrize("need", ["samples", "encode", "diversity"])
def test_annotations_hold_for_a_recommendation(need):
    data = torch.randn(32, 2, generator=torch.Generator().manual_seed(1)).double()
    few = pool(need == "diversity")[::200]
    found = recommend(SDE, data, 9, need, surrogate=gaussian_surrogate, candidates=few)
    assert found.best.error <= found.ranking[-1].error


def test_the_name_of_a_grid_says_which_it_is():
    sde = VPSDE()
    for name, grid in STOCHASTIC_GRIDS.items():
        assert torch.equal(grids.parse(name)(sde, 7).t, grid(sde, 7).t), name
    for wrong in (
        "0.5 karras + 0.6 uniform",
        "0.5 karras + 0.5 cubic",
        "0.5.1 karras + 0.5 log_snr",
        "0.5 karras +",
        "1 karras",
    ):
        with pytest.raises(ValueError, match="expected a grid"):
            grids.parse(wrong)
