"""Energies: the score is minus the gradient, and densities add, mix and pass Metropolis' test."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from scoresde import (
    EDM,
    VESDE,
    VPSDE,
    Denoiser,
    Karras,
    Rectified,
    checkpoint,
    energy,
    guidance,
    losses,
    networks,
    noise,
    sample,
    solvers,
)
from scoresde.denoiser import DATA, FLOW, NOISE, SCORE, VELOCITY
from scoresde.laws import Gaussian, Mixture
from scoresde.networks import MLP
from scoresde.noise import Noise
from scoresde.sde import like

F64 = torch.float64
VP = VPSDE()
SDES = [VP, VESDE(), EDM(), Rectified()]
VIEWS = [DATA, NOISE, SCORE, VELOCITY, FLOW]
LAW = Mixture(
    [0.3, 0.7], torch.tensor([[-1.0, 0.2], [0.6, 0.5]], dtype=F64), torch.tensor([0.1, 0.4], dtype=F64)
)


def states(sde, n: int = 5, shape: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor]:
    t = sde.time(torch.linspace(-4, 5, n, dtype=F64))
    x = torch.randn(n, *shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    return x * like(torch.hypot(sde.alpha(t), sde.sigma(t)), x), t


def of(law, sde=VP) -> energy.Energy:
    exact = law.denoiser(sde)
    return energy.Energy(lambda x, t: -exact.log_prob(x, t), sde)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_the_energy_of_a_law_is_its_denoiser(sde) -> None:
    (x, t), exact, model = states(sde), LAW.denoiser(sde), of(LAW, sde)
    for view in VIEWS:
        torch.testing.assert_close(model.as_view(view, x, t), exact.as_view(view, x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x, t), exact(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.score(x, t), exact.score(x, t), rtol=1e-10, atol=1e-10)
    assert torch.equal(model.log_prob(x, t), exact.log_prob(x, t)) and torch.equal(
        model.energy(x, t), -exact.log_prob(x, t)
    )


def test_an_energy_samples_like_the_score(unchecked) -> None:
    for solver in (solvers.unipc(3), solvers.ddpm(), solvers.predictor_corrector(solvers.ddim())):
        found, expected = (
            sample(m, (4, 2), solver, steps=8, dtype=F64).x for m in (of(LAW), LAW.denoiser(VP))
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# ---- networks that are gradients


def perturbed(network: nn.Module, dtype: torch.dtype = F64) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.to(dtype).parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=F64).to(p))
    return network.eval()


class Scalar(nn.Module):
    """One number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.7, -0.3], dtype=F64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.sin(x @ self.a + time)[:, None] + x.square().sum(1, keepdim=True)


def conservative(kind: str) -> networks.Gradient:
    torch.manual_seed(0)
    return networks.Gradient(perturbed(networks.MLP(2, hidden=16, layers=1)) if kind == "mlp" else Scalar())


@pytest.mark.parametrize("kind", ["mlp", "scalar"])
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "flow", "score", Karras(0.6)], ids=str)
@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_the_score_of_a_potential_is_minus_the_gradient_of_its_energy(sde, predicts, kind) -> None:
    """By central differences, for every prediction and preconditioning: the energy has all their factors."""
    denoiser = Denoiser(conservative(kind), sde, predicts)
    model, (x, t) = energy.potential(denoiser), states(sde, 4)
    score = model.score(x, t)
    assert torch.equal(score, denoiser.score(x, t)) and torch.equal(model(x, t), denoiser(x, t))
    for i in range(2):
        h = (
            1e-5
            * torch.hypot(sde.alpha(t), sde.sigma(t))
            * torch.minimum(sde.sigma(t), torch.ones(4, dtype=F64)) ** 0.5
        )
        step = h[:, None] * torch.eye(2, dtype=F64)[i]
        slope = (model.energy(x + step, t) - model.energy(x - step, t)) / (2 * h)
        assert ((slope + score[:, i]).abs() / (1 + score.abs().sum(1))).max() < 1e-6
    rows = model.rows(t, x)
    assert rows.a == denoiser.rows(t, x).a and torch.equal(
        rows.evaluate(x, 1), denoiser.rows(t, x).evaluate(x, 1)
    )


def test_a_conservative_network_is_trained_by_the_usual_loss(device) -> None:
    """The gradients reach the weights through the gradient, and the Jacobian stays symmetric."""
    torch.manual_seed(0)
    network = networks.Gradient(networks.MLP(2, hidden=24, layers=1)).to(device)
    model = Denoiser(network, VP, "velocity").to(device)
    optimizer, exact = torch.optim.Adam(model.parameters(), 5e-3), LAW.denoiser(VP).to(device)
    g = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        t = losses.uniform(VP, torch.rand(256, generator=g, dtype=F64)).to(device)
        return LAW.sample(256, generator=g).float().to(device), torch.randn(256, 2, generator=g).to(device), t

    x0, eps, t = batch()
    x_t = VP.marginal(x0, t)[0] + VP.marginal(x0, t)[1] * eps

    def error() -> float:
        return float((model.velocity(x_t, t) - exact.velocity(x_t, t)).detach().square().mean())

    before = error()
    for _ in range(40):
        loss = losses.denoising(model, *batch(), losses.snr_plus_one).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < 0.5 * before
    model.double()
    x = x0[:1].double()
    J = torch.func.jacrev(lambda x: model(x[None], 0.3)[0])(x[0])
    torch.testing.assert_close(J, J.mT, rtol=1e-9, atol=1e-9)
    assert (J - torch.diag(torch.diag(J))).abs().max() > 1e-6
    with torch.no_grad():
        assert not model(x, 0.3).requires_grad


def test_a_conservative_network_is_saved_and_loaded(tmp_path) -> None:
    torch.manual_seed(0)
    inner = perturbed(
        networks.UNet(1, base=4, multipliers=(1,), blocks=1, attention=(), classes=3), torch.float32
    )
    network = networks.Gradient(inner)
    model = Denoiser(network, VP)
    checkpoint.save(tmp_path / "m.safetensors", model)
    again = checkpoint.load(tmp_path / "m.safetensors")
    x, label = torch.randn(2, 1, 4, 4), torch.tensor([0, -1])
    assert torch.equal(again(x, 0.3, label=label), model(x, 0.3, label=label))
    assert torch.equal(
        energy.potential(again).energy(x, 0.3, label=label),
        energy.potential(model).energy(x, 0.3, label=label),
    )
    assert networks.Gradient(Scalar()).config is None


def test_what_is_no_potential_is_told() -> None:
    two = networks.Gradient(networks.MLP(3, out_dim=2))
    with pytest.raises(ValueError, match=r"input's \(4, 3\), or one number a sample, found \(4, 2\)"):
        two(torch.zeros(4, 3), torch.zeros(4))
    for wrong in ({"class": "Linear", "config": {}}, {}):
        with pytest.raises(ValueError, match=r"one of \['MLP', 'UNet'\]"):
            networks.Gradient(wrong)


# ---- combinations


def test_a_product_of_gaussians_is_the_gaussian_of_the_product() -> None:
    """At every t by itself: precisions add, with powers, one of them negative."""
    a, b = (
        Gaussian(torch.tensor([0.5, 0.0], dtype=F64), 0.2),
        Gaussian(torch.tensor([-0.2, 1.0], dtype=F64), 0.5),
    )
    for powers in ((1.0, 1.0), (1.0, 0.5), (1.0, -0.5)):
        model, (x, t) = energy.product([of(a), b.denoiser(VP)], powers), states(VP)
        V = [VP.alpha(t) ** 2 * v + VP.sigma(t) ** 2 for v in (0.2, 0.5)]
        precision = powers[0] / V[0] + powers[1] / V[1]
        mean = (powers[0] * a.mean / V[0][:, None] + powers[1] * b.mean / V[1][:, None]) * VP.alpha(t)[
            :, None
        ]
        expected = mean - precision[:, None] * x
        torch.testing.assert_close(model.score(x, t), expected, rtol=1e-9, atol=1e-9)
        slope = torch.func.grad(lambda x, t=t, model=model: model.energy(x, t).sum())(x)
        torch.testing.assert_close(slope, -expected, rtol=1e-9, atol=1e-9)
    only = energy.product([of(a)])
    assert torch.equal(only.score(x, t), of(a).score(x, t)) and "powers=(1.0,)" in repr(only)


def test_a_mixture_of_energies_is_the_mixture_under_noise_too() -> None:
    parts = [Gaussian(LAW.means[k], [0.1, 0.4][k]) for k in range(2)]
    model, exact, (x, t) = (
        energy.mixture([of(parts[0]), parts[1].denoiser(VP)], [0.3, 0.7]),
        LAW.denoiser(VP),
        states(VP),
    )
    torch.testing.assert_close(model.log_prob(x, t), exact.log_prob(x, t), rtol=1e-10, atol=1e-10)
    for view in VIEWS:
        torch.testing.assert_close(model.as_view(view, x, t), exact.as_view(view, x, t), rtol=1e-8, atol=1e-8)
    equal = energy.mixture([of(part) for part in parts])
    expected = Mixture([0.5, 0.5], LAW.means, torch.tensor([0.1, 0.4], dtype=F64)).denoiser(VP)
    torch.testing.assert_close(equal.log_prob(x, t), expected.log_prob(x, t), rtol=1e-10, atol=1e-10)


def test_metropolis_takes_energies(unchecked) -> None:
    """The chain on a product of Gaussians is, move by move, the one on the Gaussian that it is."""
    t, step = 0.3, 0.2
    a, b = (
        Gaussian(torch.tensor([0.5, 0.0], dtype=F64), 0.2),
        Gaussian(torch.tensor([-0.2, 1.0], dtype=F64), 0.5),
    )
    V = [float(VP.alpha(t) ** 2 * v + VP.sigma(t) ** 2) for v in (0.2, 0.5)]
    variance = 1 / (1 / V[0] + 1 / V[1])
    mean = variance * float(VP.alpha(t)) * (a.mean / V[0] + b.mean / V[1])
    target = energy.Energy(lambda x, t: 0.5 * (x - mean).square().sum(1) / variance, VP)
    source = noise.Noise.of(3, None, batch=64, device="cpu", dtype=F64)
    x = torch.zeros(64, 2, dtype=F64)
    found = solvers.mala(energy.product([of(a), of(b)]), x, t, step=step, steps=30, noise=source)
    expected = solvers.mala(target, x, t, step=step, steps=30, noise=source)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.acceptance, expected.acceptance) and 0.3 < found.acceptance.mean() < 0.999


def test_the_ratio_of_two_times() -> None:
    x, _ = states(VP)
    exact, model = LAW.denoiser(VP), of(LAW)
    expected = LAW.marginal(VP, 0.2).log_prob(x) - LAW.marginal(VP, 0.6).log_prob(x)
    for m in (exact, model):
        torch.testing.assert_close(energy.log_ratio(m, x, 0.2, 0.6), expected, rtol=1e-10, atol=1e-10)
    shifted = energy.Energy(lambda x, t: 4.0 - exact.log_prob(x, t), VP)
    torch.testing.assert_close(energy.log_ratio(shifted, x, 0.2, 0.6), expected, rtol=1e-10, atol=1e-10)


# ---- modes, batches, errors


def test_modes_are_left_as_found() -> None:
    model, (x, t) = of(LAW), states(VP)
    expected = model(x, t)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x.clone(), t), expected)
    p = energy.potential(Denoiser(conservative("scalar"), VP))
    weight = next(p.parameters())
    weight.grad = torch.ones_like(weight)
    p.score(x, t), p.energy(x, t)
    assert torch.equal(weight.grad, torch.ones_like(weight)) and weight.requires_grad


def test_every_combination_keeps_samples_apart(unchecked) -> None:
    """Adaptive steps, where samples leave the batch and take their conditions with them."""
    exact = LAW.denoiser(VP)

    class Shifted(energy.EnergyModel):
        sde = VP

        def energy(self, x: Tensor, t, shift: Tensor, **cond) -> Tensor:
            return -exact.log_prob(x - 0.1 * shift[:, None], t)

    class ShiftedBy:
        """A function that holds a number for each sample."""

        def __init__(self, shift: Tensor) -> None:
            self.shift = shift

        def __call__(self, x: Tensor, t, **cond) -> Tensor:
            return -exact.log_prob(x - 0.1 * self.shift[:, None], t)

        def narrowed(self, rows: Tensor | slice, batch: int) -> ShiftedBy:
            return ShiftedBy(self.shift[rows])

    for model in (
        Shifted(),
        energy.product([Shifted(), Shifted()], [0.5, 0.5]),
        energy.mixture([Shifted(), Shifted()]),
    ):
        shift = torch.tensor([0.0, 3.0, -2.0], dtype=F64)
        x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([1.0, 0.6], dtype=F64)
        solver = solvers.adaptive_ode(rtol=1e-2, atol=1e-2)
        together = solver.solve(model.given(shift=shift), x, times).x
        for i in (0, 2):
            alone = solver.solve(model.given(shift=shift[i : i + 1]), x[i : i + 1], times).x
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-9, atol=1e-9)
    held = solver.solve(energy.Energy(ShiftedBy(shift), VP), x, times)
    known = solver.solve(Shifted().given(shift=shift), x, times)
    torch.testing.assert_close(held.x, known.x, rtol=1e-9, atol=1e-9)
    assert len(set(held.evaluations.tolist())) > 1  # some were finished before others


def test_errors(unchecked) -> None:
    x, t = states(VP)
    with pytest.raises(TypeError, match=r"expected a function E\(x, t\), found float"):
        energy.Energy(1.0, VP)
    with pytest.raises(ValueError, match="one number a sample, shape"):
        energy.Energy(lambda x, t: x, VP).score(x, t)
    with pytest.raises(TypeError, match=r"networks\.Gradient\(network\) is; found MLP"):
        energy.potential(Denoiser(networks.MLP(2), VP))
    with pytest.raises(ValueError, match="at least one model"):
        energy.product([])
    with pytest.raises(ValueError, match="at least one model"):
        energy.product([of(LAW)], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        energy.product([of(LAW)], [math.inf])
    with pytest.raises(ValueError, match="weights > 0"):
        energy.mixture([of(LAW), of(LAW)], [1.0, 0.0])
    # What a classifier says is no density of the model that it guides.
    guided = guidance.classifier(LAW.denoiser(VP), lambda x, t: -x.square().sum(1))
    for model in (Denoiser(networks.MLP(2), VP), guided):
        with pytest.raises(TypeError, match=f"denoisers with log_prob, found {type(model).__name__}"):
            energy.mixture([model])
        with pytest.raises(TypeError, match=f"denoisers with log_prob, found {type(model).__name__}"):
            energy.log_ratio(model, x, 0.1, 0.9)
        with pytest.raises(TypeError, match=f"log_prob.*{type(model).__name__} does not have"):
            solvers.mala(model, x, 0.1, step=0.1, steps=1, noise=noise.Noise.of(0, batch=5, dtype=F64))
    table = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    alike = VPSDE.from_betas(table), VPSDE.from_betas(2 * table), VPSDE.from_betas(table.clone())
    assert len(set(map(repr, alike))) == 1  # tables are too long to be printed
    for one, other in ((VP, EDM()), alike[:2], (VESDE(), VESDE(sigma_max=40.0))):
        with pytest.raises(ValueError, match="on one SDE"):
            energy.product([of(LAW, one), of(LAW, other)])
    energy.product([of(LAW, alike[0]), of(LAW, alike[2])])
    with pytest.raises(ValueError, match="determined"):
        of(LAW, Rectified())(x, 1.0)
    with pytest.raises(NotImplementedError):
        energy.EnergyModel().energy(x, t)


def test_conditions_are_composed(unchecked):
    """A product of one energy under two conditions (Du et al. 2023), and Metropolis steps of one."""

    def quadratic(x, t, mu):
        return 0.5 * (x - mu).square().flatten(1).sum(1)

    conditional = energy.Energy(quadratic, VPSDE())
    x, first, second = torch.randn(4, 2, dtype=F64), torch.randn(4, 2, dtype=F64), torch.full((1, 2), -1.0)
    parts = [conditional.given(mu=mu) for mu in (first, second)]
    both = energy.product(parts)
    torch.testing.assert_close(both.score(x, 0.5), first + second - 2 * x)
    torch.testing.assert_close(both.energy(x, 0.5), quadratic(x, 0.5, first) + quadratic(x, 0.5, second))
    torch.testing.assert_close(both.narrowed(slice(1, 3), 4).score(x[1:3], 0.5), both.score(x, 0.5)[1:3])
    walked = solvers.mala(parts[0], x, 0.5, step=0.1, steps=3, noise=Noise.of(0, batch=4, dtype=F64))
    assert walked.x.shape == x.shape
    with pytest.raises(TypeError, match="or other denoisers with log_prob, found Conditioned"):
        energy.product([Denoiser(MLP(2, 8, 1), VPSDE()).given(label=first), parts[0]])
