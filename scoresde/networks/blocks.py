"""The parts of the U-Net: residual block, attention, and the encoder that classifiers share with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


def zeros_(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer with weight and bias set to zero, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def groups(channels: int) -> int:
    """The largest divisor of `channels` up to 32 that leaves 4 channels or more to each group, or 1."""
    return next(g for g in range(max(1, min(32, channels // 4)), 0, -1) if channels % g == 0)


def norm(channels: int, *, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(groups(channels), channels, affine=affine)


class Residual(nn.Module):
    """`skip(x) + conv(dropout(SiLU((1 + scale) * norm(conv(SiLU(norm(x)))) + shift)))`.

    scale and shift are linear in emb.
    Ho et al. 2020 (arXiv:2006.11239) with the scale-shift norm of Dhariwal & Nichol 2021 (arXiv:2105.05233,
    section 3). The second convolution starts at zero. x (B, C_in, H, W), emb (B, width) -> (B, C_out, H, W).
    """

    def __init__(self, channels: int, out_channels: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.film = nn.Linear(width, 2 * out_channels)
        self.norm2 = norm(out_channels, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeros_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"]) -> Float[Tensor, "b d h w"]:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """`x + W_o softmax(q k^T / sqrt(d)) v` over the H W positions; q, k, v linear in norm(x), d = C / heads.

    Vaswani et al. 2017 (arXiv:1706.03762). W_o starts at zero. x (B, C, H, W) -> the same.

    The fused CPU kernel has neither a second derivative nor a forward-mode one: where a loss differentiates
    through a gradient, call the network inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeros_(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(b, height * width, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        return x + self.out(h).transpose(1, 2).view(b, c, height, width)


class CrossAttention(nn.Module):
    """`x + W_o softmax(q k^T / sqrt(d)) v`: the H W positions attend to the tokens of a context, q linear in
    norm(x), k and v in the tokens, d = C / heads.

    Vaswani et al. 2017 (arXiv:1706.03762), for images Rombach et al. 2022 (arXiv:2112.10752, section 3.3).
    W_o starts at zero, so that a new network ignores its context. One token more, learned and always there,
    is what remains without a context or with all of it masked. Tokens have no order: one that matters belongs
    into them.

    x (B, C, H, W), context (B, L, context_dim) or None, mask (B, L), True for the tokens that count -> as x.
    """

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.norm = norm(channels)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(context_dim, 2 * channels)
        self.null = nn.Parameter(torch.zeros(1, 1, context_dim))  # what dropped conditions are: zeros
        self.out = zeros_(nn.Linear(channels, channels))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        context: Float[Tensor, "b l k"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        b, c, height, width = x.shape
        tokens = self.null.expand(b, -1, -1)
        if context is not None:
            tokens = torch.cat([tokens, context.to(tokens.dtype)], 1)
        positions = self.norm(x).flatten(2).transpose(1, 2)
        q = self.query(positions).view(b, height * width, self.heads, c // self.heads).transpose(1, 2)
        pairs = self.key_value(tokens).view(b, tokens.shape[1], 2, self.heads, c // self.heads)
        k, v = pairs.permute(2, 0, 3, 1, 4).unbind(0)
        seen = None if mask is None else F.pad(mask, (1, 0), value=True)[:, None, None]
        h = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).reshape(b, height * width, c)
        return x + self.out(h).transpose(1, 2).view(b, c, height, width)


class Block(nn.Module):
    """A residual block and, where `heads` is given, self-attention after it and attention to a context of
    `context_dim` features a token."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        width: int,
        heads: int | None,
        dropout: float,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.residual = Residual(channels, out_channels, width, dropout)
        self.attention = None if heads is None else Attention(out_channels, heads)
        self.cross = None
        if heads is not None and context_dim is not None:
            self.cross = CrossAttention(out_channels, context_dim, heads)

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = self.residual(x, emb)
        x = x if self.attention is None else self.attention(x)
        return x if self.cross is None else self.cross(x, context, mask)


class Encoder(nn.Module):
    """The way down of the U-Net: a convolution, then `blocks` blocks at each level, 2x2 means in between.

    Level l has `base * multipliers[l]` channels and a 2^l-th of the height and width. `attention` names the
    levels that have self-attention (a negative one counts from the deepest), and attention to a context of
    `context_dim` features a token. `width` is the size of emb.

    forward: x (B, channels, H, W), emb (B, width), context and mask as in `CrossAttention` -> the outputs of
    all blocks, finest first; the last one is the deepest. `out_channels` lists their channels. Raises
    ValueError for sizes that the levels do not divide.
    """

    def __init__(
        self,
        channels: int,
        base: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        heads: int,
        dropout: float,
        width: int,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.levels = len(multipliers)
        self.stem = nn.Conv2d(channels, base, 3, padding=1)
        self.down = nn.ModuleList()
        self.out_channels: list[int] = []
        attended = attended_levels(attention, self.levels)
        previous = base
        for level, multiplier in enumerate(multipliers):
            inputs = [previous] + [base * multiplier] * (blocks - 1)
            level_heads = heads if level in attended else None
            self.down.append(
                nn.ModuleList(
                    Block(c, base * multiplier, width, level_heads, dropout, context_dim) for c in inputs
                )
            )
            self.out_channels += [base * multiplier] * blocks
            previous = base * multiplier

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        emb: Float[Tensor, "b e"],
        context: Float[Tensor, "b l k"] | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> list[Tensor]:
        check_image(x, self.channels, self.levels)
        h = self.stem(x)
        features: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if level else h
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                h = block(h, emb, context, mask)
                features.append(h)
        return features


def attended_levels(attention: Sequence[int], levels: int) -> set[int]:
    """The levels with attention, counted from 0; ValueError if there is no such level, TypeError for what is
    no sequence of ints."""
    if not isinstance(attention, Sequence) or not all(isinstance(level, int) for level in attention):
        raise TypeError(
            f"attention: expected the ints of levels, as in (-1,) for the deepest, found {attention!r}."
        )
    if not all(-levels <= level < levels for level in attention):
        raise ValueError(
            f"attention: expected levels from 0 (full resolution) to {levels - 1}, or from -{levels} to -1 "
            f"(the deepest), found {list(attention)}."
        )
    return {level % levels for level in attention}


def check_heads(channels: int, heads: int) -> None:
    """ValueError unless the channels can be shared out among the heads."""
    if channels % heads:
        raise ValueError(
            f"heads: expected a divisor of the {channels} channels to attend over, found {heads}."
        )


def check_image(x: Tensor, channels: int, levels: int) -> None:
    """(B, channels, H, W) with H and W divisible by 2^(levels-1), or a ValueError that names what fits."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected shape (B, {channels}, H, W), found {tuple(x.shape)}.")
    height, width = x.shape[2:]
    factor = 2 ** (levels - 1)
    if height % factor or width % factor or not height * width:
        up = [max(factor, -(-size // factor) * factor) for size in (height, width)]
        down = [max(factor, size // factor * factor) for size in (height, width)]
        raise ValueError(
            f"x: expected a height and width divisible by {factor} (2^(levels - 1), {levels} levels), found "
            f"{height}x{width}; crop to {down[0]}x{down[1]}, pad to {up[0]}x{up[1]}, or use fewer levels."
        )
