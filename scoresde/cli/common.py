"""What several commands need: solvers and grids by name, the device, threads, the checkpoint's shape."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import grids, solvers
from ..sampling import GridFunction
from ..sde import LinearSDE
from ..select import STOCHASTIC_GRIDS
from ..solvers import Solver
from ..tableau import Tableau


def parse_solver(text: str) -> tuple[Solver, Tensor | None]:
    """The solver that `name`, `name(value, option=value, ...)` or `table.json` is; a table has its grid.

    Values are Python literals, or solvers in the same form, so that every solver can be given as it prints;
    nothing is evaluated. Raises ValueError for anything else.
    """
    entry = parse_entry(text)
    if isinstance(entry, Tableau):
        return solvers.from_tableau(entry), entry.ends
    return entry, None


def parse_entry(text: str) -> Solver | Tableau:
    """As `parse_solver`, but a table stays one."""
    if text.endswith(".json"):
        return Tableau.from_json(Path(text).read_text(encoding="utf-8"))
    return solvers.parse(text)


def parse_grid(text: str) -> GridFunction:
    """The grid of select.STOCHASTIC_GRIDS, where all grids of the pools are, or the function of
    scoresde.grids with options, that a text names; nothing is evaluated. Raises ValueError for anything else.
    """
    if text in STOCHASTIC_GRIDS:
        return STOCHASTIC_GRIDS[text]
    named = grids.parse(text)

    def spaced(sde: LinearSDE, steps: int, end: float | None = None) -> grids.Grid:
        try:
            return named(sde, steps, end)
        except TypeError as error:  # an option of another type, or a grid of other processes
            raise ValueError(f"{text}: {str(error).splitlines()[0]}") from error

    return spaced


def numbers(text: str) -> tuple[int, ...]:
    """The whole numbers of "5,10,20". Raises ValueError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'expected whole numbers as in "5,10,20", found {text!r}') from None


def read_array(path: Path) -> Tensor:
    """The samples (n, ...) of an .npy file, in float32. Raises ValueError for other files and arrays."""
    import numpy as np

    if path.suffix != ".npy":
        raise ValueError(f"expected an array in an .npy file, found {path}")
    try:
        array = torch.from_numpy(np.load(path))
    except (ValueError, TypeError, EOFError) as error:  # the last for an empty file
        raise ValueError(f"expected an array of numbers in {path}: {error}") from error
    if array.ndim < 2 or not array.is_floating_point():
        raise ValueError(
            f"expected floating numbers of shape (n, ...) in {path}, found {array.dtype} of shape "
            f"{tuple(array.shape)}; scale integer images to floats as for the training"
        )
    return array.float()


def shape_of(description: Mapping[str, Any], given: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = given or description["metadata"].get("shape")
    if not shape:
        raise ValueError(
            "expected the shape of a sample, which the checkpoint does not say: give it, as in --shape 3 8 8"
        )
    return tuple(shape)


def condition_of(
    description: Mapping[str, Any], n: int, label: int | None, device: torch.device
) -> dict[str, Tensor]:
    if n < 1:
        raise ValueError(f"expected n of at least 1 sample, found {n}")
    classes = (description["network"]["config"] or {}).get("classes")
    if classes is None and label is None:
        return {}
    if classes is None or not (label is None or -1 <= label < classes):
        expected = (
            "no label, for a network without classes"
            if classes is None
            else f"a label from 0 to {classes - 1}, or -1 for none"
        )
        raise ValueError(f"expected {expected}; found {label}")
    return {
        "label": torch.arange(n, device=device) % classes
        if label is None
        else torch.full((n,), label, device=device)
    }


def device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"expected a device of this machine, such as cpu, cuda or auto; found {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device


def machine(device: torch.device) -> dict[str, Any]:
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return {
        "device": named,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


@contextmanager
def interrupt_says(text: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(text()) from None


@contextmanager
def best_threads() -> Iterator[None]:
    """As many threads as make small convolutions fastest, at most one a core, unless OMP_NUM_THREADS is set.

    One thread wins where other processes use the cores, since threads wait for the slowest of them.
    """
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ:
        counts = sorted({1, min(cores, 2), min(cores, 4), min(cores, 8)})
        torch.set_num_threads(min(counts, key=_convolution_seconds))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _convolution_seconds(threads: int) -> float:
    """Mean time of a convolution of the size that training has most of."""
    torch.set_num_threads(threads)
    x, weight = torch.ones(128, 24, 8, 8), torch.ones(24, 24, 3, 3)
    torch.conv2d(x, weight, padding=1)
    start = time.perf_counter()
    for _ in range(50):
        torch.conv2d(x, weight, padding=1)
    return (time.perf_counter() - start) / 50
