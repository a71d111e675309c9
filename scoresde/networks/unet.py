"""The U-Net for images."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from scoresde.networks.blocks import Block, Encoder, attended_levels, check_heads, norm, zeros_
from scoresde.networks.embeddings import Conditioning, check_features, check_time

P = ParamSpec("P")


def plain_numbers(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor whose arguments may be, or hold, numpy's numbers: it gets Python's, which JSON takes."""

    @wraps(init)
    def made(*args: P.args, **options: P.kwargs) -> None:
        init(*map(_plain, args), **{name: _plain(value) for name, value in options.items()})  # pyright: ignore[reportCallIssue]

    return made


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_positive(**sizes: int | None) -> None:
    """ValueError unless each size is a positive int (None: left out)."""
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name}: expected a positive int, found {size!r}.")


def check_levels(multipliers: Sequence[int]) -> None:
    """TypeError unless there is a sequence, ValueError unless it is of positive ints, one or more."""
    if not isinstance(multipliers, Sequence):
        raise TypeError(f"multipliers: expected positive ints, one for each level, found {multipliers!r}.")
    check_positive(
        **{f"multipliers[{level}]": m for level, m in enumerate(multipliers)}, levels=len(multipliers)
    )


def check_context(context: Tensor | None, mask: Tensor | None, batch: int, dim: int | None) -> None:
    """ValueError unless context is (B, L, dim) and its mask boolean (B, L), where they are given."""
    if context is None and mask is None:
        return
    if dim is None:
        raise ValueError(
            "context: this network reads none; leave it out, or build the network with context_dim=."
        )
    for name, given in {"context": context, "context_mask": mask}.items():
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(given).__name__}.")
    if context is None or context.ndim != 3 or (len(context), context.shape[2]) != (batch, dim):
        found = None if context is None else tuple(context.shape)
        raise ValueError(f"context: expected shape ({batch}, L, {dim}) (context_dim), found {found}.")
    if mask is not None and (mask.shape != context.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"context_mask: expected booleans of shape {tuple(context.shape[:2])}, True for tokens that "
            f"count, found {mask.dtype} of shape {tuple(mask.shape)}."
        )


def check_dropout(dropout: float) -> None:
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), found {dropout!r}.")


class UNet(nn.Module):
    """A U-Net `F(x, time, label, vector, context)` for images of any number of channels, from 8x8 up.

    Ho et al. 2020 (arXiv:2006.11239), Dhariwal & Nichol 2021 (arXiv:2105.05233), made lean: as many blocks up
    as down, levels joined by 2x2 means and nearest neighbours inside the skip path without convolutions of
    their own. The last convolution and the second one of every block start at zero, so a new network returns
    exactly 0.

    channels:       of x;  out_channels: of the result (default: the same)
    base:           channels of the finest level; level l has base * multipliers[l], half the size of l-1
    blocks:         residual blocks per level, each way
    attention:      levels with self-attention; 0 is full resolution, -1 the deepest
    heads:          attention heads, a divisor of the channels there
    dropout:        inside the residual blocks
    classes:        number of classes, for `label=`; label -1, or none, is the null class
    vector_dim:     size of `vector=`
    context_dim:    features of a token of `context=` (a text, a set of vectors), which the attended levels
                    read by cross-attention
    embedding:      "sinusoidal" or "fourier";  time_input: "t", "log_snr" or "index", what `time` holds
    embedding_dim:  size of the conditioning features (default 4 * base)

    `config` holds these arguments as JSON takes them: `UNet(**net.config)` is the same network, before
    training. Raises ValueError for arguments that do not fit together.

    The layout is that of the weights: `net.to(memory_format=torch.channels_last)` is the faster one on a GPU
    in half precision, the default one on a CPU for small images (its channels-last group norm is three times
    slower).
    """

    @plain_numbers
    def __init__(
        self,
        channels: int,
        base: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (-1,),
        heads: int = 4,
        dropout: float = 0.0,
        classes: int | None = None,
        vector_dim: int | None = None,
        embedding: str = "sinusoidal",
        time_input: str = "t",
        embedding_dim: int | None = None,
        out_channels: int | None = None,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, base=base, blocks=blocks, heads=heads, classes=classes)
        check_positive(vector_dim=vector_dim, embedding_dim=embedding_dim, out_channels=out_channels)
        check_positive(context_dim=context_dim)
        check_levels(multipliers)
        check_dropout(dropout)
        width = embedding_dim or 4 * base
        check_features(embedding, embedding_dim=width)
        attended = attended_levels(attention, len(multipliers))
        if context_dim is not None and not attended:
            raise ValueError(
                f"attention: expected a level at which to read the context (context_dim={context_dim}), "
                "found none."
            )
        for level in attended:  # before any weight is drawn
            check_heads(base * multipliers[level], heads)
        self.config: dict[str, Any] = {
            "channels": channels,
            "base": base,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "heads": heads,
            "dropout": dropout,
            "classes": classes,
            "vector_dim": vector_dim,
            "embedding": embedding,
            "time_input": time_input,
            "embedding_dim": embedding_dim,
            "out_channels": out_channels,
            "context_dim": context_dim,
        }
        self.context_dim = context_dim
        self.conditioning = Conditioning(
            width, classes=classes, vector_dim=vector_dim, embedding=embedding, time_input=time_input
        )
        self.encoder = Encoder(
            channels, base, multipliers, blocks, attention, heads, dropout, width, context_dim
        )
        skips = list(self.encoder.out_channels)
        h = skips[-1]
        deepest_heads = heads if len(multipliers) - 1 in attended else None
        self.middle = nn.ModuleList(
            Block(h, h, width, head, dropout, context_dim) for head in (deepest_heads, None)
        )
        self.up = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            stage = nn.ModuleList()
            for _ in range(blocks):
                c = base * multipliers[level]
                level_heads = heads if level in attended else None
                stage.append(Block(h + skips.pop(), c, width, level_heads, dropout, context_dim))
                h = c
            self.up.append(stage)
        self.head = norm(h)
        self.out = zeros_(nn.Conv2d(h, out_channels or channels, 3, padding=1))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Real[Tensor, " b"],
        label: Int[Tensor, " b"] | None = None,
        vector: Float[Tensor, "b k"] | None = None,
        context: Float[Tensor, "b l e"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b d h w"]:
        """x (B, C, H, W), time (B,) -> (B, out_channels, H, W) in the dtype of x.

        label (B,) integers from -1 to classes - 1, vector (B, vector_dim), context (B, L, context_dim) of
        tokens in any order, context_mask (B, L), True for those that count. Without a context, or with all of
        it masked, a learned null token is read: in classifier-free guidance
        `null={"context": 0.0, "context_mask": False}`, as `train.fit(label_dropout=...)` drops them.
        Raises ValueError for shapes that do not fit; sizes must be divisible by 2^(levels - 1).
        """
        check_time(time, len(x))
        check_context(context, context_mask, len(x), self.context_dim)
        emb = self.conditioning(time, label, vector)
        features = self.encoder(x, emb, context, context_mask)
        h = features[-1]
        for block in self.middle:
            h = block(h, emb, context, context_mask)
        for depth, blocks in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if depth else h
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                h = block(torch.cat([h, features.pop()], dim=1), emb, context, context_mask)
        return self.out(F.silu(self.head(h))).to(x.dtype)
