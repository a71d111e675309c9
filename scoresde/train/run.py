"""The run: one step, its records, and its state."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import checkpoint, losses
from ..denoiser import Denoiser
from .data import Batches, Condition, Data
from .resuming import (
    Resumed,
    average_state,
    average_tensors,
    generator,
    narrow,
    optimizer_state,
    optimizer_tensors,
    reading_state,
)
from .surroundings import FilePath, Output, Randomness, held_interrupts

Parts = tuple[nn.Module, losses.Times, losses.Draw]
"""The objective `(x0, eps, t, conditions) -> (B,)`, and the law of its times."""


@dataclass(frozen=True)
class Progress:
    """The state after `step` of `steps` steps: mean loss since the last record, seconds spent training since
    the start.
    """

    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        done = f"step {self.step}/{self.steps}  loss {self.loss:.4f}  lr {self.lr:.2e}"
        return f"{done}  {self.images_per_second:.0f} images/s  {self.seconds:.0f} s"


@dataclass(frozen=True)
class Settings:
    """The numbers of a run. Raises ValueError for those out of range.

    lr, warmup, cosine     AdamW's rate: rises over the first `warmup` steps; with `cosine` it falls to 0 at
                           the end
    betas, weight_decay    of AdamW
    clip                   the largest norm of the gradient (None: any)
    ema_decay              of the average, once it is warm
    label_dropout          probability that a sample loses its conditions, for classifier-free guidance (Ho
                           and Salimans 2022, arXiv:2207.12598): its label becomes `null_label`, others 0
    every                  steps between records
    patience               steps in a row that may be not finite
    """

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    cosine: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.0
    null_label: int = -1
    every: int = 10
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "warmup", "weight_decay", "ema_decay", "label_dropout"):
            value = getattr(self, name)
            _expect(isinstance(value, int | float), name, "a number", value)
        for name in ("steps", "batch_size", "every", "patience"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _expect(whole and value >= 1, name, "an int of at least 1", value)
        for name in ("warmup", "weight_decay"):
            _expect(
                0 <= getattr(self, name) < math.inf,
                name,
                "a finite number of at least 0",
                getattr(self, name),
            )
        for name in ("ema_decay", "label_dropout"):
            _expect(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1", getattr(self, name))
        _expect(0 < self.lr < math.inf, "lr", "a positive number", self.lr)
        _expect(
            self.clip is None or 0 < self.clip < math.inf, "clip", "a positive number, or None", self.clip
        )

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, counted from 1."""
        rise = min(1.0, step / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps)) if self.cosine else 1.0
        return self.lr * rise * fall

    def decay(self, step: int) -> float:
        """The average's decay at `step`: less at the beginning, so that the initial weights are soon
        forgotten.
        """
        return min(self.ema_decay, (1 + step) / (10 + step))


class Run(Iterator[Progress]):
    """A training run; `next(run)` trains up to the next record.

    Attributes: model, a Denoiser or a classifier (which has no checkpoints); ema, the exponential moving
    average of the model, in evaluation mode (it goes on moving: copy it to keep it); step; seconds; settings.
    """

    def __repr__(self) -> str:
        return f"Run({self.step} of {self.settings.steps} steps; iterate over it to train)"

    def __init__(
        self, model: Any, data: Data, settings: Settings, parts: Parts, accelerator: Any, output: Output
    ) -> None:
        share = accelerator.num_processes
        _expect(
            settings.batch_size % share == 0,
            "batch_size",
            f"a multiple of {share} processes",
            settings.batch_size,
        )
        self.model, self.settings, self.accelerator, self.output = model, settings, accelerator, output
        objective, self.times, self.draw = parts
        self.step, self.seconds, self.updating = 0, 0.0, False
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.averaged = list(self.ema.parameters()), list(model.parameters())
        self.average = self._accumulators()
        self.buffers = list(zip(self.ema.buffers(), model.buffers(), strict=True))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.objective, self.stepper = accelerator.prepare(objective, self.optimizer)
        device = self.parameters[0].device  # a classifier of one's own has no attribute for it
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.tally = {name: zero.clone() for name in ("loss", "steps", "bad", "worst")}
        order, noise, clock, inside = _seeds(settings.seed, 4)
        self.data = Batches(data, settings.batch_size, device, order)
        self.noise = torch.Generator(device).manual_seed(noise)
        self.clock = torch.Generator().manual_seed(clock)
        self.inside = Randomness(device, inside + accelerator.process_index)

    def __next__(self) -> Progress:
        """Train up to the next record: a multiple of `every`, a save, or the end."""
        self._check_finite()
        if self.step >= self.settings.steps:
            self.close()
            raise StopIteration
        start, first = time.perf_counter(), self.step
        with held_interrupts(lambda: self.updating) as interrupted, self._training_mode():
            self._train_step()
            while not (self._at_record() or interrupted()):
                self._train_step()
            loss = self._mean_loss() if self._at_record() else None
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self._check_finite()
        speed = (self.step - first) * self.settings.batch_size / seconds
        if loss is not None:
            rate = self.settings.learning_rate(self.step)
            record = Progress(self.step, self.settings.steps, loss, rate, self.seconds, speed)
            self.output.record(self, record)
        if loss is None or interrupted():
            self.close()
            raise KeyboardInterrupt
        return record

    def close(self) -> None:
        """Save, if there is a path and something new, and end the bar. The run can still go on."""
        self.output.end(self)

    def _train_step(self) -> None:
        """One step, or none: what breaks it off leaves the run, if not the tally, as it was at its start."""
        start = self._place()
        try:
            self.optimizer.zero_grad()  # what the caller's own backward passes have left
            self._update(*self._gradient())
        except BaseException:
            self._go_back(*start)
            raise

    def _gradient(self) -> tuple[Tensor, Tensor]:
        """The loss of the next batch and the norm of its gradient, which the parameters hold."""
        x0, cond = self.data.next()
        t = self.times(self.model.sde, self.draw(len(x0), self.clock)).to(x0.device, non_blocking=True)
        eps = torch.randn(x0.shape, generator=self.noise, dtype=x0.dtype, device=x0.device)
        cond = self._dropped(cond)
        # Every process draws the whole batch and keeps its share.
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        loss = self.objective(x0[mine], eps[mine], t[mine], {k: v[mine] for k, v in cond.items()}).mean()
        self.accelerator.backward(loss)
        return loss.detach(), self.accelerator.clip_grad_norm_(
            self.parameters, self.settings.clip or math.inf
        )

    def _place(self) -> tuple[Any, ...]:
        """Where the run stands, between steps."""
        data = self.data.before_epoch, self.data.position
        return self.step, self.clock.get_state(), self.noise.get_state(), data, self.inside.now()

    def _go_back(
        self, step: int, clock: Tensor, noise: Tensor, data: tuple[Tensor, int], inside: dict[str, Tensor]
    ) -> None:
        """To a place, so that the step that is broken off is done again with the same numbers."""
        self.step = step
        self.clock.set_state(clock)
        self.noise.set_state(noise)
        self.data.go_to(*data)
        self.inside.put(inside)
        self.optimizer.zero_grad()
        for its, theirs in self.buffers:  # the average has those of the last whole step
            theirs.copy_(its)

    def _update(self, loss: Tensor, norm: Tensor) -> None:
        """Optimiser and average, which no Ctrl-C parts. A step that is not finite is skipped on the device,
        without a look from the host.
        """
        self.updating = True
        try:
            self._updated(loss, norm)
        finally:
            self.updating = False

    def _updated(self, loss: Tensor, norm: Tensor) -> None:
        self.step += 1
        bad = ~norm.isfinite()  # the norm, since it is the same on all devices
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate(self.step)
        if self.accelerator.scaler is None:  # a loss scaler says so itself
            self.optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
        self.stepper.step()
        self.optimizer.zero_grad()
        self._average()
        self.tally["loss"] += torch.where(bad, 0.0, loss)
        self.tally["steps"] += ~bad
        self.tally["bad"].add_(1).mul_(bad)
        self.tally["worst"].copy_(torch.maximum(self.tally["worst"], self.tally["bad"]))

    def _dropped(self, cond: Condition) -> Condition:
        """The conditions; with probability `label_dropout` all those of a sample are replaced: its label by
        the null label, others by 0.
        """
        if not self.settings.label_dropout or not cond:
            return cond
        first = next(iter(cond.values()))
        drop = torch.rand(len(first), generator=self.noise, device=first.device) < self.settings.label_dropout
        null = {name: self.settings.null_label if name == "label" else 0 for name in cond}
        return {
            name: value.masked_fill(drop.view(-1, *[1] * (value.ndim - 1)), null[name])
            for name, value in cond.items()
        }

    def _accumulators(self) -> list[Tensor]:
        """What the average is kept in: its own parameters, or float32 for those that are narrower.

        A change of `(1 - d)` of the distance, with 1 - d = 1e-3, is less than half a unit in the last place
        of bfloat16 (2^-9) for most weights and would be rounded away for ever.
        """
        return [p.detach().float() if narrow(p) else p for p in self.ema.parameters()]

    @torch.no_grad()
    def _average(self) -> None:
        """`ema = d ema + (1 - d) model`; buffers are copied. (AveragedModel waits for the device.)"""
        blend = get_ema_multi_avg_fn(self.settings.decay(self.step))
        averages, weights = self.averaged
        wide = [p.to(mine.dtype) for p, mine in zip(weights, self.average, strict=True)]
        blend(self.average, wide, self.step)  # pyright: ignore[reportArgumentType]
        for rounded, mine in zip(averages, self.average, strict=True):
            if rounded.dtype != mine.dtype:
                rounded.copy_(mine)
        for mine, its in self.buffers:
            mine.copy_(its)

    def _at_record(self) -> bool:
        s = self.settings
        return self.step % s.every == 0 or self.step >= s.steps or self.output.due(self.step)

    def _mean_loss(self) -> float:
        """The mean over the finite steps since the last record."""
        total, count = self.tally["loss"].item(), self.tally["steps"].item()
        self.tally["loss"].zero_()
        self.tally["steps"].zero_()
        return total / count if count else math.nan

    def _check_finite(self) -> None:
        worst = int(self.tally["worst"].item())
        if worst >= self.settings.patience:
            raise FloatingPointError(
                f"expected finite losses, found NaN or infinite gradients in {worst} steps in a row, up to "
                "step "
                f"{self.step}; none of them changed a weight. Look at the data, lower lr, or train in full "
                "precision"
            )

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Gradients, training flags, the run's own global random state; all put back as they were."""
        flags = [(module, module.training) for module in self.model.modules()]
        with torch.inference_mode(False), torch.enable_grad(), self.inside.active():
            try:
                self.model.train()
                yield
            finally:
                for module, flag in flags:
                    module.training = flag

    def save(self, path: FilePath, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the model, its average, and all that `resume` needs to one file (on the main process)."""
        if self.accelerator.is_main_process:
            checkpoint.save(path, self.model, ema=self.ema, training=self.state(), metadata=metadata)

    def state(self) -> checkpoint.Training:
        """Everything but the weights: optimiser, generators, place in the data, open sums."""
        scaler = self.accelerator.scaler
        tensors = {f"tally.{name}": value for name, value in self.tally.items()}
        tensors |= {f"inside.{name}": value for name, value in self.inside.state.items()}
        tensors |= {
            "clock": self.clock.get_state(),
            "noise": self.noise.get_state(),
            "order": self.data.before_epoch,
        }
        tensors |= optimizer_tensors(self.model, self.optimizer)
        tensors |= average_tensors(self.ema, self.average)
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "position": self.data.position,
            "settings": asdict(self.settings),
            "samples": len(self.data),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return checkpoint.Training(tensors, values)

    def restore(self, path: FilePath) -> None:
        """Go on from `path`, all or nothing. Raises CheckpointError if it holds no such run, ValueError if it
        is one on other batches.
        """
        device = self.noise.device
        with reading_state(path, device):
            self._check_same_batches(path)
        rehearsed = copy.deepcopy(self.ema)  # everything is checked before a weight changes
        tensors, values = checkpoint.restore(path, rehearsed, rehearsed)
        del rehearsed
        with reading_state(path, device):
            state = self._read(path, tensors, values)
        checkpoint.restore(path, self.model, self.ema)
        self._go_on(state)

    def _read(self, path: FilePath, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Resumed:
        for name in self.inside.state:
            generator(self.noise.device if name == "cuda" else "cpu", tensors[f"inside.{name}"])
        return Resumed(
            step=int(values["step"]),
            seconds=float(values["seconds"]),
            tally={k: tensors[f"tally.{k}"].reshape(()).to(mine) for k, mine in self.tally.items()},
            clock=generator("cpu", tensors["clock"]),
            noise=generator(self.noise.device, tensors["noise"]),
            inside={name: tensors[f"inside.{name}"] for name in self.inside.state},
            order=generator("cpu", tensors["order"]).get_state(),
            position=int(values["position"]),
            optimizer=optimizer_state(path, self.model, tensors),
            average=average_state(self.ema, tensors),
            scaler=values["scaler"],
        )

    def _go_on(self, state: Resumed) -> None:
        self.step, self.seconds = state.step, state.seconds
        for name, value in self.tally.items():
            value.copy_(state.tally[name])
        self.clock, self.noise, self.inside.state = state.clock, state.noise, state.inside
        self.data.go_to(state.order, state.position)
        self.optimizer.state.update(state.optimizer)
        self.average = [
            mine if wide is None else wide
            for mine, wide in zip(self._accumulators(), state.average, strict=True)
        ]
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)

    def _check_same_batches(self, path: FilePath) -> None:
        saved = checkpoint.describe(path)["training"]
        if saved is not None:
            for name in ("seed", "batch_size"):
                mine = getattr(self.settings, name)
                _expect(
                    mine == saved["settings"][name], name, f"{saved['settings'][name]}, as in {path}", mine
                )
            _expect(
                len(self.data) == saved["samples"],
                "data",
                f"{saved['samples']} samples, as in {path}",
                len(self.data),
            )


class Classification(nn.Module):
    """The loss of a classifier of noisy data, as a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return losses.classification(self.model, x0, eps, t, cond["label"])


class Objective(nn.Module):
    """The loss as a module, so that what wraps modules (several devices, mixed precision) sees one forward
    pass.
    """

    def __init__(self, model: Denoiser, loss: losses.Loss, weight: losses.Weighting) -> None:
        super().__init__()
        self.model, self.loss, self.weight = model, loss, weight

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.loss(self.model, x0, eps, t, self.weight, **cond)


def _seeds(seed: int, n: int) -> list[int]:
    """n seeds for the streams of a run, 32 bits each, since torch's CPU generator takes no more."""
    return np.random.SeedSequence(seed % 2**64).generate_state(n).tolist()


def _expect(holds: bool, name: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}; found {found!r}")
