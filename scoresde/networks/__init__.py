"""Networks `net(x, time, label=None, vector=None)`, the U-Net also with a context: what a `Denoiser` wraps.

A network is rebuilt from its class name, one of `__all__`, and its `config`: `getattr(networks,
name)(**config)`. `UNet` is for images, `MLP` for vectors, `Gradient` makes either conservative,
`NoisyClassifier` tells classes; the other names are the parts to build your own from.
"""

from scoresde.networks.blocks import Attention, CrossAttention, Encoder, Residual
from scoresde.networks.classifier import NoisyClassifier
from scoresde.networks.embeddings import Conditioning, RandomFourier, Sinusoidal
from scoresde.networks.gradient import Gradient
from scoresde.networks.mlp import MLP
from scoresde.networks.unet import UNet

__all__ = [
    "MLP",
    "Attention",
    "Conditioning",
    "CrossAttention",
    "Encoder",
    "Gradient",
    "NoisyClassifier",
    "RandomFourier",
    "Residual",
    "Sinusoidal",
    "UNet",
]
