"""Solvers: functions that return immutable solver objects. `card()` lists them."""

from .base import Card, Samples, Solver, TableSolver
from .catalogue import card, examples
from .exponential import adams, deis, dpm, dpmpp, er_sde, exponential, sa, sde_dpmpp, seeds, unipc
from .onestep import ddim, ddpm, euler_maruyama, from_tableau, reverse_diffusion
from .reversible import reversible
from .singlestep import dpm_fast, edm, heun, midpoint, restart

__all__ = [
    "Card",
    "Samples",
    "Solver",
    "TableSolver",
    "adams",
    "card",
    "ddim",
    "ddpm",
    "deis",
    "dpm",
    "dpm_fast",
    "dpmpp",
    "edm",
    "er_sde",
    "euler_maruyama",
    "examples",
    "exponential",
    "from_tableau",
    "heun",
    "midpoint",
    "restart",
    "reverse_diffusion",
    "reversible",
    "sa",
    "sde_dpmpp",
    "seeds",
    "unipc",
]
