"""Pictures show the right pixels at the right places, in small files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from scoresde import plots


def pixels(ax) -> torch.Tensor:
    return torch.as_tensor(ax.images[0].get_array().data).float()


def test_rows_show_the_images():
    x, y = torch.linspace(-1.5, 1.5, 5 * 6).view(5, 1, 2, 3), -torch.ones(2, 3, 2, 3)
    figure = plots.image_rows({"first": x, "second": y}, columns=4, heads=["a", "b"], title="Title")
    axes = figure.axes
    assert len(axes) == 2 * 4
    for j in range(4):
        torch.testing.assert_close(pixels(axes[j]), (x[j, 0].clamp(-1, 1) + 1) / 2)
    assert pixels(axes[4]).shape == (2, 3, 3) and pixels(axes[5]).max() == 0
    assert not axes[6].images and not axes[7].images
    assert [axes[0].get_title(), axes[1].get_title(), axes[2].get_title()] == ["a", "b", ""]
    assert [axes[0].texts[0].get_text(), axes[4].texts[0].get_text()] == ["first", "second"]
    assert axes[0].images[0].get_clim() == (0, 1)  # not stretched to each image's own range


def test_trajectory_shows_the_steps():
    states, denoised = torch.rand(3, 2, 1, 2, 2), -torch.rand(3, 2, 1, 2, 2)
    figure = plots.trajectory([1.0, 0.5, 0.0], states, denoised)
    axes = figure.axes
    assert len(axes) == 4 * 3
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(pixels(axes[6 * i + j]), (states[j, i, 0] + 1) / 2)
            torch.testing.assert_close(pixels(axes[6 * i + 3 + j]), (denoised[j, i, 0] + 1) / 2)
    assert [ax.get_title() for ax in axes[:3]] == ["t = 1", "t = 0.5", "t = 0"]


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
    with pytest.raises(ValueError, match="1 or 3 channels"):
        plots.image_rows({"a": torch.zeros(2, 2, 8, 8)})
    with pytest.raises(ValueError, match="the 2 times"):
        plots.trajectory([1.0, 0.0], torch.zeros(3, 1, 1, 8, 8), torch.zeros(3, 1, 1, 8, 8))
    with pytest.raises(ValueError, match="the 3 times"):
        plots.trajectory([1.0, 0.5, 0.0], torch.zeros(3, 1, 1, 8, 8), torch.zeros(3, 2, 1, 8, 8))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"scoresde\[plots\]"):
        plots.image_rows({"a": torch.zeros(1, 1, 8, 8)})
