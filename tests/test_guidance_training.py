"""The classifier of noisy images, its training, and what training a conditional model leaves out."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from scoresde import VPSDE, Denoiser, guidance, losses, networks, sample, solvers, train
from scoresde.laws import Mixture

F64 = torch.float64
VP = VPSDE()
CONFIG = {
    "channels": 2,
    "classes": 5,
    "base": 8,
    "multipliers": [1, 3],
    "blocks": 1,
    "attention": [0],
    "heads": 2,
    "dropout": 0.25,
    "embedding": "fourier",
    "time_input": "log_snr",
    "embedding_dim": 12,
}


def perturbed(network: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=F64).to(p))
    return network.eval()


def built(dtype: torch.dtype = F64, **changes) -> networks.NoisyClassifier:
    torch.manual_seed(0)
    return networks.NoisyClassifier(**{**CONFIG, **changes}).to(dtype)


# ---- the network


def test_a_new_classifier_knows_nothing_and_a_trained_one_sees_image_and_time(device) -> None:
    x, time = torch.randn(3, 2, 4, 6, dtype=F64, device=device), torch.tensor([0.1, 0.4, 2.0], device=device)
    assert not built().to(device)(x, time).any()
    network = perturbed(built()).to(device)
    logits = network(x, time)
    assert logits.shape == (3, 5) and logits.dtype == F64
    assert (network(x, time + 1) - logits).abs().amax(1).min() > 1e-4
    for c in range(2):
        for i in (0, 3):
            other = x.clone()
            other[:, c, i, i] += 1
            assert (network(other, time) - logits).abs().amax(1).min() > 1e-6
    torch.testing.assert_close(network(x[1:2], time[1:2]), logits[1:2], rtol=1e-10, atol=1e-10)


def test_the_way_down_is_the_u_net_s() -> None:
    """The same parts by the same names, so that the weights of a U-Net's encoder can be taken over."""
    network, unet = (
        built(),
        networks.UNet(2, **{k: v for k, v in CONFIG.items() if k not in ("channels", "classes")}),
    )
    mine, its = network.encoder.state_dict(), unet.encoder.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in its.items()}
    shared = {k for k in network.conditioning.state_dict()} & {k for k in unet.conditioning.state_dict()}
    assert shared == set(network.conditioning.state_dict())


def test_config_rebuilds_it() -> None:
    network = built()
    again = networks.NoisyClassifier(**json.loads(json.dumps(network.config))).to(F64)
    assert network.config == CONFIG
    again.load_state_dict(network.state_dict())


def test_errors_of_the_network(unchecked) -> None:
    for wrong in (
        {"classes": 0},
        {"channels": 0},
        {"base": 1.5},
        {"dropout": 1.0},
        {"multipliers": []},
        {"heads": 3},
    ):
        with pytest.raises(ValueError, match="expected"):
            built(**wrong)
    network = built()
    for x, time in (
        (torch.zeros(2, 2, 4, 4), torch.zeros(3)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2)),
        (torch.zeros(2, 2, 3, 4), torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match="expected"):
            network(x.to(F64), time)


# ---- training


CENTRES = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.0]], dtype=F64)


class Small(nn.Module):
    """Logits of points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.body = networks.MLP(2, hidden=48, layers=2, out_dim=3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.body(x, time)


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (n,), generator=g)
    return (CENTRES[label] + 0.3 * torch.randn(n, 2, generator=g, dtype=F64)).float(), label


def test_the_loss_is_the_cross_entropy_at_x_t(unchecked) -> None:
    x0, label = points(4, 0)
    eps, t = torch.randn(4, 2), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=F64)
    torch.manual_seed(0)
    classifier = guidance.Classifier(perturbed(Small()), VP)
    found = losses.classification(classifier, x0, eps, t, label).detach()
    for i in range(4):
        x_t = VP.alpha(t[i]).float() * x0[i] + VP.sigma(t[i]).float() * eps[i]
        log_p = classifier(x_t[None], t[i])[0].detach()
        assert abs(float(found[i] + log_p[label[i]])) < 1e-5
    for dtype in (torch.int8, torch.int32):
        assert torch.equal(losses.classification(classifier, x0, eps, t, label.to(dtype)).detach(), found)
    for wrong in (label + 1, label - 1, label.float()):  # counted from 1; no class; no integers
        with pytest.raises(ValueError, match="label: expected integers from 0 to 2, found"):
            losses.classification(classifier, x0, eps, t, wrong)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    run = train.fit_classifier(
        guidance.Classifier(Small(), VP),
        points(2000, 1),
        steps=250,
        batch_size=512,
        lr=5e-3,
        ema_decay=0.98,
        cosine=True,
        every=50,
    )
    records = list(run)
    return run, records


def test_training_finds_the_posterior_of_the_classes(trained, device) -> None:
    """At every noise level log p(y | x_t) is that of the mixture that the data are from."""
    run, records = trained
    assert [r.step for r in records] == [50, 100, 150, 200, 250] and records[-1].loss < records[0].loss
    assert not any(p.requires_grad for p in run.ema.parameters()) and not run.ema.training
    x0, _ = points(400, 2)
    for t in (0.05, 0.2, 0.5, 1.0):
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        x = alpha * x0 + sigma * torch.randn(400, 2, generator=torch.Generator().manual_seed(3))
        V = alpha**2 * 0.09 + sigma**2
        exact = (-0.5 * torch.cdist(x.double(), alpha * CENTRES) ** 2 / V).log_softmax(1)
        found = run.ema(x, t).double()
        kl = (exact.exp() * (exact - found)).sum(1).mean()
        none = (exact.exp() * (exact + torch.tensor(3.0).log())).sum(1).mean()  # of knowing nothing
        assert kl < 0.02 + 0.05 * none, (t, float(kl), float(none))


def test_a_trained_classifier_guides_to_its_class(trained) -> None:
    """The data's exact denoiser, guided: all samples end near the class asked for, at scale 2."""
    run, _ = trained
    law = Mixture([1 / 3] * 3, CENTRES, 0.09)
    label = torch.arange(60) % 3
    guided = guidance.classifier(law.denoiser(VP), run.ema.log_prob(label), 2.0)
    x = sample(guided, (60, 2), solvers.dpmpp(2), steps=20, end=0, dtype=torch.float32).x
    assert (torch.cdist(x.double(), CENTRES).argmin(1) == label).double().mean() > 0.95
    plain = sample(law.denoiser(VP), (60, 2), solvers.dpmpp(2), steps=20, end=0, dtype=torch.float32).x
    assert (torch.cdist(plain.double(), CENTRES).argmin(1) == label).double().mean() < 0.7


def test_the_same_seed_is_the_same_run_and_the_global_state_is_left_alone() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(0)
        run = train.fit_classifier(
            guidance.Classifier(Small(), VP), points(64, 0), steps=3, batch_size=16, seed=seed
        )
        state = torch.get_rng_state()
        list(run)
        assert torch.equal(state, torch.get_rng_state())
        return nn.utils.parameters_to_vector(run.model.parameters()).detach()

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_errors_of_training(unchecked) -> None:
    with pytest.raises(TypeError, match="expected a module with an sde"):
        train.fit_classifier(Small(), points(8, 0), steps=1)
    with pytest.raises(ValueError, match="label_dropout: expected 0"):
        train.fit_classifier(guidance.Classifier(Small(), VP), points(8, 0), steps=1, label_dropout=0.1)
    with pytest.raises(ValueError, match="steps"):
        train.fit_classifier(guidance.Classifier(Small(), VP), points(8, 0), steps=0)


# ---- conditions that are dropped


class Recorder(nn.Module):
    """A network that records its conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        self.seen.append(cond)
        return x * self.weight


def test_all_conditions_of_a_sample_are_dropped_together(alpha_ledger) -> None:
    """The label to its null, vectors to 0, of about p of the samples; 2000 of them."""
    n, p = 2000, 0.3
    model = Denoiser(Recorder(), VP)
    cond = {"vector": torch.ones(n, 3) * torch.arange(1, n + 1)[:, None], "label": torch.arange(n)}
    next(train.fit(model, (torch.zeros(n, 2), cond), steps=1, batch_size=n, label_dropout=p))
    seen = model.network.seen[0]
    dropped = seen["label"] == -1
    assert torch.equal(seen["vector"][~dropped][:, 0], seen["label"][~dropped] + 1.0)
    assert not seen["vector"][dropped].any()
    alpha = alpha_ledger.spend(1e-9, "conditions are dropped at the stated rate")
    bound = -float(torch.special.ndtri(torch.tensor(alpha / 4, dtype=F64))) * (n * p * (1 - p)) ** 0.5
    assert abs(float(dropped.sum()) - n * p) < bound < abs(float(dropped.sum()) - n * 1.5 * p)
    only = Denoiser(Recorder(), VP)
    next(
        train.fit(
            only, (torch.zeros(n, 2), {"vector": cond["vector"]}), steps=1, batch_size=n, label_dropout=p
        )
    )
    share = float((only.network.seen[0]["vector"] == 0).all(1).double().mean())
    assert 0.2 < share < 0.4
