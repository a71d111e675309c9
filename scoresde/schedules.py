"""Noise schedules of variance-preserving processes.

A schedule is its integrated rate `B(t) = int_0^t beta(s) ds`, so that `alpha(t) = exp(-B/2)` and
`sigma(t)^2 = 1 - exp(-B)`. Everything is float64: an argument in float32 is widened first, so that the value
belongs to the very number that was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

Time = float | Tensor


def check_numbers(**values: object) -> None:
    """TypeError unless each value is a number, or converts to one as numpy's do (text does not)."""
    for name, value in values.items():
        if not hasattr(value, "__float__") or getattr(value, "ndim", 0):
            raise TypeError(f"{name}: expected a number, found {value!r}")


def wide(t: Time) -> Tensor:
    """`t` as a float64 tensor on its own device (numbers: the CPU). Raises TypeError for integer tensors and
    for what is no number."""
    if not isinstance(t, Tensor):
        check_numbers(time=t)
        return torch.tensor(float(t), dtype=torch.float64)
    if not t.is_floating_point():
        raise TypeError(f"expected floating times, found {t.dtype}; a DDPM index i sits at t = i/N")
    return t.double()


def unit_interval(t: Tensor) -> Tensor:
    """`t`, for formulas that mean nothing beyond t = 1; what rounding puts beyond it is 1. Raises ValueError
    further on."""
    if not holds(t <= 1 + 1e-9):
        raise ValueError(f"expected times t <= 1, where this process ends, found {t.max().item()}")
    return t.clamp(max=1)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere, as far as the host can tell without waiting for a device or a
    trace.
    """
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    try:
        return bool(condition.all())
    except RuntimeError:  # inside torch.func.vmap values cannot be looked at
        return True


@runtime_checkable
class Schedule(Protocol):
    """What an SDE needs of a schedule; all three take and return float64 tensors of one shape."""

    def B(self, t: Tensor) -> Tensor:
        """Integrated rate `B(t)`, increasing, `B(0) = 0`."""
        ...

    def beta(self, t: Tensor) -> Tensor:
        """Rate `beta(t) = dB/dt`."""
        ...

    def time(self, B: Tensor) -> Tensor:
        """The inverse of `B`."""
        ...


@dataclass(frozen=True)
class Linear:
    """`beta_min + t (beta_max - beta_min)` on [0, 1] (Song et al. 2021, arXiv:2011.13456, eq. 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_numbers(beta_min=self.beta_min, beta_max=self.beta_max)
        if not (0 <= self.beta_min < math.inf and 0 < self.beta_max < math.inf):
            raise ValueError(
                f"expected 0 <= beta_min, 0 < beta_max, both finite; found {self.beta_min}, {self.beta_max}"
            )

    def B(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def time(self, B: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * B).clamp_min(0).sqrt()
        return 2 * B / (self.beta_min + root).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Cosine:
    """`alpha_bar(t) = cos^2(u(t)) / cos^2(u(0))`, u linear in t.

    Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17. The paper's angle reaches pi/2 at t = 1, where the
    signal vanishes. Here it stops just short of it, at the stated `log_snr(1) = log_snr_min` (half-log-SNR
    `lam(1) = log_snr_min / 2`); `u(0) = s/(1 + s) pi/2` as in the paper.
    """

    s: float = 0.008
    log_snr_min: float = -10.0

    def __post_init__(self) -> None:
        check_numbers(s=self.s, log_snr_min=self.log_snr_min)
        if not (self.s >= 0 and -700 < self.log_snr_min < 10):
            raise ValueError(
                f"expected s >= 0 and -700 < log_snr_min < 10, found {self.s}, {self.log_snr_min}"
            )

    @property
    def _start(self) -> float:
        return self.s / (1 + self.s) * math.pi / 2

    @property
    def _gap(self) -> float:
        """pi/2 - u(1)."""
        return math.asin(math.cos(self._start) * math.exp(-0.5 * _terminal_B(self.log_snr_min)))

    @property
    def _rate(self) -> float:
        return math.pi / 2 - self._start - self._gap

    def B(self, t: Tensor) -> Tensor:
        t = unit_interval(t)
        # Each branch stays where it is used, so that gradients are finite.
        d = self._rate * t.clamp(max=0.5)  # u - u(0)
        left = self._rate * (1 - t.clamp(min=0.5)) + self._gap  # pi/2 - u
        # cos(u) / cos(u0) = 1 - (2 sin^2(d/2) + tan(u0) sin d); near pi/2 the complement's sine keeps the
        # digits.
        early = -2 * torch.log1p(-(2 * (d / 2).sin() ** 2 + math.tan(self._start) * d.sin()))
        late = -2 * (left.sin() / math.cos(self._start)).log()
        return torch.where(t < 0.5, early, late)

    def beta(self, t: Tensor) -> Tensor:
        t = unit_interval(t)
        # tan(u) from the nearer end, so that each keeps its digits where it is small
        early = (self._start + self._rate * t).tan()
        late = 1 / (self._rate * (1 - t) + self._gap).tan()
        return 2 * self._rate * torch.where(t < 0.5, early, late)

    def time(self, B: Tensor) -> Tensor:
        c = -torch.expm1(-B / 2)  # = 2 sin^2(d/2) + tan(u0) sin(d); a quadratic in w = tan(d/2)
        slope = math.tan(self._start)
        root = (slope**2 + c * (2 - c)).sqrt()
        t = 2 * (c / (slope + root).clamp_min(torch.finfo(torch.float64).tiny)).atan() / self._rate
        # An angle is known to some eps pi/2, which may be more than what is left between u(1) and pi/2.
        rounding = 4 * torch.finfo(torch.float64).eps * (math.pi / 2) / self._rate
        return torch.where(t <= 1 + rounding, t.clamp(max=1), t)


@dataclass(frozen=True)
class Sigmoid:
    """`1 - alpha_bar(t)` proportional to `sigmoid(w(t)) - sigmoid(w(0))`, w from start/tau to end/tau.

    `w(t) = (start + t (end - start))/tau` (Jabri et al. 2022, arXiv:2212.11972), scaled so that
    `log_snr(1) = log_snr_min` is finite. `time` of what lies beyond it is 1.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    log_snr_min: float = -10.0

    def __post_init__(self) -> None:
        check_numbers(start=self.start, end=self.end, tau=self.tau, log_snr_min=self.log_snr_min)
        steep = max(abs(self.start), abs(self.end)) / self.tau if self.tau > 0 else math.inf
        if not (self.end > self.start and steep < 500 and -700 < self.log_snr_min < 10):
            raise ValueError(
                "expected start < end, tau > 0, |start|/tau and |end|/tau < 500, -700 < log_snr_min < 10; "
                f"found {self}"
            )

    @property
    def _end(self) -> tuple[float, float]:
        """(alpha_bar(1), 1 - alpha_bar(1)), each with full relative precision."""
        return 1 / (1 + math.exp(-self.log_snr_min)), 1 / (1 + math.exp(self.log_snr_min))

    @property
    def _w(self) -> tuple[float, float]:
        return self.start / self.tau, self.end / self.tau

    @property
    def _width(self) -> float:
        """sigmoid(w(1)) - sigmoid(w(0))."""
        first, last = self._w
        return -math.expm1(first - last) * _logistic(last) * _logistic(-first)

    def _alpha_bar(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_bar, 1 - alpha_bar), each with full relative precision."""
        (first, last), (signal_end, noise_end) = self._w, self._end
        t = unit_interval(t)
        w = first + t * (last - first)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) does not cancel
        noise = -torch.expm1(-t * (last - first)) * sigmoid(w) * _logistic(-first)
        signal = -torch.expm1((t - 1) * (last - first)) * _logistic(last) * sigmoid(-w)
        return signal_end + noise_end * signal / self._width, noise_end * noise / self._width

    def B(self, t: Tensor) -> Tensor:
        signal, noise = self._alpha_bar(t)
        return torch.where(noise < 0.5, -torch.log1p(-noise.clamp(max=0.5)), -signal.log())

    def beta(self, t: Tensor) -> Tensor:
        first, last = self._w
        w = first + t * (last - first)
        rate = self._end[1] * (last - first) * sigmoid(w) * sigmoid(-w) / self._width
        return rate / self._alpha_bar(t)[0]

    def time(self, B: Tensor) -> Tensor:
        (first, last), (signal_end, noise_end) = self._w, self._end
        # Beyond B(1), which rounding reaches too where the end is flat, lies nothing but the end itself.
        rise = -torch.expm1(-B) / noise_end * self._width  # sigmoid(w) - sigmoid(w(0))
        rest = _logistic(-last) + ((-B).exp() - signal_end).clamp(min=0) / noise_end * self._width
        # log of sigmoid(-w) / sigmoid(-w(0)), rest being sigmoid(-w): each form keeps its digits where used
        short = torch.log1p((-rise / _logistic(-first)).clamp(min=-1))
        fall = torch.where(B > 0.5, (rest / _logistic(-first)).log(), short)
        return ((torch.log1p(rise / _logistic(first)) - fall) / (last - first)).clamp(max=1)


@dataclass(frozen=True)
class Tabulated:
    """The schedule through `B(i/N) = nodes[i]`, i = 0..N, `nodes[0] = 0`, by monotone cubic interpolation.

    Slopes are those of Fritsch and Butland (1984, SIAM J. Sci. Stat. Comput. 5:300), so B is continuously
    differentiable and increasing; at the nodes it is exact, and beyond t = 1 it continues linearly. `time`
    carries no gradient.
    """

    nodes: tuple[float, ...]
    _tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.nodes, str) or not isinstance(self.nodes, Iterable):
            raise TypeError(f"expected the numbers B(i/N) as nodes, found {self.nodes!r}")
        object.__setattr__(self, "nodes", tuple(float(b) for b in self.nodes))
        steps = [b - a for a, b in zip(self.nodes, self.nodes[1:], strict=False)]
        if len(self.nodes) < 2 or self.nodes[0] != 0 or not all(0 < d < math.inf for d in steps):
            raise ValueError(
                "expected at least two finite, strictly increasing nodes B(i/N) that begin with B(0) = 0; "
                f"found {len(self.nodes)} nodes beginning with {self.nodes[:3]}"
            )
        grid = torch.arange(len(self.nodes), dtype=torch.float64) / self.steps
        nodes = torch.tensor(self.nodes, dtype=torch.float64)
        object.__setattr__(self, "_tables", {grid.device: (grid, nodes, _monotone_cubic(nodes.diff()))})

    @property
    def steps(self) -> int:
        """N, the number of intervals."""
        return len(self.nodes) - 1

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Times and values (N + 1,) of the nodes, and cubics (N + 1, 3); each device gets its copy once."""
        if device not in self._tables:
            grid, nodes, cubic = self._tables[torch.device("cpu")]
            self._tables[device] = (grid.to(device), nodes.to(device), cubic.to(device))
        return self._tables[device]

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value at the left end of each t's interval, the position in it, and its cubic."""
        grid, nodes, cubic = self._on(t.device)
        i = _interval(grid, t)
        return nodes[i], (t - grid[i]) * self.steps, cubic[i]

    def B(self, t: Tensor) -> Tensor:
        base, s, c = self._at(t)
        return base + _cubic(c, s)

    def beta(self, t: Tensor) -> Tensor:
        _, s, c = self._at(t)
        return self.steps * (c[..., 0] + s * (2 * c[..., 1] + s * 3 * c[..., 2]))

    def time(self, B: Tensor) -> Tensor:
        _, nodes, cubic = self._on(B.device)
        i = _interval(nodes, B)
        c, rest = cubic[i], B - nodes[i]
        inside = _increasing_root(lambda s: _cubic(c, s) - rest, rest)
        return (i + torch.where(i == self.steps, rest / c[..., 0], inside)) / self.steps


class Learned(nn.Module):
    """A trainable schedule: `log_snr(t)` falls from `log_snr_max` to `log_snr_min` along a monotone curve.

    The curve is `g(t) = (m(t) - m(0)) / (m(1) - m(0))`, `m(t) = a t + sum_k w_k sigmoid(s_k (t - c_k))` with
    positive `a, w, s` (a monotone network as in Kingma et al. 2021, arXiv:2107.00630, appendix H). As there,
    a little noise is left at t = 0: `alpha_bar(0) = sigmoid(log_snr_max)`, so `B(0)` is small but not 0.
    `time` carries no gradient. The ends are pinned numbers, or parameters too with `learn_ends`.
    """

    def __init__(
        self,
        log_snr_max: float = 13.3,
        log_snr_min: float = -10.0,
        hidden: int = 32,
        learn_ends: bool = False,
    ) -> None:
        super().__init__()
        check_numbers(log_snr_max=log_snr_max, log_snr_min=log_snr_min)
        if not (log_snr_max > log_snr_min and isinstance(hidden, Integral) and int(hidden) >= 1):
            raise ValueError(
                "expected log_snr_min < log_snr_max and a whole number hidden >= 1, "
                f"found {log_snr_min}, {log_snr_max}, {hidden}"
            )
        self.log_snr_max, self.log_snr_min = (
            nn.Parameter(torch.tensor(end, dtype=torch.float64)) if learn_ends else end
            for end in (log_snr_max, log_snr_min)
        )
        self.linear = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.weight = nn.Parameter(torch.full((hidden,), -3.0, dtype=torch.float64))
        self.slope = nn.Parameter(torch.full((hidden,), 2.0, dtype=torch.float64))
        self.center = nn.Parameter(torch.linspace(0, 1, hidden, dtype=torch.float64))

    # Parameters go to where t is: training asks on the data's device, samplers with their clock on the host.

    def _terms(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, w_k, s_k, and the K sigmoids at t."""
        a, w, s = (p.exp().to(t.device) for p in (self.linear, self.weight, self.slope))
        return a, w, s, sigmoid(s * (t.unsqueeze(-1) - self.center.to(t.device)))

    def _curve(self, t: Tensor) -> Tensor:
        a, w, _, bumps = self._terms(t)
        return a * t + (bumps * w).sum(-1)

    def _ends(self, t: Tensor) -> tuple[float | Tensor, float | Tensor]:
        high, low = (
            end.to(t.device) if isinstance(end, Tensor) else end
            for end in (self.log_snr_max, self.log_snr_min)
        )
        return high, low

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), decreasing in t."""
        first, last = self._curve(torch.zeros_like(t)), self._curve(torch.ones_like(t))
        high, low = self._ends(t)
        return high - (high - low) * (self._curve(t) - first) / (last - first)

    def B(self, t: Tensor) -> Tensor:
        return -logsigmoid(self.log_snr(t))

    def beta(self, t: Tensor) -> Tensor:
        a, w, s, bumps = self._terms(t)
        rise = a + (bumps * (1 - bumps) * s * w).sum(-1)
        span = self._curve(torch.ones_like(t)) - self._curve(torch.zeros_like(t))
        high, low = self._ends(t)
        return sigmoid(-self.log_snr(t)) * (high - low) * rise / span

    def time(self, B: Tensor) -> Tensor:
        return _increasing_root(lambda t: self.B(t) - B, B)


def float_table(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """Numbers as a float64 CPU tensor. Raises TypeError for what is none."""
    try:
        return torch.as_tensor(values, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected a table of numbers as {name}, found {values!r}") from None


def beta_table(betas: Sequence[float] | Tensor) -> Tensor:
    """A DDPM table as an (N,) float64 CPU tensor. Raises ValueError unless 0 < beta < 1 throughout."""
    table = float_table(betas, "betas").detach()
    if table.ndim != 1 or len(table) == 0 or not bool(((table > 0) & (table < 1)).all()):
        span = f", range [{table.min().item():g}, {table.max().item():g}]" if table.numel() else ""
        raise ValueError(
            "expected a one-dimensional, non-empty table of betas strictly between 0 and 1, "
            f"found shape {tuple(table.shape)}{span}"
        )
    return table


def tabulated_betas(betas: Sequence[float] | Tensor) -> Tabulated:
    """The schedule whose exact N-step discretization is the table: `B(i/N) = -sum_{j<=i} log(1 - beta_j)`."""
    return Tabulated((0.0, *torch.log1p(-beta_table(betas)).neg().cumsum(0).tolist()))


def sigmoid(w: Tensor) -> Tensor:
    """1/(1 + e^-w), a function of w alone: torch's own, and its logaddexp, take the last few numbers of a
    tensor on the CPU with other instructions than the rest, so that a value depends on its neighbours."""
    return 1 / (1 + (-w).exp())


def _terminal_B(log_snr: float) -> float:
    """B = log(1 + exp(-log_snr))."""
    return max(-log_snr, 0.0) + math.log1p(math.exp(-abs(log_snr)))


def _logistic(w: float) -> float:
    return 1 / (1 + math.exp(-w))


def _interval(nodes: Tensor, values: Tensor) -> Tensor:
    """The index i with nodes[i] <= value < nodes[i + 1], kept between 0 and the last."""
    return (torch.searchsorted(nodes, values.contiguous(), right=True) - 1).clamp(0, len(nodes) - 1)


def _cubic(c: Tensor, s: Tensor) -> Tensor:
    """The rise c_0 s + c_1 s^2 + c_2 s^3 within an interval."""
    return s * (c[..., 0] + s * (c[..., 1] + s * c[..., 2]))


def _monotone_cubic(d: Tensor) -> Tensor:
    """(N + 1, 3) coefficients of s, s^2, s^3 on unit intervals of rise d, and the line after the last."""
    slopes = torch.cat([d[:1], 2 * d[:-1] * d[1:] / (d[:-1] + d[1:]), d[-1:]])  # harmonic means
    if len(d) > 1:
        slopes[0], slopes[-1] = _end_slope(d[0], d[1]), _end_slope(d[-1], d[-2])
    left, right = slopes[:-1], slopes[1:]
    inside = torch.stack([left, 3 * d - 2 * left - right, left + right - 2 * d], -1)
    after = torch.stack([slopes[-1], torch.zeros_like(d[0]), torch.zeros_like(d[0])])
    return torch.cat([inside, after[None]])


def _end_slope(near: Tensor, far: Tensor) -> Tensor:
    """Three-point slope at an end, at most 1.5 near, kept from starting flat (or falling)."""
    return torch.maximum(1.5 * near - 0.5 * far, 0.1 * near)


def _increasing_root(function: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The root in [0, 1] of an increasing elementwise function, bisected from below (0 is exact)."""
    low, high = torch.zeros_like(like), torch.ones_like(like)
    with torch.no_grad():
        for _ in range(90):  # to the last bit of roots down to 1e-11
            middle = (low + high) / 2
            below = function(middle) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low
