"""Networks that are gradients: what makes a denoiser conservative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Real
from torch import Tensor, nn

from scoresde.gradients import gradient
from scoresde.networks.mlp import MLP
from scoresde.networks.unet import UNet

KINDS: dict[str, type[nn.Module]] = {"MLP": MLP, "UNet": UNet}


class Gradient(nn.Module):
    """`F(x, time, ...) = grad_x phi(x, time, ...)` of the potential `phi = x . N(x, time, ...)`, N a network
    with the interface of `UNet`, or `phi = N` where N returns one number a sample.

    A `Denoiser` with such a network, whatever it predicts, has a score that is a gradient, and an energy:
    `energy.potential(denoiser)` (Salimans and Ho 2021, ICLR workshop, "Should EBMs model the energy or the
    score?"; Du et al. 2023, arXiv:2302.11552, appendix). It costs a backward pass more than N.

    Training differentiates twice: with attention on the CPU inside
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, see `Attention`.

    `config` is that of N by class and arguments, from which `Gradient(**config)` makes the same network; None
    where N is not from this library.
    """

    def __init__(self, network: nn.Module | Mapping[str, Any]) -> None:
        super().__init__()
        if isinstance(network, Mapping):
            if network.get("class") not in KINDS:
                raise ValueError(
                    f"network: expected a network or its class, one of {sorted(KINDS)}, and config, found "
                    f"{network}."
                )
            network = KINDS[network["class"]](**network["config"])
        self.network = network
        name = type(network).__name__
        ours = KINDS.get(name) is type(network)
        self.config: dict[str, Any] | None = (
            {"network": {"class": name, "config": network.config}} if ours else None
        )

    def potential(
        self, x: Float[Tensor, "b ..."], time: Real[Tensor, " b"], **cond: Any
    ) -> Float[Tensor, " b"]:
        """phi, (B,)."""
        out = self.network(x, time, **cond)
        if out.shape == x.shape:
            return (x * out).flatten(1).sum(1)
        if out.numel() != len(x):
            raise ValueError(
                f"expected the network to return its input's {tuple(x.shape)}, or one number a sample, found "
                f"{tuple(out.shape)}."
            )
        return out.reshape(len(x))

    def forward(
        self, x: Float[Tensor, "b ..."], time: Real[Tensor, " b"], **cond: Any
    ) -> Float[Tensor, "b ..."]:
        """grad phi, shaped like x."""
        return gradient(lambda x: self.potential(x, time, **cond), x, "potential")[1]
