"""Time grids: N steps are N + 1 strictly decreasing nodes from `t_max` to `end`.

Every function here has the form `(sde, steps, end=None, **options) -> Grid`; `end=None` is `sde.default_end`.
Where half-log-SNR `lam` is infinite (no noise at the end, or no signal at the start) a grid that is spaced in
`lam` puts that node alone and spaces the others from the nearest regular one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .schedules import Tabulated, check_numbers
from .sde import VPSDE, LinearSDE
from .text import Kind, read_call


@dataclass(frozen=True)
class Grid:
    """Nodes of a solver, each with its time `t`, half-log-SNR `lam = log(alpha/sigma)` and the label `t N -
    1` (or t) of a network that counts.

    All three are float64 on the CPU, of shape (steps + 1,), strictly monotone.
    """

    t: Tensor
    lam: Tensor
    label: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, sde: LinearSDE, t: Tensor | Grid) -> Grid:
        """The validated grid on the times `t` (N + 1,); ends that are those of the SDE's range to the
        rounding of a dtype narrower than float64 become just those. Raises ValueError if they do not strictly
        decrease within the range, or if a Grid is another SDE's."""
        if isinstance(t, Grid):
            if not torch.equal(t.lam, 0.5 * sde.log_snr(t.t)):
                raise ValueError(
                    f"expected a grid made for {sde}, found one whose log-SNR is not that of its times "
                    f"there: {t}; make it anew, or pass its times"
                )
            return t
        try:
            given = torch.as_tensor(t).detach().cpu()
            t = given.double()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"expected a Grid or a tensor of decreasing times, found {t!r}") from None
        if t.ndim != 1 or len(t) < 2:
            raise ValueError(
                f"expected a one-dimensional grid of at least two times, found shape {tuple(t.shape)}"
            )
        if not bool((t.diff() < 0).all()):
            raise ValueError(
                f"expected strictly decreasing times from t_max={sde.t_max} to the end, found {_shown(t)}"
            )
        last = -2 if float(sde.sigma(t[-1])) == 0 else -1  # with noise
        t = _on_the_range(t, given.dtype, sde, last)
        if not (float(t[last]) >= sde.t_min * (1 - 1e-12) and float(t[0]) <= sde.t_max * (1 + 1e-12)):
            raise ValueError(
                f"expected times in [{sde.t_min}, {sde.t_max}] for {sde}, found {_shown(t)}, from "
                f"{t[0].item()} to {t[last].item()}"
            )
        lam = 0.5 * sde.log_snr(t)
        if not bool((lam.diff() > 0).all()):
            raise ValueError(
                f"expected times that float64 tells apart in log-SNR, found lam = {_shown(lam)}: take fewer "
                "steps or a later end"
            )
        schedule = getattr(sde, "schedule", None)
        label = t * schedule.steps - 1 if isinstance(schedule, Tabulated) else t.clone()
        return cls(t, lam, label)

    def reversed(self) -> Grid:
        """The same nodes from the end to t_max: for encoding with a deterministic solver."""
        return Grid(self.t.flip(0), self.lam.flip(0), self.label.flip(0))

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.t) - 1

    def __repr__(self) -> str:
        return f"Grid({len(self)} steps, t={_shown(self.t)}, lam={_shown(self.lam)})"


def _on_the_range(t: Tensor, dtype: torch.dtype, sde: LinearSDE, last: int) -> Tensor:
    """The times t, of which the first is t_max and the one at `last` is t_min if they are so to the rounding
    of the dtype that they were given in: float32 has most ends of a range a little outside or inside of it.
    """
    if dtype == torch.float64 or not dtype.is_floating_point:
        return t
    t, eps = t.clone(), torch.finfo(dtype).eps
    for k, end in ((0, sde.t_max), (last, sde.t_min)):
        if abs(float(t[k]) - end) <= eps * abs(end):
            t[k] = end
    return t


def _shown(values: Tensor) -> str:
    listed = values.tolist()
    return str([round(v, 6) for v in (listed if len(listed) <= 6 else listed[:3] + listed[-2:])])


@torch.no_grad()
def _range(sde: LinearSDE, steps: int, end: float | None) -> tuple[float, float]:
    """(t_max, end) after checking the arguments."""
    if not isinstance(sde, LinearSDE):
        raise TypeError(f"expected an SDE to make a grid for, found {sde!r}")
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"expected a whole number of steps >= 1, found {steps!r}")
    check_numbers(end=sde.default_end if end is None else end)
    last = float(sde.default_end if end is None else end)
    if not (sde.t_min <= last < sde.t_max or (last < sde.t_max and float(sde.sigma(last)) == 0)):
        raise ValueError(f"expected an end in [{sde.t_min}, {sde.t_max}) or 0, found {end}")
    return float(sde.t_max), last


def _fractions(steps: int) -> Tensor:
    return torch.arange(steps + 1, dtype=torch.float64) / steps


@torch.no_grad()
def _in_time(
    sde: LinearSDE,
    steps: int,
    end: float | None,
    shape: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> Grid:
    """Nodes equidistant in `shape(t)`; a noiseless end below t_min is set apart."""
    start, last = _range(sde, steps, end)
    if last < sde.t_min and steps > 1:
        return Grid.of(
            sde,
            torch.cat(
                [
                    _in_time(sde, steps - 1, sde.t_min, shape, inverse).t,
                    torch.tensor([last], dtype=torch.float64),
                ]
            ),
        )
    ends = shape(torch.tensor([start, last], dtype=torch.float64))
    t = inverse(ends[0] + _fractions(steps) * (ends[1] - ends[0]))
    t[0], t[-1] = start, last
    return Grid.of(sde, t)


@torch.no_grad()
def _in_lam(
    sde: LinearSDE,
    steps: int,
    end: float | None,
    shape: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> Grid:
    """Nodes equidistant in `shape(lam)`, with nodes of infinite lam set apart."""
    start, last = _range(sde, steps, end)
    head = [start] if float(sde.log_snr(start)) == -math.inf else []
    tail = [last] if float(sde.log_snr(last)) == math.inf else []
    inner = steps + 1 - len(head) - len(tail)
    if inner < 2:  # too few nodes left to space anything: one step, or two with both ends set apart
        middle = [float(sde.default_end)] * (steps - 1)
        return Grid.of(sde, torch.tensor([start, *middle, last], dtype=torch.float64))
    regular_last = float(sde.default_end) if tail else last
    # The regular node nearest to a start without signal mirrors the default end.
    regular_start = float(sde.time(-sde.log_snr(sde.default_end))) if head else start
    if not regular_last < regular_start:
        raise ValueError(
            f"expected an end below {regular_start:.6g}, where the nodes of finite log-SNR begin, found "
            f"{regular_last:.6g}; take a grid that is spaced in t, such as grids.uniform"
        )
    lam = 0.5 * sde.log_snr(torch.tensor([regular_start, regular_last], dtype=torch.float64))
    ends = shape(lam)
    t = sde.time(2 * inverse(ends[0] + _fractions(inner - 1) * (ends[1] - ends[0])))
    t[0], t[-1] = regular_start, regular_last
    return Grid.of(sde, torch.cat([t.new_tensor(head), t, t.new_tensor(tail)]))


def uniform(sde: LinearSDE, steps: int, end: float | None = None) -> Grid:
    """Equidistant in t."""
    return _in_time(sde, steps, end, lambda t: t, lambda u: u)


def power(sde: LinearSDE, steps: int, end: float | None = None, *, exponent: float = 2.5) -> Grid:
    """Equidistant in `t^(1/exponent)`: 1 is `uniform`, 2 `quadratic`; more puts more nodes near the end."""
    check_numbers(exponent=exponent)
    if not 0 < exponent < math.inf:
        raise ValueError(f"expected exponent > 0, found {exponent}")
    return _in_time(sde, steps, end, lambda t: t ** (1 / exponent), lambda u: u**exponent)


def quadratic(sde: LinearSDE, steps: int, end: float | None = None) -> Grid:
    """Equidistant in the square root of t (the "quadratic" spacing of Song et al. 2021, arXiv:2010.02502)."""
    return _in_time(sde, steps, end, Tensor.sqrt, Tensor.square)


def log_snr(sde: LinearSDE, steps: int, end: float | None = None) -> Grid:
    """Equidistant in log-SNR (Lu et al. 2022, arXiv:2206.00927)."""
    return _in_lam(sde, steps, end, lambda lam: lam, lambda u: u)


def karras(sde: LinearSDE, steps: int, end: float | None = None, *, rho: float = 7.0) -> Grid:
    """Equidistant in `(sigma/alpha)^(1/rho)` (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    check_numbers(rho=rho)
    if not 0 < rho < math.inf:
        raise ValueError(f"expected rho > 0, found {rho}")
    return _in_lam(sde, steps, end, lambda lam: (-lam / rho).exp(), lambda u: -rho * u.log())


def blend(
    sde: LinearSDE,
    steps: int,
    end: float | None = None,
    *,
    one: Callable[..., Grid],
    other: Callable[..., Grid],
    weight: float = 0.5,
) -> Grid:
    """Node by node between two grids: `t_k = weight one_k + (1 - weight) other_k`.

    `power(exponent=3)` with a little of `karras`, for example, has most nodes where the first has them, and
    smaller first steps. Raises ValueError for a weight outside [0, 1], TypeError for what is no function.
    """
    check_numbers(weight=weight)
    for name, grid in {"one": one, "other": other}.items():
        if not callable(grid):
            raise TypeError(f"{name}: expected a function such as grids.karras, found {grid!r}")
    if not 0 <= weight <= 1:
        raise ValueError(f"expected a weight in [0, 1], found {weight}")
    return Grid.of(sde, other(sde, steps, end).t.lerp(one(sde, steps, end).t, weight))  # keeps the ends


def ddpm(sde: LinearSDE, steps: int, end: float | None = None, *, spacing: str = "trailing") -> Grid:
    """Nodes i/N of a DDPM chain (of a tabulated VP-SDE), `steps` of them and then `end` (None: 0, the data).

    spacing, as the labels 0..N-1 of public code (i = label + 1): "trailing" N, N - N/steps, ...; "leading"
    labels 0, N//steps, 2 (N//steps), ...; "linspace" labels from N - 1 down to 0. (Lin et al. 2023,
    arXiv:2305.08891, table 2.)
    """
    if not (isinstance(sde, VPSDE) and isinstance(sde.schedule, Tabulated)):
        raise TypeError(f"expected a VP-SDE made by VPSDE.from_betas, found {sde}; use another grid")
    n = sde.schedule.steps
    _range(sde, steps, 0.0 if end is None else end)
    if steps > n:
        raise ValueError(f"expected at most {n} steps, one for each index of the chain, found {steps}")
    k = torch.arange(steps, dtype=torch.float64)
    spacings = {
        "trailing": lambda: (n - k * n / steps).round(),
        "leading": lambda: 1 + (steps - 1 - k) * (n // steps),
        "linspace": lambda: 1 + (n - 1 - k * (n - 1) / max(steps - 1, 1)).round(),
    }
    if spacing not in spacings:
        raise ValueError(f"expected spacing to be one of {sorted(spacings)}, found {spacing!r}")
    return Grid.of(
        sde,
        torch.cat(
            [spacings[spacing]() / n, torch.tensor([0.0 if end is None else float(end)], dtype=torch.float64)]
        ),
    )


def parse(text: str) -> Callable[..., Grid]:
    """The function of this module that a text names, with options: "karras", "karras(rho=5.0)" or
    "blend(one=karras, other=power(exponent=3.0), weight=0.2)", what `text.spell` writes; and of blends with
    weights that add up to 1 also "0.2 karras + 0.8 power(exponent=3.0)". Raises ValueError.
    """
    number = r"(\d+\.?\d*)"
    parts = re.fullmatch(rf"{number} (.+) \+ {number} (.+)", text) if isinstance(text, str) else None
    if parts and math.isclose(float(parts[1]) + float(parts[3]), 1):
        return partial(blend, one=parse(parts[2]), other=parse(parts[4]), weight=float(parts[1]))
    made = {f.__name__: _with_options(f) for f in (uniform, power, quadratic, log_snr, karras, blend, ddpm)}
    return read_call(text, Kind("grid", "karras(rho=5.0)", made))


def _with_options(function: Callable[..., Grid]) -> Callable[..., Callable[..., Grid]]:
    @wraps(function)
    def made(**options: Any) -> Callable[..., Grid]:
        signature(function).bind(None, 1, None, **options)  # TypeError for other names
        function(VPSDE.from_betas([0.5, 0.5]), 1, **options)  # tried where each works: for other values
        return partial(function, **options) if options else function

    return made
