"""Samplers as black boxes: any function `sampler(denoise, x, times, noise) -> x`, whoever wrote it.

    denoise(x, t)   E[x_0 | x_t = x], shaped like x; t a number, a tensor of shape () or (B,)
    x               (B, ...) float64, the state at times[0]
    times           (N + 1,) float64, decreasing times of the process; under `EDM` they are noise levels sigma
                    (the state is then x/alpha, which is how k-diffusion works)
    noise(...)      the next standard normals, shaped like x; its arguments are ignored, so that it can stand
                    in for `torch.randn_like` or a `noise_sampler`

Normals that a sampler draws from torch by itself (`randn`, `randn_like`, `normal`, `normal_`) are replaced by
the same numbers while it runs. Solvers of this library, and any object with their `.tableau(sde, times)` or
`.solve(model, x, times, noise=...)`, are taken as they are.

On Gaussian data the exact denoiser is affine, and so is a sampler in its state and noises: fed with unit
vectors in place of noise it gives the exact mean and covariance of its output, without Monte Carlo.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..denoiser import BaseDenoiser
from ..laws import Gaussian, Law
from ..noise import Noise
from ..schedules import Time
from ..sde import LinearSDE
from ..solvers.base import execute
from ..tableau import NoiseSource
from .failure import at_most, holds

Denoise = Callable[[Tensor, Time], Tensor]
Sampler = Callable[[Denoise, Tensor, Tensor, Callable[..., Tensor]], Tensor]


class Given(BaseDenoiser):
    """A function `denoise(x, t)` as a denoiser of a process."""

    def __init__(self, denoise: Denoise, sde: LinearSDE) -> None:
        super().__init__()
        self.denoise, self.sde = denoise, sde

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.denoise(x, t)


class Injected(TorchFunctionMode):
    """While it is on, normals that torch would draw come from `draw(shape)`, in the dtype asked for."""

    def __init__(self, draw: Callable[[tuple[int, ...]], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            like_this = args[0] if args else kwargs["input"]
            return self.draw(tuple(like_this.shape)).to(kwargs.get("dtype") or like_this.dtype)
        if func is torch.randn:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            return self.draw(tuple(size)).to(kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.Tensor.normal_:
            mean, std = _moments(args[1:], kwargs)
            return args[0].copy_(mean + std * self.draw(tuple(args[0].shape)))
        if func is torch.normal:
            mean, std = _moments(args, kwargs)
            sizes = [v.shape for v in (mean, std) if isinstance(v, Tensor)]
            size = kwargs.get("size", args[2] if len(args) > 2 else torch.broadcast_shapes(*sizes))
            return mean + std * self.draw(tuple(size))
        return func(*args, **kwargs)


def _moments(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """(mean, std) as `torch.normal` and `normal_` take them."""
    named = {"mean": 0.0, "std": 1.0} | dict(zip(("mean", "std"), args, strict=False))
    return kwargs.get("mean", named["mean"]), kwargs.get("std", named["std"])


def run_sampler(
    sampler: Any, sde: LinearSDE, denoise: Denoise, x: Tensor, times: Tensor, noise: NoiseSource
) -> Tensor:
    """The output of a sampler of any kind, float64; `noise(k, shape)` gives its k-th normals (those of row k
    for solvers of this library's form)."""
    model = denoise if isinstance(denoise, BaseDenoiser) else Given(denoise, sde)
    if hasattr(sampler, "solve"):
        return sampler.solve(model, x, times, noise=noise).x.double()
    if hasattr(sampler, "tableau"):
        return execute(sampler.tableau(sde, times), model, x, noise=noise).x.double()
    requests = itertools.count()

    def draw(shape: tuple[int, ...]) -> Tensor:
        holds("a request for noise has the shape of the state", shape == x.shape, shape=shape)
        return noise(next(requests), shape)

    with torch.no_grad(), Injected(draw):
        return sampler(model, x.clone(), times, lambda *args, **kwargs: draw(tuple(x.shape))).double()


def zero_noise(k: int, shape: Any) -> Tensor:
    """No noise at all."""
    return torch.zeros(tuple(shape), dtype=torch.float64)


def is_stochastic(sampler: Any, sde: LinearSDE, denoise: Denoise, x: Tensor, times: Tensor) -> bool:
    """Whether the noise that a sampler asks for changes its output; some ask, and multiply it by zero."""
    one, two = (
        run_sampler(sampler, sde, denoise, x, times, Noise.of(seed, batch=len(x), dtype=torch.float64))
        for seed in (0, 1)
    )
    return not torch.equal(one, two)


class Response(NamedTuple):
    """A sampler as a linear form, for flattened events of D numbers: `x_end = constant + start x + sum_k
    noises_k z_k`, of shapes (D,), (D, D), (K, D, D)."""

    constant: Tensor
    start: Tensor
    noises: Tensor


def response(
    sampler: Any, gaussian: Gaussian, sde: LinearSDE, times: Tensor, *, tolerance: float = 1e-9
) -> Response:
    """A sampler's response to unit vectors in its state and in each of its noises, on Gaussian data.

    Raises AssertionError if it is not affine, sample by sample: if a batch of other states and noises does
    not come out as the response says, to `tolerance` (about 1e-4 where the sampler works in float32).
    """
    denoise, event = gaussian.denoiser(sde), gaussian.event_shape
    probe, asked = Noise.of(0, batch=3, dtype=torch.float64), {}

    def asking(k: int, shape: Any) -> Tensor:
        return asked.setdefault(k, probe(k, shape))

    x = probe.prior((3, *event)) * sde.prior_std
    actual = run_sampler(sampler, sde, denoise, x, times, asking).flatten(1)
    drawn, place = torch.stack([x, *asked.values()]).flatten(2), {k: 1 + i for i, k in enumerate(asked)}

    def measured(units: Tensor) -> tuple[Response, Tensor, Tensor]:
        """The response to multiples of `units` (U, D), by how much it misses the probe, and its terms."""
        batch = 1 + len(units) * (1 + len(place))

        def block(number: int) -> Tensor:
            rows = torch.zeros(batch, gaussian.dim, dtype=torch.float64)
            rows[1 + number * len(units) : 1 + (number + 1) * len(units)] = units
            return rows.reshape(batch, *event)

        out = run_sampler(sampler, sde, denoise, block(0), times, lambda k, shape: block(place[k])).flatten(1)
        columns = (out[1:] - out[0]).reshape(1 + len(place), len(units), gaussian.dim)
        matrices = columns.mT if len(units) == gaussian.dim else columns[:, 0].diag_embed()
        parts = torch.einsum("kij,kbj->kbi", matrices, drawn)
        form = Response(out[0], matrices[0], matrices[1:])
        return form, (actual - out[0] - parts.sum(0)).abs(), out[0].abs() + parts.abs().sum(0)

    # Where the denoiser acts on each coordinate by itself most samplers do too: one vector then is enough.
    eye = torch.eye(gaussian.dim, dtype=torch.float64)
    form, gap, size = measured(eye.sum(0, keepdim=True) if gaussian.eigen().basis is None else eye)
    if not bool((gap <= tolerance * size.clamp_min(1.0)).all()):
        form, gap, size = measured(eye)
    at_most(
        "a sampler is affine on Gaussian data, and each sample is by itself",
        gap,
        tolerance * size.clamp_min(1.0),
        sampler=sampler,
        sample=torch.arange(3)[:, None],
    )
    return form


def sampler_law(
    sampler: Any,
    gaussian: Gaussian,
    sde: LinearSDE,
    times: Tensor,
    *,
    start: Gaussian | None = None,
    tolerance: float = 1e-9,
) -> Gaussian:
    """The exact law of any sampler's output on Gaussian data with the exact denoiser, started from the
    process's prior or from `start`; see `response` for the rest."""
    form = response(sampler, gaussian, sde, times, tolerance=tolerance)
    mean, cov = torch.zeros(gaussian.dim, dtype=torch.float64), sde.prior_std**2 * torch.eye(gaussian.dim)
    if start is not None:
        mean, cov = start.mean.flatten(), start.cov
    moved = form.constant + form.start @ mean
    spread = form.start @ cov.double() @ form.start.mT + (form.noises @ form.noises.mT).sum(0)
    return Gaussian(moved.reshape(gaussian.event_shape), (spread + spread.mT) / 2)


def check_sampler_exact_law(
    sampler: Any,
    expected: Gaussian,
    gaussian: Gaussian,
    sde: LinearSDE,
    times: Tensor,
    *,
    start: Gaussian | None = None,
    tolerance: float = 1e-10,
) -> Gaussian:
    """The exact law of a sampler's output on Gaussian data is `expected`: for instance that of the same
    method here, `solver.tableau(sde, times).law(gaussian, sde)`. Returns the law found.

    Raises AssertionError unless the means agree to `tolerance` standard deviations and the covariances to
    `tolerance` of the largest variance.
    """
    found = sampler_law(sampler, gaussian, sde, times, start=start, tolerance=max(1e-9, tolerance))
    variance = expected.variance.max().clamp_min(1e-300)
    at_most(
        "the mean of the output is the expected one",
        (found.mean - expected.mean).abs() / variance.sqrt(),
        tolerance,
        sampler=sampler,
        found=found.mean,
        expected=expected.mean,
    )
    at_most(
        "the covariance of the output is the expected one",
        (found.cov - expected.cov).abs() / variance,
        tolerance,
        sampler=sampler,
        found=found.cov,
        expected=expected.cov,
    )
    return found


class SameLaw(NamedTuple):
    """What `check_same_law` saw: how many draws, the smallest p-value, and `detectable`: a law whose
    distribution function differs by more than that in one of the directions passes with probability at most
    `alpha`."""

    draws: int
    p_value: float
    detectable: float


def check_same_law(
    draw: Callable[[int, int], Tensor],
    law: Law,
    *,
    draws: int = 100_000,
    alpha: float = 1e-9,
    stages: int = 4,
    directions: int = 8,
    seed: int = 0,
) -> SameLaw:
    """Independent draws `draw(n, seed)`, (n, *event), have the law `law`; a right one fails with probability
    at most `alpha`.

    One stage after the other, each of twice as many draws as all before together, up to `draws` in all; the
    first one that rejects ends the check. In every direction (the coordinates, then random ones, at most
    `directions` of each) the draws are held against the exact distribution function of the law by the bound
    of Dvoretzky, Kiefer, Wolfowitz and Massart (1990), `P(sup |F_n - F| > d) <= 2 exp(-2 n d^2)`, which holds
    for every n; of a single Gaussian also the mean (normal) and the variance (chi square), exactly. Alpha is
    divided evenly among all of them.

    Power: see `SameLaw.detectable`; with the defaults 0.022, a shift of a normal by 0.06 of its standard
    deviation; of a single Gaussian a shift by 0.042, or 3 % of the standard deviation.
    """
    axes = _directions(law.dim, directions, seed)
    tests = (3 if len(law.means) == 1 else 1) * len(axes) * stages
    totals = [draws // 3 ** (stages - 1 - k) for k in range(stages)]
    sizes = [total - before for before, total in zip([0, *totals], totals, strict=False)]
    smallest, seen = 1.0, torch.zeros(0, law.dim, dtype=torch.float64)
    for stage, n in enumerate(sizes):
        fresh = draw(n, seed + stage)
        holds("as many draws as asked for", tuple(fresh.shape) == (n, *law.event_shape), shape=fresh.shape)
        seen = torch.cat([seen, fresh.detach().cpu().double().reshape(n, law.dim)])
        for axis in axes:
            for name, p in _p_values(seen @ axis, law, axis).items():
                smallest = min(smallest, p)
                at_most(
                    f"draws have the law, by {name}",
                    -math.log10(max(p, 1e-300)),
                    -math.log10(alpha / tests),
                    law=law,
                    direction=[round(a, 4) for a in axis.tolist()],
                    draws=len(seen),
                    seed=seed,
                    numbers="minus log10 of a p-value",
                )
    return SameLaw(len(seen), smallest, 2 * math.sqrt(math.log(2 * tests / alpha) / (2 * len(seen))))


def _directions(dim: int, most: int, seed: int) -> list[Tensor]:
    """Up to `most` coordinate axes, and as many random orthonormal directions where there are more than
    one."""
    eye = torch.eye(dim, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    random = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return [*eye[:most], *(random[:most] if dim > 1 else [])]


def _p_values(values: Tensor, law: Law, axis: Tensor) -> dict[str, float]:
    """Bounds on the probability of what is seen, or worse, by the name of the statistic."""
    from scipy.stats import chi2

    n, (means, stds) = len(values), _projected(law, axis)
    values = values.sort().values
    z = (values[:, None] - means) / stds
    F = torch.special.ndtr(z) @ law.weights.cpu()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(F - steps[:-1], steps[1:] - F).max())
    shape = {"distribution function": min(1.0, 2 * math.exp(-2 * n * distance**2))}
    if len(means) > 1:
        return shape
    total = float(z.square().sum())
    tails = 2 * min(chi2.cdf(total, n), chi2.sf(total, n))
    mean = math.erfc(abs(float(z.sum())) / math.sqrt(2 * n))
    return {"mean": mean, "variance": float(min(1.0, tails)), **shape}


def _projected(law: Law, axis: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the components of `axis . x`."""
    means = law.means.cpu().reshape(len(law.means), -1) @ axis
    roots = [law._spectrum.root(k).cpu() for k in range(len(means))]
    return means, torch.stack([(axis @ root).norm() for root in roots]).clamp_min(1e-300)
