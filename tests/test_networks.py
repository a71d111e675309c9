"""Networks: formulas against independent oracles, conditioning, layout, precision, compilation, config."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde import networks
from scoresde.networks import (
    MLP,
    Attention,
    Conditioning,
    Encoder,
    NoisyClassifier,
    RandomFourier,
    Residual,
    Sinusoidal,
    UNet,
)
from scoresde.networks.blocks import groups
from scoresde.networks.embeddings import FOURIER, SINUSOIDAL

# One value that is not the default for every argument.
UNET = {
    "channels": 2,
    "base": 8,
    "multipliers": [1, 3],
    "blocks": 3,
    "attention": [0, -1],
    "heads": 2,
    "dropout": 0.25,
    "classes": 5,
    "vector_dim": 3,
    "embedding": "fourier",
    "time_input": "log_snr",
    "embedding_dim": 12,
    "out_channels": 4,
    "context_dim": None,  # tests/test_networks_context.py
}
PERCEPTRON = {
    "dim": 3,
    "hidden": 16,
    "layers": 2,
    "dropout": 0.25,
    "classes": 5,
    "vector_dim": 3,
    "embedding": "fourier",
    "time_input": "index",
    "embedding_dim": 12,
    "out_dim": 4,
}
INPUT = {"channels": (2, 8, 12), "dim": (3,)}  # shape of one row, by the first argument
BOTH = pytest.mark.parametrize(("kind", "config"), [(UNet, UNET), (MLP, PERCEPTRON)], ids=["unet", "mlp"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}


def perturbed(net, seed=0):
    """The network with every parameter moved away from its initial value, zeros included."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p))
    return net


def build(kind, config, device, dtype, **changes):
    torch.manual_seed(0)
    return perturbed(kind(**{**config, **changes}).to(device, dtype)).eval()


def batch(config, rows, device, dtype, seed=1):
    """x, time, label, vector for a network of this config; labels run through null and all classes."""
    g = torch.Generator().manual_seed(seed)
    row = next(shape for name, shape in INPUT.items() if name in config)
    x = torch.randn(rows, *row, generator=g, dtype=torch.float64).to(device, dtype)
    time = torch.rand(rows, generator=g, dtype=torch.float64).to(device, dtype)
    label = (torch.arange(rows, device=device) % 6) - 1
    return x, time, label, torch.randn(rows, 3, generator=g, dtype=torch.float64).to(device, dtype)


def biggest(x):
    return float(x.detach().abs().max())


def assert_close(actual, expected, tolerance):
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


# --- Embeddings ---------------------------------------------------------------------------------------------


@given(
    half=st.integers(2, 40),
    max_period=st.floats(2, 1e5),
    scale=st.floats(0.01, 1000),
    times=st.lists(st.floats(-20, 1000), min_size=1, max_size=4),
)
def test_sinusoidal_is_the_formula(half, max_period, scale, times):
    found = Sinusoidal(2 * half, max_period, scale)(torch.tensor(times, dtype=torch.float64))
    for row, time in zip(found.numpy(), times, strict=True):
        phase = np.array([scale * time * max_period ** (-i / (half - 1)) for i in range(half)])
        expected = np.concatenate([np.sin(phase), np.cos(phase)])
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-14 * max(100.0, abs(scale * time)))


def test_random_fourier_is_the_formula(device):
    torch.manual_seed(3)
    embed = RandomFourier(6, bandwidth=2.0).to(device)
    time = torch.tensor([-3.0, 0.25, 17.0], dtype=torch.float64, device=device)
    w = embed.state_dict()["frequencies"].double().cpu().numpy()
    assert w.shape == (3,)
    phase = np.array([[2 * math.pi * t * f for f in w] for t in time.tolist()])
    np.testing.assert_allclose(
        embed(time).cpu(), np.concatenate([np.sin(phase), np.cos(phase)], 1), atol=1e-12
    )
    assert not list(embed.parameters())


def test_random_fourier_frequencies_have_the_bandwidth(alpha_ledger):
    # Kolmogorov-Smirnov on 20000 frequencies: p = 1e-10 is at a distance of 0.024 +- 0.004; a bandwidth wrong
    # by 20 % (0.044) or a uniform law of the same variance (0.057) lies five deviations beyond.
    torch.manual_seed(0)
    w = RandomFourier(40_000, bandwidth=3.0).frequencies.double()
    assert kstest(w.numpy() / 3, "norm").pvalue > alpha_ledger.spend(1e-10, "random frequencies are normal")


RANGES = {"t": (0.0, 1.0, 1e-3), "log_snr": (-15.0, 20.0, 0.1), "index": (0.0, 999.0, 1.0)}


@pytest.mark.parametrize("time_input", RANGES)
@pytest.mark.parametrize("kind", ["sinusoidal", "fourier"])
def test_embeddings_tell_times_apart(kind, time_input, device):
    """RMS distance of the features: 1e-3 and 2e-3 in t, 4 and 4.1 in log-SNR, index 3 and 4; any others."""
    torch.manual_seed(0)
    embed = Conditioning(64, embedding=kind, time_input=time_input).to(device).embed
    start, end, step = RANGES[time_input]
    times = torch.arange(round((end - start) / step) + 1, device=device, dtype=torch.float32) * step + start
    features = embed(times).double()
    distance = torch.cdist(features, features) / math.sqrt(32)
    apart = distance + 9 * torch.eye(len(times), device=device)
    assert float(apart.min()) > 0.08
    # Neighbours look alike, so that what is learned at one time serves the next.
    assert float(distance.diagonal(1).max()) < 0.6


@pytest.mark.parametrize("option", [SINUSOIDAL, FOURIER])
def test_the_unit_of_time_does_not_matter(option):
    """t, log-SNR and index get the same phases from steps of 1e-3, 0.1 and 1."""
    fastest = {name: next(iter(o.values())) * RANGES[name][2] for name, o in option.items()}
    assert max(fastest.values()) == pytest.approx(min(fastest.values()), rel=1e-12)


@pytest.mark.parametrize("embed", [Sinusoidal(32), RandomFourier(32, 0.1)], ids=["sinusoidal", "fourier"])
def test_embeddings_are_wide_whatever_autocast_and_casts_do(embed, device):
    embed = embed.to(device)
    time = torch.arange(990, 1000, device=device)
    expected = embed(time.float())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = embed(time.float())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)
    assert torch.equal(embed(time), expected)  # integers
    assert torch.equal(embed(time.bfloat16()), embed(time.bfloat16().float()))
    assert embed(time.double()).dtype == torch.float64
    narrow = embed.to(torch.bfloat16)
    assert torch.equal(narrow(time.float()), expected)
    assert_close(narrow.double()(time.double()).float(), expected, 1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sinusoidal(5),
        lambda: Sinusoidal(2),
        lambda: Sinusoidal(8, max_period=0.0),
        lambda: Sinusoidal(8, scale=-1.0),
        lambda: RandomFourier(3),
        lambda: RandomFourier(0),
        lambda: RandomFourier(4, bandwidth=0.0),
        lambda: Conditioning(8, embedding="cosine"),
        lambda: Conditioning(8, time_input="sigma"),
    ],
)
def test_embedding_errors(make, unchecked):
    with pytest.raises(ValueError, match=r"expected .*found"):
        make()


def test_conditioning_is_the_formula(device):
    net = build(Conditioning, {"dim": 8}, device, torch.float64, classes=3, vector_dim=2)
    time, label, vector = (
        torch.tensor([0.1, 0.7]),
        torch.tensor([2, -1]),
        torch.tensor([[1.0, -2.0], [0.5, 3.0]]),
    )
    p = {name: value.cpu().numpy() for name, value in net.state_dict().items()}

    def silu(h):
        return h / (1 + np.exp(-h))

    e = Sinusoidal(8, 1e4, 1e3)(time.double()).numpy()
    h = silu(e @ p["time.0.weight"].T + p["time.0.bias"]) @ p["time.2.weight"].T + p["time.2.bias"]
    h = h + p["label.weight"][[3, 0]] + vector.double().numpy() @ p["vector.weight"].T + p["vector.bias"]
    found = net(time.double().to(device), label.to(device), vector.to(device))
    np.testing.assert_allclose(found.detach().cpu(), silu(h), atol=1e-12)


# --- Blocks -------------------------------------------------------------------------------------------------


def test_groups_divide():
    for channels in range(1, 520):
        fits = [g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4)]
        assert groups(channels) == max(fits)


def normalised(x, weight=None, bias=None):
    """Group normalisation by its definition, in numpy."""
    b, c = x.shape[:2]
    grouped = x.reshape(b, groups(c), -1)
    centred = grouped - grouped.mean(2, keepdims=True)
    h = (centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)).reshape(x.shape)
    shape = (1, c, 1, 1)
    return h if weight is None else h * weight.reshape(shape) + bias.reshape(shape)


def convolved(x, weight, bias):
    """Convolution with zero padding that keeps the size, by its definition, in numpy."""
    k = weight.shape[-1]
    r = k // 2
    padded = np.pad(x, ((0, 0), (0, 0), (r, r), (r, r)))
    height, width = x.shape[2:]
    h = bias.reshape(1, -1, 1, 1)
    for i in range(k):
        for j in range(k):
            h = h + np.einsum(
                "dc,bchw->bdhw", weight[:, :, i, j], padded[:, :, i : i + height, j : j + width]
            )
    return h


@pytest.mark.parametrize("out_channels", [8, 12])
def test_residual_block_is_the_formula(out_channels, device):
    block = build(
        Residual, {"channels": 8}, device, torch.float64, out_channels=out_channels, width=5, dropout=0.5
    )
    g = torch.Generator().manual_seed(2)
    x, emb = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 8, 4, 6), (2, 5)))
    p = {name: value.cpu().numpy() for name, value in block.state_dict().items()}

    def silu(h):
        return h / (1 + np.exp(-h))

    h = convolved(
        silu(normalised(x.numpy(), p["norm1.weight"], p["norm1.bias"])), p["conv1.weight"], p["conv1.bias"]
    )
    film = (emb.numpy() @ p["film.weight"].T + p["film.bias"])[:, :, None, None]
    h = silu((1 + film[:, :out_channels]) * normalised(h) + film[:, out_channels:])
    skip = x.numpy() if out_channels == 8 else convolved(x.numpy(), p["skip.weight"], p["skip.bias"])
    expected = skip + convolved(h, p["conv2.weight"], p["conv2.bias"])
    np.testing.assert_allclose(block(x.to(device), emb.to(device)).detach().cpu(), expected, atol=1e-12)


def test_attention_is_softmax_of_scalar_products(device):
    block = build(Attention, {"channels": 12}, device, torch.float64, heads=3)
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p = {name: value.cpu().numpy() for name, value in block.state_dict().items()}
    tokens = normalised(x.numpy(), p["norm.weight"], p["norm.bias"]).reshape(2, 12, 15).transpose(0, 2, 1)
    expected = x.numpy().reshape(2, 12, 15).transpose(0, 2, 1).copy()
    for b in range(2):
        q, k, v = np.split(tokens[b] @ p["qkv.weight"].T + p["qkv.bias"], 3, axis=1)
        mixed = np.empty((15, 12))
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            for n in range(15):
                weight = np.exp(k[:, part] @ q[n, part] / math.sqrt(4))
                mixed[n, part] = (weight / weight.sum()) @ v[:, part]
        expected[b] += mixed @ p["out.weight"].T + p["out.bias"]
    expected = expected.transpose(0, 2, 1).reshape(2, 12, 3, 5)
    np.testing.assert_allclose(block(x.to(device)).detach().cpu(), expected, atol=1e-12)


# --- The U-Net ----------------------------------------------------------------------------------------------


def recursive(net, h, emb, level=0):
    """The U-Net between its first and last convolution as a recursion over levels, with its own blocks."""
    skips = []
    for block in net.encoder.down[level]:
        h = block(h, emb)
        skips.append(h)
    if level + 1 < len(net.up):
        inner = h.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).mean(dim=(-3, -1))
        inner = recursive(net, inner, emb, level + 1)
        h = inner.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    else:
        for block in net.middle:
            h = block(h, emb)
    for block, skip in zip(net.up[len(net.up) - 1 - level], reversed(skips), strict=True):
        h = block(torch.cat([h, skip], dim=1), emb)
    return h


def test_unet_joins_its_levels_as_declared(device, dtype):
    net = build(
        UNet, {"channels": 1}, device, dtype, base=8, multipliers=(1, 1, 2), attention=(1,), classes=2
    )
    x = torch.randn(2, 1, 8, 12, dtype=dtype, device=device)
    time, label = torch.tensor([0.3, 0.9], device=device, dtype=dtype), torch.tensor([0, -1], device=device)
    h = recursive(net, net.encoder.stem(x), net.conditioning(time, label))
    expected = net.out(torch.nn.functional.silu(net.head(h)))
    assert_close(net(x, time, label), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("attention", "levels"), [((), ()), ((0,), (0,)), ((-1,), (2,)), ((1, -2), (1,))])
def test_attention_stands_where_asked(attention, levels):
    net = UNet(1, base=8, multipliers=(1, 2, 2), attention=attention, heads=2)
    for level in range(3):
        blocks = [*net.encoder.down[level], *net.up[2 - level]]
        assert [block.attention is not None for block in blocks] == [level in levels] * 4
    assert [block.attention is not None for block in net.middle] == [2 in levels, False]


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (8, 8)),
        ({"channels": 3, "multipliers": (1,)}, (9, 11)),
        ({"multipliers": (1, 2, 3, 4), "blocks": 1}, (8, 16)),
        ({"channels": 5, "out_channels": 2, "base": 12, "heads": 3}, (12, 8)),
        ({"attention": (0, 1, 2), "embedding": "fourier"}, (8, 8)),
        ({"base": 7, "attention": ()}, (8, 8)),
    ],
)
def test_unet_shapes_and_zero_output(changes, shape, device, dtype):
    config = {"channels": 1, "base": 8, **changes}
    net = UNet(**config).to(device, dtype)
    x = torch.randn(3, config["channels"], *shape, device=device, dtype=dtype)
    out = net(x, torch.rand(3, device=device, dtype=dtype))
    assert out.shape == (3, config.get("out_channels", config["channels"]), *shape)
    assert out.dtype == dtype
    assert torch.equal(out, torch.zeros_like(out))
    moved = perturbed(net)(x, torch.rand(3, device=device, dtype=dtype)).detach()
    assert float(moved.abs().min()) > 0


def test_new_blocks_are_the_identity(device, dtype):
    x, emb = (
        torch.randn(2, 8, 4, 4, device=device, dtype=dtype),
        torch.randn(2, 6, device=device, dtype=dtype),
    )
    assert torch.equal(Residual(8, 8, 6).to(device, dtype)(x, emb), x)
    assert torch.equal(Attention(8, 2).to(device, dtype)(x), x)


def test_encoder_serves_alone(device, dtype):
    encoder = Encoder(2, 8, (1, 2), 2, (1,), 4, 0.0, 6).to(device, dtype)
    emb = torch.randn(3, 6, device=device, dtype=dtype)
    features = encoder(torch.randn(3, 2, 8, 12, device=device, dtype=dtype), emb)
    assert [tuple(f.shape[1:]) for f in features] == [(8, 8, 12)] * 2 + [(16, 4, 6)] * 2
    assert encoder.out_channels == [8, 8, 16, 16]


# --- The MLP ------------------------------------------------------------------------------------------------


def test_mlp_is_the_formula(device):
    net = build(MLP, PERCEPTRON, device, torch.float64)
    x, time, label, vector = batch(PERCEPTRON, 4, device, torch.float64)
    p = {name: value.cpu().numpy() for name, value in net.state_dict().items()}
    emb = net.conditioning(time, label, vector).detach().cpu().numpy()

    def silu(h):
        return h / (1 + np.exp(-h))

    h = x.cpu().numpy() @ p["stem.weight"].T + p["stem.bias"]
    for i in range(2):
        q = {name.removeprefix(f"layers.{i}."): value for name, value in p.items()}
        film = emb @ q["film.weight"].T + q["film.bias"]
        inner = (1 + film[:, :16]) * (h @ q["linear1.weight"].T + q["linear1.bias"]) + film[:, 16:]
        h = h + silu(inner) @ q["linear2.weight"].T + q["linear2.bias"]
    expected = silu(h) @ p["out.weight"].T + p["out.bias"]
    np.testing.assert_allclose(net(x, time, label, vector).detach().cpu(), expected, atol=1e-12)


def test_mlp_shapes_and_zero_output(device, dtype):
    net = MLP(5, out_dim=2).to(device, dtype)
    x, time = torch.randn(3, 5, device=device, dtype=dtype), torch.rand(3, device=device, dtype=dtype)
    assert torch.equal(net(x, time), torch.zeros(3, 2, device=device, dtype=dtype))
    assert MLP(5).to(device, dtype)(x, time).shape == (3, 5)


# --- What both promise --------------------------------------------------------------------------------------


@BOTH
def test_every_parameter_gets_a_gradient(kind, config, device, dtype):
    net = build(kind, config, device, dtype)
    net(*batch(config, 6, device, dtype)).square().sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent
    assert bool((net.conditioning.label.weight.grad.abs().sum(1) > 0).all())  # null and every class


@BOTH
def test_output_follows_time_class_and_vector(kind, config, device, dtype):
    net = build(kind, config, device, dtype)
    x, time, label, vector = batch(config, 1, device, dtype)
    first = net(x, time, label, vector)
    for other in [(time + 1, label, vector), (time, label + 1, vector), (time, label, vector + 1)]:
        assert biggest(net(x, *other) - first) > 1e-3


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@BOTH
def test_rows_do_not_see_their_neighbours(kind, config, precision, device):
    net = build(kind, config, device, precision)
    inputs = batch(config, 7, device, precision)
    together = net(*inputs)
    alone = torch.cat([net(*(a[i : i + 1] for a in inputs)) for i in range(7)])
    assert_close(alone, together, TOLERANCE[precision])
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4], device=device)
    assert_close(net(*(a[order] for a in inputs)), together[order], TOLERANCE[precision])
    assert net(*(a[:0] for a in inputs)).shape == (0, *together.shape[1:])


@BOTH
def test_config_rebuilds_the_network(kind, config, device, dtype):
    net = build(kind, config, device, dtype)
    stored = json.loads(json.dumps(net.config))
    assert stored == net.config == config
    assert set(config) == set(inspect.signature(kind).parameters)
    name = type(net).__name__
    assert name in networks.__all__
    torch.manual_seed(99)
    again = getattr(networks, name)(**stored).to(device, dtype).eval()
    again.load_state_dict(net.state_dict(), strict=True)
    inputs = batch(config, 3, device, dtype)
    assert torch.equal(again(*inputs), net(*inputs))
    with pytest.raises(TypeError, match="flavour"):
        kind(**config, flavour=1)


@pytest.mark.parametrize("kind", [UNet, MLP])
def test_config_of_the_defaults(kind):
    net = kind(3)
    assert kind(**net.config).config == net.config
    defaults = inspect.signature(kind).parameters.items()
    expected = {
        k: list(p.default) if isinstance(p.default, tuple) else p.default for k, p in list(defaults)[1:]
    }
    assert {k: v for k, v in net.config.items() if k not in ("channels", "dim")} == expected


def test_default_size_of_the_features():
    assert UNet(1, base=8).conditioning.embed.dim == 32
    assert MLP(3, hidden=24).conditioning.embed.dim == 24


def test_state_dict_holds_the_random_frequencies():
    first, second = UNet(**UNET), UNet(**UNET)
    name = "conditioning.embed.frequencies"
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])


@BOTH
def test_null_class(kind, config, device, dtype):
    net = build(kind, config, device, dtype)
    x, time, _, vector = batch(config, 4, device, dtype)
    null = torch.full((4,), -1, device=device)
    assert torch.equal(net(x, time, None, vector), net(x, time, null, vector))
    mixed = torch.tensor([-1, 4, 0, -1], device=device)
    out = net(x, time, mixed, vector)
    assert_close(out[[0, 3]], net(x, time, None, vector)[[0, 3]], TOLERANCE[dtype])
    moved = (out - net(x, time, None, vector)).detach().flatten(1).abs().amax(1)
    assert float(moved[1:3].min()) > 1e-3
    assert torch.equal(out, net(x, time, mixed.int(), vector))


@BOTH
def test_dropout_acts_in_training_only(kind, config, device, dtype):
    net = build(kind, config, device, dtype)
    inputs = batch(config, 3, device, dtype)
    state = torch.get_rng_state()
    assert torch.equal(net(*inputs), net(*inputs))
    assert torch.equal(torch.get_rng_state(), state)
    net.train()
    assert biggest(net(*inputs) - net(*inputs)) > 1e-3
    quiet = build(kind, config, device, dtype, dropout=0.0).train()
    assert torch.equal(quiet(*inputs), net.eval()(*inputs))


# --- Errors -------------------------------------------------------------------------------------------------


@BOTH
def test_wrong_calls(kind, config, device, dtype, unchecked):
    net, plain = (
        build(kind, config, device, dtype, **c) for c in ({}, {"classes": None, "vector_dim": None})
    )
    x, time, label, vector = batch(config, 3, device, dtype)
    for call, names in [
        (lambda: net(x[:, :1], time, label, vector), "x: expected shape"),
        (lambda: net(x[0], time, label, vector), "x: expected|time: expected"),
        (lambda: net(x, time[:2], label, vector), r"time: expected shape \(3,\).*found \(2,\)"),
        (lambda: net(x, time[0], label, vector), r"time: .*time\.expand\(3\)"),
        (lambda: net(x, time, label[:2], vector), "label: expected integers"),
        (lambda: net(x, time, label.to(dtype), vector), "label: expected integers"),
        (lambda: net(x, time, label > 0, vector), "label: expected integers"),
        (lambda: net(x, time, label + 0j, vector), "label: expected integers"),
        (lambda: net(x, time, label), r"vector: expected shape \(3, 3\).*found None"),
        (lambda: net(x, time, label, vector[:, :2]), r"vector: expected shape.*found \(3, 2\)"),
        (lambda: plain(x, time, label), "label: this network has no classes"),
        (
            lambda: plain(x, time, vector=vector),
            "vector: expected none, found shape .*: this network has no vector input",
        ),
    ]:
        with pytest.raises(ValueError, match=names):
            call()
    for call, names in [
        (lambda: net(x, 0.5, label, vector), r"time: expected a tensor .* found 0\.5; give torch\.full"),
        (lambda: net(x, time, label, vector.tolist()), r"vector: expected a tensor of shape \(3, 3\), found"),
        (lambda: plain(x, time, vector=[1.0]), "vector: expected a tensor"),
        (lambda: net(x, time, [0, 1, 2], vector), "label: expected a tensor"),
    ]:
        with pytest.raises(TypeError, match=names):
            call()
    if device.type == "cpu":  # a GPU asserts in its kernel, which ends the process's use of it
        for wrong in (-2, 5):
            with pytest.raises(ValueError, match=f"from -1 .no class. to 4, found .*{wrong}"):
                net(x, time, torch.tensor([0, wrong, 1]), vector)


@BOTH
@pytest.mark.parametrize("integer", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_dtype(kind, config, integer, device, unchecked):
    net = build(kind, config, device, torch.float64)
    x, time, label, vector = batch(config, 3, device, torch.float64)
    label = label.abs()
    assert torch.equal(net(x, time, label.to(integer), vector), net(x, time, label, vector))
    if device.type == "cpu":  # a GPU asserts in its kernel
        with pytest.raises(ValueError, match="to 4, found 0 to 127"):
            net(x, time, torch.tensor([0, 127, 1]).to(integer), vector)


@given(height=st.integers(1, 40), width=st.integers(1, 40), levels=st.integers(1, 4))
def test_sizes_that_do_not_fit_name_those_that_do(height, width, levels):
    net = UNet(1, base=4, multipliers=(1,) * levels, blocks=1, attention=())
    factor = 2 ** (levels - 1)
    x, time = torch.zeros(1, 1, height, width), torch.zeros(1)
    if height % factor == width % factor == 0:
        assert net(x, time).shape == x.shape
        return
    with pytest.raises(ValueError, match=rf"divisible by {factor}\b.*found {height}x{width}") as error:
        net(x, time)
    sizes = [(int(h), int(w)) for h, w in re.findall(r"to (\d+)x(\d+)", str(error.value))]
    assert len(sizes) == 2
    for fit, ends in zip(sizes, (False, True), strict=True):
        assert all(f % factor == 0 and abs(f - s) < factor for f, s in zip(fit, (height, width), strict=True))
        assert not ends or (fit[0] >= height and fit[1] >= width)
        assert net(torch.zeros(1, 1, *fit), time).shape[2:] == fit


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 0},
        {"base": -8},
        {"base": 8.0},
        {"blocks": True},
        {"blocks": 0},
        {"multipliers": ()},
        {"multipliers": (1, 0)},
        {"attention": (2,)},
        {"attention": (-3,)},
        {"heads": 3},
        {"heads": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"classes": 0},
        {"vector_dim": 0},
        {"embedding": "rotary"},
        {"time_input": "sigma"},
        {"embedding_dim": 7},
        {"out_channels": 0},
        {"context_dim": 0},
        {"context_dim": 3, "attention": ()},
    ],
    ids=str,
)
def test_wrong_configurations(changes, unchecked):
    config = {"channels": 1, "base": 8, "multipliers": (1, 2), "heads": 2, **changes}
    with pytest.raises(ValueError, match=r"expected .*found"):
        UNet(**config)
    shared = {k: v for k, v in changes.items() if k in inspect.signature(MLP).parameters}
    if shared:
        with pytest.raises(ValueError, match=r"expected .*found"):
            MLP(2, **shared)


@pytest.mark.parametrize("network", [UNet, partial(NoisyClassifier, classes=2)])
@pytest.mark.parametrize("changes", [
    {"attention": -1}, {"attention": [0.5]}, {"attention": "1"}, {"multipliers": 2},
], ids=str)  # fmt: skip
def test_levels_are_sequences(network, changes, unchecked):
    with pytest.raises(TypeError, match=r"(attention|multipliers): expected .*found"):
        network(1, base=8, **changes)


@pytest.mark.parametrize("changes", [{"dim": 0}, {"hidden": 0}, {"layers": 0}, {"out_dim": 0}], ids=str)
def test_wrong_mlp_configurations(changes, unchecked):
    with pytest.raises(ValueError, match=r"expected .*found"):
        MLP(**{"dim": 2, **changes})


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_numbers_of_numpy_are_sizes(integer, unchecked):
    """And nothing of them is left, so that a config can be saved; 4 * 64 is 0 in eight bits."""
    for kind, config in (
        (
            UNet,
            {"channels": 1, "base": 64, "multipliers": [1, 1], "attention": [1], "blocks": 1, "classes": 2},
        ),
        (NoisyClassifier, {"channels": 1, "classes": 3, "base": 64, "multipliers": [1, 1], "attention": [1]}),
        (MLP, {"dim": 2, "hidden": 128, "layers": 1}),
    ):
        given = {
            name: tuple(map(integer, value)) if isinstance(value, list) else integer(value)
            for name, value in config.items()
        }
        net = kind(**given, dropout=np.float32(0.25))
        assert net.config == kind(**config, dropout=0.25).config
        assert json.loads(json.dumps(net.config)) == net.config
        assert kind(integer(2), integer(4)).config == kind(2, 4).config
    assert UNet(1, base=8, attention=(np.int64(-1),)).config["attention"] == [-1]
    with pytest.raises(ValueError, match="hidden: expected a positive int, found 0"):
        MLP(2, hidden=integer(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(2, hidden=33), "hidden: expected an even number of at least 4, .*, found 33"),
        (lambda: MLP(2, hidden=2), "hidden: expected an even number of at least 4, .*, found 2"),
        (lambda: MLP(2, hidden=3, embedding="fourier"), "hidden: expected an even number of at least 2"),
        (lambda: MLP(2, embedding_dim=5), "embedding_dim: expected an even number"),
        (lambda: UNet(1, base=8, embedding_dim=5), "embedding_dim: expected an even number"),
        (lambda: NoisyClassifier(1, 2, base=8, embedding_dim=5), "embedding_dim: expected an even number"),
    ],
)
def test_embeddings_of_odd_size_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    MLP(2, hidden=33, embedding_dim=4)
    MLP(2, hidden=2, embedding="fourier")


# --- Precision, layout, compilation, derivatives ------------------------------------------------------------


@BOTH
def test_bfloat16_autocast(kind, config, device):
    net = build(kind, config, device, torch.float32)
    inputs = batch(config, 4, device, torch.float32)
    exact = net(*inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = net(*inputs)
        out.square().mean().backward()
    assert out.dtype == torch.float32
    assert float(((out - exact).norm() / exact.norm()).detach()) < 0.05
    assert not torch.equal(out, exact)
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in net.parameters())


@BOTH
def test_bfloat16_network(kind, config, device):
    exact = build(kind, config, device, torch.float32)
    x, time, label, vector = batch(config, 4, device, torch.float32)
    time = 100 * time  # where bfloat16 has lost the second digit
    expected = exact(x, time, label, vector)
    narrow = exact.to(torch.bfloat16)
    out = narrow(x.bfloat16(), time, label, vector.bfloat16())
    assert out.dtype == torch.bfloat16
    assert float(((out - expected).norm() / expected.norm()).detach()) < 0.1


def test_channels_last_is_the_same_network(device, dtype):
    net = build(UNet, UNET, device, dtype)
    x, *rest = batch(UNET, 4, device, dtype)

    def value_and_gradients(x):
        net.zero_grad()
        out = net(x, *rest)
        out.square().mean().backward()
        return out.detach().clone(), [p.grad.clone() for p in net.parameters()]

    expected, gradients = value_and_gradients(x)
    net.to(memory_format=torch.channels_last)
    out, found = value_and_gradients(x.to(memory_format=torch.channels_last))
    if device.type == "cpu" or dtype != torch.float64:  # no such convolutions on a GPU
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, expected, 10 * TOLERANCE[dtype])
    for a, b in zip(found, gradients, strict=True):
        assert_close(a, b, 10 * TOLERANCE[dtype])


@BOTH
def test_compiles_as_one_graph(kind, config, device, dtype, unchecked):
    net = build(kind, config, device, dtype, **({"blocks": 1, "attention": [1]} if kind is UNet else {}))
    inputs = batch(config, 3, device, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs), net(*inputs), TOLERANCE[dtype])
    x, time, _, vector = inputs
    assert_close(compiled(x, time, None, vector), net(x, time, None, vector), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="needs a C++ compiler"
)
def test_compiled_by_inductor(device, unchecked):
    torch.manual_seed(0)
    net = UNet(1, base=4, multipliers=(1,), blocks=1, attention=(0,), heads=1, classes=5)
    net = perturbed(net.to(device, torch.float32))
    x, time = torch.randn(2, 1, 8, 8, device=device), torch.rand(2, device=device)
    label, parameters = torch.tensor([3, -1], device=device), list(net.parameters())
    expected = torch.autograd.grad(net(x, time, label).square().mean(), parameters)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True)
    found = torch.autograd.grad(compiled(x, time, label).square().mean(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-4)


@BOTH
def test_derivatives_of_every_kind(kind, config, device):
    """<u, J v> forward = <J^T u, v> backward; the backward of the backward against a central difference."""
    net = build(kind, config, device, torch.float64)
    x, *rest = batch(config, 2, device, torch.float64)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(device)

    def energy_gradient(x):
        x = x.requires_grad_()
        return torch.autograd.grad(net(x, *rest).square().sum(), x, create_graph=True)[0]

    with sdpa_kernel(SDPBackend.MATH):
        out, forward = torch.func.jvp(lambda x: net(x, *rest), (x,), (v,))
        _, pull = torch.func.vjp(lambda x: net(x, *rest), x)
        assert_close((out * forward).sum(), (pull(out)[0] * v).sum(), 1e-11)
        at = x.clone().requires_grad_()
        second = torch.autograd.grad((energy_gradient(at) * v).sum(), at)[0]
        step = 1e-5
        difference = (energy_gradient(x + step * v) - energy_gradient(x - step * v)) / (2 * step)
    assert_close(second, difference.detach(), 1e-6)
