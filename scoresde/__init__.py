"""Score-based generative models in continuous time: a VP-SDE you can discretize, reverse, sample and measure."""

from . import checkpoint, grids, laws, losses, networks, noise, schedules, solvers, train
from .ddpm import DDPM
from .denoiser import BaseDenoiser, Denoiser, Karras
from .grids import Grid
from .sampling import sample
from .sde import EDM, VESDE, LinearSDE, Rectified, ReverseSDE, SubVPSDE, VPSDE
from .solvers import Samples
from .tableau import Tableau

__version__ = "0.1.0"
