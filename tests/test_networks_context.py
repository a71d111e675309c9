"""Cross-attention: the U-Net reads a sequence of vectors, a text, say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoresde import VPSDE, Denoiser, checkpoint, guidance, sample, solvers, train
from scoresde.networks import CrossAttention, UNet

F64 = torch.float64
CONFIG = {
    "channels": 1, "base": 8, "multipliers": [1, 2], "blocks": 1, "attention": [0, -1], "heads": 2,
    "context_dim": 6,
}  # fmt: skip


def perturbed(net: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=F64).to(p))
    return net.eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def built(device: torch.device, dtype: torch.dtype, **changes) -> UNet:
    torch.manual_seed(0)
    return perturbed(UNet(**{**CONFIG, **changes})).to(device, dtype)


def inputs(device: torch.device, dtype: torch.dtype, rows: int = 3, tokens: int = 5):
    """x, time, and a context."""
    x, context = draw(rows, 1, 4, 4, seed=1), draw(rows, tokens, 6, seed=2)
    time = torch.linspace(0.1, 0.9, rows, dtype=F64)
    return tuple(a.to(device, dtype) for a in (x, time, context))


def softmax_by_hand(block: CrossAttention, x: Tensor, context: Tensor, mask: np.ndarray) -> np.ndarray:
    """The formula, position by position and head by head, without the tokens that are masked."""
    p = {name: value.cpu().numpy() for name, value in block.state_dict().items()}
    positions = nn.functional.group_norm(
        x, block.norm.num_groups, block.norm.weight, block.norm.bias, block.norm.eps
    )
    positions = positions.detach().flatten(2).transpose(1, 2).cpu().numpy()
    out = x.flatten(2).transpose(1, 2).cpu().numpy().copy()
    width = positions.shape[2] // block.heads
    for b in range(len(x)):
        tokens = np.concatenate([p["null"][0], context[b].cpu().numpy()[mask[b]]])
        q = positions[b] @ p["query.weight"].T + p["query.bias"]
        k, v = np.split(tokens @ p["key_value.weight"].T + p["key_value.bias"], 2, axis=1)
        mixed = np.empty_like(q)
        for head in range(block.heads):
            part = slice(width * head, width * (head + 1))
            for n in range(len(q)):
                weight = np.exp(k[:, part] @ q[n, part] / math.sqrt(width))
                mixed[n, part] = (weight / weight.sum()) @ v[:, part]
        out[b] += mixed @ p["out.weight"].T + p["out.bias"]
    return out.transpose(0, 2, 1).reshape(x.shape)


def test_it_is_softmax_over_the_tokens_and_the_null_token(device) -> None:
    block = perturbed(CrossAttention(12, 5, 3).to(device, F64))
    x, context = draw(2, 12, 3, 2).to(device), draw(2, 4, 5, seed=3).to(device)
    mask = torch.tensor([[True, False, True, True], [False] * 4], device=device)
    for given in (mask, torch.ones_like(mask)):
        found = block(x, context, given).detach().cpu()
        np.testing.assert_allclose(found, softmax_by_hand(block, x, context, given.cpu().numpy()), atol=1e-12)
    assert torch.allclose(block(x, context), block(x, context, torch.ones_like(mask)), rtol=0, atol=1e-14)
    nothing = torch.zeros_like(mask)
    assert torch.allclose(block(x), block(x, context, nothing), rtol=0, atol=1e-14)
    assert torch.allclose(block(x), block(x, context[:, :0]), rtol=0, atol=1e-14)


def test_a_new_network_ignores_its_context(device, dtype) -> None:
    torch.manual_seed(0)
    net = UNet(**CONFIG).to(device, dtype)
    nn.init.normal_(net.out.weight)
    x, time, context = inputs(device, dtype)
    assert torch.equal(net(x, time), net(x, time, context=context))
    assert bool(net(x, time).any())


def test_it_stands_where_attention_does() -> None:
    net = UNet(1, base=8, multipliers=(1, 2, 2), attention=(1,), heads=2, context_dim=3)
    blocks = [block for stage in (*net.encoder.down, *net.up) for block in stage] + [*net.middle]
    assert all((block.cross is None) == (block.attention is None) for block in blocks)
    assert sum(block.cross is not None for block in blocks) == 4
    plain = UNet(1, base=8, multipliers=(1, 2, 2), attention=(1,), heads=2)
    assert all(block.cross is None for stage in (*plain.encoder.down, *plain.up) for block in stage)


def test_tokens_have_no_order_and_masked_ones_no_influence(device, dtype) -> None:
    net, (x, time, context) = built(device, dtype), inputs(device, dtype)
    tolerance = 1e-12 if dtype == F64 else 1e-4
    mask = torch.tensor(
        [[True, True, False, True, False], [True] * 5, [False, True, True, True, True]], device=device
    )
    first, order = net(x, time, context=context, context_mask=mask), torch.tensor([3, 1, 0, 4, 2])
    other = net(x, time, context=context[:, order], context_mask=mask[:, order])
    assert torch.allclose(first, other, rtol=0, atol=tolerance)
    assert not torch.allclose(first, net(x, time, context=context[:, order], context_mask=mask), atol=1e-2)
    noise = torch.where(mask[..., None], 0.0, 1e4 * draw(3, 5, 6, seed=9).to(device, dtype))
    assert torch.allclose(
        first, net(x, time, context=context + noise, context_mask=mask), rtol=0, atol=tolerance
    )
    short = net(x[:1], time[:1], context=context[:1, [0, 1, 3]])
    assert torch.allclose(first[:1], short, rtol=0, atol=tolerance)
    for token in range(5):  # every other one counts
        moved = context.clone()
        moved[:, token] += 1
        change = (net(x, time, context=moved, context_mask=mask) - first).flatten(1).abs().amax(1)
        assert torch.equal(change > 1e-4, mask[:, token])


def test_rows_do_not_see_each_other(device, dtype) -> None:
    net, (x, time, context) = built(device, dtype), inputs(device, dtype)
    mask = torch.tensor([[True] * 5, [True, False, False, True, True], [False] * 5], device=device)
    whole = net(x, time, context=context, context_mask=mask)
    for i in range(3):
        one = slice(i, i + 1)
        alone = net(x[one], time[one], context=context[one], context_mask=mask[one])
        assert torch.allclose(whole[one], alone, rtol=0, atol=1e-12 if dtype == F64 else 1e-5)
    assert net(x[:0], time[:0], context=context[:0], context_mask=mask[:0]).shape == (0, 1, 4, 4)


def test_gradients_reach_tokens_and_every_weight(device) -> None:
    net, (x, time, context) = built(device, F64), inputs(device, F64)
    mask = torch.tensor([[True] * 5, [True, False, False, True, True], [False] * 5], device=device)
    context.requires_grad_()
    net(x, time, context=context, context_mask=mask).square().sum().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert torch.equal(context.grad.abs().amax(2) > 0, mask)


Call = Callable[[UNet, UNet, Tensor, Tensor, Tensor], Tensor]
WRONG: list[tuple[Call, str]] = [
    (lambda net, plain, x, t, c: plain(x, t, context=c), "reads none; leave it out, or build"),
    (lambda net, plain, x, t, c: net(x, t, context=c[:2]), r"expected shape \(3, L, 6\).*found \(2, 5, 6\)"),
    (lambda net, plain, x, t, c: net(x, t, context=c[..., :4]), r"\(context_dim\), found \(3, 5, 4\)"),
    (lambda net, plain, x, t, c: net(x, t, context=c[:, 0]), r"found \(3, 6\)"),
    (
        lambda net, plain, x, t, c: net(x, t, context_mask=c[..., 0] > 0),
        r"context: expected shape \(3, L, 6\).*None",
    ),
    (
        lambda net, plain, x, t, c: net(x, t, context=c, context_mask=c[:, 1:, 0] > 0),
        r"context_mask: expected booleans of shape \(3, 5\).*found torch.bool of shape \(3, 4\)",
    ),
    (
        lambda net, plain, x, t, c: net(x, t, context=c, context_mask=c[..., 0]),
        "context_mask: expected booleans",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_contexts(call: Call, message: str, device, dtype, unchecked) -> None:
    net, plain = built(device, dtype), built(device, dtype, context_dim=None)
    x, t, context = inputs(device, dtype)
    with pytest.raises(ValueError, match=message):
        call(net, plain, x, t, context)
    with pytest.raises(TypeError, match="context: expected a tensor, found list"):
        net(x, t, context=context.tolist())


def test_a_checkpoint_keeps_it(tmp_path, device) -> None:
    net, (x, time, context) = built(device, torch.float32), inputs(device, torch.float32)
    assert json.loads(json.dumps(net.config))["context_dim"] == 6
    model = Denoiser(net, VPSDE(), "velocity")
    checkpoint.save(tmp_path / "model.safetensors", model)
    again = checkpoint.load(tmp_path / "model.safetensors").to(device).eval()
    assert torch.equal(again(x, time, context=context), model(x, time, context=context))
    older = {k: v for k, v in net.config.items() if k != "context_dim"}
    assert UNet(**older).config["context_dim"] is None


@pytest.mark.parametrize("doubled", [False, True])
def test_guidance_without_a_classifier(doubled: bool, device, dtype, unchecked) -> None:
    """The null condition masks every token: scale 0 is the network without a context."""
    model = Denoiser(built(device, dtype), VPSDE(), "velocity")
    x, time, context = inputs(device, dtype)
    mask = torch.tensor([[True] * 5, [True, False, False, True, True], [True] * 5], device=device)
    cond = {"context": context, "context_mask": mask}
    guided = guidance.classifier_free(
        model, 2.0, null={"context": 0.0, "context_mask": False}, doubled=doubled
    )
    without, given = model(x, time), model(x, time, **cond)
    tolerance = {F64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]  # values up to 8
    assert torch.allclose(guided(x, time, **cond), without + 2 * (given - without), rtol=0, atol=tolerance)
    assert not torch.allclose(given, without, atol=1e-2)
    found = sample(guided, (3, 1, 4, 4), solvers.dpmpp(2), steps=3, condition=cond, dtype=torch.float64)
    assert bool(found.x.isfinite().all())


def test_training_drops_the_context(device) -> None:
    """With all contexts dropped only the null token is read, and learned."""
    torch.manual_seed(0)
    net = UNet(**CONFIG).to(device)
    cond = {"context": torch.randn(8, 5, 6), "context_mask": torch.ones(8, 5, dtype=torch.bool)}
    before = net.middle[0].cross.out.weight.clone()
    model = Denoiser(net, VPSDE(), "velocity")
    progress = list(
        train.fit(model, (torch.randn(8, 1, 4, 4), cond), steps=2, batch_size=8, label_dropout=0.5)
    )
    assert math.isfinite(progress[-1].loss) and not torch.equal(net.middle[0].cross.out.weight, before)


def test_layout_precision_and_one_graph(device, unchecked) -> None:
    net = built(device, torch.float32, multipliers=[1], attention=[0])
    x, time, context = inputs(device, torch.float32)
    mask = torch.tensor([[True] * 5, [True, False, False, True, True], [False] * 5], device=device)
    expected = net(x, time, context=context, context_mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    found = compiled(x, time, context=context, context_mask=mask)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        narrow = net(x, time, context=context, context_mask=mask)
        narrow.square().mean().backward()
    assert narrow.dtype == torch.float32 and not torch.equal(narrow, expected)
    assert float(((narrow - expected).norm() / expected.norm()).detach()) < 0.05
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    last = net.to(memory_format=torch.channels_last)(
        x.to(memory_format=torch.channels_last), time, context=context, context_mask=mask
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(last, expected, rtol=0, atol=1e-4)
    half = net.to(torch.bfloat16)(x.bfloat16(), time, context=context.bfloat16(), context_mask=mask)
    assert half.dtype == torch.bfloat16
    assert float(((half.float() - expected).norm() / expected.norm()).detach()) < 0.1
