"""Models and samplers of other libraries as ours, and ours as theirs.

Each library has a module of its own: `interop.diffusers`, `interop.k_diffusion`, `interop.azula`; our solvers
as a diffusers scheduler are in `interop.scheduler`. None of those libraries is imported before it is needed.
"""

from . import azula, diffusers, k_diffusion
from .matched import under

__all__ = ["azula", "diffusers", "k_diffusion", "under"]
