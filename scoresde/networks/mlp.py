"""The network for vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from scoresde.networks.blocks import zeros_
from scoresde.networks.embeddings import Conditioning, check_features, check_time
from scoresde.networks.unet import check_dropout, check_positive, plain_numbers


class Layer(nn.Module):
    """`h + V dropout(SiLU((1 + scale) * (W h) + shift))`, scale and shift linear in emb; V starts at zero."""

    def __init__(self, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden, hidden)
        self.film = nn.Linear(width, 2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = zeros_(nn.Linear(hidden, hidden))

    def forward(self, h: Float[Tensor, "b d"], emb: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        scale, shift = self.film(emb).chunk(2, dim=1)
        return h + self.linear2(self.dropout(F.silu(torch.addcmul(shift, self.linear1(h), 1 + scale))))


class MLP(nn.Module):
    """A residual network `F(x, time, label, vector)` for vectors x (B, dim), with the interface of `UNet`.

    `layers` residual layers of size `hidden` between a linear map in and one out, which starts at zero: a new
    network returns exactly 0. There is no normalisation, so that the result can grow linearly with x, as
    scores do. The other arguments, `config` and the null class are those of `UNet` (embedding_dim defaults to
    hidden, out_dim to dim).
    """

    @plain_numbers
    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        classes: int | None = None,
        vector_dim: int | None = None,
        embedding: str = "sinusoidal",
        time_input: str = "t",
        embedding_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, hidden=hidden, layers=layers, classes=classes)
        check_positive(vector_dim=vector_dim, embedding_dim=embedding_dim, out_dim=out_dim)
        check_dropout(dropout)
        width = embedding_dim or hidden
        check_features(embedding, **{"embedding_dim" if embedding_dim else "hidden": width})
        self.config: dict[str, Any] = {
            "dim": dim,
            "hidden": hidden,
            "layers": layers,
            "dropout": dropout,
            "classes": classes,
            "vector_dim": vector_dim,
            "embedding": embedding,
            "time_input": time_input,
            "embedding_dim": embedding_dim,
            "out_dim": out_dim,
        }
        self.conditioning = Conditioning(
            width, classes=classes, vector_dim=vector_dim, embedding=embedding, time_input=time_input
        )
        self.stem = nn.Linear(dim, hidden)
        self.layers = nn.ModuleList(Layer(hidden, width, dropout) for _ in range(layers))
        self.out = zeros_(nn.Linear(hidden, out_dim or dim))

    def forward(
        self,
        x: Float[Tensor, "b d"],
        time: Real[Tensor, " b"],
        label: Int[Tensor, " b"] | None = None,
        vector: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b o"]:
        """x (B, dim), time (B,), label (B,) integers, vector (B, vector_dim) -> (B, out_dim), dtype of x.

        Raises ValueError for shapes that do not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.config["dim"]:
            raise ValueError(f"x: expected shape (B, {self.config['dim']}), found {tuple(x.shape)}.")
        check_time(time, len(x))
        emb = self.conditioning(time, label, vector)
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h, emb)
        return self.out(F.silu(h)).to(x.dtype)
