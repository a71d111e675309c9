"""What a step of training costs: `train.fit`, a loop by hand, and one in the style of diffusers' examples.

    python -m benchmarks.training_speed [--device cuda] [--quick] [--out benchmarks/results]

All train the same U-Net on the same images with AdamW, clipped gradients and an exponential moving average,
in one process, in turns of some steps; a number is the median of the turns: CPU time of one thread on the CPU
(other processes do not count), synchronised wall time on a GPU.

fit        scoresde's `train.fit`: stratified times, skipped steps where a gradient is not finite, records
by hand    the least that does the same: uniform times, no checks, no records
accelerate `accelerate.Accelerator`, a table of betas with its gather at random indices, DataLoader, and
           the moving average of diffusers' `EMAModel` where diffusers is installed (else the one by hand)

Memory is the peak that some steps add, with a model of their own: on a GPU what the allocator counts, on the
CPU the growth of the resident set (Linux) of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import VPSDE, Denoiser, networks, train

from .overhead import Clock, device_name, save

RESULTS = Path(__file__).parent / "results"
LINUX = sys.platform == "linux"
LR, DECAY, CLIP = 1e-3, 0.999, 1.0
Steps = Callable[[int], None]


def unet(size: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    made = networks.UNet(1, base=24, multipliers=(1, 2), blocks=1) if size == 8 else networks.UNet(3, base=64)
    return made.to(device)


def images(shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8 * shape[0], *shape[1:], generator=generator).clamp(-1, 1).to(device)


# Each takes the shape of a batch and a precision, and returns a function that makes some steps


def fit(shape: tuple[int, ...], precision: str, device: torch.device, every: int) -> Steps:
    model = Denoiser(unet(shape[-1], device), VPSDE())
    run = train.fit(
        model,
        images(shape, device),
        steps=10**6,
        batch_size=shape[0],
        lr=LR,
        ema_decay=DECAY,
        clip=CLIP,
        every=every,
        precision=precision,  # pyright: ignore[reportArgumentType]
    )
    return lambda steps: next(run) and None


def by_hand(shape: tuple[int, ...], precision: str, device: torch.device, every: int) -> Steps:
    net, x = unet(shape[-1], device), images(shape, device)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True)
    weights, mean = list(net.parameters()), list(average.parameters())

    def steps(count: int) -> None:
        for _ in range(count):
            x0 = x[torch.randint(len(x), (shape[0],), device=device)]
            t = torch.rand(shape[0], device=device) * (1 - 1e-5) + 1e-5
            B = 0.1 * t + 0.5 * 19.9 * t**2
            alpha, sigma = (-0.5 * B).exp(), (-torch.expm1(-B)).sqrt()
            eps = torch.randn_like(x0)
            noisy = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = (net(noisy, t) - eps).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(mean, weights, 1 - DECAY)

    return steps


def accelerate_style(shape: tuple[int, ...], precision: str, device: torch.device, every: int) -> Steps:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    net, x = unet(shape[-1], device), images(shape, torch.device("cpu"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=shape[0], shuffle=True)
    update = _average(net)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    bars = (1 - torch.linspace(1e-4, 0.02, 1000, device=device)).cumprod(0)

    def batches() -> Iterator[Tensor]:
        while True:
            for (batch,) in loader:
                yield batch

    source = batches()

    def steps(count: int) -> None:
        for _ in range(count):
            x0 = next(source)
            eps = torch.randn_like(x0)
            i = torch.randint(1000, (len(x0),), device=device)
            bar = bars[i].view(-1, 1, 1, 1)
            noisy = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
            with accelerator.accumulate(net):
                loss = (net(noisy, i.float()) - eps).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(net.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            update(net.parameters())
            loss.detach().item()  # the examples log every step

    return steps


def _average(net: nn.Module) -> Callable[[Any], None]:
    """diffusers' moving average, or one like it."""
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.training_utils import EMAModel  # pyright: ignore

        return EMAModel(net.parameters(), decay=DECAY, use_ema_warmup=True).step
    mean = [p.detach().clone() for p in net.parameters()]

    @torch.no_grad()
    def update(weights: Any) -> None:
        for own, its in zip(mean, weights, strict=True):
            own.lerp_(its, 1 - DECAY)

    return update


LOOPS: dict[str, Callable[..., Steps]] = {"fit": fit, "by hand": by_hand, "accelerate": accelerate_style}


def settings(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Batches, precisions, steps a turn and turns."""
    if quick:
        return [{"shape": (32, 1, 8, 8), "precision": "no", "every": 2, "turns": 3}]
    if device.type == "cuda":
        return [
            {"shape": shape, "precision": precision, "every": 10, "turns": 7}
            for shape in ((256, 1, 8, 8), (128, 3, 32, 32))
            for precision in ("no", "bf16")
        ]
    return [
        {"shape": (128, 1, 8, 8), "precision": "no", "every": 4, "turns": 9},
        {"shape": (128, 1, 8, 8), "precision": "bf16", "every": 4, "turns": 5},
        {"shape": (8, 3, 32, 32), "precision": "no", "every": 1, "turns": 3},
    ]


@contextmanager
def one_precision() -> Iterator[None]:
    """accelerate allows a process one precision: none is set before, and none stays behind."""
    if not usable("accelerate"):
        yield
        return
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def measured(setting: dict[str, Any], device: torch.device, clock: Clock) -> dict[str, Any]:
    """Milliseconds a step and MiB of every loop."""
    with one_precision():
        return _measured(setting, device, clock)


def _measured(setting: dict[str, Any], device: torch.device, clock: Clock) -> dict[str, Any]:
    shape, precision, every = setting["shape"], setting["precision"], setting["every"]
    loops = {name: make(shape, precision, device, every) for name, make in LOOPS.items() if usable(name)}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for steps in loops.values():
        steps(every)  # warm
    for turn in range(setting["turns"]):
        names = list(loops)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(clock(lambda steps=loops[name]: steps(every)) / every * 1000)
    counted = LINUX or device.type == "cuda"
    return {
        "shape": list(shape),
        "precision": precision,
        "milliseconds": {name: statistics.median(found) for name, found in times.items()},
        "mebibytes": {name: memory(name, shape, precision, device) for name in loops} if counted else {},
    }


def usable(name: str) -> bool:
    return name != "accelerate" or importlib.util.find_spec("accelerate") is not None


def memory(name: str, shape: tuple[int, ...], precision: str, device: torch.device) -> float:
    """Peak that some steps add, in MiB."""
    if device.type == "cuda":
        return allocated(name, shape, precision, device)
    words = [name, ",".join(map(str, shape)), precision]
    command = [sys.executable, "-m", "benchmarks.training_speed", "--memory-of", *words]
    return float(subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).splitlines()[-1])


def allocated(name: str, shape: tuple[int, ...], precision: str, device: torch.device) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    LOOPS[name](shape, precision, device, 3)(3)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def grown(name: str, shape: tuple[int, ...], precision: str) -> float:
    """What `memory` calls in another process, on the CPU."""
    cpu = torch.device("cpu")
    LOOPS[name]((2, *shape[1:]), precision, cpu, 1)(1)  # what is imported at the first step
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    LOOPS[name](shape, precision, cpu, 3)(3)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in status if line.startswith(field)).split()[1]) / 1024


def report(rows: list[dict[str, Any]], device: str) -> str:
    names = list(LOOPS)
    titles = ["batch", "precision", *(f"{n}, ms a step" for n in names), "fit, images/s"]
    titles += [*(f"{n} / fit" for n in names[1:]), *(f"{n}, MiB" for n in names)]
    lines = [
        f"One step of training, medians. {device}, torch {torch.__version__}.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    for row in rows:
        times, own = row["milliseconds"], row["milliseconds"]["fit"]
        cells = ["x".join(map(str, row["shape"])), row["precision"]]
        cells += [f"{times[n]:.1f}" if n in times else "" for n in names]
        cells.append(f"{row['shape'][0] / own * 1000:.0f}")
        cells += [f"{times[n] / own:.2f}" if n in times else "" for n in names[1:]]
        cells += [f"{row['mebibytes'][n]:.0f}" if n in row["mebibytes"] else "" for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small batch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of training_speed.json and .md")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        name, shape, precision = options.memory_of
        print(grown(name, tuple(map(int, shape.split(","))), precision))
        return
    device = torch.device(options.device)
    clock, rows = Clock(device), []
    for setting in settings(options.quick, device):
        rows.append(measured(setting, device, clock))
        print(rows[-1], flush=True)
    text = report(rows, device_name(device))
    print(text)
    save(options.out, "training_speed", device, {"rows": rows}, text)


if __name__ == "__main__":
    main()
