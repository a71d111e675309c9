"""The boundary between networks and everything else: `D(x, t) = E[x_0 | x_t = x]`.

With `x_t = alpha x_0 + sigma eps` every other target of a network is a fixed linear view of D:

    noise = (x - alpha D)/sigma,   score = -noise/sigma,   velocity = alpha noise - sigma D

(score: Tweedie's formula, Robbins 1956, Efron 2011; velocity: Salimans and Ho 2022, arXiv:2202.00512). All
views are conditional expectations given x_t. A view that is not determined (noise at sigma = 0, the data from
predicted noise at alpha = 0) raises ValueError where the host knows the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .schedules import Tabulated, Time, check_numbers, holds, wide
from .sde import LinearSDE, like

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prediction:
    """What a network predicts: `F = p x_0 + q eps`, and `c_in`, the factor on its input.

    `pq` and `c_in` are functions of (alpha, sigma) in float64.
    """

    name: str
    pq: Callable[[Tensor, Tensor], Pair]
    c_in: Callable[[Tensor, Tensor], Tensor] = lambda alpha, sigma: torch.ones_like(alpha)
    config: tuple[tuple[str, float], ...] = ()

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config)
        return f"{self.name}({options})" if options else self.name


def _zero(alpha: Tensor) -> Tensor:
    return torch.zeros_like(alpha)


def _one(alpha: Tensor) -> Tensor:
    return torch.ones_like(alpha)


DATA = Prediction("data", lambda alpha, sigma: (_one(alpha), _zero(alpha)))
NOISE = Prediction("noise", lambda alpha, sigma: (_zero(alpha), _one(alpha)))
VELOCITY = Prediction("velocity", lambda alpha, sigma: (-sigma, alpha))
FLOW = Prediction("flow", lambda alpha, sigma: (-_one(alpha), _one(alpha)))
SCORE = Prediction("score", lambda alpha, sigma: (_zero(alpha), -1 / sigma))
PREDICTIONS = {p.name: p for p in (DATA, NOISE, VELOCITY, FLOW, SCORE)}


def Karras(sigma_data: float = 0.5) -> Prediction:
    """EDM preconditioning `D = c_skip x + c_out F(c_in x)` for data of standard deviation `sigma_data`.

    Karras et al. 2022, arXiv:2206.00364, table 1; for any alpha, with `S = sigma^2 + alpha^2 sigma_data^2`:
    c_skip = alpha sigma_data^2/S, c_out = sigma sigma_data/S^(1/2), c_in = 1/S^(1/2), so input and target
    both have unit variance.
    """
    check_numbers(sigma_data=sigma_data)
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"expected sigma_data > 0, found {sigma_data}; it must be finite")

    def spread(alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma**2 + (alpha * sigma_data) ** 2).sqrt()

    def pq(alpha: Tensor, sigma: Tensor) -> Pair:
        # (x_0 - c_skip x)/c_out with x = alpha x_0 + sigma eps
        root = spread(alpha, sigma)
        return sigma / (sigma_data * root), -alpha * sigma_data / root

    def c_in(alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / spread(alpha, sigma)

    return Prediction("Karras", pq, c_in, (("sigma_data", sigma_data),))


def determined(a: Tensor, b: Tensor, t: Tensor, what: str) -> Pair:
    """(a, b) if finite. Raises ValueError at the first time where they are not, if the host knows them."""
    known = a.isfinite() & b.isfinite()
    if not holds(known):
        first = t.expand_as(known)[~known].flatten()[0].item()
        raise ValueError(
            f"expected times at which {what} is determined, found t={first}: without signal (alpha = 0) "
            "noise says nothing of the data, without noise (sigma = 0) the data say nothing of it. "
            "Keep away from that end (grid=...), or if it is not guided use a network that predicts data, "
            "velocity or flow"
        )
    return a, b


def view(target: Prediction, source: Prediction, alpha: Tensor, sigma: Tensor) -> Pair:
    """(a, b) with `target = a x + b source`, all of the form `p x_0 + q eps`, x being (alpha, sigma)."""
    (p, q), (p_new, q_new) = source.pq(alpha, sigma), target.pq(alpha, sigma)
    determinant = q * alpha - p * sigma
    a, b = (q * p_new - p * q_new) / determinant, (alpha * q_new - sigma * p_new) / determinant
    # Proportional quantities need no x, not even where it would be needed to tell x_0 from eps.
    proportional = q * p_new == p * q_new
    b = torch.where(proportional, (p * p_new + q * q_new) / (p * p + q * q), b)
    return torch.where(proportional, 0, a), b


def checked(out: Any, x: Tensor) -> Tensor:
    """What a model returned for a state like `x`, in the dtype of x. Raises ValueError for another shape."""
    if not isinstance(out, Tensor) or out.shape != x.shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"expected the model to return its input's {tuple(x.shape)}, found {found}")
    return out if out.dtype == x.dtype else out.to(x.dtype)


class Rows(NamedTuple):
    """A denoiser prepared for a solver's times: `D(x, t_k) = a_k x + b_k evaluate(x, k)`, a, b floats.

    What `evaluate` returns is not `checked` yet.
    """

    evaluate: Callable[[Tensor, int], Tensor]
    a: list[float]
    b: list[float]


class BaseDenoiser(nn.Module):
    """`model(x, t, **cond) = E[x_0 | x_t = x]`, for `x` (B, ...) and `t` a float or of shape () or (B,).

    Subclasses define `forward`.
    """

    sde: LinearSDE

    @property
    def device(self) -> torch.device:
        """Where the parameters (or buffers) live; the CPU if there are none."""
        tensor = first_tensor(self)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; the default dtype if there are none."""
        tensor = first_tensor(self)
        return torch.get_default_dtype() if tensor is None else tensor.dtype

    def as_view(self, target: Prediction, /, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """The view `target` of this denoiser at x, t."""
        t = wide(t)
        a, b = determined(*view(target, DATA, self.sde.alpha(t), self.sde.sigma(t)), t, target.name)
        return like(a, x) * x + like(b, x) * checked(self(x, t, **cond), x)

    def noise(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """E[eps | x_t] = (x - alpha D)/sigma."""
        return self.as_view(NOISE, x, t, **cond)

    def score(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """grad log p_t(x) = (alpha D - x)/sigma^2."""
        return self.as_view(SCORE, x, t, **cond)

    def velocity(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """E[alpha eps - sigma x_0 | x_t]."""
        return self.as_view(VELOCITY, x, t, **cond)

    def flow(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """E[eps - x_0 | x_t]."""
        return self.as_view(FLOW, x, t, **cond)

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        """Prepare evaluation at the float64 host `times` (K,) for states like `x`.

        `evaluate(x, k)` is free of host-device traffic.
        """
        clock = times.to(x.device)
        return Rows(lambda state, k: self(state, clock[k], **cond), [0.0] * len(times), [1.0] * len(times))

    def given(self, **cond: Any) -> BaseDenoiser:
        """This denoiser with conditions filled in; lists and arrays of numbers become tensors.

        Where samples leave the batch, or run one by one, what has as many entries as the batch belongs to the
        samples, also inside of mappings and lists: see `some_rows`. Let what they share have another length,
        such as a batch axis of 1.
        """
        return Conditioned(self, as_conditions(cond, self.device)) if cond else self

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        """This denoiser for some rows of a batch: what it holds one entry a sample of is cut to them, as
        `some_rows` does."""
        return self


class Wrapper(BaseDenoiser):
    """A denoiser made of another one, `model`, on the same device and dtype, and the same process unless it
    says otherwise."""

    def __init__(self, model: BaseDenoiser) -> None:
        super().__init__()
        self.model = model

    @property
    def sde(self) -> LinearSDE:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.sde

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


class Conditioned(Wrapper):
    """A denoiser with some conditions filled in."""

    def __init__(self, model: BaseDenoiser, cond: dict[str, Any]) -> None:
        super().__init__(model)
        self.cond = cond

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.model(x, t, **{**self.cond, **cond})

    def as_view(self, target: Prediction, /, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.model.as_view(target, x, t, **{**self.cond, **cond})

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        return self.model.rows(times, x, **{**self.cond, **cond})

    def __getattr__(self, name: str) -> Any:
        """The density and the energy of a model that has them, for products and Metropolis steps."""
        if name in ("log_prob", "energy"):
            return partial(getattr(self.model, name), **self.cond)
        return super().__getattr__(name)

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        cond = {name: some_rows(value, rows, batch) for name, value in self.cond.items()}
        return self.model.narrowed(rows, batch).given(**cond)


class Denoiser(BaseDenoiser):
    """A network as a denoiser.

    `network(input, time, **cond)` gets `c_in x` (B, ...) in its own dtype and `time` (B,) in float32 or
    wider, and returns `F = p x_0 + q eps`, shaped like its input. The pair (p, q) is chosen by

    predicts    "noise" (0, 1) | "data" (1, 0) | "velocity" (-sigma, alpha) | "flow" (-1, 1)
                | "score" (0, -1/sigma) | `Karras(sigma_data)`
    time_input  "t" | "log_snr" | "index" (t N - 1, Ho's label 0..N-1; N is the table's, or 1000)

    Raises ValueError for other words.
    """

    def __init__(
        self, network: nn.Module, sde: LinearSDE, predicts: str | Prediction = "noise", time_input: str = "t"
    ) -> None:
        super().__init__()
        if not callable(network) or not isinstance(sde, LinearSDE):
            raise TypeError(f"expected a network and an SDE, found {type(network)} and {sde!r}")
        if not isinstance(predicts, Prediction) and predicts not in PREDICTIONS:
            raise ValueError(
                f"expected predicts in {sorted(PREDICTIONS)} or Karras(sigma_data), found {predicts!r}"
            )
        if time_input not in TIME_INPUTS:
            raise ValueError(f"expected time_input to be one of {sorted(TIME_INPUTS)}, found {time_input!r}")
        self.network, self.sde, self.time_input = network, sde, time_input
        self.predicts = predicts if isinstance(predicts, Prediction) else PREDICTIONS[predicts]

    def extra_repr(self) -> str:
        return f"{self.sde}, predicts={self.predicts}, time_input={self.time_input!r}"

    def _label(self, t: Tensor) -> Tensor:
        """What the network gets for time, at the float64 `t`."""
        label = TIME_INPUTS[self.time_input](self.sde, t)
        if not holds(label.isfinite()):
            raise ValueError("expected times of finite log-SNR, found alpha or sigma = 0; use time_input='t'")
        return label

    def _output(self, x: Tensor, c_in: Tensor | float, label: Tensor, /, **cond: Any) -> Any:
        """What a network of any dtype returns, as it is."""
        dtype = self.dtype
        time = label.to(torch.promote_types(dtype, torch.float32)).expand(len(x))
        return self.network((x * c_in).to(dtype), time, **cond)

    def _call(self, x: Tensor, c_in: Tensor | float, label: Tensor, /, **cond: Any) -> Tensor:
        """F in the dtype of x."""
        return checked(self._output(x, c_in, label, **cond), x)

    def raw(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """The network's own output `F(c_in x, t)`, in the dtype of x."""
        return self._call(x, *self._scale_and_label(x, t), **cond)

    def _scale_and_label(self, x: Tensor, t: Time) -> Pair:
        """c_in for x, and the network's label."""
        t = wide(t)
        c_in = self.predicts.c_in(self.sde.alpha(t), self.sde.sigma(t))
        return like(c_in, x), self._label(t).to(x.device)

    def target(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """What F should be: `p x_0 + q eps`."""
        p, q = self.predicts.pq(self.sde.alpha(t), self.sde.sigma(t))
        return like(p, x0) * x0 + like(q, x0) * eps

    def as_view(self, target: Prediction, /, x: Tensor, t: Time, **cond: Any) -> Tensor:
        t = wide(t)
        pair = view(target, self.predicts, self.sde.alpha(t), self.sde.sigma(t))
        a, b = determined(*pair, t, f"{target.name} from predicted {self.predicts.name}")
        return like(a, x) * x + like(b, x) * self.raw(x, t, **cond)

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.as_view(DATA, x, t, **cond)

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        alpha, sigma = self.sde.alpha(times), self.sde.sigma(times)
        what = f"data from predicted {self.predicts.name}"
        a, b = determined(*view(DATA, self.predicts, alpha, sigma), times, what)
        c_in, dtype, network = self.predicts.c_in(alpha, sigma).tolist(), self.dtype, self.network
        labels = self._label(times).to(x.device, torch.promote_types(dtype, torch.float32))
        labels = labels[:, None].expand(-1, len(x)).unbind()

        def evaluate(state: Tensor, k: int) -> Tensor:
            scaled = state if c_in[k] == 1 else state * c_in[k]
            scaled = scaled if scaled.dtype == dtype else scaled.to(dtype)
            return network(scaled, labels[k], **cond)

        return Rows(evaluate, a.tolist(), b.tolist())


def _index(sde: LinearSDE, t: Tensor) -> Tensor:
    schedule = getattr(sde, "schedule", None)
    steps = schedule.steps if isinstance(schedule, Tabulated) else 1000
    label, nearest = t * steps - 1, (t * steps).round() - 1
    # i/N N need not round to i: the label of a node is an integer all the same.
    return torch.where((label - nearest).abs() < 1e-14 * steps, nearest, label)


TIME_INPUTS: dict[str, Callable[[LinearSDE, Tensor], Tensor]] = {
    "t": lambda sde, t: t,
    "log_snr": lambda sde, t: sde.log_snr(t),
    "index": _index,
}


def some_rows(value: Any, rows: Tensor | slice, batch: int) -> Any:
    """What of `value` belongs to some rows of a batch. Tensors, arrays, lists and tuples with as many entries
    as the batch are one entry a sample; of other lists, and of mappings and named tuples, each part is cut by
    itself; what has `narrowed(rows, batch)` gives its result; all else is shared and stays whole.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if hasattr(value, "narrowed"):
        return value.narrowed(rows, batch)
    if isinstance(value, Mapping):
        return {name: some_rows(part, rows, batch) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return value[_numbers(rows, batch)] if value.ndim and len(value) == batch else value
    if not isinstance(value, list | tuple):
        return value
    if hasattr(value, "_fields"):
        return type(value)(*(some_rows(part, rows, batch) for part in value))
    if len(value) == batch:
        return type(value)(value[i] for i in _numbers(rows, batch))
    return type(value)(some_rows(part, rows, batch) for part in value)


def _numbers(rows: Tensor | slice, batch: int) -> list[int]:
    """The rows as numbers on the host, where lists live."""
    return torch.arange(batch)[rows if isinstance(rows, slice) else rows.cpu()].tolist()


def as_conditions(cond: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Conditions as models get them: lists and arrays of numbers become tensors."""
    return {
        name: torch.as_tensor(value, device=device) if _are_numbers(value) else value
        for name, value in cond.items()
    }


def _are_numbers(value: Any) -> bool:
    """Whether a condition is a list or an array of numbers; a list of texts, say, is none."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, list) and all(isinstance(one, int | float) for one in value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode and every part of it back as it was afterwards."""
    training = [part for part in model.modules() if part.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def first_tensor(module: nn.Module) -> Tensor | None:
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor
    return None
