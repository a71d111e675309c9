"""Solvers of other libraries, wrapped so that they keep what the other solvers promise, or say where they
cannot."""

from .external_ode import SCIPY, scipy_ode
from .external_sde import TORCHSDE, torchsde_solver

__all__ = ["SCIPY", "TORCHSDE", "scipy_ode", "torchsde_solver"]
