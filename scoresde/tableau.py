"""A fixed-grid solver is a table: one row per network call, one running state x.

    m_k = skip_k x + out_k D(x, t_k)
    x  <- keep_k x + sum_j mix_kj m_{k-j} + noise_k eps_k            from t_k to t_{k+1}

The coefficients are float64 on the host. `run` executes any table on any device; the same executor applied to
unit vectors gives the table's canonical form, and applied to the affine denoiser of Gaussian data the exact
law of its output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Rows, checked
from .laws import Gaussian
from .sde import LinearSDE

NoiseSource = Callable[[int, Sequence[int]], Tensor]
FIELDS = ("times", "skip", "out", "keep", "mix", "noise")


class Step(NamedTuple):
    """What a callback sees before row k is applied: the state `x` at time `t`, and `denoised`, D(x, t).

    Of adaptive solvers k is the last network call, and x and denoised are those samples of the batch that
    still run, in their order, which ones it does not say. Each is at a time of its own, to which its
    `denoised` belongs; `t` is the largest of these times. Run one sample for a path with its times.
    """

    k: int
    t: float
    x: Tensor
    denoised: Tensor


class Canonical(NamedTuple):
    """States of a table as linear forms: `x_k = a_k x_0 + sum_j B_kj D_j + sum_j C_kj eps_j`, k = 0..K."""

    times: Tensor
    a: Tensor
    B: Tensor
    C: Tensor


@dataclass(frozen=True, eq=False)
class Tableau:
    """Coefficients of a solver on a grid: `times` (K + 1,), `skip, out, keep, noise` (K,), `mix` (K, H);
    float64, CPU.

    Row k may use the outputs of rows k, k - 1, ..., k - H + 1. The state x_0 is one at `start`, which is
    times[0] unless the first call is about another time than that of its state (of almost pure noise a model
    knows little, whatever it is asked: a little later it knows more). Raises ValueError for wrong shapes,
    non-finite numbers, or a row that reads outputs from before the first row.
    """

    times: Tensor
    skip: Tensor
    out: Tensor
    keep: Tensor
    mix: Tensor
    noise: Tensor
    name: str = dataclass_field(default="tableau")
    start: float | None = None

    def __post_init__(self) -> None:
        for key in FIELDS:
            try:
                value = torch.as_tensor(getattr(self, key), dtype=torch.float64).detach().cpu()
            except (TypeError, ValueError, RuntimeError):
                found = getattr(self, key)
                raise TypeError(f"expected a tensor of numbers as {key}, found {found!r}") from None
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"expected finite coefficients in {self.name}, found {key} = {value}; where alpha or "
                    "sigma is 0 some rates are infinite: keep a little away from that end"
                )
            object.__setattr__(self, key, value)
        rows = self.keep.numel()
        found = {key: tuple(getattr(self, key).shape) for key in FIELDS}
        expected = {
            "times": (rows + 1,),
            "skip": (rows,),
            "out": (rows,),
            "keep": (rows,),
            "mix": (rows, *self.mix.shape[1:]),
            "noise": (rows,),
        }
        if self.mix.numel() == 0 or self.mix.ndim != 2 or found != expected:
            raise ValueError(f"expected shapes {expected} with mix (K, H) and K, H >= 1, found {found}")
        before = torch.arange(self.mix.shape[1]) > torch.arange(rows)[:, None]
        if bool((self.mix[before] != 0).any()):
            raise ValueError(
                "expected rows that use outputs of this table only; found weights on outputs before its "
                "first row"
            )
        if self.start is not None and not (isinstance(self.start, float) and math.isfinite(self.start)):
            raise ValueError(f"expected None or a finite time as start of {self.name}, found {self.start!r}")

    @property
    def nodes(self) -> Tensor:
        """(K + 1,): the times of the states."""
        if self.start is None:
            return self.times
        return torch.cat([self.times.new_tensor([self.start]), self.times[1:]])

    @property
    def ends(self) -> Tensor:
        """(2,): where a run starts, and where it ends."""
        return self.nodes[[0, -1]]

    def __len__(self) -> int:
        """The number of network calls."""
        return len(self.keep)

    def __add__(self, other: Tableau) -> Tableau:
        """This table, then `other` from where it ended."""
        if not isinstance(other, Tableau):
            return NotImplemented
        return join([self, other])

    def __repr__(self) -> str:
        late = "" if self.start is None else f", from t = {self.start:.5g}"
        head = f"{self.name}: {len(self)} calls, history {self.mix.shape[1]}{late}"
        lines = ["   k          t ->          t       skip        out       keep      noise  mix"]
        shown = range(len(self)) if len(self) <= 12 else [*range(5), *range(len(self) - 5, len(self))]
        for k in shown:
            numbers = [self.skip[k], self.out[k], self.keep[k], self.noise[k]]
            mix = " ".join(f"{w:.5g}" for w in self.mix[k].tolist())
            lines.append(
                f"{k:4d} {self.times[k]:10.5g} -> {self.times[k + 1]:10.5g} "
                + " ".join(f"{float(n):10.5g}" for n in numbers)
                + f"  {mix}"
            )
        return "\n".join([head, *lines])

    def to_json(self) -> str:
        """The table as JSON; floats survive exactly."""
        return json.dumps(
            {
                "format": "scoresde.tableau/1",
                "name": self.name,
                **({} if self.start is None else {"start": self.start}),
                **{key: getattr(self, key).tolist() for key in FIELDS},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Tableau:
        """The table written by `to_json`. Raises ValueError for anything else."""
        try:
            data = json.loads(text)
        except (TypeError, ValueError):
            data = None
        if (
            not isinstance(data, dict)
            or data.get("format") != "scoresde.tableau/1"
            or set(FIELDS) - set(data)
        ):
            raise ValueError(
                f"expected JSON written by Tableau.to_json with fields {FIELDS}, found {str(text)[:80]!r}"
            )
        try:
            columns = {key: torch.tensor(data[key], dtype=torch.float64) for key in FIELDS}
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"expected lists of numbers as {FIELDS}, found {str(text)[:80]!r}") from None
        return cls(
            **columns,
            name=str(data.get("name", "tableau")),
            start=data.get("start"),
        )

    def canonical(self) -> Canonical:
        """Coefficients of every state over the initial state, the outputs D_k and the noises. Two solvers are
        the same iff these agree."""
        rows = len(self)
        unit = torch.eye(1 + 2 * rows, dtype=torch.float64)
        states = [unit[0]]
        run(
            self,
            Rows(lambda x, k: unit[1 + k], [0.0] * rows, [1.0] * rows),
            unit[0],
            lambda k, shape: unit[1 + rows + k],
            after=states.append,
        )
        stacked = torch.stack(states)
        return Canonical(self.times, stacked[:, 0], stacked[:, 1 : 1 + rows], stacked[:, 1 + rows :])

    @torch.no_grad()
    def defect(self, sde: LinearSDE) -> Tensor:
        """(K, 2): by how much each row misses the point-mass law. On data concentrated at 1 the state should
        keep mean alpha and standard deviation sigma.

        Column 0: `keep_k alpha_k + sum_j mix_kj (skip_{k-j} alpha_{k-j} + out_{k-j}) - alpha_{k+1}`. Column
        1: variance of the state after row k, minus sigma_{k+1}^2.
        """
        alpha, sigma = sde.alpha(self.nodes), sde.sigma(self.nodes)
        output = self.skip * alpha[:-1] + self.out
        history = (
            torch.nn.functional.pad(output, (self.mix.shape[1] - 1, 0))
            .unfold(0, self.mix.shape[1], 1)
            .flip(1)
        )
        mean = self.keep * alpha[:-1] + (self.mix * history).sum(1) - alpha[1:]
        form = self.canonical()
        variance = (form.a * sigma[0]) ** 2 + form.C.square().sum(1) - sigma**2
        return torch.stack([mean, variance[1:]], 1)

    def law(self, gaussian: Gaussian, sde: LinearSDE, prior: Gaussian | None = None) -> Gaussian:
        """The exact law of the output on Gaussian data with the exact denoiser, started from the sde's prior
        or from `prior`."""
        return output_law(self, gaussian, sde, prior)


def join(tables: Sequence[Tableau]) -> Tableau:
    """The tables one after the other, each starting where the one before ends."""
    for before, after in pairwise(tables):
        if not bool(torch.isclose(before.times[-1], after.nodes[0], rtol=1e-12, atol=0)):
            raise ValueError(
                f"expected each table to start where the one before ends, found {before.times[-1].item()} "
                f"and {after.nodes[0].item()}"
            )
        if after.start is not None:
            raise ValueError(
                "expected only the first table to ask about another time than that of its start, found "
                f"{after.name}, which starts at {after.start} and asks about {after.times[0].item()}"
            )
    width = max(table.mix.shape[1] for table in tables)
    mix = torch.cat([torch.nn.functional.pad(table.mix, (0, width - table.mix.shape[1])) for table in tables])
    joined = {
        key: torch.cat([getattr(table, key) for table in tables]) for key in ("skip", "out", "keep", "noise")
    }
    times = torch.cat([*(table.times[:-1] for table in tables), tables[-1].times[-1:]])
    name = " + ".join(dict.fromkeys(table.name for table in tables))
    return Tableau(times, mix=mix, name=name, start=tables[0].start, **joined)


def run(
    table: Tableau,
    rows: Rows,
    x: Tensor,
    noise: NoiseSource | None,
    *,
    before: Callable[[int, Tensor, Tensor], None] | None = None,
    after: Callable[[Tensor], Tensor | None] | None = None,
) -> Tensor:
    """The executor. `rows` is a denoiser prepared for `table.times[:-1]`; `noise(k, shape)` is only asked for
    rows with noise.

    No host-device traffic, no branch on device values. `before(k, x, F)` sees each call's state and output,
    `after(x)` each new state; a state that it returns takes its place.
    """
    return loop(coefficients(table, rows, x.dtype), rows.evaluate, x, noise, before=before, after=after)


class Row(NamedTuple):
    """A row as Python numbers, fused with a denoiser `D = a x + b F`:

        x <- keep x + gain F + noise eps + what earlier rows have added in advance

    `ahead` lists (j, c, d): c x + d F is what this row adds, in advance, to the state after the j-th row from
    here.
    """

    keep: float
    gain: float
    noise: float
    ahead: tuple[tuple[int, float, float], ...]


class Coefficients(NamedTuple):
    """What `loop` needs of a table: its name, how many rows ahead a row adds to, and the rows."""

    name: str
    reach: int
    rows: list[Row]


def coefficients(table: Tableau, rows: Rows, dtype: torch.dtype) -> Coefficients:
    """The table with `m_k = skip x + out D = c x + d F` put in, for states of a dtype."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (rows.a, rows.b))
    on_x, on_F = table.skip + table.out * a, table.out * b
    # later[j][k] is the weight that row k + j gives to m_k
    later = [
        torch.nn.functional.pad(column[j:], (0, min(j, len(column)))) for j, column in enumerate(table.mix.T)
    ]
    settled = _settled if dtype == torch.float32 else list
    x_weights = [settled((weight * on_x).tolist()) for weight in later[1:]]
    F_weights = [settled((weight * on_F).tolist()) for weight in later]
    keep = settled((table.keep + later[0] * on_x).tolist())
    lags = range(1, len(later))
    made = [
        Row(
            keep[k],
            F_weights[0][k],
            noise,
            tuple(
                (j, x_weights[j - 1][k], F_weights[j][k])
                for j in lags
                if x_weights[j - 1][k] or F_weights[j][k]
            ),
        )
        for k, noise in enumerate(table.noise.tolist())
    ]
    return Coefficients(table.name, len(later) - 1, made)


def _settled(column: list[float]) -> list[float]:
    """The numbers, rounded to the 24 bits of float32; what one loses the next one gets.

    So their sums along a run are right to one rounding. Rounded one by one, a coefficient that hardly changes
    is off by the same amount in every row, and a thousand such errors add up. A number that float32 has
    stays as it is (the last row to data returns D itself), and none gets more than its own rounding.
    """
    settled, carry = [], 0.0
    for value in column:
        rounded = _single(value)
        if rounded != value:
            wanted = value + carry if abs(carry) <= 2**-23 * abs(value) else value
            rounded = _single(wanted)
            carry = wanted - rounded
        settled.append(rounded)
    return settled


def _single(value: float) -> float:
    """To the nearest number of 24 bits, by Veltkamp's splitting (Dekker 1971, doi 10.1007/BF01397083)."""
    split = value * (2**29 + 1.0)
    return split - (split - value)


def loop(
    c: Coefficients,
    evaluate: Callable[[Tensor, int], Tensor],
    x: Tensor,
    noise: NoiseSource | None,
    *,
    before: Callable[[int, Tensor, Tensor], None] | None = None,
    after: Callable[[Tensor], Tensor | None] | None = None,
) -> Tensor:
    """The part of `run` that works on tensors: what torch.compile traces as one graph, and a CUDA graph
    captures.

    A row is added to the states it enters as soon as it is known (the transposed form of a linear filter),
    so that no output is kept: a network may write the next one where this one is. The large term `keep x`
    comes last, so that a state is rounded once a row.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected a floating state, found {x.dtype}; scale integer images to floats first")
    later = nothing_ahead(c, x)
    for k, row in enumerate(c.rows):
        F = checked(evaluate(x, k), x)
        if before is not None:
            before(k, x, F)
        z = None
        if row.noise:
            if noise is None:
                raise ValueError(f"{c.name} is stochastic: expected a noise source, found None")
            z = noise(k, x.shape)
        x, later = advance(row, x, F, z, later)
        if after is not None:
            changed = after(x)
            x = x if changed is None else changed
    return x


def nothing_ahead(c: Coefficients, x: Tensor) -> list[Tensor]:
    """Parts of the states after the first row, the second, ..., that earlier rows have added: a shared zero,
    which stays in the last place, beyond the reach of any row."""
    return [x.new_zeros(())] * (c.reach + 1)


def advance(
    row: Row, x: Tensor, F: Tensor, z: Tensor | None, later: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One row: the next state, and what is now known of the states after it. `z` are the normals of a row
    with noise."""
    zero = later[-1]
    fresh = _plus(later[0], F, row.gain, zero)
    if z is not None:
        fresh.add_(z, alpha=row.noise)
    fresh.add_(x, alpha=row.keep)
    later = [*later[1:], zero]
    for j, on_x, on_F in row.ahead:
        later[j - 1] = part = _plus(later[j - 1], F, on_F, zero)
        if on_x:
            part.add_(x, alpha=on_x)
    return fresh, later


def _plus(part: Tensor, F: Tensor, weight: float, zero: Tensor) -> Tensor:
    """part + weight F, in place but for the shared zero, from which `add` is faster than a product."""
    return part.add(F, alpha=weight) if part is zero else part.add_(F, alpha=weight)


@torch.no_grad()
def output_law(table: Tableau, gaussian: Gaussian, sde: LinearSDE, prior: Gaussian | None = None) -> Gaussian:
    """See `Tableau.law`. In the eigenbasis of the data every direction is a scalar recursion; the executor
    runs it on (constant, initial state, noises)."""
    if not isinstance(gaussian, Gaussian):
        raise TypeError(f"expected a laws.Gaussian, whose output law is Gaussian too, found {gaussian!r}")
    basis, values = gaussian.eigen()
    mean = gaussian.mean.flatten()
    center = mean if basis is None else basis.T @ mean
    times, rows = table.times[:-1], len(table)
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    gain = (
        alpha * values[:, None] / (alpha**2 * values[:, None] + sigma**2)
    )  # D = center + gain (x - alpha center)
    unit = torch.eye(rows + 2, dtype=torch.float64)

    def exact(x: Tensor, k: int) -> Tensor:
        return gain[:, k, None] * x + (center * (1 - gain[:, k] * alpha[k]))[:, None] * unit[0]

    start = unit[1].expand(len(values), -1)
    form = run(
        table, Rows(exact, [0.0] * rows, [1.0] * rows), start, lambda k, shape: unit[k + 2].expand(shape)
    )
    constant, slope, noise = form[:, 0], form[:, 1], form[:, 2:].square().sum(1)

    def back(v: Tensor) -> Tensor:
        return v if basis is None else basis @ v

    if prior is None:
        return Gaussian.from_eigen(
            basis, back(constant).view_as(gaussian.mean), (slope * sde.prior_std) ** 2 + noise
        )
    frame = torch.eye(len(values), dtype=torch.float64) if basis is None else basis
    through = frame * slope @ frame.T
    moved = back(constant) + through @ prior.mean.flatten()
    return Gaussian(moved.view_as(gaussian.mean), through @ prior.cov @ through.T + frame * noise @ frame.T)


def check_finite(table: Tableau, k: int, x: Tensor, F: Tensor) -> None:
    """Raises if what the network returned for row k is not finite, naming call and time. Reads one number:
    for the CPU."""
    # The sum is cheap, and may overflow by itself.
    if not math.isfinite(F.sum().item()) and not F.isfinite().all():
        raise not_finite(table, k, (~F.isfinite()).reshape(len(F), -1).any(1).nonzero()[:, 0].tolist())


def not_finite(table: Tableau, k: int, samples: Sequence[int] = ()) -> FloatingPointError:
    """The error that names call, time and quantity, and the samples where they are known."""
    where = (
        f"; found in samples {', '.join(map(str, samples[:8]))}{' ...' * (len(samples) > 8)}"
        if samples
        else ""
    )
    return FloatingPointError(
        f"{table.name}: the network returned NaN or Inf at call {k + 1} of {len(table)}, t = "
        f"{table.times[k].item():.6g}{where}; "
        "check the model, its dtype and its inputs there"
    )
