"""Reliability in figures: wrong inputs, runs that must end, batches, crashes, damage, memory, threads.

    python -m benchmarks.reliability [--quick] [--only 2 7 ...]

Each line has a goal, what was measured, and whether it passes. The numbers are those of the figures that the
design sets:

    2 bad inputs     3 settings      7 termination   8 batch invariance   11 resume          12 kill -9
    13 corruption    14 hostile files   15 memory    16 threads           17 hygiene

Figure 3 is counted by `benchmarks.sweep` and cited from its results. The tests run smaller versions of all of
it, with the same functions (bad_inputs.py, damage.py, hostile.py). Writes results/reliability.json and
results/reliability.md; with --only, the other lines stay as they were.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import json
import os
import platform
import random
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import scoresde
from scoresde import checkpoint, decode, encode, grids, networks, sample, solvers, train
from scoresde.checkpoint import CheckpointError
from scoresde.denoiser import BaseDenoiser, Denoiser
from scoresde.laws import Gaussian
from scoresde.noise import BrownianPath, Noise
from scoresde.sde import VPSDE, LinearSDE

from . import bad_inputs, damage
from .hostile import HOSTILE

RESULTS = Path(__file__).parent / "results"
PACKAGE = Path(scoresde.__file__).parent
VP = VPSDE()
F64 = torch.float64


class Line(NamedTuple):
    """One line of the table."""

    figure: int
    what: str
    goal: str
    measured: str
    passed: bool


class Function(BaseDenoiser):
    """D(x, t) = function(x, t), without parameters."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE = VP) -> None:
        super().__init__()
        self.function, self.sde, self.calls = function, sde, 0

    def forward(self, x: Tensor, t: Any) -> Tensor:
        self.calls += 1
        return self.function(x, torch.as_tensor(t))


def elementwise() -> Function:
    """Not linear, and made of operations that give an element the same bits in any batch."""
    return Function(lambda x, t: 0.8 * x / (1 + 0.1 * x * x))


def network(kind: str) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made: nn.Module = networks.MLP(3, hidden=64, layers=2)
        if kind == "UNet":
            made = networks.UNet(1, base=8, multipliers=(1, 2), blocks=1, heads=2)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn(p.shape))
    return Denoiser(made, VP, "velocity").requires_grad_(False)


# ---- 2, 3


def bad(quick: bool) -> Iterator[Line]:
    outcomes = [bad_inputs.judge(case) for case in bad_inputs.cases()]
    kinds = Counter(outcome.kind for outcome in outcomes)
    share = kinds["clear"] / len(outcomes)
    for outcome in outcomes:
        if outcome.kind != "clear":
            print(f"  {outcome.kind}: {outcome.name}: {outcome.detail}"[:200])
    yield Line(2, "bad inputs tried", ">= 400", str(len(outcomes)), len(outcomes) >= 400)
    yield Line(
        2, "with a clear error, at most one network call", ">= 99 %", f"{100 * share:.1f} %", share >= 0.99
    )
    yield Line(
        2, "silent; hang", "0; 0", f"{kinds['silent']}; {kinds['hang']}", not kinds["silent"] + kinds["hang"]
    )


def settings(quick: bool) -> Iterator[Line]:
    what, goal = "settings of solvers that run and are finite (benchmarks.sweep)", ">= 10000, all"
    file = RESULTS / "sweep.json"
    if not file.exists():
        yield Line(3, what, goal, "not measured: run `python -m benchmarks.sweep` first", False)
        return
    counts: Counter[str] = Counter()
    for part in json.loads(file.read_text()).values():
        counts.update(part["counts"] if isinstance(part, dict) else {})
    measured = (
        f"{counts['run']} ran, {counts['failed']} failed, {counts['refused']} refused before the first call"
    )
    yield Line(3, what, goal, measured, counts["run"] >= 10_000 and not counts["failed"])


# ---- 7: adaptive solvers


ADAPTIVE = {
    "adaptive_ode": solvers.adaptive_ode(),
    "adaptive_sde": solvers.adaptive_sde(),
    "scipy RK45": solvers.scipy_ode("RK45"),
    "scipy DOP853": solvers.scipy_ode("DOP853"),
    "scipy LSODA": solvers.scipy_ode("LSODA"),
    "torchsde heun": solvers.torchsde_solver("heun", True),
}


def raising(x: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("the network broke")


# What must be an error, and which.
ERRORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], type[Exception]]] = {
    "another shape": (lambda x, t: torch.cat([x, x])[:, None], ValueError),
    "one sample": (lambda x, t: x[:1], ValueError),
    "raises": (raising, RuntimeError),
}


def terminating(quick: bool) -> Iterator[Line]:
    ends, noise = torch.tensor([1.0, 1e-3], dtype=F64), Noise.of(0, batch=3, dtype=F64)
    x, bad, slowest, late, runs = noise.prior((3, 2)), [], 0.0, 0, 0
    chosen = list(ADAPTIVE)[:2] if quick else list(ADAPTIVE)
    tried, least = [*HOSTILE, *ERRORS][:: 4 if quick else 1], 0 if quick else 30
    for name in chosen:
        for what in tried:
            function = (HOSTILE | ERRORS)[what][0]
            model, started, runs = Function(function), time.process_time(), runs + 1
            try:
                with bad_inputs.limited(60):
                    drawn = ADAPTIVE[name].solve(model, x, ends, noise=noise)
                ended = all(drawn.status) and what not in ERRORS
                if what in ("NaN", "inf", "1/0"):
                    late = max(late, model.calls - 1)
            except Exception as error:
                ended = what in ERRORS and type(error) is ERRORS[what][1]
            seconds = time.process_time() - started
            slowest = max(slowest, seconds)
            if not ended or seconds >= 5:
                bad.append(f"{name}: {what} ({seconds:.1f} s)")
        empty = ADAPTIVE[name].solve(elementwise(), x[:0], ends, noise=Noise.of(0, [], dtype=F64))
        bad += [] if empty.status == "ok" and empty.x.shape == (0, 2) else [f"{name}: empty batch"]
    for line in bad:
        print(f"  {line}")
    hostile = len(tried) + 1
    runs += len(chosen)
    yield Line(
        7,
        f"{hostile} hostile scores x {len(chosen)} adaptive solvers: end in 5 s, with a status or an error",
        f"all of >= {least} each",
        f"{runs - len(bad)} of {runs}, slowest {slowest:.1f} s of CPU time",
        not bad and hostile >= least,
    )
    yield Line(7, "network calls after the first NaN or Inf", "<= 1", str(late), late <= 1)


# ---- 8: batches


COUPLED = ("scipy", "torchsde", "norm='batch'")  # one error estimate for the batch, as published


def batches(quick: bool) -> Iterator[Line]:
    alone = {name: s for name, s in solvers.examples().items() if not any(word in name for word in COUPLED)}
    alone |= {repr(s): s for s in (solvers.scipy_ode(per_sample=True), solvers.torchsde_solver("heun"))}
    wrong, checks = [], 0
    generator = torch.Generator().manual_seed(0)
    for name, solver in alone.items():
        model = elementwise()
        whole = sample(model, (64, 3), solver, steps=6, dtype=F64).x
        parts = [list(range(b)) for b in (1, 2, 3, 7, 16)]
        parts += [torch.randperm(64, generator=generator).tolist() for _ in range(1 if quick else 3)]
        parts += [list(range(first, min(first + 13, 64))) for first in range(0, 64, 13)]
        for ids in parts:
            part = sample(model, (len(ids), 3), solver, steps=6, dtype=F64, ids=ids).x
            checks += 1
            wrong += [] if torch.equal(part, whole[ids]) else [f"{name}: {len(ids)} ids"]
    for line in wrong:
        print(f"  {line}")
    yield Line(
        8,
        f"sample i bit-equal for B = 1 to 64, permuted, in chunks; {len(alone)} fixed and adaptive solvers",
        "all",
        f"{checks - len(wrong)} of {checks}",
        not wrong,
    )
    for kind, event in (("MLP", (3,)), ("UNet", (1, 8, 8))):
        model, worst = network(kind), 0.0
        whole = sample(model, (64, *event), solvers.dpmpp(2), steps=10).x
        for b in (1, 2, 3, 7, 16):
            part = sample(model, (b, *event), solvers.dpmpp(2), steps=10).x
            worst = max(worst, float((part - whole[:b]).abs().max() / whole.abs().max()))
        yield Line(
            8,
            f"{kind} in float32, 10 steps: largest difference, relative",
            "<= 1e-6",
            f"{worst:.1e}",
            worst <= 1e-6,
        )


# ---- 11 to 14: training and files


def resuming(quick: bool) -> Iterator[Line]:
    trials, same = 5 if quick else 100, 0
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), torch.Generator().manual_seed(1)
        whole = damage.new_fit(log=folder / "whole")
        list(whole)
        for trial in range(trials):
            stops = torch.randint(1, 39, (2,), generator=generator).sort().values.tolist()
            run = damage.stopped_and_resumed(folder, stops, folder / f"log{trial}")
            trace = damage.losses_of(folder / f"log{trial}") == damage.losses_of(folder / "whole")
            same += trace and not damage.differing(run, whole)
    yield Line(
        11,
        "runs stopped twice and resumed: bits of weights, average, optimiser, generators, loss trace",
        f"{trials}/{trials}",
        f"{same}/{trials}",
        same == trials,
    )


def killing(quick: bool) -> Iterator[Line]:
    trials = 10 if quick else 200
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model"
        good, files = damage.kill_9(path, trials)
        checkpoint.save(path, damage.random_model())
        left = len(os.listdir(name)) - 1
    yield Line(
        12,
        "kill -9 while saving: the save that ended or the next, whole",
        f"{trials}/{trials}",
        f"{good}/{trials}",
        good == trials,
    )
    yield Line(
        12,
        "temporary files during; after the next save",
        "<= 1; 0",
        f"{files - 1}; {left}",
        files <= 2 and not left,
    )
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model"
        checkpoint.save(path, damage.random_model())
        content = path.read_bytes()
        limits = [int(x) for x in np.linspace(0, 400_000, 20)]
        errors = damage.full_disk(path, limits)
        kept = sum("unchanged" in line for line in errors) if path.read_bytes() == content else 0
    yield Line(12, "no space left: old file intact and a clear error", "20/20", f"{kept}/20", kept == 20)


@contextmanager
def saved() -> Iterator[Path]:
    """A good file in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        checkpoint.save(path, damage.random_model(classes=4), ema=damage.random_model(seed=1, classes=4))
        yield path


def corrupting(quick: bool) -> Iterator[Line]:
    flips, cuts = (50, 40) if quick else (1000, 200)
    with saved() as path:
        content = path.read_bytes()
        missed = len(damage.unnoticed(path, damage.flipped_bits(content, flips)))
        yield Line(
            13, "flipped bits with a clear error", f"{flips}/{flips}", f"{flips - missed}/{flips}", not missed
        )
        shortened = list(damage.truncations(content, cuts))
        missed = len(damage.unnoticed(path, shortened))
        total = len(shortened)
        yield Line(
            13,
            "truncations with a clear error",
            f"{total}/{total}",
            f"{total - missed}/{total}",
            not missed and total >= cuts,
        )
        run = damage.new_fit()
        next(run)
        run.save(path)
        found = 0
        for model in damage.others(50):
            with suppress(CheckpointError):
                checkpoint.restore(path, model, copy.deepcopy(model))
                continue
            found += 1
        yield Line(13, "models of another configuration refused", "50/50", f"{found}/50", found == 50)
        bad_models = 0
        for value in (torch.nan, torch.inf, -torch.inf):
            model = damage.random_model()
            with torch.no_grad():
                model.network.out.bias[0] = value  # pyright: ignore
            bad_models += damage.refused(
                lambda p, model=model: checkpoint.save(p, model), path, "NaN or infinity"
            )
        yield Line(13, "weights of NaN and infinity not saved", "3/3", f"{bad_models}/3", bad_models == 3)


def hostile_files(quick: bool) -> Iterator[Line]:
    code = [f"{file.name}: {word}" for file in PACKAGE.rglob("*.py") for word in runs_code(file.read_text())]
    yield Line(
        14, "pickle, eval, exec, torch.load in the package's syntax trees", "0", str(len(code)), not code
    )
    with saved() as path:
        content, state, refused = path.read_bytes(), torch.get_rng_state(), 0
        for change, _ in damage.HOSTILE.values():
            path.write_bytes(content)
            damage.resigned(path, change)
            refused += damage.refused(checkpoint.load, path, "")
        path.write_bytes(content)
        files = damage.foreign_files(path.parent)
        before = sorted(path.parent.iterdir())
        refused += sum(damage.refused(checkpoint.load, file) for file in files)
        clean = sorted(path.parent.iterdir()) == before and torch.equal(state, torch.get_rng_state())
        total = len(files) + len(damage.HOSTILE)
        yield Line(
            14,
            "hostile files refused, nothing run, nothing left",
            f"{total}/{total}",
            f"{refused}/{total}" + ("" if clean else ", with side effects"),
            refused == total >= 20 and clean,
        )
        trials = 500 if quick else 20_000
        start, crashes, loaded = resident(), [], 0
        for fuzzed in damage.fuzzed_headers(content, trials):
            path.write_bytes(fuzzed)
            try:
                checkpoint.load(path)
                loaded += 1
            except CheckpointError:
                pass
            except BaseException as error:
                crashes.append(f"{type(error).__name__}: {error}")
        grown = resident() - start
        for crash in crashes[:5]:
            print(f"  {crash}")
        measured = f"{len(crashes)} of {trials} ({loaded} harmless ones load), RSS +{grown:.1f} MiB"
        yield Line(
            14,
            "fuzzed headers, half of them signed rightly: crashes; memory",
            "0; < 10 MiB",
            measured,
            not crashes and grown < 10,
        )


def runs_code(source: str) -> list[str]:
    """Names in a syntax tree that run code from data."""
    words = {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "eval",
        "exec",
        "__import__",
    }
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name.split(".")[0] for alias in node.names]
            names += [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name in words]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += (
                [name] if name in words or name in ("torch.load", "torch.jit.load", "torch.hub.load") else []
            )
    return found


# ---- 15: memory


def resident() -> float:
    """Resident memory of this process in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def remembering(quick: bool) -> Iterator[Line]:
    last = 2000 if quick else 10_000
    for name, solver in {
        "dpmpp(3)": solvers.dpmpp(3),
        "ddpm": solvers.ddpm(),
        "corrector": solvers.predictor_corrector(solvers.ddim()),
    }.items():
        seen: dict[int, float] = {}

        def look(step: Any, seen: dict[int, float] = seen) -> None:
            if step.k in (100, last - 1):
                seen[step.k] = resident()

        drawn = sample(network("MLP"), (4, 3), solver, steps=last, callback=look)
        grown = seen[last - 1] - seen[100]
        kept = drawn.x.grad_fn is not None
        yield Line(
            15,
            f"{name}: RSS from step 100 to {last}; autograd nodes kept",
            "< 1 MiB; 0",
            f"{grown:+.2f} MiB; {int(kept)}",
            grown < 1 and not kept,
        )
    path, queries = BrownianPath(Noise.of(0, batch=2), (2, 3), 0.0, 1.0), 2000 if quick else 20_000
    path(0.5)
    start = resident()
    for k in range(queries):
        path(k / queries)
    grown = resident() - start
    yield Line(15, f"a Brownian path asked {queries} times", "< 1 MiB", f"{grown:+.2f} MiB", grown < 1)
    model = Denoiser(networks.MLP(2, hidden=16, layers=1), VP)
    run = train.fit(model, damage.X.float(), steps=last, batch_size=16, every=100)
    next(run)
    start = resident()
    for _ in run:
        pass
    grown = resident() - start
    yield Line(15, f"training from step 100 to {last}", "< 5 MiB", f"{grown:+.2f} MiB", grown < 5)


# ---- 16: threads


def sharing(quick: bool) -> Iterator[Line]:
    workers, runs = 8, 10 if quick else 200
    model = network("MLP")
    shared = [
        solvers.unipc(3),
        solvers.ddpm(),
        solvers.adaptive_ode(1e-2, 1e-2),
        solvers.predictor_corrector(solvers.ddim()),
    ]
    serial = {
        (s, seed): sample(model, (2, 3), shared[s], steps=5, seed=seed).x
        for s in range(4)
        for seed in range(5)
    }
    wrong: list[str] = []

    def work(worker: int) -> None:
        for k in range(runs):
            s, seed = (worker + k) % 4, k % 5
            try:
                if not torch.equal(sample(model, (2, 3), shared[s], steps=5, seed=seed).x, serial[s, seed]):
                    wrong.append(f"{shared[s]}: other bits")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = workers * runs
    yield Line(
        16,
        f"{workers} threads x {runs} runs on shared solvers and one network: bit-equal to serial",
        f"{total}/{total}",
        f"{total - len(wrong)}/{total}",
        not wrong,
    )


# ---- 17: manners


def surroundings(model: nn.Module) -> dict[str, Any]:
    """What a call should leave as it was."""
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": np.random.get_state()[1].tolist(),  # pyright: ignore
        "random": random.getstate(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "modes": [part.training for part in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": os.getcwd(),
    }


def public_calls(model: Denoiser, folder: Path, quick: bool) -> dict[str, Callable[[], Any]]:
    """Calls of the public functions that work, with the model in training mode."""
    law, path = Gaussian([0.0, 0.5, 1.0], 0.5), folder / "model"
    x = law.sample(3, generator=torch.Generator().manual_seed(0)).float()
    known = list(solvers.examples().items())
    calls: dict[str, Callable[[], Any]] = {
        f"sample {name}": lambda solver=solver: sample(model, (3, 3), solver, steps=3)
        for name, solver in (known[::9] if quick else known)
    }

    def trained() -> None:
        next(train.fit(model, x, steps=4, batch_size=3, every=2, path=folder / "run"))

    calls |= {
        "encode": lambda: encode(model, x, solvers.ddim(), steps=3),
        "decode": lambda: decode(model, x, solvers.unipc(), steps=3),
        "progress": lambda: sample(model, (3, 3), solvers.ddim(), steps=3, progress=True),
        "save": lambda: checkpoint.save(path, model, ema=model),
        "load": lambda: checkpoint.load(path),
        "describe": lambda: checkpoint.describe(path),
        "train": trained,
        "denoiser": lambda: model(x, 0.5),
        "score": lambda: law.denoiser(VP).score(x, 0.5),
        "losses": lambda: scoresde.losses.denoising(model, x, x, torch.rand(3, generator=torch.Generator())),
        "noise": lambda: Noise.of(0, batch=3)(0, (3, 2)),
        "law": lambda: (law.log_prob(x.double()), law.marginal(VP, 0.5), law.cov),
        "tableau": lambda: solvers.dpmpp(3).tableau(VP, grids.karras(VP, 5)).law(law, VP),
        "card": lambda: repr(solvers.card()),
        "mlp": lambda: networks.MLP.forward(model.network, x, torch.rand(3, generator=torch.Generator())),  # pyright: ignore
    }
    return calls


def manners(quick: bool) -> Iterator[Line]:
    model = damage.random_model()
    model.train()
    model.network.layers[0].eval()  # pyright: ignore
    rude: list[str] = []

    def watch(name: str, call: Callable[[], Any]) -> None:
        before = surroundings(model)
        with suppress(Exception):
            call()
        after = surroundings(model)
        rude.extend(f"{name}: {key}" for key in before if before[key] != after[key])

    with tempfile.TemporaryDirectory() as name:
        calls = public_calls(model, Path(name), quick)
        bad_inputs.import_all()
        calls["progress"]()
        for around in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with around():
                for label, call in calls.items():
                    watch(label, call)
        for label, call in calls.items():
            with breaking(model):
                watch(f"{label}, network raises", call)
    worked = len(rude)
    cases = bad_inputs.cases()
    for case in cases[:: 10 if quick else 1]:
        watch(case.name, case.call)
    for line in rude[:20]:
        print(f"  {line}")
    yield Line(
        17,
        f"{len(calls)} public calls in three gradient modes, and with a network that raises: things changed",
        "0",
        str(worked),
        not worked,
    )
    yield Line(
        17,
        f"{len(cases[:: 10 if quick else 1])} calls with bad inputs: things changed",
        "0",
        str(len(rude) - worked),
        len(rude) == worked,
    )


@contextmanager
def breaking(model: Denoiser) -> Iterator[None]:
    """The network raises."""

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    hook = model.network.register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


FIGURES: dict[int, Callable[[bool], Iterator[Line]]] = {
    2: bad,
    3: settings,
    7: terminating,
    8: batches,
    11: resuming,
    12: killing,
    13: corrupting,
    14: hostile_files,
    15: remembering,
    16: sharing,
    17: manners,
}


def table(lines: list[Line]) -> list[str]:
    rows = ["| figure | what | goal | measured | |", "|---|---|---|---|---|"]
    for line in lines:
        verdict = "pass" if line.passed else "FAIL"
        rows.append(f"| {line.figure} | {line.what} | {line.goal} | {line.measured} | {verdict} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few trials; writes nothing")
    parser.add_argument("--only", nargs="+", type=int, default=list(FIGURES), choices=list(FIGURES))
    options = parser.parse_args()
    measured: list[Line] = []
    for figure in options.only:
        started = time.perf_counter()
        for line in FIGURES[figure](options.quick):
            print(table([line])[-1], flush=True)
            measured.append(line)
        print(f"  figure {figure}: {time.perf_counter() - started:.0f} s", flush=True)
    lines = measured if options.quick else merged(measured)
    report = [
        "# Reliability",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}, one thread.",
        f"Made by `python -m benchmarks.reliability{' --quick' if options.quick else ''}`.",
        "",
        *table(lines),
        "",
        f"{sum(line.passed for line in lines)} of {len(lines)} lines pass.",
        "",
    ]
    print("\n".join(report))
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "reliability.md").write_text("\n".join(report))
        record = {"torch": torch.__version__, "lines": [line._asdict() for line in lines]}
        (RESULTS / "reliability.json").write_text(json.dumps(record, indent=1) + "\n")


def merged(measured: list[Line]) -> list[Line]:
    """These lines, and those of other figures from the run before."""
    file, new = RESULTS / "reliability.json", {line.figure for line in measured}
    before = [Line(**line) for line in json.loads(file.read_text())["lines"]] if file.exists() else []
    kept = [line for line in before if line.figure not in new]
    return sorted([*kept, *measured], key=lambda line: line.figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torchsde|torch")
    main()
