"""Our fixed-grid solvers as a scheduler of diffusers. Importing this module imports diffusers.

A pipeline owns the loop: it asks for timesteps, calls the network at each, and hands the output to `step`.
A tableau has one row a network call and one running state, so a step of the scheduler is a row of the table,
whatever the method: multistep, multi-stage and stochastic ones alike. Steps that depend on the data (adaptive
ones, Langevin correctors) are no rows, and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin  # pyright: ignore
from diffusers.configuration_utils import register_to_config  # pyright: ignore
from diffusers.schedulers.scheduling_utils import SchedulerOutput  # pyright: ignore
from diffusers.utils.torch_utils import randn_tensor  # pyright: ignore
from torch import Tensor

from .. import grids, solvers
from ..denoiser import DATA, TIME_INPUTS, Rows, checked, determined, view
from ..sde import like
from ..solvers.base import Solver, TableSolver
from ..tableau import Coefficients, Tableau, advance, coefficients, nothing_ahead
from .diffusers import convention, predicted


class TableauScheduler(SchedulerMixin, ConfigMixin):
    """A solver on a grid, or a fixed table, for a network trained with a table of betas (or flow matching).

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type
            as in diffusers; prediction_type may also be "flow_prediction": alpha = 1 - t, label N t
    solver  a fixed-grid solver as it prints, such as "unipc(order=3)"
    grid    a function of scoresde.grids as `text.spell` writes it, such as "karras(rho=5.0)". It runs from
            t_max to the first index, t = 1/N, and a last step from there to the data; "ddpm(spacing=...)"
            gives the chain's own spacings
    table   instead of solver and grid: what `Tableau.to_json` wrote, as a mapping, such as a tuned one

    `interop.diffusers.scheduler` makes one from a solver object. Predictions are not clipped. The state is
    at least float32 inside whatever the dtype of the samples. Raises ValueError for other solvers.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        solver: str = "dpmpp(order=2)",
        grid: str = "quadratic",
        table: Mapping[str, Any] | None = None,
    ) -> None:
        self.betas = DDPMScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas
        ).betas
        self.sde, self.predicts, self.time_input, self.label = convention(self)
        self.table = None if table is None else Tableau.from_json(json.dumps(dict(table)))
        self.solver, self.grid = fixed(solvers.parse(solver)), grids.parse(grid)
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.num_inference_steps: int | None = None
        self._run: Run | None = None

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @property
    def step_index(self) -> int | None:
        """The row of the next `step`; None before `set_timesteps`."""
        return None if self._run is None else self._run.row

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Begin a run of this many steps of the grid; `timesteps` are the labels of all network calls,
        float32, more than steps where a step takes several calls.

        Of a fixed table the number must be that of its calls. Raises ValueError.
        """
        table = self._tableau(num_inference_steps)
        self.num_inference_steps, self._run = num_inference_steps, Run(self, table)
        labels = self.label(TIME_INPUTS[self.time_input](self.sde, table.times[:-1]))
        self.timesteps = labels.to(device, torch.float32)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of `timesteps`, as pipelines do that start from a given image. The solver
        starts afresh there. Raises ValueError where that is not the beginning of a step."""
        if begin_index == 0:
            return
        times = self._running().table.times
        if self.table is not None or self.solver.calls(len(times) - 1) != len(times) - 1:
            raise ValueError(
                f"expected a solver of one call a step to begin at entry {begin_index}, found "
                f"{self.table.name if self.table else self.solver}: begin at 0"
            )
        self._run = Run(self, self.solver.tableau(self.sde, times[begin_index:]))

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network is given the state as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x + sigma eps` at labels (B,)."""
        flow = self.predicts.name == "flow"
        t = (timesteps.to(original_samples.device).double() + (not flow)) / len(self)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return like(alpha, original_samples) * original_samples + like(sigma, original_samples) * noise

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The state after the next row, `.prev_sample`, shaped and typed like `sample`.

        Rows are taken in turn: labels may repeat, so `timestep` says nothing. Noise comes from `generator`.
        Raises ValueError when the run is over or has not begun.
        """
        after = self._running().step(predicted(model_output, sample), sample, generator)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def _running(self) -> Run:
        if self._run is None:
            raise ValueError("expected a run, found none: call set_timesteps first")
        return self._run

    def _tableau(self, steps: int) -> Tableau:
        if isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < 1:
            raise ValueError(f"expected a whole number of steps >= 1 as num_inference_steps, found {steps!r}")
        if self.table is None:
            return self.solver.tableau(self.sde, self._times(steps))
        if steps != len(self.table):
            raise ValueError(
                f"expected num_inference_steps={len(self.table)}, the calls of the table {self.table.name}, "
                f"found {steps}"
            )
        return self.table

    def _times(self, steps: int) -> Tensor:
        if getattr(self.grid, "func", self.grid) is grids.ddpm:
            return self.grid(self.sde, steps).t
        first = torch.tensor([self.sde.t_max], dtype=torch.float64)
        inner = self.grid(self.sde, steps - 1, 1 / len(self)).t if steps > 1 else first
        return torch.cat([inner, torch.zeros(1, dtype=torch.float64)])


def fixed(solver: Solver) -> TableSolver:
    """The solver. Raises ValueError if it has no table."""
    if not isinstance(solver, TableSolver):
        raise ValueError(
            f"expected a fixed-grid solver, found {solver}: a pipeline asks for all timesteps in advance, so "
            "steps cannot depend on the data; use scoresde.sample with interop.diffusers.denoiser"
        )
    return solver


class Run:
    """A table on its way: the next row, and what earlier rows have added to the states to come."""

    def __init__(self, scheduler: TableauScheduler, table: Tableau) -> None:
        self.table, self.row = table, 0
        self.later: list[Tensor] = []
        times = table.times[:-1]
        alpha, sigma = scheduler.sde.alpha(times), scheduler.sde.sigma(times)
        pair = determined(
            *view(DATA, scheduler.predicts, alpha, sigma),
            times,
            f"data from predicted {scheduler.predicts.name}",
        )
        self.on_x, self.on_F = (part.tolist() for part in pair)
        self.numbers: Coefficients | None = None
        self.rest: Tensor | float = 0.0  # what the sample that was returned lacks of the state behind it

    def step(self, F: Tensor, sample: Tensor, generator: Any) -> Tensor:
        if self.row == len(self.table):
            raise ValueError(
                f"expected at most {self.row} steps, the calls of {self.table.name}; call set_timesteps "
                "before another run"
            )
        # Samples in half precision would be rounded once a step; what a pipeline does to them counts.
        x = sample.to(torch.promote_types(sample.dtype, torch.float32)) + self.rest
        if self.numbers is None:
            rows = Rows(lambda state, k: state, self.on_x, self.on_F)  # the pipeline calls the network
            self.numbers = coefficients(self.table, rows, x.dtype)
            self.later = nothing_ahead(self.numbers, x)
        row = self.numbers.rows[self.row]
        z = randn_tensor(x.shape, generator, x.device, x.dtype) if row.noise else None
        x, self.later = advance(row, x, checked(F, x), z, self.later)
        self.row += 1
        after = x.to(sample.dtype)
        if after.dtype != x.dtype:
            self.rest = x - after.to(x.dtype)
        return after
