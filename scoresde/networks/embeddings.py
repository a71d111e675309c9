"""Embeddings: from one number of time (and a class, and a vector) to the features that steer a network."""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

# Fastest phase of an embedding in radians per unit of time, and the ratio of the fastest to the slowest. One
# radian is 1e-3 of t in [0, 1], 0.1 of the log-SNR in about [-15, 20], one DDPM index of 0..999; the slowest
# phase turns by at most about 0.3 radian over the whole range, so that far apart times differ as well.
SINUSOIDAL = {
    "t": {"scale": 1000.0, "max_period": 10_000.0},
    "log_snr": {"scale": 10.0, "max_period": 1_000.0},
    "index": {"scale": 1.0, "max_period": 10_000.0},
}
# Standard deviation of the random frequencies in cycles per unit of time: about 0.2 radian over the same
# small steps.
FOURIER = {"t": {"bandwidth": 32.0}, "log_snr": {"bandwidth": 0.32}, "index": {"bandwidth": 0.032}}


def widen(time: Tensor) -> Tensor:
    """Time in float32 or wider: phases of hundreds of radians mean nothing in 8 or 11 bits."""
    return time.to(torch.promote_types(time.dtype, torch.float32))


class Sinusoidal(nn.Module):
    """sin and cos of `scale * time * max_period^(-i / (dim/2 - 1))`, i = 0 .. dim/2 - 1.

    Ho et al. 2020 (arXiv:2006.11239), after Vaswani et al. 2017 (arXiv:1706.03762, section 3.5). `scale` is
    the fastest phase in radians per unit of time, `scale / max_period` the slowest: 1 suits a DDPM index,
    1000 a t in [0, 1], 10 (with max_period 1000) a log-SNR. `SINUSOIDAL[time_input]` holds these.

    time (B,), any real dtype -> (B, dim), all sines before all cosines, computed and returned in float32 or
    wider whatever the autocast dtype. Raises ValueError if dim is odd or below 4, or a period or scale is not
    positive.
    """

    def __init__(self, dim: int, max_period: float = 10_000.0, scale: float = 1.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(
                f"Sinusoidal: expected an even dim of at least 4 (sines and cosines), found {dim}."
            )
        if not (max_period > 0 and scale > 0):
            raise ValueError(
                f"Sinusoidal: expected max_period > 0 and scale > 0, found {max_period} and {scale}; "
                "scale is the fastest phase in radians per unit of time."
            )
        self.dim, self.max_period, self.scale = dim, max_period, scale

    def forward(self, time: Real[Tensor, " b"]) -> Float[Tensor, "b dim"]:
        time = widen(time)
        half = self.dim // 2
        # Made here and not kept in a buffer: `.to(bfloat16)` would round a buffer.
        i = torch.arange(half, device=time.device, dtype=time.dtype)
        frequencies = self.scale * torch.exp(i * (-math.log(self.max_period) / (half - 1)))
        phase = time[:, None] * frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class RandomFourier(nn.Module):
    """sin and cos of `2 pi w_i time` with fixed `w_i ~ N(0, bandwidth^2)`, i = 1 .. dim/2.

    Tancik et al. 2020 (arXiv:2006.10739), Song et al. 2021 (arXiv:2011.13456, appendix C). `bandwidth` is in
    cycles per unit of time; `FOURIER[time_input]` holds fitting ones. The frequencies are drawn once, from
    torch's generator like every initial weight, are not trained, and stand in the state_dict. They stay
    float32 when the network is cast to another dtype, since a rounded frequency would be another embedding.

    time (B,), any real dtype -> (B, dim), all sines before all cosines, computed and returned in float32 or
    wider. Raises ValueError if dim is odd or below 2, or the bandwidth is not positive.
    """

    frequencies: Tensor

    def __init__(self, dim: int, bandwidth: float = 16.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(
                f"RandomFourier: expected an even dim of at least 2 (sines, cosines), found {dim}."
            )
        if not bandwidth > 0:
            raise ValueError(
                f"RandomFourier: expected bandwidth > 0 in cycles per unit of time, found {bandwidth}."
            )
        self.dim, self.bandwidth = dim, bandwidth
        self.register_buffer("frequencies", bandwidth * torch.randn(dim // 2, dtype=torch.float32))

    def _apply(self, fn, recurse: bool = True):
        kept = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != kept.dtype:
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, time: Real[Tensor, " b"]) -> Float[Tensor, "b dim"]:
        phase = widen(time)[:, None] * self.frequencies * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


def time_embedding(kind: str, time_input: str, dim: int) -> nn.Module:
    """The embedding `kind` ("sinusoidal" or "fourier") of size dim, tuned to what `time` holds.

    `time_input` is "t" (t in [0, 1]), "log_snr" (about -15..20) or "index" (0..999), as in `Denoiser`.
    """
    makers = {"sinusoidal": (Sinusoidal, SINUSOIDAL), "fourier": (RandomFourier, FOURIER)}
    if kind not in makers:
        raise ValueError(f"embedding: expected one of {sorted(makers)}, found {kind!r}.")
    maker, options = makers[kind]
    if time_input not in options:
        raise ValueError(f"time_input: expected one of {sorted(options)}, found {time_input!r}.")
    return maker(dim, **options[time_input])


def check_features(kind: str, **sizes: int) -> None:
    """ValueError unless each size can be that of an embedding of this kind."""
    least = 2 if kind == "fourier" else 4
    for name, size in sizes.items():
        if size < least or size % 2:
            raise ValueError(
                f"{name}: expected an even number of at least {least}, for sines and cosines of time, found "
                f"{size}."
            )


class Conditioning(nn.Module):
    """Time, class and vector -> features `SiLU(MLP(embed(time)) + E[label] + V vector)` of size `dim`.

    Dhariwal & Nichol 2021 (arXiv:2105.05233). Row 0 of the class table E is the null token of classifier-free
    guidance (Ho & Salimans 2022, arXiv:2207.12598): label -1 and label None both mean "no class". To train
    it, set a tenth or so of the labels to -1.

    time (B,), label (B,) integers in -1 .. classes-1, vector (B, vector_dim) -> (B, dim) in the dtype of the
    weights. Raises ValueError for a label or vector the network was not built for, a missing vector, a wrong
    shape or dtype, and for a label out of range where that costs nothing (CPU, not while compiling; a GPU
    asserts in its kernel).
    """

    def __init__(
        self,
        dim: int,
        *,
        classes: int | None = None,
        vector_dim: int | None = None,
        embedding: str = "sinusoidal",
        time_input: str = "t",
    ) -> None:
        super().__init__()
        self.classes, self.vector_dim = classes, vector_dim
        self.embed = time_embedding(embedding, time_input, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = None if classes is None else nn.Embedding(classes + 1, dim)
        self.vector = None if vector_dim is None else nn.Linear(vector_dim, dim)

    def forward(
        self,
        time: Real[Tensor, " b"],
        label: Int[Tensor, " b"] | None = None,
        vector: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b dim"]:
        weight = cast(nn.Linear, self.time[0]).weight
        h = self.time(self.embed(time).to(weight.dtype))
        if self.label is not None:
            h = h + (self.label.weight[:1] if label is None else self.label(self._row(label, len(time))))
        elif label is not None:
            raise ValueError(
                "label: this network has no classes; leave label out, or build it with classes=."
            )
        if vector is not None and not isinstance(vector, Tensor):
            raise TypeError(
                f"vector: expected a tensor of shape ({len(time)}, {self.vector_dim}), found {vector!r}; "
                "give torch.tensor(vector)."
            )
        if self.vector is not None:
            h = h + self.vector(self._checked(vector, len(time)).to(weight.dtype))
        elif vector is not None:
            raise ValueError(
                f"vector: expected none, found shape {tuple(vector.shape)}: this network has no vector "
                "input; leave it out, or build the network with vector_dim=."
            )
        return nn.functional.silu(h)

    def _row(self, label: Tensor, batch: int) -> Tensor:
        if not isinstance(label, Tensor):
            raise TypeError(
                f"label: expected a tensor of integers of shape ({batch},), found {label!r}; give "
                f"torch.full(({batch},), label)."
            )
        fractional = label.is_floating_point() or label.is_complex()
        if label.shape != (batch,) or fractional or label.dtype == torch.bool:
            raise ValueError(
                f"label: expected integers of shape ({batch},), "
                f"found {label.dtype} of shape {tuple(label.shape)}."
            )
        label = label.long()  # unsigned integers have no -1, and narrow ones no index
        on_host = label.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and bool(((label < -1) | (label >= cast(int, self.classes))).any()):
            raise ValueError(
                f"label: expected values from -1 (no class) to {cast(int, self.classes) - 1}, "
                f"found {int(label.min())} to {int(label.max())}."
            )
        return label + 1

    def _checked(self, vector: Tensor | None, batch: int) -> Tensor:
        found = None if vector is None else tuple(vector.shape)
        if vector is None or found != (batch, self.vector_dim):
            raise ValueError(
                f"vector: expected shape ({batch}, {self.vector_dim}) (vector_dim), found {found}."
            )
        return vector


def check_time(time: Tensor, batch: int) -> None:
    """One time for each row, or a ValueError; TypeError for what is no tensor."""
    if not isinstance(time, Tensor):
        raise TypeError(
            f"time: expected a tensor of shape ({batch},), one time a row, found {time!r}; give "
            f"torch.full(({batch},), time)."
        )
    if time.shape != (batch,):
        raise ValueError(
            f"time: expected shape ({batch},), one time a row, "
            f"found {tuple(time.shape)}; use time.expand({batch})."
        )
