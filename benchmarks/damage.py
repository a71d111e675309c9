"""Damage to checkpoints and to runs of training, as the tests and the reliability figures do it.

Everything here takes a good file (or a good run) and breaks it in a stated way; whether the library notices
is counted by the caller.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from scoresde import checkpoint, train
from scoresde.checkpoint import CheckpointError
from scoresde.denoiser import Denoiser, Karras
from scoresde.networks import MLP
from scoresde.schedules import Cosine
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, SubVPSDE

ROOT = Path(__file__).resolve().parents[1]
Change = Callable[[Any, Any], Any]

X = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.arange(50) % 3


def random_model(sde: LinearSDE | None = None, seed: int = 0, predicts="noise", **options) -> Denoiser:
    """An MLP with random weights everywhere (a new network is zero at its end)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        network = MLP(3, hidden=8, layers=1, embedding="fourier", **options)
        for p in network.parameters():
            p.normal_()
    return Denoiser(network, VPSDE() if sde is None else sde, predicts)


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    return list(a.state_dict()) == list(b.state_dict()) and all(
        x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def resigned(path: Path, change: Change) -> None:
    """Change tensors and description of a file and sign it rightly, as a hostile author can."""
    with safe_open(path, framework="pt") as opened:
        description = json.loads(opened.metadata()["scoresde"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    description = change(description, tensors) or description
    content = safetensors.torch.save(tensors, {"scoresde": json.dumps(description), "sha256": "0" * 64})
    path.write_bytes(
        content.replace(b'"' + b"0" * 64 + b'"', f'"{hashlib.sha256(content).hexdigest()}"'.encode())
    )


# ---- bytes


def unnoticed(path: Path, contents: Iterable[bytes]) -> list[int]:
    """The numbers of the contents which `load` or `describe` take for a checkpoint; the file is put back."""
    good, found = path.read_bytes(), []
    for number, content in enumerate(contents):
        path.write_bytes(content)
        if not all(refused(read, path) for read in (checkpoint.load, checkpoint.describe)):
            found.append(number)
    path.write_bytes(good)
    return found


def refused(read: Callable[[Path], Any], path: Path, says: str = "expected") -> bool:
    """Whether reading ends in a CheckpointError that says what was expected."""
    try:
        read(path)
    except CheckpointError as error:
        return says in str(error)
    return False


def flipped_bits(content: bytes, trials: int) -> Iterator[bytes]:
    """One bit is wrong; in half of them a bit of the header, which is a small part of the file."""
    header = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(trials)
    for trial in range(trials):
        size = header if trial % 2 else len(content)
        position = int(torch.randint(size * 8, (), generator=generator))
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        yield bytes(damaged)


def truncations(content: bytes, trials: int) -> Iterator[bytes]:
    """Cut after 0 .. 11 bytes, at even distances, and before the last byte."""
    lengths = {*range(12), *range(12, len(content), max(1, len(content) // (trials - 12))), len(content) - 1}
    for length in sorted(lengths):
        yield content[:length]


def fuzzed_headers(content: bytes, trials: int) -> Iterator[bytes]:
    """One to four random bytes of the header are wrong; every other one is signed rightly all the same."""
    header = 8 + int.from_bytes(content[:8], "little")
    unsigned = content.replace(_signature(content), b"0" * 64)
    generator = torch.Generator().manual_seed(trials)
    counts = torch.randint(1, 5, (trials,), generator=generator).tolist()
    for trial, count in enumerate(counts):
        damaged = bytearray(unsigned)
        places, values = torch.randint(2**31, (2, count), generator=generator).tolist()
        for place, value in zip(places, values, strict=True):
            damaged[8 + place % (header - 8)] = value % 256 if trial % 4 < 2 else 32 + value % 96
        yield _signed(bytes(damaged)) if trial % 2 else bytes(damaged)


def _signature(content: bytes) -> bytes:
    return content.split(b'"sha256":"')[1][:64]


def _signed(unsigned: bytes) -> bytes:
    return unsigned.replace(b"0" * 64, hashlib.sha256(unsigned).hexdigest().encode(), 1)


class Trap:
    """Whoever unpickles it has run its code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def foreign_files(folder: Path) -> list[Path]:
    """Files that are no checkpoints, some of them hostile: who runs their code makes `folder/executed`."""
    trap = Trap(folder / "executed")
    (folder / "folder").mkdir()
    safetensors.torch.save_file({"x": torch.ones(2)}, folder / "foreign", {"format": "pt"})
    torch.save(trap, folder / "torch")
    contents = {
        "pickle": pickle.dumps(trap),
        "empty": b"",
        "text": b"hello, this is no checkpoint at all",
        "huge header": (2**63 - 1).to_bytes(8, "little") + b"{}",
        "long header": (10**12).to_bytes(8, "little") + b"{" * 100,
        "zeros": bytes(1000),
        "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "zip": b"PK\x03\x04" + bytes(100),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / n for n in (*contents, "folder", "foreign", "torch", "missing", "no/such/folder")]


# ---- content: signed rightly, as a hostile author can


def _rename(description, tensors):
    for key in list(tensors):
        tensors[f"{key.split('.')[0]}.module.{key.partition('.')[2]}"] = tensors.pop(key)


def _drop_one(description, tensors):
    tensors.pop("ema.out.bias")


def _add_one(description, tensors):
    tensors["ema.extra"] = torch.ones(1)


def _nan(description, tensors):
    tensors["ema.out.weight"][0, 0] = float("nan")


def _wrong_shape(description, tensors):
    tensors["ema.out.bias"] = torch.ones(4)


def _set(*path_and_value):
    *path, value = path_and_value

    def change(description, tensors):
        place = description
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


HOSTILE = {
    "renamed keys": (_rename, "missing .* not expected module"),
    "a key dropped": (_drop_one, "missing out.bias"),
    "a key added": (_add_one, "not expected extra"),
    "NaN weight": (_nan, "NaN or infinity in ema.out.weight"),
    "wrong shape": (_wrong_shape, r"out.bias of shape \(3,\), found \(4,\)"),
    "wider network": (_set("network", "config", "hidden", 16), "of shape"),
    "deeper network": (_set("network", "config", "layers", 2), "missing layers.1"),
    "enormous network": (_set("network", "config", "hidden", 10**7), "elements"),
    "endless network": (_set("network", "config", "layers", 10**12), "elements"),
    "enormous negative": (_set("network", "config", "hidden", -(10**7)), "elements"),
    "unknown argument": (_set("network", "config", "surprise", 1), "surprise"),
    "config of another type": (_set("network", "config", [1, 2]), "does not rebuild"),
    "config text": (_set("network", "config", "hidden", "8; import os"), "does not rebuild"),
    "another class": (_set("network", "class", "UNet"), "does not rebuild"),
    "class from elsewhere": (_set("network", "class", "os.system"), "expected one of scoresde.networks"),
    "dunder": (_set("network", "class", "__builtins__"), "expected one of scoresde.networks"),
    "no class": (_set("network", {}), "does not rebuild"),
    "unknown sde": (_set("sde", "class", "MySDE"), "does not rebuild"),
    "wrong rates": (_set("sde", "schedule", "beta_max", -1.0), "does not rebuild"),
    "unknown schedule": (_set("sde", "schedule", "class", "eval"), "does not rebuild"),
    "learned without weights": (
        _set("sde", "schedule", {"class": "Learned", "hidden": 10**12}),
        "weights of the schedule",
    ),
    "unknown prediction": (_set("predicts", "name", "score2"), "does not rebuild"),
    "bad preconditioning": (_set("predicts", {"name": "Karras", "sigma_data": -1.0}), "does not rebuild"),
    "unknown time": (_set("time_input", "clock"), "does not rebuild"),
    "unknown dtype": (_set("dtype", "nn"), "does not rebuild"),
    "newer version": (_set("version", 2), "version 1, found version 2"),
    "list": (lambda description, tensors: [1], "found version None"),
    "incomplete": (lambda description, tensors: {"version": 1}, "found none of"),
}


def others(count: int) -> Iterator[Denoiser]:
    """Models that differ in one thing or more from `random_model(classes=4)`."""
    sdes = [VPSDE(0.2, 20.0), VPSDE(schedule=Cosine()), SubVPSDE(), VESDE(), EDM()]
    views = ["data", "velocity", "flow", "score", Karras(0.4)]
    shapes: list[dict[str, Any]] = [
        {},
        {"vector_dim": 2},
        {"classes": 5},
        {"embedding_dim": 6},
        {"time_input": "log_snr"},
    ]
    for number in range(count):
        sde, view, shape = sdes[number % 5], views[number // 5 % 5], shapes[number // 25 % 5]
        yield random_model(sde, number, view, **{"classes": 4, **shape})


# ---- crashes

SAVER = """
    import sys, torch
    from scoresde import checkpoint
    from scoresde.denoiser import Denoiser
    from scoresde.networks import MLP
    from scoresde.sde import VPSDE
    model = Denoiser(MLP(3, hidden=200, layers=3), VPSDE())
"""


def run_saver(script: str, *arguments: object) -> str:
    """What the script prints, run by another process after SAVER."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = textwrap.dedent(SAVER) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    ).stdout


def kill_9(path: Path, trials: int) -> tuple[int, int]:
    """Kill a process that saves without end, so many times: how often the file then held the save that had
    ended or the one after it, whole; and the largest number of files in the folder."""
    out = run_saver(
        """
        import os, signal, time
        path, trials = sys.argv[1], int(sys.argv[2])
        for trial in range(trials):
            said, say = os.pipe()
            child = os.fork()
            if child == 0:
                for step in range(10**9):
                    with torch.no_grad():
                        model.network.out.bias.fill_(step)
                    checkpoint.save(path, model, metadata={"step": step})
                    os.write(say, b"%d " % step)
            os.close(say)
            said = os.fdopen(said)
            said.read(2)
            time.sleep(0.05 * torch.rand(()).item())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            last = int(("0 " + said.read()).split()[-1])
            loaded, step = checkpoint.load(path), checkpoint.describe(path)["metadata"]["step"]
            good = step in (last, last + 1) and bool((loaded.network.out.bias == step).all())
            print(good, len(os.listdir(os.path.dirname(path))))
        """,
        path,
        trials,
    ).split()
    return out[::2].count("True"), max(map(int, out[1::2]))


def full_disk(path: Path, limits: Sequence[int]) -> list[str]:
    """Save to `path` where files may not grow beyond the limits: the errors."""
    out = run_saver(
        """
        import resource
        for limit in map(int, sys.argv[2:]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                checkpoint.save(sys.argv[1], model)
            except checkpoint.CheckpointError as error:
                print(error)
        """,
        path,
        *limits,
    )
    return out.splitlines()


# ---- runs that stop and go on


def new_model(dropout: float = 0.2, dtype: torch.dtype = torch.float32, classes: int | None = 3) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        network = MLP(2, hidden=16, layers=1, dropout=dropout, classes=classes)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.1 * torch.randn(p.shape))
    return Denoiser(network, VPSDE(), "velocity").to(dtype)


def new_fit(model: Denoiser | None = None, data=None, **options) -> train.Run:
    defaults = {"steps": 40, "batch_size": 16, "every": 4, "warmup": 5, "cosine": True, "label_dropout": 0.3}
    data = (X.float(), LABELS) if data is None else data
    return train.fit(new_model() if model is None else model, data, **{**defaults, **options})


def everything(run: train.Run) -> dict[str, torch.Tensor]:
    """All that a run is made of."""
    tensors, values = run.state()
    state = {**tensors, **run.model.state_dict(prefix="model."), **run.ema.state_dict(prefix="ema.")}
    exact = {k: v for k, v in values.items() if isinstance(v, int)}
    return {k: v.clone() for k, v in {**state, **{k: torch.tensor(v) for k, v in exact.items()}}.items()}


def differing(a: train.Run, b: train.Run) -> list[str]:
    """Names of the parts in which two runs differ, be it in one bit."""
    first, second = everything(a), everything(b)
    return [
        name
        for name in first.keys() | second.keys()
        if name not in first
        or name not in second
        or first[name].dtype != second[name].dtype
        or not torch.equal(first[name], second[name])
    ]


def losses_of(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def stopped_and_resumed(folder: Path, stops: Sequence[int], log: Path) -> train.Run:
    """A run that is stopped after those steps, saved, and resumed by a new one, up to its end."""
    run, path = new_fit(log=log), folder / "stopped"
    for stop in stops:
        while run.step < stop:
            with run._training_mode():  # stops in the middle between records, as an interrupt does
                run._train_step()
            if run._at_record():
                loss = run._mean_loss()
                run.output.record(run, train.Progress(run.step, 40, loss, 0.0, 0.0, 0.0))
        run.save(path)
        torch.randn(stop)  # whoever draws between the runs does not matter
        run = new_fit(new_model(), resume=path, log=log)
    list(run)
    return run
