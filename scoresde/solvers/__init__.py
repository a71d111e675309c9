"""Solvers: functions that return immutable solver objects. `card()` lists them."""

from .adaptive_ode import adaptive_ode
from .adaptive_sde import adaptive_sde
from .base import Card, Samples, Solver, TableSolver
from .catalogue import card, examples, parse
from .exponential import adams, deis, dpm, dpmpp, er_sde, exponential, sa, sde_dpmpp, seeds, unipc
from .external import scipy_ode, torchsde_solver
from .langevin import annealed_langevin, langevin, mala, predictor_corrector
from .learned import ddpm_learned
from .onestep import ddim, ddpm, euler_maruyama, from_tableau, reverse_diffusion
from .reversible import reversible
from .singlestep import dpm_fast, edm, heun, midpoint, restart

__all__ = [
    "Card",
    "Samples",
    "Solver",
    "TableSolver",
    "adams",
    "adaptive_ode",
    "adaptive_sde",
    "annealed_langevin",
    "card",
    "ddim",
    "ddpm",
    "ddpm_learned",
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
    "langevin",
    "mala",
    "midpoint",
    "parse",
    "predictor_corrector",
    "restart",
    "reverse_diffusion",
    "reversible",
    "sa",
    "scipy_ode",
    "sde_dpmpp",
    "seeds",
    "torchsde_solver",
    "unipc",
]
