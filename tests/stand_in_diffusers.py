"""The part of diffusers that scoresde.interop.scheduler stands on, for where diffusers is not installed:
configurations that remember the constructor's arguments, and noise from a generator."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch


class ConfigMixin:
    def save_config(self, folder: str | Path) -> None:
        (Path(folder) / "scheduler_config.json").write_text(json.dumps(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Any:
        return cls(**json.loads((Path(folder) / "scheduler_config.json").read_text()))


class SchedulerMixin:
    def save_pretrained(self, folder: str | Path) -> None:
        self.save_config(folder)


def register_to_config(init: Any) -> Any:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.config = dict(list(bound.arguments.items())[1:])
        init(self, *args, **kwargs)

    return wrapped


class DDPMScheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        assert beta_schedule == "linear"
        table = torch.linspace(beta_start, beta_end, num_train_timesteps)
        self.betas = table if trained_betas is None else torch.tensor(trained_betas)


class SchedulerOutput:
    def __init__(self, prev_sample: torch.Tensor) -> None:
        self.prev_sample = prev_sample


def randn_tensor(shape: Any, generator: Any, device: Any, dtype: Any) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def modules() -> dict[str, types.ModuleType]:
    """What `import diffusers` and its parts would find."""
    this = sys.modules[__name__]
    names = ("", ".configuration_utils", ".schedulers", ".schedulers.scheduling_utils", ".utils")
    made = {
        f"diffusers{name}": types.ModuleType(f"diffusers{name}") for name in (*names, ".utils.torch_utils")
    }
    for module in made.values():
        vars(module).update({k: v for k, v in vars(this).items() if not k.startswith("__")})
    return made
