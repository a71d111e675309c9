"""Pictures show the right pixels at the right places, in small files."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from scoresde import plots
from scoresde.select.comparison import About, Comparison, Row


def cells(figure) -> dict[tuple[int, int], torch.Tensor]:
    """Pixels by (row, column)."""
    (ax,) = figure.axes
    corners = [image.get_extent() for image in ax.images]
    return {
        (int(top), int(left)): torch.as_tensor(image.get_array().data).float()
        for image, (left, _, _, top) in zip(ax.images, corners, strict=True)
    }


def words(figure) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.get_position() for text in figure.axes[0].texts}


def test_rows_show_the_images():
    x, y = torch.linspace(-1.5, 1.5, 5 * 6).view(5, 1, 2, 3), -torch.ones(2, 3, 2, 3)
    figure = plots.image_rows({"first": x, "second": y}, columns=4, heads=["a", "b"], title="Title")
    shown = cells(figure)
    assert set(shown) == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}
    for j in range(4):
        torch.testing.assert_close(shown[0, j], (x[j, 0].clamp(-1, 1) + 1) / 2)
    assert shown[1, 0].shape == (2, 3, 3) and shown[1, 0].max() == 0
    assert figure.axes[0].images[0].get_clim() == (0, 1)  # not stretched to each image's own range
    assert figure.axes[0].get_ylim() == (2, 0) and figure.axes[0].get_xlim() == (0, 4)
    where = words(figure)
    assert [where["first"][1], where["second"][1]] == [0.5, 1.5] and where["first"][0] < 0
    assert [where["a"][0], where["b"][0]] == [0.5, 1.5] and where["a"][1] < 0
    assert figure.texts[0].get_text() == "Title"


def test_trajectory_shows_the_steps():
    states, denoised = torch.rand(3, 2, 1, 2, 2), -torch.rand(3, 2, 1, 2, 2)
    figure = plots.trajectory([1.0, 0.5, 0.0], states, denoised)
    shown = cells(figure)
    assert len(shown) == 4 * 3
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(shown[2 * i, j], (states[j, i, 0] + 1) / 2)
            torch.testing.assert_close(shown[2 * i + 1, j], (denoised[j, i, 0] + 1) / 2)
    where = words(figure)
    assert [where[f"t = {t}"][0] for t in ("1", "0.5", "0")] == [0.5, 1.5, 2.5]


def test_files_are_small_and_show_something(tmp_path: Path):
    from PIL import Image

    rows = {f"row {i}": torch.rand(20, 1, 8, 8) * 2 - 1 for i in range(6)}
    plots.save(plots.image_rows(rows, title="Noise"), tmp_path / "rows.png")
    steps = torch.rand(12, 3, 1, 8, 8) * 2 - 1
    plots.save(plots.trajectory([1.0] * 12, steps, steps, title="Noise"), tmp_path / "steps.png")
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            grey = torch.as_tensor(np.array(image.convert("L")))
        assert grey.min() < 20 and grey.max() > 250 and 40 < grey.float().mean() < 230


def test_no_window_is_prepared(tmp_path: Path):
    """Nothing global: pyplot, its backends and its list of figures are not touched."""
    code = (
        "import sys, torch; from scoresde import plots; assert 'matplotlib' not in sys.modules;"
        "plots.save(plots.image_rows({'a': torch.zeros(1, 1, 8, 8)}), sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, cwd=root)


def test_what_cannot_be_drawn(unchecked: None):
    with pytest.raises(ValueError, match="at least one row"):
        plots.image_rows({})
    with pytest.raises(ValueError, match="at least one image in every row, found none in 'b'"):
        plots.image_rows({"a": torch.zeros(2, 1, 8, 8), "b": torch.zeros(0, 1, 8, 8)})
    for columns in (0, -1):
        with pytest.raises(ValueError, match="at least one column"):
            plots.image_rows({"a": torch.zeros(2, 1, 8, 8)}, columns=columns)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        plots.image_rows({"a": torch.zeros(2, 2, 8, 8)})
    with pytest.raises(ValueError, match="the 2 times"):
        plots.trajectory([1.0, 0.0], torch.zeros(3, 1, 1, 8, 8), torch.zeros(3, 1, 1, 8, 8))
    with pytest.raises(ValueError, match="the 3 times"):
        plots.trajectory([1.0, 0.5, 0.0], torch.zeros(3, 1, 1, 8, 8), torch.zeros(3, 2, 1, 8, 8))
    for shape in [(0, 2, 1, 8, 8), (3, 0, 1, 8, 8)]:
        with pytest.raises(ValueError, match=r"at least one time and one sample, found states of shape"):
            plots.trajectory([1.0] * shape[0], torch.zeros(shape), torch.zeros(shape))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"scoresde\[plots\]"):
        plots.image_rows({"a": torch.zeros(1, 1, 8, 8)})


# ---- fronts


def comparison(*errors: float, floor: float | None = None) -> Comparison:
    """Solver a with 5, 10, ... calls and these errors; b ten times as good and half as fast, with 6 calls."""
    about = About(
        n=9, shape=(2,), seed=0, end=0.001, measure="distance", flip=None, reference="r",
        reference_error=None, floor=floor, floor_std=0.0, calls=9, seconds=1.0, device="cpu",
    )  # fmt: skip
    rows = [Row("a", "g", 5 * i, 5 * i, 0.1 * i, None, e, e, e) for i, e in enumerate(errors, 1)]
    return Comparison((*rows, Row("b", "g", 6, 6, 0.2, None, errors[0] / 10, 0.0, 1.0)), about)


def lines(ax) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in ax.lines}


def test_fronts_show_error_and_cost():
    figure = plots.fronts(comparison(0.5, 0.2, 0.01), title="Mine")
    calls, seconds = figure.axes
    assert lines(calls)["front"] == [(5, 0.5), (6, 0.05), (15, 0.01)]
    assert lines(calls)["a"] == [(5, 0.5), (10, 0.2), (15, 0.01)] and lines(calls)["b"] == [(6, 0.05)]
    assert lines(seconds)["front"] == [(0.1, 0.5), (0.2, 0.05), (pytest.approx(0.3), 0.01)]
    assert [ax.get_xscale() + ax.get_yscale() for ax in figure.axes] == ["loglog"] * 2
    assert calls.get_xlabel() == "network calls" and calls.get_ylabel() == "distance"
    assert figure.get_suptitle() == "Mine"
    assert "resolution" not in lines(calls)
    assert "b" not in lines(plots.fronts(comparison(0.5, 0.2), named=1).axes[0])


def test_each_picture_has_its_own_front():
    table = comparison(0.5, 0.2)
    quick = Row("c", "g", 20, 20, 0.05, None, 0.4, 0.4, 0.4)
    figure = plots.fronts(replace(table, rows=(*table.rows, quick)))
    assert [lines(ax)["front"] for ax in figure.axes] == [[(5, 0.5), (6, 0.05)], [(0.05, 0.4), (0.2, 0.05)]]


def test_medians_that_are_infinite_are_not_drawn():
    """Of a run most of whose samples are infinitely far, and the others near."""
    table = comparison(0.5, 0.2)
    lost = replace(table.rows[0], solver="c", calls=1, seconds=1e-3, median=math.inf, flips=0.6)
    with_it, without = (plots.fronts(replace(table, rows=rows)) for rows in ((*table.rows, lost), table.rows))
    for one, other in zip(with_it.axes, without.axes, strict=True):
        assert one.get_ylim() == other.get_ylim() and lines(one)["front"] == lines(other)["front"]
    with pytest.raises(ValueError, match="finite errors"):
        plots.fronts(replace(table, rows=(lost,)))


def test_errors_without_a_logarithm_are_at_the_edge():
    figure = plots.fronts(comparison(0.5, -0.2, math.inf, floor=0.1))
    assert lines(figure.axes[0])["a"] == [(5, 0.5), (10, 0.05)]
    assert {y for _, y in lines(figure.axes[0])["resolution"]} == {0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.fronts(comparison(0.0)).savefig(BytesIO())
    with pytest.raises(ValueError, match="finite errors"):
        plots.fronts(replace(comparison(0.5), rows=()))
