"""The table that `compare` returns: one row a run, its fronts, and as text, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT = "scoresde.comparison/1"


@dataclass(frozen=True)
class Row:
    """One configuration with one number of calls.

    solver, grid   how they print in short
    budget         network calls that were asked for
    calls          network calls that were made, at most `budget` for solvers with fixed steps
    seconds        of the run, the making of the table not included
    memory         bytes: on CUDA the peak allocated above what was there before; else the states that the
                   solver keeps, the network's own memory not included; None if unknown
    error          a distance between laws, or the root mean square of the samples' distances (see
                   `About.measure`); `low` to `high` is its 95 % interval over the samples
    flips          share of samples that end elsewhere (further than `About.flip` off), not in `error`
    median         of the distances of all samples; None for distances between laws, like `flips`
    wins           share of the bootstrap's resamples in which no run of this budget is better
    """

    solver: str
    grid: str
    budget: int
    calls: int
    seconds: float
    memory: int | None
    error: float
    low: float
    high: float
    flips: float | None = None
    median: float | None = None
    wins: float | None = None

    @property
    def name(self) -> str:
        return configuration(self.solver, self.grid)

    @property
    def typical(self) -> float:
        """The median, or the error where there is none."""
        return self.error if self.median is None else self.median

    @property
    def score(self) -> float:
        """What rows are ordered by: `typical`, plus the share of flips where that is more than one in ten,
        for a run that loses so many samples is not good for being right on the others.

        A few samples make up most of the error, and change with the noises: on a trained network two sets of
        64 noises order 90 configurations of 20 calls alike to 0.83 by the error, to 0.998 by the median
        (Spearman).
        """
        flips = self.flips or 0.0
        return self.typical if flips <= MANY_FLIPS else self.typical + flips


MANY_FLIPS = 0.1


@dataclass(frozen=True)
class LeftOut:
    """A run that was not made, or gave no numbers, and why."""

    solver: str
    grid: str
    budget: int
    why: str


@dataclass(frozen=True)
class About:
    """What was measured, on what, and what it cost.

    n, shape, seed, end   samples, shape of one, seed of their noises, last time
    measure               what `Row.error` is
    flip                  distance beyond which a sample counts as ended elsewhere; None: not counted
    reference             what errors are distances to
    reference_error       how far the reference is from itself with half the calls, measured as rows are
    floor, floor_std      the metric's value for true samples, mean and deviation; None with a reference
    calls, seconds        spent in all, the reference included, what came from the cache not
    device                where
    interrupted           whether Ctrl-C ended it
    """

    n: int
    shape: tuple[int, ...]
    seed: int
    end: float
    measure: str
    flip: float | None
    reference: str
    reference_error: float | None
    floor: float | None
    floor_std: float | None
    calls: int
    seconds: float
    device: str
    interrupted: bool = False

    @property
    def resolution(self) -> float:
        """Errors below it cannot be told apart: that of the reference, or two deviations above the floor."""
        if self.floor is None:
            return self.reference_error or 0.0
        return self.floor + 2 * (self.floor_std or 0.0)


@dataclass(frozen=True)
class Comparison:
    """Rows by budget, best first within each; prints as a table of the best five of each and the fronts."""

    rows: tuple[Row, ...]
    about: About
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: (row.budget, row.score))))

    def budgets(self) -> list[int]:
        """The numbers of calls that were asked for, ascending."""
        return sorted({row.budget for row in self.rows})

    def ranking(self, budget: int) -> list[Row]:
        """The rows of one number of calls, best first."""
        return [row for row in self.rows if row.budget == budget]

    def best(self, calls: int) -> Row:
        """The best row that makes at most `calls` network calls. Raises ValueError if there is none."""
        fitting = [row for row in self.rows if row.calls <= calls]
        if not fitting:
            raise ValueError(f"expected a run with at most {calls} calls, found none in this comparison")
        return min(fitting, key=lambda row: row.score)

    def front(self, cost: Callable[[Row], float] | None = None) -> list[Row]:
        """The non-dominated rows, by rising cost: no other row is as cheap and as good, and better in one.
        Rows below `About.resolution` are equally good. Those whose samples all end elsewhere, or most of them
        infinitely far, are none.

        cost: `by_calls` if None; `by_seconds` is the other one that is printed.
        """
        cost = by_calls if cost is None else cost

        def told(row: Row) -> float:
            return max(row.score, self.about.resolution)

        kept: list[Row] = []
        for row in sorted(self.rows, key=lambda row: (cost(row), row.score)):
            finite = math.isfinite(row.error) and math.isfinite(row.score)
            if finite and (not kept or told(row) < told(kept[-1])):
                kept.append(row)
        return kept

    def table(self, top: int | None = None) -> str:
        """Rows as a table in Markdown: all, or the `top` best of each budget and whatever is on a front."""
        calls, seconds = self.front(), self.front(by_seconds)
        flips = any(row.median is not None for row in self.rows)
        lines = [_HEAD if flips else [cell for cell in _HEAD if cell not in _PAIRED]]
        for budget in self.budgets():
            for place, row in enumerate(self.ranking(budget)):
                marks = " ".join(
                    mark for mark, front in (("calls", calls), ("seconds", seconds)) if row in front
                )
                if top is None or place < top or marks:
                    lines.append(_cells(row, marks, flips))
        return _ruled(lines)

    def __str__(self) -> str:
        a = self.about
        head = [
            f"{len({row.name for row in self.rows})} configurations, {a.n} samples of shape {a.shape}, seed "
            f"{a.seed}, to t = {a.end:g}; {a.calls} network calls in {a.seconds:.0f} s on {a.device}",
            f"error: {a.measure}"
            + (", root mean square" if a.floor is None else "")
            + (f" without flips (samples more than {a.flip:.3g} off)" if a.flip is not None else "")
            + ("; rows are ordered by the median" if a.floor is None else ""),
            f"{'reference' if a.floor is None else 'data'}: {a.reference}"
            + (f"; from itself with half the calls: {a.reference_error:.1e}" if a.reference_error else "")
            + (f"; floor of true samples: {a.floor:.2g} +- {a.floor_std:.1g}" if a.floor is not None else ""),
        ]
        return "\n".join([*head, "", self.table(top=5), "", *self._notes()])

    def _notes(self) -> list[str]:
        names = [
            f"{row.calls} calls: {row.name} ({row.typical:.2g}"
            + (f", {_percent(row.flips)} flips)" if row.flips else ")")
            for row in self.front()
        ]
        lines = ["Non-dominated in calls: " + "; ".join(names)] if names else []
        if blurred := sum(row.score <= self.about.resolution for row in self.rows):
            what = "the reference's own error" if self.about.floor is None else "what true samples reach"
            lines.append(
                f"{blurred} of {len(self.rows)} runs are within {self.about.resolution:.2g}, {what}: among "
                "these the order says nothing, and the cheapest will do."
            )
        for why in dict.fromkeys(item.why for item in self.left_out):
            runs = [item for item in self.left_out if item.why == why]
            shown = ", ".join(f"{configuration(r.solver, r.grid)} with {r.budget} calls" for r in runs[:3])
            lines.append(
                f"Left out ({why}): {shown}" + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
            )
        return lines

    def to_json(self) -> str:
        """Everything as JSON, one row a line; infinite errors and medians as null."""
        parts = [
            f'"format": {json.dumps(FORMAT)}',
            f'"about": {_json(self.about)}',
            *(
                f'"{name}": [' + ",".join(f"\n {_json(item)}" for item in items) + "]"
                for name, items in (("rows", self.rows), ("left_out", self.left_out))
            ),
        ]
        return "{" + ",\n".join(parts) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """What `to_json` wrote. Raises ValueError for anything else."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(data["format"])
            about = About(**{**data["about"], "shape": tuple(data["about"]["shape"])})
            rows = tuple(Row(**{**row, **_infinite(row)}) for row in data["rows"])
            return cls(rows, about, tuple(LeftOut(**item) for item in data["left_out"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"expected JSON written by Comparison.to_json ({FORMAT}), found {str(text)[:80]!r}"
            ) from error

    def to_csv(self) -> str:
        """The rows as CSV with a header; unknown values empty."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        names = [field.name for field in fields(Row)]
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in self.rows)
        return file.getvalue()


def by_calls(row: Row) -> float:
    """The cost in network calls."""
    return row.calls


def by_seconds(row: Row) -> float:
    """The cost in seconds."""
    return row.seconds


def configuration(solver: str, grid: str) -> str:
    """How a solver on a grid is named."""
    return f"{solver} on {grid}" if grid else solver


def rank_agreement(one: Comparison, other: Comparison) -> dict[int, float]:
    """Spearman's rank correlation of the rows of two comparisons, for every budget that both have: 1 where
    they order their common configurations alike. NaN for fewer than three of these."""
    from scipy.stats import spearmanr

    found = {}
    for budget in one.budgets():
        first, second = ({row.name: row.score for row in c.ranking(budget)} for c in (one, other))
        common = [name for name in first if name in second]
        if common:
            found[budget] = math.nan
            if len(common) > 2:
                result: Any = spearmanr([first[name] for name in common], [second[name] for name in common])
                found[budget] = float(result.statistic)
    return found


_INFINITE = ("error", "low", "high")


def _infinite(row: Mapping[str, Any]) -> dict[str, float]:
    """What was infinite; a median, which distances between laws have not, where there are `wins`."""
    names = _INFINITE if row.get("wins") is None else (*_INFINITE, "median")
    return {name: math.inf for name in names if row[name] is None}


def _json(item: Any) -> str:
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(item).items()
    }
    return json.dumps(plain, allow_nan=False)


_PAIRED = ("median", "flips", "best in")
_HEAD = ["calls", *_PAIRED, "error", "95 % interval", "seconds", "MB", "front", "solver on grid"]


def _cells(row: Row, marks: str, flips: bool) -> list[str]:
    paired = ["-" if row.median is None else f"{row.median:.2e}", _percent(row.flips), _percent(row.wins)]
    calls = str(row.calls) if row.calls == row.budget else f"{row.calls} of {row.budget}"
    return [
        calls,
        *(paired if flips else []),
        f"{row.error:.2e}",
        f"{row.low:.2e} .. {row.high:.2e}",
        f"{row.seconds:.2g}",
        "-" if row.memory is None else f"{row.memory / 1e6:.2g}",
        marks,
        row.name,
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _ruled(lines: Sequence[Iterable[str]]) -> str:
    rows = [list(line) for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in ruled
    )
