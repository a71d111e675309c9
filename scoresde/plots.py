"""Pictures: rows of images, how samples take shape, and fronts of error and cost. No window is opened."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from .select.comparison import Comparison, Row, by_calls, by_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FilePath = str | os.PathLike[str]


def image_rows(
    rows: Mapping[str, Float[Tensor, "n c h w"]],
    *,
    columns: int = 20,
    heads: Sequence[str] = (),
    title: str = "",
    scale: float = 0.42,
) -> Figure:
    """A row of images for each entry of `rows`, its name to the left: the first `columns`; 1 or 3 channels.

    Pixels in [-1, 1], clipped, not rescaled. heads: words above the columns. scale: inches an image.
    Raises ValueError for no rows, no images in one, no columns, or other numbers of channels; ImportError
    without matplotlib.
    """
    if not rows:
        raise ValueError("expected at least one row of images, found none")
    if columns < 1:
        raise ValueError(f"expected at least one column, found {columns}")
    if empty := [name for name, x in rows.items() if not len(x)]:
        raise ValueError(f"expected at least one image in every row, found none in {empty[0]!r}")
    images = [list(x[:columns]) for x in rows.values()]
    return _mosaic(images, list(rows), heads, title, scale, left=0.35 + 0.075 * _longest(rows))


def trajectory(
    times: Sequence[float],
    states: Float[Tensor, "k n c h w"],
    denoised: Float[Tensor, "k n c h w"],
    *,
    title: str = "",
    scale: float = 0.62,
) -> Figure:
    """How n samples take shape: for each a row of states `x_t` above one of `E[x_0 | x_t]`, at k times.

    Pixels in [-1, 1], clipped. Raises ValueError for shapes that do not fit or that hold no image,
    ImportError without matplotlib.
    """
    if not len(times) == len(states) == len(denoised) or states.shape != denoised.shape:
        raise ValueError(
            f"expected as many states and denoised images as the {len(times)} times, "
            f"found shapes {tuple(states.shape)} and {tuple(denoised.shape)}"
        )
    if not len(states) or not states.shape[1]:
        raise ValueError(
            f"expected at least one time and one sample, found states of shape {tuple(states.shape)}; "
            "record a sample that the batch has"
        )
    pairs = [(states[:, i], denoised[:, i]) for i in range(states.shape[1])]
    images = [list(row) for pair in pairs for row in pair]
    names = ["$x_t$", r"$E[x_0\,|\,x_t]$"] * len(pairs)
    return _mosaic(images, names, [f"t = {t:.2g}" for t in times], title, scale, left=0.95)


def fronts(comparison: Comparison, *, title: str = "", named: int = 8) -> Figure:
    """Error against network calls, and against seconds, both axes logarithmic: every run a point, and the
    front of non-dominated ones a thick line.

    `named` solvers have a colour and a thin line through their best runs of each number of calls: those on
    the front of calls, then those that are best on average. The dotted line is `About.resolution`, below
    which errors cannot be told apart; errors <= 0, which distances between laws may have, are drawn at the
    lower edge. Raises ValueError for a comparison without finite errors, ImportError without matplotlib.
    """
    shown = [row for row in comparison.rows if math.isfinite(row.error) and math.isfinite(row.score)]
    if not shown:
        raise ValueError("expected a comparison with finite errors, found none")
    figure = _figure((11, 5))
    chosen = _leading(comparison)[:named]
    positive = [error for error in (*(row.score for row in shown), comparison.about.resolution) if error > 0]
    lowest = min(positive, default=1e-16)
    highest = max([lowest, *(row.score for row in shown)])
    costs = {"network calls": by_calls, "seconds for all samples": by_seconds}
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (label, cost) in zip(axes, costs.items(), strict=True):

        def place(
            rows: Sequence[Row], cost: Callable[[Row], float] = cost
        ) -> tuple[list[float], list[float]]:
            return [cost(row) for row in rows], [max(row.score, lowest) for row in rows]

        ax.scatter(*place(shown), s=6, c="0.8", lw=0, zorder=1)
        ax.plot(*place(comparison.front(cost)), color="0.1", lw=2.5, alpha=0.35, zorder=2, label="front")
        for i, solver in enumerate(chosen):
            best = [min(rows, key=lambda row: row.score) for rows in _by_budget(shown, solver)]
            ax.plot(*place(best), "o-", color=f"C{i % 10}", ms=4, lw=1, zorder=3, label=solver)
        if comparison.about.resolution > 0:
            ax.axhline(comparison.about.resolution, color="0.4", ls=":", lw=1.2, label="resolution")
        ax.set(xscale="log", yscale="log", xlabel=label, ylim=(0.6 * lowest, 2 * highest))
        ax.grid(alpha=0.25, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    ticks = [budget for budget in comparison.budgets() if len(comparison.ranking(budget)) > 1]
    axes[0].set_xticks(ticks, [str(budget) for budget in ticks])
    axes[0].minorticks_off()
    median = "" if shown[0].median is None else "median "
    axes[0].set_ylabel(median + comparison.about.measure)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title or f"{comparison.about.n} samples, seed {comparison.about.seed}", fontsize=11)
    figure.tight_layout(rect=(0, 0.04 * math.ceil(len(labels) / 2), 1, 1))
    return figure


def _leading(comparison: Comparison) -> list[str]:
    """Solvers: those on the front of calls, then by the mean place of their best run of each budget."""
    places: dict[str, list[int]] = {}
    for budget in comparison.budgets():
        order = dict.fromkeys(row.solver for row in comparison.ranking(budget))
        for place, solver in enumerate(order):
            places.setdefault(solver, []).append(place)
    front = [row.solver for row in comparison.front()]
    average = sorted(places, key=lambda solver: (-len(places[solver]), sum(places[solver])))
    return list(dict.fromkeys([*front, *average]))


def _by_budget(rows: Sequence[Row], solver: str) -> list[list[Row]]:
    own = [row for row in rows if row.solver == solver]
    return [[row for row in own if row.budget == budget] for budget in sorted({row.budget for row in own})]


def save(figure: Figure, path: FilePath, dpi: int = 100) -> None:
    """Write a PNG of few bytes: at most 256 colours, which grey images do not notice."""
    from io import BytesIO

    from PIL import Image  # comes with matplotlib

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def _figure(size: tuple[float, float]) -> Figure:
    """An empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is missing: pip install 'scoresde[plots]'"
        ) from error
    return Figure(figsize=size)


def _mosaic(
    images: list[list[Tensor]],
    names: list[str],
    heads: Sequence[str],
    title: str,
    scale: float,
    left: float,
) -> Figure:
    """All images in one axes whose unit is a cell, so that hundreds cost little; lengths in inches."""
    columns, rows, edge = max(map(len, images)), len(images), 0.08
    top = edge + 0.3 * bool(title) + 0.2 * bool(heads)
    width, height = left + columns * scale + edge, top + rows * scale + edge
    figure = _figure((width, height))
    box = (left / width, edge / height, columns * scale / width, rows * scale / height)
    ax = figure.add_axes(box)
    for i, (name, line) in enumerate(zip(names, images, strict=True)):
        ax.text(-0.15, i + 0.5, name, ha="right", va="center", fontsize=8.5)
        for j, image in enumerate(line):
            _show(ax, image, j, i)
    for j, head in enumerate(heads[:columns]):
        ax.text(j + 0.5, -0.08, head, ha="center", va="bottom", fontsize=8, color="0.35")
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.axis("off")
    if title:
        figure.text(edge / width, 1 - edge / height, title, ha="left", va="top", fontsize=10, weight="bold")
    return figure


def _show(ax: Axes, image: Tensor, column: int, row: int, gap: float = 0.04) -> None:
    """The image in a cell: grey ones in ink on paper, so dark is 1 and light is -1."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected images of 1 or 3 channels, shape (c, h, w); found {tuple(image.shape)}")
    pixels = (image.detach().float().cpu().clamp(-1, 1).permute(1, 2, 0).numpy() + 1) / 2
    shown = pixels.squeeze(2) if pixels.shape[2] == 1 else pixels
    cell = (column + gap, column + 1 - gap, row + 1 - gap, row + gap)
    ax.imshow(shown, extent=cell, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")


def _longest(names: Mapping[str, object]) -> int:
    return max(len(line) for name in names for line in name.split("\n"))
