"""What a step costs beside the network: ours, a loop written by hand, and public libraries, side by side.

    python -m benchmarks.overhead [--device cuda] [--quick] [--out benchmarks/results]

All are timed in one process, one thread, float32, in turns; numbers are medians of the turns, in microseconds
a step: CPU time on the CPU (other processes do not count), wall time with synchronisation on a GPU. The
network is one that returns ready tensors in turn, or the digits' U-Net; it predicts noise for DDIM and DDPM
and data for the others, except that k-diffusion and azula always get data, their own convention. "table" is
`tableau.run`, "execute" what solvers call, with its checks; "compiled" is the loop of "table" under
torch.compile around a network that it cannot see into and whose outputs are new memory, for states of 10 000
numbers and more (in small ones the checks of a compiled call cost more than the arithmetic that it saves);
on a GPU the loop is a CUDA graph in its place, "graph". The noise is a ready tensor in all of them, so that
samplers are compared and not generators; what ours costs stands in a table of its own, and in the column
"sample", which is the whole call of `sample`: grid, table, reproducible noise, checks. Public libraries need
the environment of benchmarks/peers.txt, "compiled" a C++ compiler; without them their columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from scoresde import VPSDE, Denoiser, grids, networks, sample, solvers
from scoresde.noise import Noise
from scoresde.solvers.base import execute
from scoresde.tableau import Tableau, coefficients, loop, run

from . import peers

STEPS = 50
LONG = ", 3 times the steps"
SHAPES = {"1x1x2x4": (1, 1, 2, 4), "16x3x32x32": (16, 3, 32, 32), "64x3x32x32": (64, 3, 32, 32)}
NOISE_BATCHES = (16, 64, 256)
LIMIT_LOOP, LIMIT_DIFFUSERS, LIMIT_K_DIFFUSION, LIMIT_RANDN, LIMIT_CALL = 1.5, 1 / 5, 1 / 3, 5.0, 0.05
OURS = ("table", "execute", "compiled")  # what the limits are for
OUTPUTS = 4  # what UniPC-3 remembers, and the one that comes
Run = Callable[[], Any]


class Ready(nn.Module):
    """A network that does nothing: returns ready tensors in turn, so that what a method remembers lies in
    different memory, as the outputs of a network do.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        outputs = [torch.randn(shape, device=device) * 0.1 for _ in range(OUTPUTS)]
        self.outputs = nn.ParameterList([nn.Parameter(out, requires_grad=False) for out in outputs])
        self.turn = cycle(list(self.outputs))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return next(self.turn)


@torch.library.custom_op(
    "scoresde_benchmarks::unseen", mutates_args=(), schema="(Tensor x, Tensor time) -> Tensor"
)  # schema: older torch does not read annotations that are strings
def unseen(x: Tensor, time: Tensor) -> Tensor:
    """A network that does nothing and that torch.compile cannot see into: it returns new memory."""
    return torch.empty_like(x)


@unseen.register_fake
def _(x: Tensor, time: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unseen(nn.Module):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return unseen(x, time)


@dataclass
class Case:
    """One method on one network and shape: what is timed, by name."""

    method: str
    network: str
    shape: str
    runs: dict[str, Run]
    steps: int = STEPS
    times: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Microseconds a step. Of what was run with three times the steps too, the slope, so that what is
        done once a call does not count.
        """
        if name not in self.times:
            return None
        taken, longer = statistics.median(self.times[name]), self.times.get(name + LONG)
        if longer:
            return (statistics.median(longer) - taken) / (2 * self.steps) * 1e6
        return taken / self.steps * 1e6

    def once(self, name: str) -> float | None:
        """Microseconds that a call takes beside its steps."""
        step = self.median(name)
        return None if step is None else statistics.median(self.times[name]) * 1e6 - step * self.steps


class Clock:
    """Seconds of one call: CPU time on the CPU, synchronised wall time on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, function: Run, repeats: int = 1) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter if self.cuda else time.process_time
        start = now()
        for _ in range(repeats):
            function()
        if self.cuda:
            torch.cuda.synchronize()
        return (now() - start) / repeats


# The same methods written by hand, with coefficients in Python floats


def loop_one_step(
    net: nn.Module,
    x: Tensor,
    times: Tensor,
    keep: list[float],
    gain: list[float],
    noise: list[float] | None,
    z: Tensor,
) -> Tensor:
    """x <- keep x + gain eps + noise z: DDIM and ancestral sampling with a network that predicts noise."""
    for k in range(len(keep)):
        eps = net(x, times[k].expand(len(x)))
        x = (x * keep[k]).add_(eps, alpha=gain[k])
        if noise is not None:
            x.add_(z, alpha=noise[k])
    return x


def loop_multistep(
    net: nn.Module,
    x: Tensor,
    times: Tensor,
    keep: list[float],
    mix: list[list[float]],
    noise: list[float] | None,
    z: Tensor,
) -> Tensor:
    """x <- keep x + sum_j mix_j D_{k-j} + noise z: DPM-Solver++ 2M, its SDE form and UniPC with a network
    that predicts data.
    """
    old: list[Tensor] = []
    for k in range(len(keep)):
        data = net(x, times[k].expand(len(x)))
        x = (x * keep[k]).add_(data, alpha=mix[k][0])
        for m, weight in zip(old, mix[k][1:], strict=False):
            x.add_(m, alpha=weight)
        if noise is not None:
            x.add_(z, alpha=noise[k])
        old = [data, *old][: len(mix[k]) - 1]
    return x


def by_hand(table: Tableau, alpha: Tensor, sigma: Tensor, net: nn.Module, x: Tensor, z: Tensor) -> Run:
    """The loop for a table that remembers D, with its coefficients made ready."""
    times = table.times[:-1].to(x)
    noise = table.noise.tolist() if bool(table.noise.any()) else None
    if table.mix.shape[1] == 1:  # D = (x - sigma eps)/alpha
        keep = (table.keep + table.mix[:, 0] / alpha[:-1]).tolist()
        gain = (-table.mix[:, 0] * (sigma / alpha)[:-1]).tolist()
        return lambda: loop_one_step(net, x, times, keep, gain, noise, z)
    keep, mix = table.keep.tolist(), table.mix.tolist()
    return lambda: loop_multistep(net, x, times, keep, mix, noise, z)


# Public libraries, each in its own loop with its own conventions, so that no adapter is timed


def in_diffusers(
    name: str,
    table: Tableau,
    alpha: Tensor,
    sigma: Tensor,
    net: nn.Module,
    x: Tensor,
    z: Tensor,
    **config: Any,
) -> Run:
    step = {"eta": config.pop("eta")} if "eta" in config else {}
    # tables on the host, where diffusers keeps them: on a GPU each of its scalar operations would be a kernel
    scheduler = peers.diffusers_scheduler(name, alpha.float(), sigma.float(), **config)
    module, times = sys.modules[type(scheduler).__module__], table.times[:-1].to(x)
    rest = {
        key: value
        for key, value in vars(scheduler).items()
        if key in ("_step_index", "lower_order_nums", "last_sample")
    }

    def loop() -> Tensor:
        vars(scheduler).update(rest)
        if hasattr(scheduler, "model_outputs"):
            scheduler.model_outputs = [None] * scheduler.config["solver_order"]
        state = x
        for k, node in enumerate(scheduler.timesteps):
            state = scheduler.step(net(state, times[k].expand(len(x))), node, state, **step).prev_sample
        return state

    return _with_noise(loop, module, "randn_tensor", z) if bool(table.noise.any()) else loop


def in_k_diffusion(name: str, alpha: Tensor, sigma: Tensor, net: nn.Module, x: Tensor, z: Tensor) -> Run:
    function, levels = getattr(peers.k_diffusion_sampling(), f"sample_{name}"), (sigma / alpha).to(x)
    options: dict[str, Any] = (
        {"noise_sampler": lambda *levels: z} if "sde" in name or "ancestral" in name else {}
    )
    return lambda: function(net, x, levels, disable=True, **options)


def in_azula(
    name: str, table: Tableau, sde: VPSDE, net: nn.Module, x: Tensor, z: Tensor, **options: Any
) -> Run:
    nodes = {float(t): (sde.alpha(t).to(x), sde.sigma(t).to(x)) for t in table.times.float()}
    whole = sde.alpha(table.times).to(x), sde.sigma(table.times).to(x)

    def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
        return whole if t.ndim else nodes[float(t)]

    times = table.times.to(x)
    sampler = peers.azula_sampler(
        name, times, schedule, lambda state, t: net(state, t.expand(len(state))), **options
    )
    return (
        _with_noise(lambda: sampler(x), torch, "randn_like", z)
        if bool(table.noise.any())
        else lambda: sampler(x)
    )


def _with_noise(function: Run, module: Any, name: str, z: Tensor) -> Run:
    def patched() -> Any:
        with mock.patch.object(module, name, lambda *args, **kwargs: z):
            return function()

    return patched


METHODS: dict[str, tuple[Any, tuple[str, dict] | None, str | None, tuple[str, dict] | None]] = {
    # ours, diffusers, k-diffusion, azula
    "DDIM": (solvers.ddim(), ("DDIMScheduler", {"eta": 0.0}), "euler", ("DDIMSampler", {})),
    "DPM-Solver++ 2M": (
        solvers.dpmpp(2),
        ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        "dpmpp_2m",
        ("xEABSampler", {"order": 2}),
    ),
    "UniPC-3": (solvers.unipc(3), ("UniPCMultistepScheduler", {"solver_order": 3}), None, None),
    "DDPM ancestral": (solvers.ddpm(), ("DDPMScheduler", {}), "euler_ancestral", ("DDPMSampler", {})),
    "SDE-DPM-Solver++ 2M": (
        solvers.sde_dpmpp(2),
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        ),
        "dpmpp_2m_sde",
        None,
    ),
}  # fmt: skip


def case(
    method: str,
    network: str,
    shape: tuple[int, ...],
    device: torch.device,
    steps: int,
    with_compiled: bool = False,
) -> Case:
    """All implementations of a method, ready to run; compiled where that pays."""
    solver, diffusers, k_diffusion, azula = METHODS[method]
    sde = VPSDE()
    net = (Ready(shape, device) if network == "ready" else digits_unet(shape[1])).to(device).eval()
    multistep = "DPM" in method.replace("DDPM", "") or "UniPC" in method
    model = Denoiser(net, sde, "data" if multistep else "noise").eval()
    grid = grids.log_snr(sde, steps)
    table = solver.tableau(sde, grid)
    alpha, sigma = sde.alpha(table.times), sde.sigma(table.times)
    x, z = torch.randn(shape, device=device), torch.randn(shape, device=device)
    rows = model.rows(table.times[:-1], x)
    longer = grids.log_snr(sde, 3 * steps)
    long_table = solver.tableau(sde, longer)
    runs: dict[str, Run] = {
        "loop": by_hand(table, alpha, sigma, net, x, z),
        "table": lambda: run(table, rows, x, lambda k, shape: z),
        "execute": lambda: execute(table, model, x, noise=lambda k, shape: z),
        "execute" + LONG: lambda: execute(long_table, model, x, noise=lambda k, shape: z),
        "sample": lambda: sample(model, shape, solver, grid=grid),
        "sample" + LONG: lambda: sample(model, shape, solver, grid=longer),
    }
    if diffusers and not peers.missing("diffusers"):
        runs["diffusers"] = in_diffusers(
            diffusers[0],
            table,
            alpha,
            sigma,
            net,
            x,
            z,
            **diffusers[1],
            prediction_type="sample" if multistep else "epsilon",
        )
    if k_diffusion and not peers.missing("k-diffusion"):
        runs["k-diffusion"] = in_k_diffusion(k_diffusion, alpha, sigma, net, x, z)
    if azula and not peers.missing("azula"):
        runs["azula"] = in_azula(azula[0], table, sde, net, x, z, **azula[1])
    if device.type == "cuda":
        runs["graph"] = in_graph(runs["table"])
    elif with_compiled and x.numel() >= 10_000 and shutil.which(os.environ.get("CXX", "g++")):
        runs["compiled"] = compiled(table, Denoiser(Unseen(), sde, model.predicts).eval(), x, z)
    return Case(method, network, "x".join(map(str, shape)), runs, steps)


def digits_unet(channels: int) -> nn.Module:
    return networks.UNet(channels, base=24, multipliers=(1, 2), blocks=1)


def compiled(table: Tableau, model: Denoiser, x: Tensor, z: Tensor) -> Run:
    """The loop of a table as one compiled function, in place of the one before: torch keeps a few for each
    piece of code, and tries them all at a call.
    """
    rows = model.rows(table.times[:-1], x)
    numbers = coefficients(table, rows, x.dtype)
    torch.compiler.reset()
    function = torch.compile(lambda x, z: loop(numbers, rows.evaluate, x, lambda k, shape: z), fullgraph=True)
    function(x, z)
    return lambda: function(x, z)


def in_graph(function: Run) -> Run:
    """The whole loop as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(cases: list[Case], clock: Clock, turns: int, least: float) -> None:
    """Fill in the times, turn by turn over everything; each entry of a turn takes at least `least` seconds,
    one run being more than that.
    """
    for one in cases:
        for function in one.runs.values():
            function()  # warm
        for turn in range(turns):
            names = list(one.runs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                first = one.times[name][0] if turn else clock(one.runs[name])
                one.times.setdefault(name, []).append(
                    clock(one.runs[name], max(1, round(least / max(first, 1e-6))))
                )


def noise_costs(device: torch.device, clock: Clock, turns: int) -> list[dict[str, Any]]:
    """Reproducible noise, row after row, beside torch.randn and beside a call of the digits' U-Net."""
    rows = []
    for batch in NOISE_BATCHES:
        for shape in ((batch, 1, 8, 8), (batch, 3, 32, 32)):
            noise = Noise.of(0, batch=batch, device=device, dtype=torch.float32)
            x, time_ = torch.randn(shape, device=device), torch.rand(batch, device=device)
            net = digits_unet(1).to(device).eval()
            row = count()
            runs: dict[str, Run] = {
                "noise": lambda noise=noise, shape=shape, row=row: noise(next(row), shape),
                "randn": lambda x=x: torch.randn_like(x),
            }
            if shape[1] == 1:
                runs["U-Net"] = lambda net=net, x=x, time_=time_: net(x, time_)
            one = Case("", "", "x".join(map(str, shape)), runs, steps=1)
            measure([one], clock, turns, 0.003)
            rows.append({"shape": one.shape, **{name: one.median(name) for name in runs}})
    return rows


def verdicts(cases: list[Case], noise: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(rule, worst ratio, limit): for each rule the worst case."""
    found: dict[str, tuple[float, float, str]] = {}

    def rule(name: str, ratio: float, limit: float, where: str) -> None:
        if name not in found or ratio > found[name][0]:
            found[name] = (ratio, limit, where)

    for one in cases:
        where = f"{one.method}, {one.network}, {one.shape}"
        for ours in OURS:
            for other, limit in (
                ("loop", LIMIT_LOOP),
                ("diffusers", LIMIT_DIFFUSERS),
                ("k-diffusion", LIMIT_K_DIFFUSION),
            ):
                mine, theirs = one.median(ours), one.median(other)
                if mine and theirs and (other == "loop" or one.network == "ready"):
                    rule(f"{ours} / {other}, {one.network} {one.shape}", mine / theirs, limit, where)
                    if other != "loop" and ours == "table":
                        rule(
                            f"loop / {other}, {one.network} {one.shape}",
                            (one.median("loop") or 0.0) / theirs,
                            limit,
                            where,
                        )
    for row in noise:
        rule(f"noise / randn, {row['shape']}", row["noise"] / row["randn"], LIMIT_RANDN, row["shape"])
        if "U-Net" in row:
            rule(f"noise / U-Net call, {row['shape']}", row["noise"] / row["U-Net"], LIMIT_CALL, row["shape"])
    return [(f"{name} (worst: {where})", ratio, limit) for name, (ratio, limit, where) in found.items()]


COLUMNS = (
    "loop",
    "table",
    "execute",
    "sample",
    "compiled",
    "graph",
    "diffusers",
    "k-diffusion",
    "azula",
)  # microseconds a step


def report(
    cases: list[Case], noise: list[dict[str, Any]], rules: list[tuple[str, float, float]], device: str
) -> str:
    shown = [c for c in COLUMNS if any(c in one.times for one in cases)]
    head = [
        "method",
        "network",
        "state",
        *shown,
        "table/loop",
        "execute/loop",
        "compiled/loop",
        "once a call: execute",
        "sample",
    ]
    lines = [
        f"Microseconds a step, medians. {device}, torch {torch.__version__}, one thread, float32.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for one in cases:
        loop = one.median("loop") or float("nan")
        numbers = [_number(one.median(c)) for c in shown]
        ratios = [_ratio(one.median(c), loop) for c in OURS]
        once = [_number(one.once(c)) for c in ("execute", "sample")]
        lines.append("| " + " | ".join([one.method, one.network, one.shape, *numbers, *ratios, *once]) + " |")
    lines += ["", "| state | noise | randn | ratio | U-Net call | share |", "|---|---|---|---|---|---|"]
    for row in noise:
        share = f"{row['noise'] / row['U-Net']:.1%}" if "U-Net" in row else ""
        ratio = f"{row['noise'] / row['randn']:.2f}"
        lines.append(
            f"| {row['shape']} | {_number(row['noise'])} | {_number(row['randn'])} | {ratio} "
            f"| {_number(row.get('U-Net'))} | {share} |"
        )
    lines += ["", "| rule | worst ratio | limit | |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {ratio:.3f} | {limit:.3f} | {'pass' if ratio <= limit else 'FAIL'} |"
        for name, ratio, limit in rules
    ]
    return "\n".join(lines) + "\n"


def _ratio(value: float | None, other: float) -> str:
    return "" if value is None else f"{value / other:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def save(out: Path, stem: str, device: torch.device, data: dict[str, Any], text: str) -> None:
    """The numbers as JSON and the report beside them, for each kind of device in files of its own."""
    out.mkdir(parents=True, exist_ok=True)
    stem += "" if device.type == "cpu" else f"_{device.type}"
    record = {"device": device_name(device), "torch": torch.__version__, **data}
    (out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer turns, no U-Net, nothing compiled")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of overhead.json and overhead.md",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, turns = torch.device(options.device), 5 if options.quick else 15
    clock = Clock(device)
    with torch.no_grad():
        cases = []
        for shape in SHAPES.values():
            for method in METHODS:  # in turn, as only one compiled loop is kept
                cases.append(case(method, "ready", shape, device, STEPS, with_compiled=not options.quick))
                measure(cases[-1:], clock, turns, 0.01)
        if not options.quick:
            with_network = [case(method, "U-Net", (16, 1, 8, 8), device, 10) for method in METHODS]
            measure(with_network, clock, 5, 0.0)
            cases += with_network
        noise = noise_costs(device, clock, turns)
    rules = verdicts(cases, noise)
    text = report(cases, noise, rules, device_name(device))
    print(text)
    for library in ("diffusers", "k-diffusion", "azula"):
        if reason := peers.missing(library):
            print(reason)
    data = {
        "microseconds_per_step": [
            {
                "method": c.method,
                "network": c.network,
                "state": c.shape,
                **{key: c.median(key) for key in c.runs if LONG not in key},
            }
            for c in cases
        ],
        "noise": noise,
        "rules": [{"rule": n, "ratio": r, "limit": limit, "pass": r <= limit} for n, r, limit in rules],
    }
    save(options.out, "overhead", device, data, text)


if __name__ == "__main__":
    main()
