"""The executor under torch.compile: one graph for the whole loop, no breaks."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import nn

from scoresde import VPSDE, Denoiser, grids, solvers
from scoresde.noise import Noise
from scoresde.tableau import coefficients, loop

STEPS = 10


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, time):
        return self.linear(x) + time[:, None]


SOLVERS = [solvers.dpmpp(2), solvers.unipc(3), solvers.ddpm()]


def prepared(solver, device):
    sde = VPSDE()
    torch.manual_seed(0)
    model = Denoiser(Tiny().to(device), sde).eval()
    table = solver.tableau(sde, grids.log_snr(sde, STEPS))
    x = torch.randn(3, 4, device=device)
    rows = model.rows(table.times[:-1], x)
    return coefficients(table, rows, x.dtype), rows.evaluate, x, torch.randn(STEPS, 3, 4, device=device)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_whole_loop_is_one_graph(solver, device, unchecked):
    """Traced as a whole (`fullgraph` raises at a break), with a backend that runs the graph as it is: no
    compiler needed.
    """
    numbers, evaluate, x, z = prepared(solver, device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def whole(x, z):
        return loop(numbers, evaluate, x, lambda k, shape: z[k])

    torch._dynamo.reset()
    with torch.no_grad():
        found, expected = torch.compile(whole, fullgraph=True, backend=backend)(x, z), whole(x, z)
    assert len(graphs) == 1
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on the CPU"
)
def test_the_compiled_loop_gives_the_same_samples(device, unchecked):
    numbers, evaluate, x, z = prepared(solvers.dpmpp(2), device)

    def whole(x, z):
        return loop(numbers, evaluate, x, lambda k, shape: z[k])

    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(whole, fullgraph=True)(x, z), whole(x, z), rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_loop_never_waits_for_the_device_and_fits_into_a_graph(solver, unchecked):
    """No read-back with reproducible noise, eager or captured; a replay gives the same bits."""
    device = torch.device("cuda")
    numbers, evaluate, x, _ = prepared(solver, device)
    noise = Noise.of(3, batch=len(x), device=device, dtype=x.dtype)

    def whole() -> torch.Tensor:
        return loop(numbers, evaluate, x, noise)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                expected = whole()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager, graph = whole(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = whole()
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(eager, expected) and torch.equal(captured, expected)
