"""What stands around a training run: random state, interrupts, devices, and the files it leaves."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..checkpoint.description import described
from ..checkpoint.files import check_place

if TYPE_CHECKING:
    from ..denoiser import Denoiser
    from .run import Progress, Run

FilePath = str | os.PathLike[str]


class Randomness:
    """A state of the global generators, from which dropout draws, that is in place only while active."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.state: dict[str, Tensor] = {}
        with self.active():
            torch.manual_seed(seed)

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.put(self.state)
            try:
                yield
            finally:
                self.state = self.now()

    def now(self) -> dict[str, Tensor]:
        """The state of the global generators."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def put(self, state: dict[str, Tensor]) -> None:
        """The global generators into that state."""
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


@contextmanager
def held_interrupts(busy: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted and not raised; a second one is raised at once, except while `busy()`.

    Nothing is held in other threads than the main one, or where someone else handles the signal.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    noted: list[bool] = []

    def note(signum: int, frame: Any) -> None:
        if noted and not busy():
            raise KeyboardInterrupt
        noted.append(True)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class OneDevice:
    """What a run needs of an accelerator, where there is one device and full precision."""

    process_index, num_processes, is_main_process, scaler = 0, 1, True, None

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return objects

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[nn.Parameter], largest: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, largest)


def accelerator(model: nn.Module, device: torch.device, precision: str) -> Any:
    """accelerate's Accelerator where there are several processes or mixed precision, OneDevice otherwise."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"precision: expected 'no', 'bf16' or 'fp16', found {precision!r}")
    if precision == "fp16" and device.type == "cpu":  # accelerate would train in full precision
        raise ValueError(
            "precision: expected 'bf16' or 'no' for a model on the CPU, found 'fp16'; take one of them, or "
            "move the model to a GPU"
        )
    if not several and precision == "no":
        return OneDevice()
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, is_initialized
    except ImportError as error:
        raise ImportError(
            "several devices or mixed precision need accelerate: pip install 'scoresde[train]'"
        ) from error
    if is_initialized() and (set_before := AcceleratorState().mixed_precision) != precision:
        raise ValueError(
            f"precision: expected {set_before!r}, which this process has begun with, found {precision!r}; "
            "accelerate allows one in a process: start another one"
        )
    made = Accelerator(mixed_precision=precision, cpu=device.type == "cpu", device_placement=several)
    if several:
        model.to(made.device)
    return made


def check_savable(path: FilePath, model: Denoiser) -> None:
    """Say before `model` is trained, and not after, what would keep it from being saved to `path`.

    Raises CheckpointError.
    """
    check_place(path)
    description = described(model)
    try:
        json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"expected a model made of values that JSON can hold, which a file could rebuild; found "
            f"{description}: {error}. Build it from Python's numbers, strings and lists, or leave out path"
        ) from error


class Output:
    """The files of a run, and its bar: a checkpoint at `path`, JSON lines at `log`. Written by the main
    process only.
    """

    def __init__(
        self,
        path: FilePath | None = None,
        save_every: int | None = None,
        log: FilePath | None = None,
        progress: bool = False,
    ) -> None:
        if save_every is not None and (path is None or save_every < 1):
            raise ValueError(
                f"save_every: expected at least 1, and a path to save to; found {save_every}, path={path}"
            )
        self.path, self.save_every, self.log, self.progress = path, save_every, log, progress
        self.saved_at: int | None = 0
        self.bar: Any = None

    def begin(self, run: Run, resumed: FilePath | None = None) -> None:
        """At the start, or where the run that was saved in `resumed` goes on: in a file of its own, it is not
        saved yet.
        """
        elsewhere = resumed is not None and not _same(self.path, resumed)
        self.saved_at = None if elsewhere else run.step
        if not run.accelerator.is_main_process:
            self.progress, self.log = False, None
        if self.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=run.settings.steps, initial=run.step, unit="step", dynamic_ncols=True)
        if self.log is not None:
            _drop_after(Path(self.log), run.step)

    def due(self, step: int) -> bool:
        return self.save_every is not None and step % self.save_every == 0

    def record(self, run: Run, record: Progress) -> None:
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        if self.bar is not None:
            self.bar.update(record.step - self.bar.n)
            self.bar.set_postfix(loss=f"{record.loss:.4f}", refresh=False)
        if self.due(record.step):
            self.save(run)

    def save(self, run: Run) -> None:
        """Save what has not been saved."""
        if self.path is not None and self.saved_at != run.step:
            run.save(self.path)
            self.saved_at = run.step

    def end(self, run: Run) -> None:
        self.save(run)
        if self.bar is not None:
            self.bar.close()


def _same(a: FilePath | None, b: FilePath | None) -> bool:
    """Whether two names are of one file."""
    return a is not None and b is not None and os.path.realpath(a) == os.path.realpath(b)


def _drop_after(log: Path, step: int) -> None:
    """Cut the records after `step`, and one written by half: the run that goes on writes them again."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    log.write_text("".join(kept), encoding="utf-8")
