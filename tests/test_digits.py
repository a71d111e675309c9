"""The digits, their judge, and what is measured; and the trained network that is kept in the repository."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from scoresde import Denoiser, checkpoint, digits, grids, sample, solvers
from scoresde.digits import GAUSSIAN, Quality, Row

CHECKPOINT = Path(__file__).parents[1] / "benchmarks" / "digits.safetensors"


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load()


@pytest.fixture(scope="module")
def examiner(data: digits.Digits) -> digits.Examiner:
    return digits.Examiner(data)


def test_three_parts_of_all_digits(data: digits.Digits):
    from sklearn.datasets import load_digits

    assert [len(part.x) for part in data] == [1000, 397, 400] == [len(part.label) for part in data]
    everything = torch.cat([torch.cat([part.x.flatten(1), part.label[:, None].float()], 1) for part in data])
    x, label = load_digits(return_X_y=True)
    whole = torch.cat([torch.tensor(x).float() / 8 - 1, torch.tensor(label)[:, None].float()], 1)
    assert sorted(everything.tolist()) == sorted(whole.tolist())
    for part in data:
        share = part.label.bincount(minlength=10) / len(part.label)
        assert share.min() > 0.09 and share.max() < 0.11
        assert part.x.min() == -1 and part.x.max() == 1
    assert float(data.train.x.std()) == pytest.approx(digits.SIGMA_DATA, abs=0.01)
    assert all(a.x.equal(b.x) and a.label.equal(b.label) for a, b in zip(data, digits.load(), strict=True))


def test_the_judge_knows_digits_it_has_not_seen(data: digits.Digits, examiner: digits.Examiner):
    judge = examiner.judge
    assert judge.accuracy(*data.held_out) >= 0.96 and judge.accuracy(*data.train) >= 0.96
    assert judge.accuracy(data.held_out.x, (data.held_out.label + 1) % 10) <= 0.02
    log_probs = judge.log_probs(data.held_out.x)
    assert log_probs.shape == (397, 10) and log_probs.dtype == torch.float64
    assert log_probs.min() == pytest.approx(torch.tensor(1e-4, dtype=torch.float64).log())
    assert log_probs.exp().sum(1).sub(1).abs().max() < 1e-3  # clipping adds at most ten times 1e-4


def test_real_digits_are_good_and_others_are_not(data: digits.Digits, examiner: digits.Examiner):
    floor = examiner.floor()
    assert (
        floor.accuracy >= 0.96
        and abs(floor.energy_distance) < 0.1
        and floor.nearest == 1
        and floor.copies <= 0.011
    )
    copied = examiner(data.train.x[:256], data.train.label[:256])
    assert copied.nearest == 0 and copied.copies == 1 and abs(copied.energy_distance) < 0.1
    label = digits.labels(256)
    normal = examiner(digits.gaussian(data.train, 256), label)
    assert normal.energy_distance > 1 and normal.accuracy < 0.25 and normal.nearest > 1.2
    noisy = examiner(data.held_out.x + 0.7 * torch.randn_like(data.held_out.x), data.held_out.label)
    assert noisy.energy_distance > 5 * abs(floor.energy_distance) and noisy.nearest > 1.5
    one_class = data.held_out.x[data.held_out.label == 3]
    assert (
        examiner(one_class, torch.full((len(one_class),), 3)).energy_distance > 1
    )  # variety is seen to be missing


def test_pixels_beyond_white_and_black_do_not_count(data: digits.Digits, examiner: digits.Examiner):
    x, label = data.held_out.x[:64], data.held_out.label[:64]
    assert examiner(torch.where(x.abs() == 1, 1.5 * x, x), label) == examiner(x, label)


def test_the_gaussian_has_mean_and_covariance_of_the_digits(data: digits.Digits):
    x = digits.gaussian(data.train, 20000).flatten(1).double()
    real = data.train.x.flatten(1).double()
    assert x.shape == (20000, 64)
    assert (x.mean(0) - real.mean(0)).abs().max() < 0.05 and (x.mT.cov() - real.mT.cov()).abs().max() < 0.05
    assert digits.gaussian(data.train, 3, seed=1).equal(digits.gaussian(data.train, 3, seed=1))
    assert not digits.gaussian(data.train, 3, seed=1).equal(digits.gaussian(data.train, 3, seed=2))


def test_the_model_is_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    a, b, c = digits.denoiser(0), digits.denoiser(0), digits.denoiser(1)
    assert torch.get_rng_state().equal(before)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (a, b, c)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_making_the_model_seeds_no_generator_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    digits.denoiser(0)
    assert not seeds
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # what is watched is what torch calls
    assert seeds == [3]


def test_two_steps_of_training(data: digits.Digits):
    run = digits.training(digits.denoiser(), data.train, steps=2, batch_size=8, every=1)
    losses = [progress.loss for progress in run]
    assert len(losses) == 2 and all(
        0.3 < loss < 3 for loss in losses
    )  # the preconditioned target has variance one


QUALITY = Quality(accuracy=0.95, energy_distance=0.3, nearest=0.9, copies=0.02)


@pytest.mark.parametrize(("n", "classes"), [(2, [0, 1]), (3, [0, 1, 2]), (4, [1, 2, 3]), (9, [3, 4, 5])])
def test_frames_show_some_of_however_few_samples(
    data: digits.Digits,
    examiner: digits.Examiner,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    classes: list[int],
):
    monkeypatch.setattr(digits, "SAMPLERS", (replace(digits.SAMPLERS[0], steps=12),))
    monkeypatch.setattr(digits, "Examiner", lambda _: examiner)
    rows, frames = digits.compare(digits.denoiser(), data, n)
    assert len(frames) == 12 and all(frame.x.shape == frame.denoised.shape for frame in frames)
    assert frames[-1].x.equal(rows[-1].x[classes])


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, None),
        ({"accuracy": 0.92}, "MISSED accuracy 0.920 >= 0.93"),
        ({"energy_distance": 0.45}, "MISSED energy distance 0.11"),
        ({"nearest": 0.79}, "MISSED nearest ratio 0.79 >= 0.8"),
        ({"copies": 0.04}, "MISSED copies 4.0% <= 3%"),
    ],
)
def test_verdict(change: dict[str, float], missed: str | None):
    x = torch.zeros(1, 1, 8, 8)
    gaussian = Row(GAUSSIAN, 0, 0.0, replace(QUALITY, energy_distance=4.0), x)
    other = Row("DDIM", 20, 1.0, replace(QUALITY, accuracy=0.0), x)
    lines = digits.verdict(
        [gaussian, other, Row("DDPM", 1000, 60.0, replace(QUALITY, **change), x)]
    ).splitlines()
    assert len(lines) == 1 and lines[0].startswith("DDPM: ")
    assert (missed in lines[0]) if missed else ("MISSED" not in lines[0] and "good" in lines[0])


def test_samplers_are_what_they_are_called():
    calls = {
        s.name: len(s.solver.tableau(digits.denoiser().sde, s.grid(digits.denoiser().sde, s.steps, s.end)))
        for s in digits.SAMPLERS
    }
    assert calls == {"DDPM": 1000, "Euler-Maruyama": 250, "DDIM": 20, "DPM-Solver++(2M)": 20}
    assert set(digits.TARGETED) <= set(calls)


def test_ddpm_is_the_chain_of_a_thousand_steps():
    """The first sampler is Algorithm 2 for the betas of the SDE: noise of variance beta-tilde."""
    sde, sampler = digits.denoiser().sde, digits.SAMPLERS[0]
    table = sampler.solver.tableau(sde, sampler.grid(sde, sampler.steps, sampler.end))
    alpha_bar = torch.cumprod(1 - sde.betas(1000), 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = (1 - previous) / (1 - alpha_bar) * sde.betas(1000)
    torch.testing.assert_close(table.noise.flip(0).square(), variance, rtol=1e-9, atol=1e-15)


@pytest.fixture(scope="module")
def trained() -> Denoiser:
    return checkpoint.load(CHECKPOINT)


def test_the_trained_network_is_small():
    assert CHECKPOINT.stat().st_size <= 2_000_000
    assert checkpoint.describe(CHECKPOINT)["training"] is None


def test_the_trained_network_draws_digits(
    trained: Denoiser, examiner: digits.Examiner, data: digits.Digits, unchecked: None
):
    label = digits.labels(200)
    drawn = sample(
        trained,
        (200, *digits.SHAPE),
        solvers.dpmpp(2),
        steps=20,
        grid=grids.quadratic,
        end=0,
        condition={"label": label},
    )
    quality = examiner(drawn.x, label)
    gaussian = examiner(digits.gaussian(data.train, 200), label)
    assert quality.accuracy >= 0.93
    assert quality.energy_distance <= 0.1 * gaussian.energy_distance
    assert quality.nearest >= 0.8 and quality.copies <= 0.03
