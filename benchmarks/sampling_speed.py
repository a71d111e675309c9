"""How long a batch of samples takes, network included: ours, a loop by hand and public libraries, compared.

    python -m benchmarks.sampling_speed [--device cuda] [--quick] [--out benchmarks/results]

Everything runs in one process, in turns, with the same U-Net, the same solver on the same grid, and the same
start; numbers are medians of whole runs, in milliseconds: CPU time of one thread on the CPU (other processes
do not count), wall time with synchronisation on a GPU. "sample" is what users of scoresde call, with its
grid, table, reproducible noise and checks; "execute" is its loop alone. Of the others only the loop is timed,
with everything made ready, and noise that costs them nothing; k-diffusion and azula take what the network
returns for data, their own convention.

network   eager | compiled (torch.compile; the same compiled module for all) | graph (the whole loop of
          `tableau.run` as one CUDA graph)
dtype     of the network; states are float32 in all of them

Public libraries need the environment of benchmarks/peers.txt; without it their columns stay empty.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import VPSDE, Denoiser, grids, networks, sample, solvers
from scoresde.solvers.base import execute
from scoresde.tableau import run

from . import peers
from .overhead import (
    Case,
    Clock,
    by_hand,
    device_name,
    in_azula,
    in_diffusers,
    in_graph,
    in_k_diffusion,
    measure,
    save,
)

RESULTS = Path(__file__).parent / "results"
MODES = ("eager", "compiled", "graph")
COLUMNS = ("sample", "execute", "loop", "graph", "diffusers", "k-diffusion", "azula")
# ours; in diffusers, k-diffusion and azula; whether the network predicts data, else noise
METHODS: dict[str, tuple[Any, tuple[str, dict[str, Any]], str, tuple[str, dict[str, Any]] | None, bool]] = {
    "DDIM": (solvers.ddim(), ("DDIMScheduler", {"eta": 0.0}), "euler", ("DDIMSampler", {}), False),
    "DPM-Solver++ 2M": (
        solvers.dpmpp(2),
        ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        "dpmpp_2m",
        ("xEABSampler", {"order": 2}),
        True,
    ),
    "DDPM": (solvers.ddpm(), ("DDPMScheduler", {}), "euler_ancestral", ("DDPMSampler", {}), False),
}


class Within(nn.Module):
    """A network in a dtype of its own behind states in another, as pipelines call it."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x.to(self.dtype), t).to(x.dtype)


def unet(size: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The digits' network for 8x8 images, a larger one for others."""
    torch.manual_seed(0)
    made = networks.UNet(1, base=24, multipliers=(1, 2), blocks=1) if size == 8 else networks.UNet(3, base=64)
    return made.to(device, dtype).eval()


def case(
    method: str, shape: tuple[int, ...], steps: int, mode: str, dtype: torch.dtype, device: torch.device
) -> Case:
    """All implementations of a method on one network, ready to run."""
    solver, diffusers, k_diffusion, azula, data = METHODS[method]
    sde = VPSDE()
    plain = unet(shape[-1], device, dtype)
    net = torch.compile(plain, dynamic=False) if mode == "compiled" else plain
    model = Denoiser(net, sde, "data" if data else "noise").eval()  # pyright: ignore[reportArgumentType]
    grid = grids.log_snr(sde, steps)
    table = solver.tableau(sde, grid)
    alpha, sigma = sde.alpha(table.times), sde.sigma(table.times)
    x, z = torch.randn(shape, device=device), torch.randn(shape, device=device)
    within = Within(net, dtype)  # pyright: ignore[reportArgumentType]
    runs: dict[str, Any] = {}
    if mode == "graph":
        rows = model.rows(table.times[:-1], x)
        runs["graph"] = in_graph(lambda: run(table, rows, x, lambda k, shape: z))
        return Case(method, mode, "x".join(map(str, shape)), runs, steps)
    runs["sample"] = lambda: sample(model, shape, solver, grid=grid, device=device)
    runs["execute"] = lambda: execute(table, model, x, noise=lambda k, shape: z).x
    runs["loop"] = by_hand(table, alpha, sigma, within, x, z)
    if not peers.missing("diffusers"):
        kind = "sample" if data else "epsilon"
        runs["diffusers"] = in_diffusers(
            diffusers[0], table, alpha, sigma, within, x, z, **diffusers[1], prediction_type=kind
        )
    if not peers.missing("k-diffusion"):
        runs["k-diffusion"] = in_k_diffusion(k_diffusion, alpha, sigma, within, x, z)
    if azula and not peers.missing("azula"):
        runs["azula"] = in_azula(azula[0], table, sde, within, x, z, **azula[1])
    return Case(method, mode, "x".join(map(str, shape)), runs, steps)


def settings(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """What is measured: keywords of `case`, with the number of turns."""
    f32, bf16, cuda = torch.float32, torch.bfloat16, device.type == "cuda"
    small, large = ((256, 1, 8, 8), (64, 3, 32, 32)) if cuda else ((64, 1, 8, 8), (8, 3, 32, 32))
    if quick:
        return [
            {"method": name, "shape": (16, 1, 8, 8), "steps": 10, "mode": "eager", "dtype": f32, "turns": 3}
            for name in METHODS
        ]
    listed = [(name, small, 20, "eager", f32) for name in METHODS]
    multistep = "DPM-Solver++ 2M"
    listed += [(multistep, small, 20, "compiled", f32), (multistep, small, 20, "eager", bf16)]
    if cuda:
        rest = [(large, dtype, mode) for dtype in (f32, bf16) for mode in MODES]
        rest += [(small, f32, "graph"), (small, bf16, "graph")]
        listed += [(multistep, shape, 20, mode, dtype) for shape, dtype, mode in rest]
    else:  # hours are not worth it where a call takes seconds
        listed += [(multistep, small, 20, "compiled", bf16), (multistep, large, 4, "eager", f32)]
    names = ("method", "shape", "steps", "mode", "dtype")
    return [dict(zip(names, one, strict=True), turns=5) for one in dict.fromkeys(listed)]


def measured(setting: dict[str, Any], device: torch.device, clock: Clock) -> dict[str, Any]:
    """Milliseconds a run of every implementation."""
    torch.compiler.reset()
    given = {key: value for key, value in setting.items() if key != "turns"}
    shown = {**given, "dtype": str(setting["dtype"]).removeprefix("torch."), "shape": list(setting["shape"])}
    try:
        one = case(**given, device=device)
        with torch.no_grad():
            measure([one], clock, setting["turns"], 0.0)
    except RuntimeError as error:  # no compiler, or no kernel for this dtype
        return {**shown, "skipped": str(error).splitlines()[0][:200]}
    times = {name: (one.median(name) or 0.0) * one.steps / 1000 for name in one.runs}
    return {**shown, "milliseconds": times}


def report(rows: list[dict[str, Any]], device: str) -> str:
    head = ["solver", "state", "steps", "network", "dtype"]
    columns = [name for name in COLUMNS if any(name in row.get("milliseconds", {}) for row in rows)]
    others = [name for name in columns if name not in ("sample", "execute", "graph")]
    titles = [*head, *columns, "images/s", *(f"{name} / sample" for name in others)]
    lines = [
        f"Milliseconds a run, medians. {device}, torch {torch.__version__}, states in float32.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        cells = [row["method"], shape, str(row["steps"]), row["mode"], row["dtype"]]
        if "skipped" in row:
            lines.append("| " + " | ".join([*cells, f"skipped: {row['skipped']}"]) + " |")
            continue
        times = row["milliseconds"]
        own = times.get("sample", times.get("graph"))
        cells += [f"{times[name]:.1f}" if name in times else "" for name in columns]
        cells.append(f"{row['shape'][0] / own * 1000:.0f}")
        cells += [f"{times[name] / own:.2f}" if name in times else "" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small batch, eager and float32 only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of sampling_speed.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    name, clock, rows = device_name(device), Clock(device), []
    for setting in settings(options.quick, device):
        rows.append(measured(setting, device, clock))
        print(rows[-1], flush=True)
        save(options.out, "sampling_speed", device, {"rows": rows}, report(rows, name))
    print(report(rows, name))
    for library in ("diffusers", "k-diffusion", "azula"):
        if reason := peers.missing(library):
            print(reason)


if __name__ == "__main__":
    main()
