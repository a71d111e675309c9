"""Training: the step against a plain loop, resuming bit for bit, faults, and what is left as it was found."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import damage
from benchmarks.damage import LABELS, X, differing, losses_of, new_fit, new_model, stopped_and_resumed
from scoresde import checkpoint, losses, networks, train
from scoresde.checkpoint import CheckpointError
from scoresde.denoiser import Denoiser
from scoresde.networks import UNet
from scoresde.sde import EDM, VESDE, VPSDE, Rectified, SubVPSDE
from scoresde.train import surroundings

ROOT = Path(__file__).resolve().parents[1]


def assert_same(a: train.Run, b: train.Run) -> None:
    assert not differing(a, b)


class Broken(nn.Module):
    """A linear network whose output is NaN at the given calls (from 1)."""

    def __init__(self, bad: range) -> None:
        super().__init__()
        self.linear, self.bad, self.calls = nn.Linear(2, 2).double(), bad, 0

    def forward(self, x, time):
        self.calls += 1
        return self.linear(x) * (math.nan if self.calls in self.bad else 1.0)


# ---- the step


def test_the_run_is_a_plain_loop(unchecked):
    """Reimplemented with torch's own AdamW (not fused), clipping and an average by hand, from the same random
    numbers.
    """
    s = train.Settings(30, 16, lr=3e-3, warmup=7, cosine=True, betas=(0.8, 0.95), weight_decay=0.1, clip=0.4)
    s = {k: v for k, v in vars(s).items() if k != "steps"} | {"every": 1, "ema_decay": 0.7, "seed": 5}
    weight = functools.partial(losses.min_snr, gamma=3.0)
    run = train.fit(new_model(0.0, torch.float64, None), X, steps=30, weight=weight, **s)
    plain = new_model(0.0, torch.float64, None)
    average = [p.detach().clone() for p in plain.parameters()]
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.8, 0.95), weight_decay=0.1, foreach=False)
    order, noise, clock = (torch.Generator() for _ in range(3))
    for mine, theirs in zip((order, noise, clock), (run.data.generator, run.noise, run.clock), strict=True):
        mine.set_state(theirs.get_state())
    queue = run.data.order.tolist()
    for k in range(1, 31):
        progress = next(run)
        while len(queue) < 16:
            queue += torch.randperm(50, generator=order).tolist()
        x0, queue = X[queue[:16]], queue[16:]
        t = 1e-3 + (1 - 1e-3) * (torch.arange(16) + torch.rand((), dtype=torch.float64, generator=clock)) / 16
        eps = torch.randn(16, 2, dtype=torch.float64, generator=noise)
        a, sd = plain.sde.alpha(t)[:, None], plain.sde.sigma(t)[:, None]
        snr = (a / sd) ** 2
        loss = (snr.clamp_max(3.0) * (x0 - plain(a * x0 + sd * eps, t)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in plain.parameters()])
        for p in plain.parameters():
            p.grad *= min(1.0, 0.4 / (gradients.norm().item() + 1e-6))
        rate = 3e-3 * min(1, k / 7) * (1 + math.cos(math.pi * (k - 1) / 30)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        d = min(0.7, (1 + k) / (10 + k))
        average = [d * e + (1 - d) * p.detach() for e, p in zip(average, plain.parameters(), strict=True)]
        assert progress.step == k and progress.lr == pytest.approx(rate, rel=1e-12)
        assert progress.loss == pytest.approx(loss.item(), rel=1e-9)
    for p, q in zip(plain.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    for p, q in zip(average, run.ema.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_average_of_constant_weights_in_closed_form():
    """Property 51: d^n theta_0 + (1 - d^n) theta."""
    run = new_fit(new_model(0.0, torch.float64, None), X, ema_decay=0.9, steps=10**6)
    start = [p.detach().clone() for p in run.ema.parameters()]
    with torch.no_grad():
        for p in run.model.parameters():
            p.copy_(2.0)
    run.step = 1000  # where the decay is warm
    for _ in range(25):
        run._average()
    for p, q in zip(run.ema.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), 0.9**25 * q + (1 - 0.9**25) * 2.0, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_of_narrow_weights_is_kept_in_float32(tmp_path, dtype):
    """Weights at 1 + h from 1 on, where (1 - d) h is far below the spacing of the dtype: d^n in closed form;
    also through a file, and from one that has no accumulator, where the rounded average is all there is.
    """
    n, decay = 200, 0.999

    def averaged(run: train.Run) -> train.Run:
        run.step = 10**6  # where the decay is warm
        with torch.no_grad():
            for p in run.model.parameters():
                p.fill_(1.25)
        for _ in range(n):
            run._average()
        return run

    def started(**options) -> train.Run:
        model = new_model(0.0, dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        return new_fit(model, (X.to(dtype), LABELS), steps=10**7, ema_decay=decay, **options)

    expected = 1.25 - 0.25 * decay**n
    run = averaged(started())
    for p, wide in zip(run.ema.parameters(), run.average, strict=True):
        assert p.dtype == dtype and wide.dtype == torch.float32
        torch.testing.assert_close(wide, torch.full_like(wide, expected), rtol=1e-5, atol=0)
        assert torch.equal(p.detach(), wide.to(dtype))
    run.save(tmp_path / "a")
    resumed = started(resume=tmp_path / "a")
    assert_same(resumed, run)
    assert all(torch.equal(a, b) for a, b in zip(resumed.average, run.average, strict=True))

    def older(_, tensors):
        for key in [key for key in tensors if key.startswith("training.average.")]:
            del tensors[key]

    damage.resigned(tmp_path / "a", older)
    resumed = started(resume=tmp_path / "a")
    for p, wide in zip(run.ema.parameters(), resumed.average, strict=True):
        assert torch.equal(p.detach().float(), wide)


def test_averages_of_wide_weights_have_no_copy():
    run = new_fit()
    pairs = zip(run.average, run.ema.parameters(), strict=True)
    assert all(wide is p for wide, p in pairs)
    assert not any(name.startswith("average") for name in run.state().tensors)


def test_learning_rate_and_decay_by_hand():
    s = train.Settings(100, lr=2.0, warmup=10)
    assert [s.learning_rate(k) for k in (1, 5, 10, 11, 100)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    s = train.Settings(100, lr=2.0, warmup=0, cosine=True)
    assert [s.learning_rate(k) for k in (1, 51, 101)] == pytest.approx([2.0, 1.0, 0.0])
    assert [s.decay(k) for k in (1, 8, 10**6)] == pytest.approx([2 / 11, 0.5, 0.999])


def test_training_learns_a_gaussian():
    """On N(0, 0.25 I) the exact denoiser is linear; a network with little to learn gets within 15 % of the
    least loss.
    """
    x = 0.5 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(3))
    run = train.fit(new_model(0.0, classes=None), x, steps=400, batch_size=128, lr=5e-3, ema_decay=0.98)
    list(run)
    t = torch.linspace(0.05, 1, 200, dtype=torch.float64)
    a, s = run.model.sde.alpha(t)[:, None], run.model.sde.sigma(t)[:, None]
    g = torch.Generator().manual_seed(4)
    x0, eps = 0.5 * torch.randn(200, 2, generator=g), torch.randn(200, 2, generator=g)
    xt = (a * x0 + s * eps).float()
    exact = (0.25 * a / (0.25 * a**2 + s**2) * xt).float()
    with torch.no_grad():
        error = (run.ema(xt, t) - exact).square().mean()
    assert float(error) < 0.15 * float((exact - x0).square().mean())


# ---- batches


def test_every_epoch_is_a_permutation_and_batches_run_across_them():
    data = train.Batches(torch.arange(7.0)[:, None], 3, torch.device("cpu"), seed=0)
    drawn = torch.cat([data.next()[0].flatten() for _ in range(14)]).view(6, 7)
    assert torch.equal(drawn.sort(1).values, torch.arange(7.0).expand(6, 7))
    assert len({tuple(row.tolist()) for row in drawn}) > 3
    large = train.Batches(torch.arange(3.0)[:, None], 8, torch.device("cpu"), seed=0).next()[0]
    assert (
        torch.equal(large[:6].view(2, 3).sort(1).values, torch.arange(3.0).expand(2, 3)) and len(large) == 8
    )


class Pairs:
    def __init__(self, second=lambda i: int(LABELS[i])) -> None:
        self.second = second

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i].float(), self.second(i)


@pytest.mark.parametrize(
    "data",
    [(X.float(), {"label": LABELS}), Pairs(), Pairs(lambda i: {"label": LABELS[i]})],
    ids=["named", "dataset", "dataset of named"],
)
def test_all_kinds_of_data_are_the_same_run(data):
    reference, other = new_fit(), new_fit(data=data)
    assert [p.loss for p in reference] == [p.loss for p in other]
    assert_same(reference, other)


class Listener(nn.Module):
    """Remembers the labels and the time it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen, self.times = nn.Linear(2, 2), [], []

    def forward(self, x, time, label=None):
        self.seen.append(label)
        self.times.append(time)
        return self.linear(x)


def test_labels_belong_to_their_samples_and_are_dropped_at_the_stated_rate(alpha_ledger):
    n, p = 4000, 0.3
    x = torch.arange(n).float()[:, None].expand(n, 2) / n
    model = Denoiser(Listener(), VPSDE(), "data")
    run = train.fit(model, (x, torch.arange(n)), steps=1, batch_size=n, label_dropout=p, null_label=-7)
    order = run.data.order
    next(run)
    label = model.network.seen[0]
    kept = label != -7
    assert torch.equal(label[kept], order[kept])
    # Hoeffding: a rate off by 0.051 is a false alarm with probability 1e-9, and one off by 0.11 is seen with
    # 1 - 1e-9.
    bound = math.sqrt(math.log(2 / alpha_ledger.spend(1e-9, "label dropout has the stated rate")) / (2 * n))
    assert abs(1 - float(kept.double().mean()) - p) < bound
    assert model.network.times[0].dtype == torch.float32


def test_times_and_draw_are_those_asked_for():
    model = Denoiser(Listener(), VPSDE(), "data")
    run = train.fit(
        model,
        X.float(),
        steps=1,
        batch_size=8,
        times=functools.partial(losses.chain, n=4),
        draw=losses.stratified,
    )
    next(run)
    assert model.network.times[0].tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]


# ---- resuming


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, again, other = new_fit(), new_fit(), new_fit(seed=1)
    assert [p.loss for p in first] == [p.loss for p in again] != [p.loss for p in other]
    assert_same(first, again)


@pytest.mark.parametrize("trials", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(tmp_path, trials):
    """Property 52, at random stops, twice in a row; the trace of the loss in the log too."""
    generator = torch.Generator().manual_seed(trials)
    whole = new_fit(log=tmp_path / "whole")
    list(whole)
    assert len(losses_of(tmp_path / "whole")) == 10
    for trial in range(trials):
        stops = torch.randint(1, 39, (2,), generator=generator).sort().values.tolist()
        log = tmp_path / f"log{trial}"
        assert_same(stopped_and_resumed(tmp_path, stops, log), whole)
        assert losses_of(log) == losses_of(tmp_path / "whole")


def test_runs_that_differ_are_told_apart(tmp_path):
    whole, other = new_fit(), new_fit(seed=1)
    list(whole), list(other)
    assert {"clock", "noise", "step"} - set(differing(whole, other)) == {"step"}
    assert "step" in differing(whole, new_fit())


def test_resuming_twice_from_one_file_and_going_on_in_place_are_the_same(tmp_path):
    run = new_fit()
    next(run)
    run.save(tmp_path / "a")
    resumed = [new_fit(new_model(0.2), resume=tmp_path / "a") for _ in range(2)]
    for each in [run, *resumed]:
        list(each)
        assert_same(each, run)


def test_channels_last_weights_are_resumed_in_their_layout(tmp_path):
    def image_run(**options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = UNet(1, base=8, multipliers=(1, 2), blocks=1, heads=2, dropout=0.1)
        model = Denoiser(network.to(memory_format=torch.channels_last), VPSDE(), "velocity")
        x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return train.fit(model, x, steps=6, batch_size=8, every=2, **options)

    run = image_run()
    next(run)
    run.save(tmp_path / "a")
    again = image_run(resume=tmp_path / "a")
    list(run), list(again)
    assert_same(run, again)
    for p, state in again.optimizer.state.items():
        assert state["exp_avg"].stride() == p.stride()


def test_what_cannot_be_resumed_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: expected a checkpoint file"):
        new_fit(resume=tmp_path / "nothing")
    run = new_fit()
    next(run)
    run.save(tmp_path / "a")
    for options, message in (
        ({"seed": 3}, "seed: expected 0, as in .*; found 3"),
        ({"batch_size": 8}, "batch_size: expected 16"),
        ({"data": (X[:40].float(), LABELS[:40])}, "data: expected 50 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            new_fit(resume=tmp_path / "a", **options)
    checkpoint.save(tmp_path / "weights", run.ema)
    with pytest.raises(CheckpointError, match="weights only"):
        new_fit(resume=tmp_path / "weights")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="SHA-256"):
        new_fit(resume=tmp_path / "a")


class Two(nn.Module):
    """A network of two layers, one of which `forward` does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, time):
        return self.first(x)


def two(frozen: bool = False, compiled: bool = False) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Two()
    network.first.weight.requires_grad_(not frozen)
    return Denoiser(torch.compile(network, backend="eager") if compiled else network, VPSDE())


@pytest.mark.parametrize(
    "before, after",
    [
        ({"frozen": True}, {"frozen": True}),
        ({}, {}),
        ({"compiled": True}, {}),
        ({}, {"compiled": True}),
        ({"compiled": True}, {"compiled": True}),
    ],
    ids=["frozen", "unused", "compiled to plain", "plain to compiled", "compiled"],
)
def test_only_what_was_trained_has_a_state_of_the_optimiser_to_resume(tmp_path, before, after):
    run = new_fit(two(**before), X.float())
    next(run)
    run.save(tmp_path / "a")
    resumed = new_fit(two(**after), X.float(), resume=tmp_path / "a")
    list(run), list(resumed)
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert run.state().tensors.keys() == resumed.state().tensors.keys()


def test_names_of_files_written_by_compiled_models_before_are_read(tmp_path):
    run = new_fit(two(), X.float())
    next(run)
    run.save(tmp_path / "a")

    def wrapped(description, tensors):
        for key in [key for key in tensors if key.startswith("training.optimizer.network.")]:
            tensors[key.replace("network.", "network._orig_mod.")] = tensors.pop(key)

    damage.resigned(tmp_path / "a", wrapped)
    resumed = new_fit(two(), X.float(), resume=tmp_path / "a")
    assert_same(resumed, run)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda _, t: t.update({"training.noise": torch.zeros(16, dtype=torch.uint8)}), "on cpu; found"),
        (lambda _, t: t.update({"training.inside.cpu": torch.zeros(16, dtype=torch.uint8)}), "on cpu; found"),
        (lambda _, t: t.__delitem__("training.clock"), "KeyError: 'clock'"),
        (lambda _, t: t.__delitem__("training.optimizer.network.first.bias.exp_avg"), "first.bias.exp_avg"),
        (lambda _, t: t.update({"training.optimizer.network.first.bias.exp_avg": torch.zeros(3)}), "shape"),
        (lambda _, t: t.update({"training.optimizer.network.third.step": torch.zeros(())}), "found .*third"),
        (lambda d, _: d["training"].__delitem__("position"), "KeyError: 'position'"),
        (lambda d, _: d["training"].__delitem__("settings"), "KeyError: 'settings'"),
    ],
    ids=["noise", "inside", "no clock", "no average", "shape", "no such parameter", "position", "settings"],
)
def test_a_state_that_does_not_fit_changes_nothing(tmp_path, change, message):
    run = new_fit(two(), X.float())
    next(run)
    run.save(tmp_path / "a")
    damage.resigned(tmp_path / "a", change)
    model = two()
    weights = [p.detach().clone() for p in model.parameters()]
    fresh = new_fit(model, X.float())
    for restore in (fresh.restore, lambda path: new_fit(model, X.float(), resume=path)):
        with pytest.raises(CheckpointError, match=message):
            restore(tmp_path / "a")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert_same(fresh, new_fit(two(), X.float()))


def test_a_file_is_written_when_asked_and_holds_the_average(tmp_path):
    run = new_fit(path=tmp_path / "a", save_every=7, every=100)
    assert next(run).step == 7
    assert checkpoint.describe(tmp_path / "a")["training"]["step"] == 7
    list(run)
    assert checkpoint.describe(tmp_path / "a")["training"]["step"] == 40
    loaded = checkpoint.load(tmp_path / "a")
    for p, q in zip(loaded.parameters(), run.ema.parameters(), strict=True):
        assert torch.equal(p, q)
    other = new_fit(path=tmp_path / "b")
    other.close()
    assert not (tmp_path / "b").exists()  # nothing was trained
    next(other)
    other.close()
    assert checkpoint.describe(tmp_path / "b")["training"]["step"] == 4
    assert next(other).step == 8


class Ramp:
    """A schedule of one's own, which a file could not rebuild."""

    def B(self, t):
        return 10 * t

    def beta(self, t):
        return 10 + 0 * t

    def time(self, B):
        return B / 10


def test_what_cannot_be_saved_is_refused_before_it_is_trained(tmp_path, unchecked):
    (tmp_path / "file").touch()
    network = networks.MLP(2, 8, 1)
    odd = networks.UNet(1, base=8, multipliers=(1, 2), blocks=1, heads=2)
    odd.config["blocks"] = torch.tensor(1)
    x = X.float()
    for model, data, path, message in (
        (Denoiser(network, VPSDE()), x, tmp_path, "expected a file to write, found the folder .*name a file"),
        (
            Denoiser(network, VPSDE()),
            x,
            tmp_path / "file" / "a",
            "expected a file in a folder, found the file",
        ),
        (Denoiser(network, VPSDE(schedule=Ramp())), x, tmp_path / "a", "expected one of the schedules"),
        (Denoiser(odd, VPSDE()), torch.zeros(9, 1, 8, 8), tmp_path / "a", "values that JSON can hold.*found"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train.fit(model, data, steps=1, path=path)
        if path == tmp_path / "a":
            next(train.fit(model, data, steps=1))  # it can be trained
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_finished_run_that_goes_on_elsewhere_is_written_there(tmp_path):
    list(new_fit(path=tmp_path / "a"))
    written = (tmp_path / "a").stat().st_mtime_ns
    list(new_fit(resume=tmp_path / "a", path=tmp_path / "b"))
    list(new_fit(resume=tmp_path / "a", path=tmp_path / "." / "a"))
    loaded = [checkpoint.load(tmp_path / name).parameters() for name in "ab"]
    assert all(torch.equal(p, q) for p, q in zip(*loaded, strict=True))
    assert (tmp_path / "a").stat().st_mtime_ns == written  # there is nothing new for it


# ---- interrupts


@pytest.mark.parametrize("at", [1, 6, 8])
def test_ctrl_c_ends_the_step_saves_and_loses_nothing(tmp_path, at):
    model = new_model()
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)

    hook = model.network.register_forward_hook(interrupt)
    run = new_fit(model, path=tmp_path / "a", log=tmp_path / "log")
    with pytest.raises(KeyboardInterrupt):
        list(run)
    assert run.step == at and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    hook.remove()
    resumed = new_fit(path=tmp_path / "a", resume=tmp_path / "a", log=tmp_path / "log")
    assert resumed.step == at
    list(resumed)
    whole = new_fit(log=tmp_path / "whole")
    list(whole)
    assert_same(resumed, whole)
    trace, expected = (
        [json.loads(x)["loss"] for x in (tmp_path / n).read_text().splitlines()] for n in ("log", "whole")
    )
    assert trace == expected


def test_a_second_ctrl_c_is_raised_at_once():
    model = new_model()
    model.network.register_forward_hook(
        lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and None
    )
    run = new_fit(model)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert run.step == 0 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Normed(nn.Module):
    """A network with dropout, which draws from the global generator, and buffers that every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(2), nn.Dropout(0.3), nn.Linear(2, 2)

    def forward(self, x, time):
        return self.linear(self.drop(self.norm(x)))


def normed() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(Normed(), VPSDE())


@pytest.mark.parametrize("place", ["forward", "backward", "clip", "optimizer"])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_step_that_is_broken_off_is_done_again(tmp_path, monkeypatch, place, at):
    """By the same run and by one resumed from its file: both end where a run that was not disturbed ends."""
    options = {"clip": None, "save_every": 5}
    whole = new_fit(normed(), X.float(), path=tmp_path / "whole", **options)
    list(whole)
    model = normed()
    run = new_fit(model, X.float(), path=tmp_path / "a", **options)
    owner, name = {
        "forward": (run.data, "next"),
        "backward": (run.accelerator, "backward"),
        "clip": (run.accelerator, "clip_grad_norm_"),
        "optimizer": (run.stepper, "step"),
    }[place]
    original, calls = getattr(owner, name), []

    def breaking(*args):
        calls.append(None)
        if len(calls) == at and place == "optimizer":
            raise KeyboardInterrupt
        result = original(*args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaking)
        with pytest.raises(KeyboardInterrupt):
            list(run)
    assert run.step == at - 1 and all(p.grad is None for p in model.parameters())
    run.save(tmp_path / "a")
    resumed = new_fit(normed(), X.float(), resume=tmp_path / "a", **options, path=tmp_path / "b")
    for each in (run, resumed):
        list(each)
        assert_same(each, whole)


def test_a_second_ctrl_c_does_not_part_an_update(monkeypatch):
    whole, run = new_fit(), new_fit()
    average = run._average

    def interrupting():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        average()

    with monkeypatch.context() as patch:
        patch.setattr(run, "_average", interrupting)
        with pytest.raises(KeyboardInterrupt):
            next(run)
    assert run.step == 1
    list(run), list(whole)
    assert_same(run, whole)


def test_gradients_from_before_do_not_enter():
    model, clean = new_model(), new_fit()
    run = new_fit(model)
    model.raw(X.float(), torch.full((50,), 0.5)).sum().backward()
    list(run), list(clean)
    assert_same(run, clean)


def test_other_threads_and_other_handlers_are_left_alone():
    runs: list[train.Run] = []
    thread = threading.Thread(target=lambda: runs.append(run) if list(run := new_fit()) else None)
    thread.start()
    thread.join()
    assert runs[0].step == 40
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        next(new_fit())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ---- what is not finite


@pytest.mark.parametrize("every", [1, 4, 100])
def test_steps_that_are_not_finite_change_nothing_and_end_the_run(every):
    model = Denoiser(Broken(range(4, 1000)), VPSDE())
    run = train.fit(model, X, steps=60, batch_size=8, every=every, patience=5, warmup=0)
    snapshots = []
    with pytest.raises(
        FloatingPointError, match=r"in [0-9]+ steps in a row, up to step [0-9]+; none of them changed"
    ):
        for _ in run:
            snapshots.append([p.detach().clone() for p in model.parameters()])
    assert all(bool(p.isfinite().all()) for p in [*model.parameters(), *run.ema.parameters()])
    if every == 1:
        assert run.step == 8  # three good ones and five
        for later in snapshots[3:]:
            assert all(torch.equal(p, q) for p, q in zip(snapshots[2], later, strict=True))
        assert {int(state["step"]) for state in run.optimizer.state.values()} == {3}
    with pytest.raises(FloatingPointError):
        next(run)


def test_a_few_bad_steps_are_survived_and_do_not_enter_the_mean():
    model = Denoiser(Broken(range(3, 5)), VPSDE())
    records = list(train.fit(model, X, steps=12, batch_size=8, every=4, patience=3))
    assert len(records) == 3 and all(math.isfinite(r.loss) for r in records)
    scattered = Denoiser(Broken(range(1, 100, 2)), VPSDE())
    assert list(train.fit(scattered, X, steps=12, batch_size=8, every=4, patience=2))[-1].step == 12
    only = Denoiser(Broken(range(1, 3)), VPSDE())
    assert math.isnan(next(train.fit(only, X, steps=4, batch_size=8, every=2, patience=3)).loss)


def test_nan_in_a_dataset_ends_the_run_and_keeps_the_last_good_file(tmp_path):
    class Rotten(Pairs):
        healthy = True

        def __getitem__(self, i):
            return X[i].float() * (1 if self.healthy else math.nan), int(LABELS[i])

    data = Rotten()
    run = new_fit(data=data, path=tmp_path / "a", save_every=4, patience=3)
    next(run)
    data.healthy = False
    with pytest.raises(FloatingPointError):
        list(run)
    assert checkpoint.describe(tmp_path / "a")["training"]["step"] == 4
    checkpoint.load(tmp_path / "a")


# ---- hygiene


def test_everything_around_is_as_it_was_found():
    model = new_model()
    model.network.layers[0].eval()
    flags = [m.training for m in model.modules()]
    run = new_fit(model)
    state, threads, default = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    for around in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with around:
            wanted, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            next(run)
            assert torch.is_grad_enabled() == wanted and torch.is_inference_mode_enabled() == inference
    assert torch.equal(state, torch.get_rng_state())
    assert (threads, default) == (torch.get_num_threads(), torch.get_default_dtype())
    assert [m.training for m in model.modules()] == flags
    assert not any(m.training for m in run.ema.modules())
    assert all(p.grad is None for p in model.parameters())

    def fail(*_):
        raise RuntimeError("planted")

    model.network.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"), torch.no_grad():
        next(run)
    assert torch.equal(state, torch.get_rng_state()) and [m.training for m in model.modules()] == flags


def test_global_draws_between_records_do_not_matter():
    first, second = new_fit(), new_fit()
    for _ in first:
        torch.manual_seed(0)
    for _ in second:
        torch.randn(7)
        torch.randn(3, generator=torch.default_generator)
    assert_same(first, second)


def test_the_average_does_not_train_and_follows():
    run = new_fit()
    before = [p.clone() for p in run.ema.parameters()]
    list(run)
    assert not any(p.requires_grad for p in run.ema.parameters())
    assert all(p.requires_grad for p in run.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, run.ema.parameters(), strict=True))


# ---- records, and what is refused


def test_records_and_the_log(tmp_path, capfd):
    (tmp_path / "log").write_text('{"step": 4}\nnot compl')
    records = list(new_fit(steps=10, log=tmp_path / "log", progress=True))
    assert [r.step for r in records] == [4, 8, 10] and records[0].steps == 10
    assert all(r.seconds > 0 and r.images_per_second > 0 for r in records)
    assert records[0].seconds < records[1].seconds < records[2].seconds
    assert records[1].images_per_second == pytest.approx(
        64 / (records[1].seconds - records[0].seconds), rel=1e-6
    )
    assert [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()] == [
        vars(r) for r in records
    ]
    assert "10/10" in capfd.readouterr().err
    assert str(records[0]).startswith("step 4/10  loss ")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps: expected an int of at least 1; found 0"),
        ({"batch_size": -1}, "batch_size"),
        ({"every": 0}, "every"),
        ({"patience": 0}, "patience"),
        ({"lr": 0.0}, "lr: expected a positive number; found 0.0"),
        ({"lr": math.nan}, "lr"),
        ({"warmup": -1}, "warmup"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"ema_decay": 1.1}, "ema_decay"),
        ({"label_dropout": -0.1}, "label_dropout"),
        ({"clip": 0.0}, "clip"),
        ({"save_every": 5}, "save_every"),
        ({"precision": "int8"}, "precision"),
        ({"data": X.float()[:, 0]}, r"shape \(N, ...\)"),
        ({"data": X.float()[:0]}, r"shape \(N, ...\)"),
        ({"data": X.float() * math.nan}, "finite numbers, found 100 NaN"),
        ({"data": (X.float(), LABELS[:3])}, "label: expected 50 entries"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_bad_options_are_refused_before_any_call(options, message, unchecked):
    model = new_model()
    model.network.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        new_fit(model, **options)


def test_wrong_types_are_refused(unchecked):
    with pytest.raises(TypeError, match="floating dtype"):
        new_fit(data=(X * 100).byte())
    with pytest.raises(TypeError, match="dataset with a length"):
        new_fit(data=3)
    with pytest.raises(TypeError, match="dataset with a length"):
        new_fit(data=[])
    with pytest.raises(TypeError, match="expected a Denoiser"):
        train.fit(nn.Linear(2, 2), X, steps=1)
    with pytest.raises(TypeError, match="momentum"):
        new_fit(momentum=0.9)
    for name in ("loss", "weight", "times", "draw"):
        with pytest.raises(TypeError, match=f"{name}: expected a function such as .* found .min_snr"):
            new_fit(**{name: "min_snr"})
    with pytest.raises(ValueError, match="found 3 parts"):
        new_fit(data=(X.float(), LABELS, LABELS))


class Items:
    """A dataset of items made when they are asked for."""

    def __init__(self, item) -> None:
        self.item = item

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return self.item(i)


@pytest.mark.parametrize(
    "data, error, message",
    [
        (Items(lambda i: (X[i] * 50).byte()), TypeError, "expected a floating dtype, .*found torch.uint8"),
        (Items(lambda i: (X[i] * 50).long()), TypeError, "expected a floating dtype, .*found torch.int64"),
        (
            Items(lambda i: {"image": X[i], "label": 1}),
            TypeError,
            r"found dicts of \['image', 'label'\]. Wrap",
        ),
        (Items(lambda i: (X[i].float(), LABELS[i], 3)), TypeError, "found 3 parts"),
        (Items(lambda i: 0.5), ValueError, r"shape \(N, ...\) with N > 0, found \(2,\)"),
        (Items(lambda i: X[i] * math.nan), ValueError, "expected finite numbers, found 4"),
        (Items(lambda i: object()), TypeError, "found items that make no batch"),
        (Items(lambda i: "a picture"), TypeError, "found items that make no batch"),
        ([X.float(), LABELS], TypeError, r"found items that make no batch.*the tuple \(x, labels\)"),
        ({"x": X.float()}, TypeError, "dataset with a length above 0; found .*dict"),
        (
            (X.float(), {"text": {"tokens": LABELS}}),
            TypeError,
            "text: expected a tensor with one entry a sample, found dict",
        ),
        (
            Items(lambda i: (X[i].float(), {"text": {"tokens": 1}})),
            TypeError,
            "text: expected a tensor with one entry a sample, found dict",
        ),
        ((X.float(), {"label": None}), TypeError, "label: expected a tensor .*, found NoneType"),
        ((X.float(), 3), ValueError, f"label: expected {len(X)} entries, one for each sample, found one"),
    ],
    ids=[
        "uint8",
        "int64",
        "dicts",
        "three",
        "numbers",
        "nan",
        "objects",
        "text",
        "list",
        "dict",
        "nested",
        "nested items",
        "none",
        "one number",
    ],
)
def test_items_that_do_not_fit_are_refused_before_any_step(data, error, message, unchecked):
    with pytest.raises(error, match=message):
        new_fit(data=data)


def test_looking_at_random_items_does_not_draw_from_the_global_generator():
    state = torch.get_rng_state()
    new_fit(data=Items(lambda i: (torch.randn(2), 1)))
    assert torch.equal(state, torch.get_rng_state())


def test_labels_may_be_lists_and_datasets_may_have_none():
    ends = []
    for data in (
        (X.float(), LABELS),
        (X.float(), LABELS.tolist()),
        (X.float().numpy(), LABELS.numpy()),
        torch.utils.data.TensorDataset(X.float(), LABELS),
    ):
        *_, last = new_fit(data=data, steps=3)
        ends.append(last.loss)
    assert len(set(ends)) == 1
    *_, plain = new_fit(data=X.float(), steps=3)
    *_, wrapped = new_fit(data=torch.utils.data.TensorDataset(X.float()), steps=3)
    assert plain.loss == wrapped.loss


def test_a_model_that_cannot_be_sampled_is_named_before_it_is_trained():
    network = networks.MLP(2, hidden=8, layers=1)
    with pytest.warns(UserWarning, match="predicts='noise', which does not determine the data there"):
        train.fit(Denoiser(network, Rectified()), X.float(), steps=1)
    with pytest.warns(UserWarning, match="time_input='log_snr', which is infinite there"):
        train.fit(Denoiser(network, Rectified(), "flow", time_input="log_snr"), X.float(), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sde in (VPSDE(), EDM(), VESDE(), SubVPSDE()):
            train.fit(Denoiser(network, sde), X.float(), steps=1)
        run = train.fit(Denoiser(network, Rectified(), "flow"), X.float(), steps=1)
    assert repr(run) == "Run(0 of 1 steps; iterate over it to train)"


# ---- devices and precision


def test_on_the_device_in_the_dtype(device, dtype, tmp_path):
    run = new_fit(new_model(dtype=dtype).to(device), (X.to(dtype), LABELS), steps=8, path=tmp_path / "a")
    first = next(run)
    assert math.isfinite(first.loss)
    list(run)
    assert all(p.device.type == device.type and p.dtype == dtype for p in run.ema.parameters())
    assert new_fit(new_model(dtype=dtype).to(device), (X.to(dtype), LABELS), resume=tmp_path / "a").step == 8


def test_bfloat16_mixed_precision_trains_float32_weights(unchecked):
    pytest.importorskip("accelerate")
    full, mixed = new_fit(new_model(0.0)), new_fit(new_model(0.0), precision="bf16")
    losses_full, losses_mixed = ([p.loss for p in run] for run in (full, mixed))
    assert losses_full != losses_mixed and losses_mixed == pytest.approx(losses_full, rel=0.1)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    with pytest.raises(ValueError, match="expected 'bf16', which this process has begun with, found 'fp16'"):
        surroundings.accelerator(full.model, torch.device("cuda"), "fp16")


def test_float16_on_the_cpu_is_refused(unchecked):
    with pytest.raises(ValueError, match="expected 'bf16' or 'no' for a model on the CPU, found 'fp16'"):
        new_fit(precision="fp16")


def test_without_accelerate_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[train\]'"):
        new_fit(precision="bf16")
    next(new_fit())


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """Without dropout inside the network, to rounding; only the main process writes."""
    pytest.importorskip("accelerate")
    script = """
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        from test_train import new_fit, new_model
        folder = sys.argv[2]
        run = new_fit(new_model(0.0, torch.float64), path=folder + "/file", log=folder + "/log", every=1)
        losses = list(run)
        assert run.accelerator.num_processes == 2
        torch.distributed.destroy_process_group()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"]
    arguments = [str(tmp_path / "script.py"), str(ROOT / "tests"), str(tmp_path)]
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=200)
    alone = new_fit(new_model(0.0, torch.float64), every=1)
    list(alone)
    loaded = checkpoint.load(tmp_path / "file", weights="model")
    for p, q in zip(loaded.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)
    assert len((tmp_path / "log").read_text().splitlines()) == 40


@pytest.mark.cuda
def test_on_a_gpu_a_record_is_the_only_look_at_the_device():
    run = new_fit(new_model().to("cuda"), steps=10**6, every=20)
    next(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with run._training_mode():
            for _ in range(5):
                run._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- classifiers of one's own


class Own(nn.Module):
    """The least that `losses.Classifies` asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sde = nn.Linear(2, 3), VPSDE()

    def forward(self, x, t):
        return self.linear(x).log_softmax(1)


def test_a_classifier_of_ones_own_is_trained(unchecked):
    assert isinstance(Own(), losses.Classifies)
    records = list(train.fit_classifier(Own(), (X.float(), LABELS), steps=4, batch_size=8, every=2))
    assert len(records) == 2 and all(math.isfinite(r.loss) for r in records)


@pytest.mark.parametrize("data", [X.float(), (X.float(), {"y": LABELS}), Items(lambda i: X[i].float())])
def test_a_classifier_needs_labels(data, unchecked):
    with pytest.raises(ValueError, match=r"data: expected \(x, labels\) for a classifier, found x with"):
        train.fit_classifier(Own(), data, steps=4)
