"""What `compare` runs: samples from the same noises, timed, and kept in a folder as soon as they are done."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, evaluating
from ..grids import Grid
from ..sampling import sample, whole_sizes
from ..solvers.base import Samples, Solver

ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]+")  # of a function without a name of its own


class How(NamedTuple):
    """What samples depend on besides the model and the noise: a solver and its grid, or the ends of it; `key`
    stands for both."""

    solver: Solver
    grid: Grid | Tensor
    key: str


def sample_shape(shape: Any) -> tuple[int, ...]:
    """The shape of one sample, as a tuple. Raises ValueError for what is none."""
    sizes = whole_sizes(shape)
    if not sizes or 0 in sizes:
        raise ValueError(f"expected the shape of one sample, such as (3, 32, 32), found {shape!r}")
    return sizes


class Cost(NamedTuple):
    """Of one run: network calls on a batch, seconds, bytes."""

    calls: int
    seconds: float
    memory: int | None


class Runner:
    """Draws samples of `shape` (n, ...) from a model, always from the same noises, `batch` at a time; `calls`
    and `seconds` count what was spent so far."""

    def __init__(
        self,
        model: BaseDenoiser,
        shape: tuple[int, ...],
        seed: int,
        end: float,
        dtype: torch.dtype | None,
        batch: int,
    ) -> None:
        if batch < 1:
            raise ValueError(f"expected a batch of at least one sample, found {batch}")
        self.model, self.shape, self.seed, self.end = model, shape, seed, end
        self.dtype, self.batch = dtype, batch
        self.calls, self.seconds = 0, 0.0

    @property
    def parts(self) -> int:
        return math.ceil(self.shape[0] / self.batch)

    def __call__(self, how: How, tick: Callable[[int], Any] | None = None) -> Samples:
        """All samples; `network_calls` those of a batch, `seconds` of all. tick: told of every call."""
        n, parts, started = self.shape[0], [], time.perf_counter()
        for first in range(0, n, self.batch):
            rows = range(first, min(first + self.batch, n))
            parts.append(
                sample(
                    self.model.narrowed(slice(rows.start, rows.stop), n),
                    (len(rows), *self.shape[1:]),
                    how.solver,
                    grid=how.grid,
                    seed=self.seed,
                    ids=rows,
                    callback=None if tick is None else lambda step: tick(1),
                    dtype=self.dtype,
                )
            )
            self.calls += parts[-1].network_calls
        self.seconds += time.perf_counter() - started
        return replace(
            parts[0],
            x=torch.cat([part.x for part in parts]),
            network_calls=max(part.network_calls for part in parts),
            seconds=sum(part.seconds for part in parts),
        )

    def measured(self, how: How, kept: int | None) -> tuple[Tensor, Cost]:
        """The samples, and what they cost. kept: states that the solver holds; for memory off CUDA."""
        device = self.model.device
        cuda, before = device.type == "cuda", 0
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        drawn = self(how)
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        if cuda:
            memory = torch.cuda.max_memory_allocated(device) - before
        else:
            memory = None if kept is None else kept * drawn.x[: self.batch].nbytes
        return drawn.x, Cost(drawn.network_calls, seconds, memory)

    def noise(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Some normals where the model is, to tell functions apart by."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.to(self.model.device, torch.promote_types(self.model.dtype, torch.float32))

    def identity(self, condition: Mapping[str, Any]) -> str:
        """A hash of the noises, the condition, how the model prints, and what it makes of four noises, each
        at four times of its own: guidance, say, may differ at some times only.

        On one thread, for the last bits of a network depend on their number.
        """
        model, n = self.model, self.shape[0]
        some = min(4, n)
        x = self.noise((some, *self.shape[1:]), 0)
        span = torch.linspace(0, 0.97, 4 * some, dtype=torch.float64).view(4, some)
        times = model.sde.t_max + span * (self.end - model.sde.t_max)
        narrow, threads = model.narrowed(slice(0, some), n), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad(), evaluating(narrow):
                outputs = [narrow(x, t.to(x.device)) for t in times]
        finally:
            torch.set_num_threads(threads)
        noises = self.shape, self.seed, self.end, self.dtype, self.batch, model.device
        printed = ADDRESS.sub("", repr(model))
        return digest(*noises, model.sde, printed, *outputs, *condition, *condition.values())


def digest(*things: Any) -> str:
    """A hash of tensors by their bytes, and of anything else by how it prints."""
    total = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Tensor):
            values = thing.detach().cpu().contiguous()
            total.update(repr((values.shape, values.dtype)).encode())
            total.update(values.flatten().view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(thing).encode())
        total.update(b"\0")
    return total.hexdigest()


class Store:
    """A folder of records and tensors by key. Each is written beside its place and moved there, so it is
    whole or not there; what cannot be read counts as not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        self._write(f"{key}.json", json.dumps(record).encode())

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        try:
            return safetensors.torch.load((self.folder / f"{key}.safetensors").read_bytes())
        except (OSError, safetensors.SafetensorError):
            return None

    def put_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        owned = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        self._write(f"{key}.safetensors", safetensors.torch.save(owned))

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
