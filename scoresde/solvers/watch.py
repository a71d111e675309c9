"""Outputs that are not finite end a run: on the CPU at once, elsewhere after its last step, for no step waits
for a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 1024  # numbers that are kept as one tensor: one alone takes as much memory as a hundred
TOGETHER, SMALL = 8, 2**20  # states that are looked at together, and how many numbers such a one may have


class Outputs:
    """The largest magnitude in every output, NaN if one is in it: one number each, which stays on the device
    until `first_bad` reads them all."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.largest: list[Tensor] = []

    def __call__(self, out: Tensor) -> None:
        self._keep(torch.linalg.vector_norm(out, math.inf) if out.numel() else out.new_zeros(()))

    def _keep(self, largest: Tensor) -> None:
        self.largest.append(largest)
        if len(self.largest) == BLOCK:
            self.blocks, self.largest = [*self.blocks, torch.hstack(self.largest)], []

    def first_bad(self) -> int | None:
        """The number of the first output that was not finite."""
        rest = [torch.hstack(self.largest)] if self.largest else []
        finite = torch.cat([*self.blocks, *rest]).isfinite().tolist() if self.blocks or rest else []
        return finite.index(False) if False in finite else None


class States(Outputs):
    """The same of the states that outputs lead to, all of one shape, which nobody writes to. Small ones wait
    for each other: a GPU takes as long for one as for several, and as long as for a step."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Tensor] = []

    def __call__(self, out: Tensor) -> None:
        if out.numel() > SMALL:
            super().__call__(out)
            return
        self.waiting.append(out)
        if len(self.waiting) == TOGETHER:
            self._look()

    def first_bad(self) -> int | None:
        """The number of the first state that was not finite."""
        if self.waiting:
            self._look()
        return super().first_bad()

    def _look(self) -> None:
        seen, self.waiting = torch.stack(self.waiting).flatten(1), []
        none = seen.new_zeros(len(seen))
        self._keep(torch.linalg.vector_norm(seen, math.inf, dim=1) if seen.numel() else none)


class Watch:
    """Counts network calls and ends the run at the first output that is not finite.

    On the CPU at once; elsewhere by `finish`, without reading the device before.
    """

    def __init__(self, name: str, x: Tensor) -> None:
        self.name, self.times = name, list[float]()
        self.outputs = None if x.device.type == "cpu" else Outputs()

    def __call__(self, out: Tensor, t: float) -> None:
        """See the output of a call at time t."""
        self.times.append(t)
        if self.outputs is not None:
            self.outputs(out)
        elif not out.isfinite().all():
            raise self._error(len(self.times) - 1)

    def finish(self) -> int:
        """The number of calls. Raises FloatingPointError if one of them was not finite."""
        bad = None if self.outputs is None else self.outputs.first_bad()
        if bad is not None:
            raise self._error(bad)
        return len(self.times)

    def _error(self, call: int) -> FloatingPointError:
        return FloatingPointError(
            f"{self.name}: the network returned NaN or Inf at call {call + 1}, t = {self.times[call]:.6g}; "
            "check the model, its dtype and its inputs there"
        )
