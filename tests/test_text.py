"""Grids and solvers by text, as they print; nothing is evaluated. (The attacks on solvers: test_cli.py.)"""

from __future__ import annotations

from functools import partial

import pytest

from scoresde import VPSDE, grids, solvers
from scoresde.text import spell

GRIDS = [
    grids.uniform,
    grids.log_snr,
    partial(grids.karras, rho=5.0),
    partial(grids.power, exponent=1.75),
    partial(grids.blend, one=grids.karras, other=partial(grids.power, exponent=3), weight=0.2),
]


@pytest.mark.parametrize("grid", GRIDS, ids=spell)
def test_grids_are_named_as_they_are_spelled(grid):
    again = grids.parse(spell(grid))
    assert spell(again) == spell(grid)
    assert again(VPSDE(), 7).t.equal(grid(VPSDE(), 7).t)


def test_every_grid_has_a_name(unchecked):
    for name in ("uniform", "power", "quadratic", "log_snr", "karras"):
        assert grids.parse(name) is getattr(grids, name)
    assert spell(grids.parse(" karras(rho=5.0)\n")) == "karras(rho=5.0)"
    assert spell(grids.parse("ddpm(spacing='leading')")) == "ddpm(spacing='leading')"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Grid",
        "parse(text='uniform')",
        "karras(rho=open('hacked', 'w'))",
        "karras(rho=rho)",
        "karras(5)",
        "karras(eta=1)",
        "karras(**{'rho': 5})",
        "blend(one=karras)()",
        "partial(karras)",
        "uniform; karras",
        "karras(rho=1.0, rho=2.0)",
        "karras(rho={[]: 1})",
        "karras(rho='a')",
        "karras(rho=0.0)",
        "karras(rho=karras)",
        "blend(one=karras, other=5)",
        "blend(one=karras, other=uniform, weight='a')",
        "0.2 karras + 0.8 power(exponent=-1.0)",
        "ddpm(spacing='other')",
    ],
)
def test_nothing_but_grids(text: str, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        grids.parse(text)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_what_is_no_text(unchecked):
    with pytest.raises(ValueError, match=r"with plain values; found .karras"):
        grids.parse("karras(**{'rho': 5})")
    for wrong in (None, 3, b"dpmpp", "(" * 5000, "x" * 401):
        with pytest.raises(ValueError, match="expected a solver as in"):
            solvers.parse(wrong)
