"""Training a denoiser, as an iterator of progress.

    run = fit(model, data, steps=3000, path="digits.safetensors")
    for progress in run:
        print(progress)
    sample(run.ema, ...)

The run owns its randomness: the same seed gives the same run, and on the CPU a run that was interrupted, saved and resumed gives the same bits as one that
was not. Outside a call of `next` nothing differs from before it: global random state, gradient mode, and training flags are as they were found.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, default_collate

from . import checkpoint, losses
from .denoiser import Denoiser

FilePath = str | os.PathLike[str]
Data = Tensor | tuple[Tensor, Any] | Dataset
Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """The state after `step` of `steps` steps; loss is the mean since the last record, seconds are those spent training."""

    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        return f"step {self.step}/{self.steps}  loss {self.loss:.4f}  lr {self.lr:.2e}  {self.images_per_second:.0f} images/s  {self.seconds:.0f} s"


@dataclass(frozen=True)
class Settings:
    """The options of `fit` that shape the run."""

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    cosine: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.0
    null_label: int = -1
    every: int = 10
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "every", "patience"):
            _expect(isinstance(getattr(self, name), int) and getattr(self, name) >= 1, name, "an int of at least 1", self)
        for name in ("warmup", "weight_decay"):
            _expect(0 <= getattr(self, name) < math.inf, name, "a finite number of at least 0", self)
        for name in ("ema_decay", "label_dropout"):
            _expect(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1", self)
        _expect(0 < self.lr < math.inf, "lr", "a positive number", self)
        _expect(self.clip > 0, "clip", "a positive norm (math.inf for none)", self)

    def learning_rate(self, step: int) -> float:
        """`lr` after a linear rise over the first `warmup` steps, with `cosine` falling to 0 at the end; step counts from 1."""
        rise = min(1.0, step / self.warmup) if self.warmup else 1.0
        if not self.cosine:
            return self.lr * rise
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))

    def decay(self, step: int) -> float:
        """The decay of the average at `step`: `ema_decay`, less at the beginning, so that the initial weights are soon forgotten."""
        return min(self.ema_decay, (1 + step) / (10 + step))


def fit(
    model: Denoiser,
    data: Data,
    *,
    weight: losses.Weighting = losses.simple,
    times: losses.Times = losses.uniform,
    draw: losses.Draw = losses.stratified,
    precision: Literal["no", "bf16", "fp16"] = "no",
    path: FilePath | None = None,
    save_every: int | None = None,
    resume: FilePath | None = None,
    log: FilePath | None = None,
    progress: bool = False,
    **settings: Any,
) -> Run:
    """Train `model` on `data` where the model is, by denoising score matching; the result is an iterator of `Progress` that holds the average, `run.ema`.

    data        x (N, ...), or (x, labels) with labels (N,), or (x, {name: tensor}) of other conditions of the network, or a map-style Dataset whose items
                are x or (x, label). Tensors are moved to the model's device whole; a Dataset stays where it is. Every epoch is a new random order
    weight, times, draw    of the loss, see `losses`
    precision   "bf16" or "fp16": mixed precision, by accelerate
    path        where to save, every `save_every` steps, at the end, and on Ctrl-C, which ends the step first and is then raised as KeyboardInterrupt
    resume      a file of a run to continue; seed, batch size and number of samples must be those of that run
    log         a file of JSON lines, one for each record
    progress    show a bar (tqdm)

    settings, with defaults: steps; batch_size 128 (over all devices); lr 1e-3, warmup 100 steps, cosine False (fall to 0 at the end); AdamW's betas
    (0.9, 0.999) and weight_decay 0; clip 1.0, the largest norm of the gradient; ema_decay 0.999; label_dropout 0, the probability that a label
    becomes null_label -1 (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598); every 10 steps a record; patience 10; seed 0.

    A step whose gradient is not finite changes nothing; `patience` of them in a row end the run with FloatingPointError. Started by `accelerate launch`
    or torchrun on several devices, each takes its share of every batch.

    Raises ValueError or TypeError for options or data that do not fit, ImportError where accelerate is needed and missing.
    """
    if not isinstance(model, Denoiser):
        raise TypeError(f"expected a Denoiser, the boundary around a network; found {type(model)}. Use Denoiser(network, sde)")
    run = Run(model, data, Settings(**settings), losses.denoising, (weight, times, draw), _backend(model, precision))
    run.output = Output(path, save_every, log, progress)
    if resume is not None:
        run.restore(resume)
    run.output.begin(run)
    return run


class Run:
    """A training run: `next(run)` trains up to the next record. Attributes: model, ema (the averaged Denoiser), step, settings."""

    def __init__(
        self,
        model: Denoiser,
        data: Data,
        settings: Settings,
        loss: Callable[..., Tensor],
        parts: tuple[losses.Weighting, losses.Times, losses.Draw],
        backend: Any,
    ) -> None:
        self.model, self.settings, self.backend, self.parts = model, settings, backend, parts
        self.data = Batches(data, settings, model.device)
        self.step, self.seconds = 0, 0.0
        self.output = Output(None, None, None, False)
        self.average = AveragedModel(model, multi_avg_fn=self._blend)
        self.average.requires_grad_(False)
        self.average.n_averaged += 1  # it starts at the initial weights
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.objective, self.wrapped_optimizer = backend.prepare(Objective(model, loss, parts[0]), self.optimizer)
        zero = torch.zeros((), dtype=torch.float64, device=model.device)
        self.tally = {name: zero.clone() for name in ("loss", "steps", "bad", "worst")}
        self.noise = torch.Generator(model.device).manual_seed(_mix(settings.seed, 1))
        self.clock = torch.Generator().manual_seed(_mix(settings.seed, 2))
        self.inside = Randomness(model.device, _mix(settings.seed, 3 + backend.process_index))

    @property
    def ema(self) -> Denoiser:
        """The exponential moving average of the model; a copy, in its own evaluation mode."""
        return self.average.module.eval()  # pyright: ignore[reportReturnType]

    def __iter__(self) -> Iterator[Progress]:
        return self

    def __next__(self) -> Progress:
        """Train up to the next record (a multiple of `every`, a save, or the end)."""
        if self.step >= self.settings.steps:
            self.close()
            raise StopIteration
        self._check_finite()
        start, first = time.perf_counter(), self.step
        with _held_interrupts() as interrupted, self._training_mode():
            while not interrupted():
                self._train_step()
                if self._at_record():
                    break
            loss = self._read_loss() if self._at_record() else math.nan
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if interrupted():
            self.close()
            raise KeyboardInterrupt
        self._check_finite()
        rate = (self.step - first) * self.settings.batch_size / seconds
        record = Progress(self.step, self.settings.steps, loss, self._rate(), self.seconds, rate)
        self.output.record(self, record)
        return record

    def close(self) -> None:
        """Save, if there is a path and something new, and end the bar."""
        self.output.end(self)

    # ---- one step

    def _train_step(self) -> None:
        x0, cond = self.data.next()
        u = self.parts[2](len(x0), self.clock)
        t = self.parts[1](self.model.sde, u).to(x0.device)
        eps = torch.randn(x0.shape, generator=self.noise, dtype=x0.dtype, device=x0.device)
        cond = self._dropped(cond)
        share = slice(self.backend.process_index, None, self.backend.num_processes)
        with self.backend.autocast():
            values = self.objective(x0[share], eps[share], t[share], {k: v[share] for k, v in cond.items()})
        loss = values.mean()
        self.backend.backward(loss)
        norm = self.backend.clip_grad_norm_(self.parameters, self.settings.clip)
        self._update(loss.detach(), norm)

    def _update(self, loss: Tensor, norm: Tensor) -> None:
        """Optimiser and average; where the gradient is not finite the fused optimiser skips the step on the device, without a look from the host."""
        self.step += 1
        # The norm is the same on all devices and the loss is not, so the norm decides.
        bad = ~norm.isfinite()
        self.optimizer.param_groups[0]["lr"] = self._rate()
        if self.backend.scaler is None:
            self.optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
        self.wrapped_optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        tally = self.tally
        tally["loss"] += torch.where(bad, 0.0, loss)
        tally["steps"] += ~bad
        tally["bad"].add_(1).mul_(bad)
        torch.maximum(tally["bad"], tally["worst"], out=tally["worst"])

    def _dropped(self, cond: Condition) -> Condition:
        """Labels, each replaced by the null label with probability `label_dropout`."""
        p = self.settings.label_dropout
        if not p or "label" not in cond:
            return cond
        label = cond["label"]
        drop = torch.rand(label.shape, generator=self.noise, device=label.device) < p
        return {**cond, "label": label.masked_fill(drop, self.settings.null_label)}

    def _blend(self, average: Any, current: Any, n: Any) -> None:
        get_ema_multi_avg_fn(self.settings.decay(self.step))(average, current, n)

    def _rate(self) -> float:
        return self.settings.learning_rate(self.step)

    # ---- records

    def _at_record(self) -> bool:
        s, save_every = self.settings, self.output.save_every
        return self.step % s.every == 0 or self.step >= s.steps or bool(save_every and self.step % save_every == 0)

    def _read_loss(self) -> float:
        total, count = self.tally["loss"].item(), self.tally["steps"].item()
        self.tally["loss"].zero_()
        self.tally["steps"].zero_()
        return total / count if count else math.nan

    def _check_finite(self) -> None:
        if self.tally["worst"].item() >= self.settings.patience:
            raise FloatingPointError(
                f"expected finite losses, found {int(self.tally['worst'].item())} steps in a row whose gradient was NaN or infinite, up to step {self.step}; "
                "none of them changed the weights. Look at the data, lower lr, or train without mixed precision"
            )

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Gradients on, training flags on, the run's own global random state; all put back."""
        flags = [(module, module.training) for module in self.model.modules()]
        with torch.inference_mode(False), torch.enable_grad(), self.inside.active():
            try:
                self.model.train()
                yield
            finally:
                for module, flag in flags:
                    module.training = flag

    # ---- state

    def save(self, path: FilePath, metadata: Mapping[str, Any] | None = None) -> None:
        """Write model, average and all that resuming needs to one file (on the main process only)."""
        if self.backend.is_main_process:
            checkpoint.save(path, self.model, ema=self.ema, training=self.state(), metadata=metadata)

    def state(self) -> checkpoint.Training:
        """Everything but the weights: optimiser, generators, place in the data, open sums."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors = {f"tally.{k}": v for k, v in self.tally.items()}
        tensors |= {"clock": self.clock.get_state(), "noise": self.noise.get_state(), "order": self.data.before_epoch}
        tensors |= {f"inside.{k}": v for k, v in self.inside.state.items()}
        for p, entries in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[id(p)]}.{k}": v for k, v in entries.items()}
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "position": self.data.position,
            "averaged": int(self.average.n_averaged),
            "settings": asdict(self.settings),
            "samples": len(self.data),
            "scaler": None if self.backend.scaler is None else self.backend.scaler.state_dict(),
        }
        return checkpoint.Training(tensors, values)

    def restore(self, path: FilePath) -> None:
        """Continue the run saved in `path`. CheckpointError if it is no such file; ValueError if it is a run on other batches."""
        saved = checkpoint.describe(path)["training"]
        if saved is not None:
            found = {**saved["settings"], "samples": saved["samples"]}
            for name, expected in {**asdict(self.settings), "samples": len(self.data)}.items():
                _expect(name not in ("seed", "batch_size", "samples") or found[name] == expected, name, f"{found[name]}, as in {path},", expected)
        tensors, values = checkpoint.restore(path, self.model, self.ema)
        self.step, self.seconds = values["step"], values["seconds"]
        self.average.n_averaged.fill_(values["averaged"])
        for name, value in self.tally.items():
            value.copy_(tensors[f"tally.{name}"])
        self.clock.set_state(tensors["clock"])
        self.noise.set_state(tensors["noise"])
        self.inside.state = {name: tensors[f"inside.{name}"] for name in self.inside.state}
        self.data.go_to(tensors["order"], values["position"])
        for name, p in self.model.named_parameters():
            saved_entries = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.rpartition(".")[0] == f"optimizer.{name}"}
            if saved_entries:
                self.optimizer.state[p] = {k: _laid_out_as(p, v) for k, v in saved_entries.items()}
        if self.backend.scaler is not None and values["scaler"]:
            self.backend.scaler.load_state_dict(values["scaler"])


class Objective(nn.Module):
    """The loss as a module, so that what wraps modules (several devices) sees one forward pass."""

    def __init__(self, model: Denoiser, loss: Callable[..., Tensor], weight: losses.Weighting) -> None:
        super().__init__()
        self.model, self.loss, self.weight = model, loss, weight

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.loss(self.model, x0, eps, t, self.weight, **cond)


class Batches:
    """Batches in a new random order every epoch, without end; the last, incomplete batch of an epoch is filled from the next."""

    def __init__(self, data: Data, settings: Settings, device: torch.device) -> None:
        self.dataset, self.tensors = _parsed(data, device)
        self.size, self.device = settings.batch_size, device
        self.generator = torch.Generator().manual_seed(_mix(settings.seed, 0))
        self.go_to(self.generator.get_state(), 0)

    def __len__(self) -> int:
        return len(self.dataset) if self.tensors is None else len(self.tensors[0])  # pyright: ignore[reportArgumentType]

    def go_to(self, before_epoch: Tensor, position: int) -> None:
        """To `position` samples into the epoch whose order the generator in that state draws."""
        self.before_epoch, self.position = before_epoch, position
        self.generator.set_state(before_epoch)
        self.order = torch.randperm(len(self), generator=self.generator)

    def next(self) -> tuple[Tensor, Condition]:
        """x (B, ...) and its conditions."""
        chosen = [self._take(self.size)]
        while (missing := self.size - sum(map(len, chosen))) > 0:
            self.go_to(self.generator.get_state(), 0)
            chosen.append(self._take(missing))
        return self._gather(torch.cat(chosen))

    def _take(self, n: int) -> Tensor:
        part = self.order[self.position : self.position + n]
        self.position += len(part)
        return part

    def _gather(self, index: Tensor) -> tuple[Tensor, Condition]:
        if self.tensors is not None:
            index = index.to(self.device)
            return self.tensors[0][index], {k: v[index] for k, v in self.tensors[1].items()}
        x, cond = _split(default_collate([self.dataset[i] for i in index.tolist()]))  # pyright: ignore[reportOptionalSubscript]
        return x.to(self.device), {k: v.to(self.device) for k, v in cond.items()}


class Randomness:
    """A state of the global generators (dropout draws from them) that is in place only while active."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.state: dict[str, Tensor] = {}
        with self.active():
            torch.manual_seed(seed)

    @contextmanager
    def active(self) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            if self.state:
                torch.set_rng_state(self.state["cpu"])
            if self.state and cuda:
                torch.cuda.set_rng_state(self.state["cuda"], self.device)
            yield
            self.state = {"cpu": torch.get_rng_state()}
            if cuda:
                self.state["cuda"] = torch.cuda.get_rng_state(self.device)


class Output:
    """What a run leaves behind: checkpoints, a log, a bar."""

    def __init__(self, path: FilePath | None, save_every: int | None, log: FilePath | None, bar: bool) -> None:
        if save_every is not None and (path is None or save_every < 1):
            raise ValueError(f"expected save_every of at least 1 with a path to save to, found save_every={save_every}, path={path}")
        self.path, self.save_every, self.log, self.show = path, save_every, log, bar
        self.saved_at = -1
        self.bar: Any = None

    def begin(self, run: Run) -> None:
        self.saved_at = run.step
        if not run.backend.is_main_process:
            self.show, self.log = False, None
        if self.show:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=run.settings.steps, initial=run.step, unit="step", dynamic_ncols=True)
        if self.log is not None:
            _drop_after(Path(self.log), run.step)

    def record(self, run: Run, record: Progress) -> None:
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        if self.bar is not None:
            self.bar.update(record.step - self.bar.n)
            self.bar.set_postfix(loss=f"{record.loss:.4f}", refresh=False)
        if self.save_every and record.step % self.save_every == 0:
            self.save(run)

    def save(self, run: Run) -> None:
        if self.path is not None and self.saved_at != run.step:
            run.save(self.path)
            self.saved_at = run.step

    def end(self, run: Run) -> None:
        self.save(run)
        if self.bar is not None:
            self.bar.close()


class OneDevice:
    """What `Run` needs of an accelerator, where there is one device and full precision."""

    process_index, num_processes, is_main_process, scaler = 0, 1, True, None

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return objects

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[nn.Parameter], largest: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, largest)


def _backend(model: Denoiser, precision: str) -> Any:
    """accelerate's, where there are several processes or mixed precision."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"expected precision 'no', 'bf16' or 'fp16', found {precision!r}")
    if not several and precision == "no":
        return OneDevice()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("several devices or mixed precision need accelerate: pip install 'scoresde[train]'") from error
    accelerator = Accelerator(mixed_precision=precision, cpu=model.device.type == "cpu", device_placement=several)
    if several:
        model.to(accelerator.device)
    return accelerator


def _parsed(data: Data, device: torch.device) -> tuple[Any, tuple[Tensor, Condition] | None]:
    """(dataset, None) or (None, (x, conditions)) on the device, checked."""
    if not isinstance(data, Tensor | tuple):
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise TypeError(f"expected a tensor, (tensor, labels) or a Dataset with a length, found {type(data)}")
        _expect(len(data) > 0, "data", "at least one sample", data)  # pyright: ignore[reportArgumentType]
        return data, None
    x, cond = _split(data)
    if not x.is_floating_point():
        raise TypeError(f"expected data of a floating dtype, scaled to about [-1, 1]; found {x.dtype}")
    _expect(x.ndim > 1 and len(x) > 0, "data", "shape (N, ...) with N > 0", tuple(x.shape))
    _expect(bool(x.isfinite().all()), "data", "finite numbers", "NaN or infinity")
    for name, value in cond.items():
        _expect(len(value) == len(x), name, f"{len(x)} entries, one for each sample", len(value))
    return None, (x.to(device), {k: v.to(device) for k, v in cond.items()})


def _split(batch: Any) -> tuple[Tensor, Condition]:
    if isinstance(batch, Tensor):
        return batch, {}
    x, second = batch
    return x, dict(second) if isinstance(second, Mapping) else {"label": second}


@contextmanager
def _held_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, noted and not raised; a second one is raised at once. In other threads than the main one nothing is held."""
    noted: list[bool] = []
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is not signal.default_int_handler:
        yield lambda: False
        return

    def note(signum: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, previous)


def _laid_out_as(p: Tensor, value: Tensor) -> Tensor:
    """An optimiser's tensor as the optimiser makes it: like the parameter, or (the step) a scalar beside it."""
    if value.shape == p.shape and value.ndim:
        return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(p.device)


def _drop_after(log: Path, step: int) -> None:
    """Cut the records after `step`: the run that continues writes them again."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step), encoding="utf-8")


def _mix(seed: int, stream: int) -> int:
    """A 32-bit seed for one stream of a run; the CPU's generator takes no more bits."""
    import numpy as np

    return int(np.random.SeedSequence([seed % 2**64, stream]).generate_state(1)[0])


def _expect(holds: bool, name: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected} found {getattr(found, name, found)!r}")
