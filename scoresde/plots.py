"""Pictures: rows of images, and how samples take shape. No window is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FilePath = str | os.PathLike[str]


def image_rows(
    rows: Mapping[str, Float[Tensor, "n c h w"]],
    *,
    columns: int = 20,
    heads: Sequence[str] | None = None,
    title: str = "",
    scale: float = 0.42,
) -> Figure:
    """A row of images for each entry of `rows`, its name to the left; the first `columns`, 1 or 3 channels.

    Pixels in [-1, 1], clipped, not rescaled. heads: words above the columns. scale: inches an image.
    Raises ValueError for no rows or other numbers of channels, ImportError without matplotlib.
    """
    if not rows:
        raise ValueError("expected at least one row of images, found none")
    width = min(columns, max(len(x) for x in rows.values()))
    figure = _figure(
        width * scale + 1.9, len(rows) * scale + (0.45 if title else 0.1) + (0.2 if heads else 0.0)
    )
    axes = figure.subplots(
        len(rows),
        width,
        squeeze=False,
        gridspec_kw={"wspace": 0.06, "hspace": 0.06, "left": 1.8 / figure.get_figwidth()},
    )
    _margins(figure, bottom=0.05, top=(0.4 if title else 0.05) + (0.2 if heads else 0.0), right=0.1)
    for line, (name, x) in zip(axes, rows.items(), strict=True):
        for j, ax in enumerate(line):
            _show(ax, x[j] if j < len(x) else None)
        line[0].text(-0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8.5)
    for ax, head in zip(axes[0], heads or (), strict=False):
        ax.set_title(head, fontsize=8, pad=2, color="0.35")
    _title(figure, title)
    return figure


def trajectory(
    times: Sequence[float],
    states: Float[Tensor, "k n c h w"],
    denoised: Float[Tensor, "k n c h w"],
    *,
    title: str = "",
    scale: float = 0.62,
) -> Figure:
    """How n samples take shape: for each a row of states `x_t` above one of `E[x_0 | x_t]`, at k times.

    Pixels in [-1, 1], clipped. Raises ValueError for shapes that do not fit, ImportError without matplotlib.
    """
    if not len(times) == len(states) == len(denoised) or states.shape != denoised.shape:
        raise ValueError(
            f"expected as many states and denoised images as the {len(times)} times, "
            f"found shapes {tuple(states.shape)} and {tuple(denoised.shape)}"
        )
    k, n = states.shape[:2]
    figure = _figure(k * scale + 1.0, 2 * n * scale + 0.75)
    axes = figure.subplots(
        2 * n,
        k,
        squeeze=False,
        gridspec_kw={"wspace": 0.06, "hspace": 0.06, "left": 0.95 / figure.get_figwidth()},
    )
    _margins(figure, bottom=0.05, top=0.65, right=0.05)
    for i in range(n):
        for j in range(k):
            _show(axes[2 * i][j], states[j, i])
            _show(axes[2 * i + 1][j], denoised[j, i])
        for line, name in ((axes[2 * i], "$x_t$"), (axes[2 * i + 1], r"$E[x_0\,|\,x_t]$")):
            line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for ax, t in zip(axes[0], times, strict=True):
        ax.set_title(f"t = {t:.2g}", fontsize=8, pad=3, color="0.35")
    _title(figure, title)
    return figure


def save(figure: Figure, path: FilePath, dpi: int = 100) -> None:
    """Write a PNG with few bytes: at most 256 colours, which grey images do not notice."""
    from io import BytesIO

    from PIL import Image  # comes with matplotlib

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is missing: pip install 'scoresde[plots]'"
        ) from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _margins(figure: Figure, *, bottom: float, top: float, right: float) -> None:
    """Margins in inches."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(bottom=bottom / height, top=1 - top / height, right=1 - right / width)


def _title(figure: Figure, title: str) -> None:
    if title:
        figure.text(
            0.012, 1 - 0.1 / figure.get_figheight(), title, ha="left", va="top", fontsize=10, weight="bold"
        )


def _show(ax: Any, image: Tensor | None) -> None:
    ax.axis("off")
    if image is None:
        return
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected images of 1 or 3 channels, shape (c, h, w); found {tuple(image.shape)}")
    pixels = (image.detach().float().cpu().clamp(-1, 1).permute(1, 2, 0).numpy() + 1) / 2
    grey = {"cmap": "gray_r", "vmin": 0, "vmax": 1} if pixels.shape[2] == 1 else {}
    ax.imshow(pixels.squeeze(2) if grey else pixels, interpolation="nearest", **grey)
