"""Score-based generative models in continuous time: a VP-SDE to discretize, reverse, sample and measure."""

from . import (
    checkpoint,
    energy,
    grids,
    guidance,
    interop,
    laws,
    likelihood,
    losses,
    networks,
    noise,
    schedules,
    select,
    solvers,
    train,
)
from .ddpm import DDPM, discretize
from .denoiser import BaseDenoiser, Denoiser, Karras
from .grids import Grid
from .sampling import decode, encode, sample, slerp
from .sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, ReverseSDE, SubVPSDE
from .solvers import Samples
from .tableau import Tableau
from .variance import LearnedVariance

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EDM",
    "VESDE",
    "VPSDE",
    "BaseDenoiser",
    "Denoiser",
    "Grid",
    "Karras",
    "LearnedVariance",
    "LinearSDE",
    "Rectified",
    "ReverseSDE",
    "Samples",
    "SubVPSDE",
    "Tableau",
    "checkpoint",
    "decode",
    "discretize",
    "encode",
    "energy",
    "grids",
    "guidance",
    "interop",
    "laws",
    "likelihood",
    "losses",
    "networks",
    "noise",
    "sample",
    "schedules",
    "select",
    "slerp",
    "solvers",
    "train",
]
