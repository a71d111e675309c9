"""`scoresde sample` and `scoresde solvers`."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from torch import Tensor

from .. import checkpoint, plots, solvers
from ..checkpoint.files import check_place
from ..sampling import sample as draw
from .common import condition_of, device_named, parse_grid, parse_solver, shape_of


def sample(
    model: tyro.conf.Positional[Path],
    solver: str = "dpmpp",
    steps: int = 20,
    grid: str | None = None,
    end: float | None = None,
    n: int = 64,
    label: int | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    out: Path = Path("samples.png"),
    device: str = "auto",
) -> None:
    """Draw samples from a checkpoint.

    Args:
        model: the checkpoint.
        solver: a name from `scoresde solvers`, with options as in "dpmpp(order=3)", or a .json file from
            Tableau.to_json.
        steps: steps of the grid.
        grid: spacing of the grid, such as quadratic or "karras(rho=5)" (default: that of the process).
        end: last time of the grid (default: that of the process; 0 ends with the denoised data).
        n: how many samples.
        label: the class of all samples (default: all classes in turn).
        shape: of one sample, where the checkpoint does not say.
        seed: sample i is a function of seed and i.
        out: a .png picture or an .npy array.
        device: cpu, cuda, or auto: cuda if there is one.
    """
    if out.suffix not in (".png", ".npy"):
        raise ValueError(f"expected an output that ends in .png or .npy, found {out}")
    check_place(out)
    chosen, table_grid = parse_solver(solver)
    description = checkpoint.describe(model)
    denoiser = checkpoint.load(model, device=device_named(device))
    condition = condition_of(description, n, label, denoiser.device)
    spacing = table_grid if grid is None else parse_grid(grid)
    size = (n, *shape_of(description, shape))
    if out.suffix == ".png" and (len(size) != 4 or size[1] not in (1, 3)):
        raise ValueError(
            f"expected images (n, c, h, w) of 1 or 3 channels for a picture, found {size}: give --out "
            "samples.npy"
        )
    result = draw(
        denoiser,
        size,
        chosen,
        steps=steps,
        grid=spacing,
        end=end,
        seed=seed,
        condition=condition,
        progress=sys.stderr.isatty(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_samples(out, result.x)
    spent = f"{result.network_calls} network calls, {result.seconds:.1f} s, end t = {result.end:g}"
    print(f"{n} samples by {chosen}: {spent}, written to {out}")


def list_solvers() -> None:
    """List the solvers and what is known of them."""
    print(solvers.card())


def write_samples(out: Path, x: Tensor) -> None:
    if out.suffix == ".npy":
        import numpy as np

        np.save(out, x.cpu().numpy())
        return
    columns = min(16, len(x))
    plots.save(
        plots.image_rows({str(i): x[i : i + columns] for i in range(0, len(x), columns)}, columns=columns),
        out,
    )
