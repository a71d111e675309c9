"""An algebraically reversible solver of the probability-flow ODE: its step can be undone exactly, so encoding
followed by decoding returns the input to rounding."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, Rows, evaluating
from ..grids import Grid
from ..schedules import check_numbers
from ..sde import LinearSDE
from ..tableau import FIELDS, NoiseSource, Step, Tableau, run
from .base import Callback, Card, Pair, Samples, check_calls, from_pair
from .singlestep import MIDPOINT, STAGES, singlestep_table
from .watch import Watch


@dataclass(frozen=True)
class Reversible:
    """Two coupled copies (y, z) of `x/(alpha^2 + sigma^2)^(1/2)`, with Psi_{s,t} the increment of an
    exponential one-step method from s to t:

        y' = c y + (1 - c) z + Psi_{s,t}(z),    z' = z - Psi_{t,s}(y')
        undone:  z = z' + Psi_{t,s}(y'),        y = (y' - (1 - c) z - Psi_{s,t}(z))/c

    (McCallum and Foster 2024, arXiv:2410.11648, with any base method.) What contracts in one copy expands in
    the difference of the two, so the scale is chosen such that the flow of standardised data hardly
    contracts. On a decreasing grid steps are done, on an increasing one undone. The latent is the pair:
    `decode(model, encode(model, x, solver), solver)` passes it on; a single tensor starts as y = z.
    """

    order: int
    coupling: float
    card: Card

    def __repr__(self) -> str:
        return f"reversible(order={self.order}, coupling={self.coupling})"

    def steps_for(self, calls: int) -> int:
        """The largest number of grid steps that takes at most `calls` network calls."""
        check_calls(calls, self.card.calls_per_step, self)
        return calls // self.card.calls_per_step

    @torch.no_grad()
    def solve(
        self,
        model: BaseDenoiser,
        x: Tensor | Pair,
        times: Grid | Tensor,
        *,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Run from `x` at times[0] to times[-1]; `noise` is not used."""
        started = time.perf_counter()
        grid = Grid.of(model.sde, times)
        if not bool(torch.isfinite(grid.lam).all()):
            raise ValueError(
                f"expected a grid with signal and noise at every node, found {grid}: a step to sigma = 0 "
                "cannot be undone"
            )
        scale = _scale(model.sde, grid.t).tolist()
        y, z = (copy / scale[0] for copy in from_pair(x))
        undo = float(grid.t[0]) < float(grid.t[-1])
        watch, path = Watch(repr(self), y), []
        with evaluating(model):
            there, back = self._increments(model, y, grid, watch)
            for k in range(len(grid)):
                if callback is not None:
                    kept = callback(
                        Step(k, float(grid.t[k]), y * scale[k], model(y * scale[k], grid.t[k].to(y.device)))
                    )
                    path.extend([] if kept is None else [kept])
                y, z = self._undone(y, z, there[k], back[k]) if undo else self._done(y, z, there[k], back[k])
        calls = watch.finish() + (len(grid) if callback is not None else 0)
        end = float(grid.t[-1])
        return Samples(
            y * scale[-1],
            calls,
            time.perf_counter() - started,
            path=tuple(path),
            end=end,
            companion=z * scale[-1],
        )

    def _done(self, y: Tensor, z: Tensor, there: Increment, back: Increment) -> Pair:
        c = self.coupling
        y = c * y + (1 - c) * z + there(z)
        return y, z - back(y)

    def _undone(self, y: Tensor, z: Tensor, there: Increment, back: Increment) -> Pair:
        """On an increasing grid the step to be undone led from its later node to its earlier one."""
        c = self.coupling
        z = z + there(y)
        return (y - (1 - c) * z - back(z)) / c, z

    def _increments(
        self, model: BaseDenoiser, y: Tensor, grid: Grid, watch: Watch
    ) -> tuple[list[Increment], list[Increment]]:
        """Psi from each node to the next, and from each to the one before; all prepared at once, so that no
        step sends anything to the device."""
        calls = self.order
        tables = [table for t in (grid.t, grid.t.flip(0)) for table in _base_tables(model.sde, t, calls)]
        rows = model.rows(torch.cat([table.times[:-1] for table in tables]), y)
        made = [
            Increment(table, _part(rows, i * calls, calls), _scale(model.sde, table.times).tolist(), watch)
            for i, table in enumerate(tables)
        ]
        return made[: len(grid)], made[: len(grid) - 1 : -1]


class Increment(NamedTuple):
    """Psi_{s,t}: u -> the change of u from s to t, the ends of a table; `scale` at the table's nodes."""

    table: Tableau
    rows: Rows
    scale: list[float]
    watch: Watch

    def __call__(self, u: Tensor) -> Tensor:
        moved = run(self.table, self.rows, u * self.scale[0], None, before=self._before)
        return moved / self.scale[-1] - u

    def _before(self, k: int, x: Tensor, F: Tensor) -> None:
        self.watch(F, float(self.table.times[k]))


def _part(rows: Rows, start: int, count: int) -> Rows:
    """Of prepared rows those from `start` on."""
    stop = start + count
    return Rows(lambda x, k: rows.evaluate(x, start + k), rows.a[start:stop], rows.b[start:stop])


def _scale(sde: LinearSDE, t: Tensor) -> Tensor:
    return sde.alpha(t).hypot(sde.sigma(t))


def _base_tables(sde: LinearSDE, t: Tensor, order: int) -> list[Tableau]:
    """The base method's tables from each time to the next, cut from that of the whole way: one by one they
    would take longer to make than small networks to run."""
    stages = {1: STAGES[1], 2: MIDPOINT}[order]
    whole = singlestep_table(
        sde, t[:-1], t[1:], stages, stored="noise", variable="sigma/alpha", name="reversible"
    )
    return [_cut(whole, start, start + order) for start in range(0, len(whole), order)]


def _cut(table: Tableau, start: int, stop: int) -> Tableau:
    """Rows of a table that use no outputs of other rows."""
    columns = (getattr(table, key)[start : stop + (key == "times")] for key in FIELDS)
    return Tableau(*columns, name=table.name)


def reversible(order: int = 2, coupling: float = 0.999) -> Reversible:
    """The reversible solver over Euler (order 1, two calls a step) or the midpoint rule (order 2, four calls
    a step) in sigma/alpha; `coupling` c in (0, 1] ties the two copies."""
    check_numbers(coupling=coupling)
    whole = isinstance(order, int) and not isinstance(order, bool)
    if not (whole and order in (1, 2) and 0 < coupling <= 1):
        raise ValueError(f"expected order 1 or 2 and 0 < coupling <= 1, found {order!r}, {coupling}")
    properties = frozenset({"marginal_exact", "clock_free", "scale_covariant"})
    return Reversible(
        order,
        coupling,
        Card(
            order,
            None,
            2 * order,
            False,
            "McCallum and Foster 2024, arXiv:2410.11648",
            properties,
            "none",
            memory=2,
        ),
    )
