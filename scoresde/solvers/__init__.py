"""Solvers: functions that return immutable solver objects. `card()` lists them."""

from .base import Card, Samples, Solver, TableSolver
from .exponential import adams, deis, dpm, dpmpp, er_sde, exponential, sa, sde_dpmpp, seeds, unipc
from .onestep import ddim, ddpm, euler_maruyama, from_tableau, reverse_diffusion
from .singlestep import heun, midpoint
