"""The network that tells classes of noisy images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from scoresde.networks.blocks import Encoder, attended_levels, norm, zeros_
from scoresde.networks.embeddings import Conditioning, check_features, check_time
from scoresde.networks.unet import check_dropout, check_levels, check_positive, plain_numbers


class NoisyClassifier(nn.Module):
    """Logits `(x, time) -> (B, classes)` of noisy images: the way down of the `UNet`, the mean over positions
    of its deepest level, and a linear map, which starts at zero.

    Dhariwal and Nichol 2021 (arXiv:2105.05233, section 4.1), who pool by attention. Arguments as for `UNet`;
    `classes` is what it tells apart. `guidance.Classifier` makes log p(y | x_t) of it, and
    `train.fit_classifier` trains that.
    """

    @plain_numbers
    def __init__(
        self,
        channels: int,
        classes: int,
        base: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (-1,),
        heads: int = 4,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        time_input: str = "t",
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, classes=classes, base=base, blocks=blocks, heads=heads)
        check_positive(embedding_dim=embedding_dim)
        check_levels(multipliers)
        attended_levels(attention, len(multipliers))
        check_dropout(dropout)
        width = embedding_dim or 4 * base
        check_features(embedding, embedding_dim=width)
        self.config: dict[str, Any] = {
            "channels": channels,
            "classes": classes,
            "base": base,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "heads": heads,
            "dropout": dropout,
            "embedding": embedding,
            "time_input": time_input,
            "embedding_dim": embedding_dim,
        }
        self.conditioning = Conditioning(width, embedding=embedding, time_input=time_input)
        self.encoder = Encoder(channels, base, multipliers, blocks, attention, heads, dropout, width)
        deepest = self.encoder.out_channels[-1]
        self.head = norm(deepest)
        self.dropout = nn.Dropout(dropout)
        self.out = zeros_(nn.Linear(deepest, classes))

    def forward(self, x: Float[Tensor, "b c h w"], time: Real[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """x (B, C, H, W), time (B,) -> logits (B, classes) in the dtype of x. Raises ValueError as `UNet`."""
        check_time(time, len(x))
        h = self.encoder(x, self.conditioning(time, None, None))[-1]
        pooled = F.silu(self.head(h)).mean((2, 3))
        return self.out(self.dropout(pooled)).to(x.dtype)
