"""Likelihood: error against network calls, beside an RK45 implementation; bits per dimension of digits.

    python -m benchmarks.likelihood [--problems gaussian ring anisotropic digits bits] [--quick]

Calls. log p through the probability flow of VP(0.1, 20), one Rademacher probe for each sample, the same for
both. The other implementation is the usual one, written here: scipy's RK45 in t on the state and the
log-density of the whole batch at once. Errors are in nats, root mean square over the samples, against ours
at a tolerance of 1e-9 with the same probes (for the network 1e-5), which is checked against DOP853. Calls
are all evaluations of the network, ours with the one that the prior's gap takes; the RK45 batch is one state,
so all of its samples have the calls of the batch, ours are given as the mean over samples and as the largest.
Here RK45 has velocity and divergence from one call; public code (score_sde's `get_likelihood_fn`) makes two
calls of each evaluation, one for either, and the last column counts those.

Bits. Held-out digits under benchmarks/digits.safetensors: levels 0..16 as 17 points on [-1, 1]. The ODE gives
a density, so the process's own noise dequantizes: `log P(x) >= E[log p(x_end) + log P(x | x_end) - log
q(x_end | x)]`, with the discrete decoder that the ELBO has. With an exact model and prior, this and the
continuous ELBO are equal on average over the data. Uniform dequantization is given too.

Writes results/likelihood.json and results/likelihood.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scoresde import checkpoint, digits, likelihood
from scoresde.denoiser import BaseDenoiser
from scoresde.likelihood.density import PROBE_ROWS
from scoresde.noise import Noise
from scoresde.sde import VPSDE, like

from .digits_checkpoint import PATH
from .problems import problem

SDE = VPSDE()
NUMBER = {"gaussian": 32, "ring": 64, "anisotropic": 16, "digits": 4}
ENDS = {"gaussian": (1e-3, 1e-5), "ring": (1e-3, 1e-5), "anisotropic": (1e-3,), "digits": (1e-3,)}
TARGETS = (1.0, 1e-1, 1e-2, 1e-3)  # nats
GOAL = 0.5
CHAINED = 4  # digits whose ELBO is taken over all 1000 steps of the DDPM chain
PROBE = likelihood.Hutchinson(1)
RESULTS = Path(__file__).parent / "results"


class Run(NamedTuple):
    """One implementation at one tolerance; `mean` and `largest` are calls a sample."""

    tolerance: float
    error: float
    mean: float
    largest: float


def usual(
    model: BaseDenoiser, x: Tensor, end: float, tolerance: float, method: str = "RK45"
) -> tuple[Tensor, int]:
    """log p (B,) and the number of network calls: `d[x, l] = [v, z.(dv/dx) z] dt` from the end to t = 1 on
    the whole batch as one state of scipy's."""
    z = PROBE.probes(Noise.of(0, batch=len(x), dtype=torch.float64, offset=PROBE_ROWS), x[0].numel())
    z = z.view(x.shape).to(x)
    calls = 0

    def field(t: float, packed: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        state = torch.from_numpy(packed[: x.numel()]).view(x.shape).requires_grad_()
        with torch.enable_grad():
            f, g2 = SDE.rates(t)
            v = like(f, state) * state - like(g2 / 2, state) * model.score(state, t)
            (product,) = torch.autograd.grad(v, state, z)
        trace = (product * z).flatten(1).sum(1)
        return torch.cat([v.detach().flatten(), trace]).numpy()

    start = np.concatenate([x.double().flatten().numpy(), np.zeros(len(x))])
    found = solve_ivp(field, (end, 1.0), start, method=method, rtol=tolerance, atol=tolerance)
    last = torch.from_numpy(found.y[:, -1])
    latent, change = last[: x.numel()].view(len(x), -1), last[x.numel() :]
    prior = -0.5 * latent.square().sum(1) - 0.5 * latent.shape[1] * math.log(2 * math.pi)
    return prior + change, calls


def ours(model: BaseDenoiser, x: Tensor, end: float, tolerance: float) -> tuple[Tensor, likelihood.LogProb]:
    found = likelihood.log_prob(model, x, end=end, divergence=PROBE, tolerance=tolerance, max_calls=10_000)
    assert found.status == "ok", found.status
    return found.value, found


def samples(name: str, quick: bool) -> int:
    """How many a problem is measured on."""
    return max(2, NUMBER[name] // (4 if quick else 1))


def subject(name: str, end: float, quick: bool) -> tuple[BaseDenoiser, Tensor]:
    """A model and points at the end."""
    n = samples(name, quick)
    generator = torch.Generator().manual_seed(0)
    if name != "digits":
        law = problem(name)
        return law.denoiser(SDE), law.marginal(SDE, end).sample(n, generator=generator)
    held_out = digits.load().held_out
    mean, std = SDE.marginal(held_out.x[:n].double(), end)
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    return trained().given(label=held_out.label[:n]), mean + std * noise


def trained() -> BaseDenoiser:
    return checkpoint.load(PATH).eval().float()


def measure(name: str, end: float, quick: bool) -> dict[str, list[Run]]:
    """Both implementations over a range of tolerances."""
    model, x = subject(name, end, quick)
    network = name == "digits"
    reference = ours(model, x, end, 1e-5 if network else 1e-9)[0]
    if not network:
        few = usual(model, x[:4], end, 1e-11, "DOP853")[0]
        assert float((few - reference[:4]).abs().max()) < 1e-5, "the reference is not converged"
    table: dict[str, list[Run]] = {"likelihood.log_prob": [], "scipy RK45": []}
    for tolerance in np.logspace(-1, -4 if network else -7, 5 if quick else 9).tolist():
        value, found = ours(model, x, end, tolerance)
        mean, largest = float(found.evaluations.double().mean()), float(found.network_calls)
        table["likelihood.log_prob"].append(Run(tolerance, _rms(value - reference), mean, largest))
        value, calls = usual(model, x, end, tolerance)
        table["scipy RK45"].append(Run(tolerance, _rms(value - reference), calls, calls))
    return table


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def calls_at(runs: list[Run], error: float) -> tuple[float, float]:
    """(mean, largest) calls where the error is `error`, interpolated between the best runs around it (those
    that no run with a smaller error undercuts); NaN beyond them."""
    best: list[Run] = []
    for run in sorted(runs, key=lambda run: run.error):
        if not best or run.mean < best[-1].mean:
            best.append(run)
    logs, wanted = [math.log(run.error) for run in best], math.log(error)
    if not logs[0] <= wanted <= logs[-1]:
        return math.nan, math.nan
    mean, largest = ([float(run[i]) for run in best] for i in (2, 3))
    return float(np.interp(wanted, logs, mean)), float(np.interp(wanted, logs, largest))


def bits(quick: bool) -> dict[str, dict[str, float]]:
    """Bits per dimension of held-out digits with their standard errors over the digits."""
    n, probes, draws = (4, 1, 8) if quick else (32, 1, 64)
    held_out = digits.load().held_out
    x, condition = held_out.x[:n].double(), {"label": held_out.label[:n]}
    model, step, dim = trained(), 0.125, x[0].numel()
    decoder = likelihood.DiscreteDecoder(step, -1.0, 1.0)
    divergence = likelihood.Hutchinson(probes)
    found: dict[str, dict[str, float]] = {}

    def note(label: str, values: Tensor, calls: float) -> None:
        found[label] = {
            "bits": float(values.mean()),
            "error": float(values.std()) / math.sqrt(n),
            "calls": calls,
        }

    for end in (1e-3, 1e-2):
        continuous = likelihood.elbo(model, x, decoder, end=end, draws=draws, condition=condition)
        note(f"ELBO, continuous, end {end:g}", continuous.bits_per_dim(), continuous.network_calls)
        mean, std = SDE.marginal(x, end)
        eps = Noise.of(1, batch=n, dtype=torch.float64)(0, x.shape)
        density = likelihood.log_prob(
            model, mean + std * eps, end=end, divergence=divergence, tolerance=1e-2, condition=condition
        )
        assert density.status == "ok", density.status
        entropy = 0.5 * dim * math.log(2 * math.pi) + dim * std.log().flatten()[0]
        noise_cost = -(0.5 * eps.square().flatten(1).sum(1) + entropy)  # log q(x_end | x)
        with torch.no_grad():
            denoised = model(mean + std * eps, end, **condition)
        decoded = decoder(x, denoised, SDE.sigma(end) / SDE.alpha(end))
        total = density.value + decoded - noise_cost
        calls = float(density.evaluations.double().mean())
        note(f"ODE, dequantized by the process, end {end:g}", likelihood.bits_per_dim(total, dim), calls)
    fine = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000 if not quick else None
    if fine is not None:
        for label, variance in (
            ("beta-tilde", likelihood.posterior_variance),
            ("beta", likelihood.transition_variance),
        ):
            chain = likelihood.elbo(
                model, x[:CHAINED], decoder, grid=fine, variance=variance,
                condition={"label": held_out.label[:CHAINED]},
            )  # fmt: skip
            values = chain.bits_per_dim()
            found[f"ELBO, 1000 steps of DDPM, {label} ({CHAINED} digits)"] = {
                "bits": float(values.mean()),
                "error": float(values.std()) / math.sqrt(CHAINED),
                "calls": chain.network_calls,
            }
    uniform = likelihood.log_prob(
        model, likelihood.dequantize(x, step), end=1e-2, divergence=divergence, tolerance=1e-2,
        condition=condition,
    )  # fmt: skip
    calls = float(uniform.evaluations.double().mean())
    note("ODE, dequantized uniformly, end 0.01", uniform.bits_per_dim(step), calls)
    return found


def summary(title: str, table: dict[str, list[Run]]) -> list[str]:
    """Markdown: calls at the targets, ours and the other's and their ratio; and all runs."""
    lines = [
        f"### {title}",
        "",
        "| error (nats) | ours: mean | largest | RK45 | mean/RK45 | largest/RK45 | mean/score_sde |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        mean, largest = calls_at(table["likelihood.log_prob"], target)
        other, _ = calls_at(table["scipy RK45"], target)
        if not math.isnan(mean + other):
            ratios = f"{mean / other:.2f} | {largest / other:.2f} | {mean / other / 2:.2f}"
            lines.append(f"| {target:g} | {mean:.0f} | {largest:.0f} | {other:.0f} | {ratios} |")
    lines += ["", "| | RMS error (mean/largest calls), tolerance by tolerance |", "|---|---|"]
    for label, runs in table.items():
        cells = ", ".join(f"{run.error:.1e} ({run.mean:.0f}/{run.largest:.0f})" for run in runs)
        lines.append(f"| {label} | {cells} |")
    return [*lines, ""]


def report(record: dict[str, Any], quick: bool) -> str:
    """Markdown of all there is."""
    lines = [
        "# Likelihood: network calls, and bits per dimension",
        "",
        f"VP(0.1, 20), one Rademacher probe. Python {platform.python_version()}, torch {torch.__version__}.",
        f"Made by `python -m benchmarks.likelihood{' --quick' if quick else ''}`.",
        f"Goal: at most {GOAL} of the calls of an implementation on scipy's RK45 at the same error.",
        "RK45 has velocity and divergence from one call; score_sde's code makes two, the last column's unit.",
        "The digits' network is float32 and not smooth: below 0.05 nats no order shows.",
        "",
    ]
    for title, table in record["calls"].items():
        lines += summary(title, {label: [Run(**run) for run in runs] for label, runs in table.items()})
    if record["bits"]:
        lines += [
            "### Bits per dimension of held-out digits",
            "",
            "| | bits/dim | standard error over digits | network calls |",
            "|---|---|---|---|",
        ]
    for label, row in record["bits"].items():
        lines.append(f"| {label} | {row['bits']:.3f} | {row['error']:.3f} | {row['calls']:.0f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=[*NUMBER, "bits"], choices=[*NUMBER, "bits"])
    parser.add_argument("--quick", action="store_true", help="few samples and tolerances; writes nothing")
    options = parser.parse_args()
    path, record = RESULTS / "likelihood.json", {"calls": {}, "bits": {}}
    if path.exists() and not options.quick:
        record = json.loads(path.read_text())  # problems that are not asked for stay as they are
    for name in options.problems:
        if name == "bits":
            record["bits"] = bits(options.quick)
        else:
            for end in ENDS[name]:
                table = measure(name, end, options.quick)
                title = f"{name}, end {end:g}, {samples(name, options.quick)} samples"
                record["calls"][title] = {k: [run._asdict() for run in runs] for k, runs in table.items()}
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
            path.with_suffix(".md").write_text(report(record, options.quick))
    print(report(record, options.quick))


if __name__ == "__main__":
    main()
