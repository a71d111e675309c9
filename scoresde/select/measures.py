"""From samples to errors with intervals: distances to a reference from the same noise, and between laws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..metrics import floor
from .comparison import MANY_FLIPS, Row
from .runs import Cost

Distance = Callable[[Tensor, Tensor], Any]  # (x, reference) -> (n,), or (x, data) -> float

CONFIDENCE = 0.95
RESAMPLES = 1000
GROUPS = 10
FLIP = 0.4  # in standard deviations of the reference; where modes are apart, so far off is in another


class Label(NamedTuple):
    """Which row a record belongs to; budget None: whatever it took."""

    solver: str
    grid: str
    budget: int | None


Record = dict[str, Any]  # calls, seconds, memory, and what a measure makes of the samples


def rms_distance(x: Float[Tensor, "n ..."], reference: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """The root mean square difference of each sample over its coordinates, float64."""
    return (x.double() - reference.double()).flatten(1).square().mean(1).sqrt()


class Paired:
    """Distances (n,) to a reference (n, ...) from the same noise. flip None: all samples count."""

    def __init__(self, reference: Tensor, metric: Distance, flip: float | None) -> None:
        self.reference, self.metric, self.flip = reference, metric, flip

    def __call__(self, x: Tensor) -> Record:
        found = torch.as_tensor(self.metric(x, self.reference), dtype=torch.float64).detach().cpu()
        if found.shape != (len(x),):
            raise ValueError(
                f"expected a metric (x, reference) -> distances of shape ({len(x)},), found "
                f"{tuple(found.shape)}"
            )
        return {"distances": found.nan_to_num(math.inf).tolist()}

    def rows(self, found: Sequence[tuple[Label, Record]]) -> Iterator[Row]:
        """The bootstrap draws the same samples for all rows, so that `wins` compares like with like."""
        groups: dict[int, list[tuple[Label, Record]]] = defaultdict(list)
        for label, record in found:
            groups[label.budget or record["calls"]].append((label, record))
        for budget, group in groups.items():
            d = torch.tensor([record["distances"] for _, record in group], dtype=torch.float64)
            errors, flips = self._scores(d, torch.ones(1, d.shape[1], dtype=torch.float64))
            drawn_errors, drawn_flips = self._bootstrap(d)
            tail = (1 - CONFIDENCE) / 2
            low, high = drawn_errors.quantile(
                torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=1, interpolation="nearest"
            )
            order = self._medians(d) + drawn_flips * (drawn_flips > MANY_FLIPS)  # `Row.score`
            wins = (order <= order.amin(0)).double().mean(1)
            for i, (label, record) in enumerate(group):
                yield Row(
                    label.solver,
                    label.grid,
                    budget,
                    *Cost(record["calls"], record["seconds"], record["memory"]),
                    error=float(errors[i]),
                    low=float(low[i]),
                    high=float(high[i]),
                    flips=None if self.flip is None else float(flips[i]),
                    median=float(d[i].median()),
                    wins=float(wins[i]),
                )

    def error(self, x: Tensor) -> float:
        """The error of samples, as rows have it."""
        d = torch.tensor([self(x)["distances"]], dtype=torch.float64)
        return float(self._scores(d, torch.ones_like(d))[0])

    def _scores(self, d: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Errors and flips, both (rows, R), of distances (rows, n) for R resamples with counts (R, n)."""
        near = (d <= (math.inf if self.flip is None else self.flip)).double()
        within = near @ counts.mT
        squares = torch.where(near > 0, d, 0.0).square() @ counts.mT
        errors = torch.where(within > 0, (squares / within).sqrt(), math.inf)
        return errors.squeeze(1), (1 - within / counts.sum(1)).squeeze(1)

    def _bootstrap(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Errors and flips, both (rows, RESAMPLES)."""
        found = [self._scores(d, counts) for counts in _resamples(d.shape[1])]
        errors, flips = (torch.cat([part[i].view(len(d), -1) for part in found], 1) for i in (0, 1))
        return errors, flips

    def _medians(self, d: Tensor) -> Tensor:
        """(rows, RESAMPLES): the lower medians of the resamples, like `Tensor.median`."""
        ordered, places = d.sort(dim=1)
        half = (d.shape[1] + 1) // 2
        found = []
        for counts in _resamples(d.shape[1]):
            for values, place in zip(ordered, places, strict=True):
                found.append(values[(counts[:, place].cumsum(1) >= half).int().argmax(1)])
        blocks = [torch.stack(found[i : i + len(d)]) for i in range(0, len(found), len(d))]
        return torch.cat(blocks, 1)


def _resamples(n: int) -> Iterator[Tensor]:
    """How often each of n samples is drawn (R, n) in RESAMPLES resamples, some at a time; always the same."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, 2**20 // n)
    for first in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - first), n)
        drawn = torch.randint(n, size, generator=generator)
        ones = torch.ones(size, dtype=torch.float64)
        yield torch.zeros(size, dtype=torch.float64).scatter_add_(1, drawn, ones)


class Laws:
    """A distance between the law of the samples and that of data (m, ...)."""

    flip = None

    def __init__(self, data: Tensor, metric: Distance) -> None:
        self.data, self.metric = data, metric

    def __call__(self, x: Tensor) -> Record:
        data = self.data.to(x.device)
        parts = torch.arange(len(x)).tensor_split(GROUPS)
        kept = [torch.cat([p for p in parts if p is not part]) for part in parts]
        # A metric for sets of one size goes on with sets of one size.
        same = len(data) == len(x)
        without = [float(self.metric(x[rows], data[: len(rows)] if same else data)) for rows in kept]
        return {"value": float(self.metric(x, data)), "without": without}

    def rows(self, found: Sequence[tuple[Label, Record]]) -> Iterator[Row]:
        from scipy.stats import t

        for label, record in found:
            value, without = record["value"], torch.tensor(record["without"], dtype=torch.float64)
            groups = len(without)
            # The delete-a-group jackknife: Efron and Stein 1981.
            spread = float(((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt())
            margin = float(t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * spread
            yield Row(
                label.solver,
                label.grid,
                label.budget or record["calls"],
                *Cost(record["calls"], record["seconds"], record["memory"]),
                error=value,
                low=value - margin,
                high=value + margin,
            )

    def floor(self, n: int) -> Any:
        """The metric for true samples: n of the data, or half of them, against the others."""
        part = min(n, len(self.data) // 2)
        return floor(self.metric, self.data, part, against=part if len(self.data) == n else None)
