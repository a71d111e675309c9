"""Checkpoints: what is saved comes back bit for bit, and no damaged, foreign or hostile file passes."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from work import Work

from benchmarks.damage import (
    HOSTILE,
    flipped_bits,
    foreign_files,
    full_disk,
    fuzzed_headers,
    kill_9,
    random_model,
    resigned,
    same_tensors,
    truncations,
    unnoticed,
)
from scoresde import checkpoint, guidance, networks
from scoresde.checkpoint import CheckpointError
from scoresde.checkpoint.files import serialize
from scoresde.denoiser import Denoiser, Karras
from scoresde.networks import UNet
from scoresde.schedules import Cosine, Learned, Linear, Sigmoid, Tabulated
from scoresde.sde import EDM, VESDE, VPSDE, Rectified, SubVPSDE

ROOT = Path(__file__).resolve().parents[1]

SDES = [
    VPSDE(0.1, 19.7),
    VPSDE(schedule=Cosine(s=0.009)),
    VPSDE(schedule=Sigmoid(-2.5, 3.5, 0.9)),
    VPSDE(schedule=Tabulated((0.0, 0.1, 1 / 3, 2.0))),
    VPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000)),
    SubVPSDE(0.2, 18.0),
    VESDE(0.011, 49.0),
    EDM(0.003, 79.0),
    Rectified(),
]


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, random_model(classes=4), ema=random_model(seed=1, classes=4))
    return path


# ---- what is saved comes back


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "flow", "score", Karras(0.37)], ids=repr)
def test_everything_comes_back(tmp_path, sde, predicts):
    model, ema = random_model(sde, 0, predicts), random_model(sde, 1, predicts)
    checkpoint.save(tmp_path / "a", model, ema=ema, metadata={"note": ["ä", 1.5]})
    for weights, original in ((None, ema), ("ema", ema), ("model", model)):
        loaded = checkpoint.load(tmp_path / "a", weights=weights)
        assert same_tensors(loaded, original) and not loaded.training
        assert type(loaded.sde) is type(sde) and loaded.network.config == model.network.config
        t = torch.tensor([0.013, 0.4, 0.9], dtype=torch.float64)
        assert torch.equal(loaded.sde.log_snr(t), sde.log_snr(t))
        x = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert torch.equal(loaded.noise(x, t), original.noise(x, t))
    assert checkpoint.describe(tmp_path / "a")["metadata"] == {"note": ["ä", 1.5]}


@pytest.mark.parametrize("time_input", ["t", "log_snr", "index"])
def test_time_input_images_and_conditions_come_back(tmp_path, time_input):
    network = UNet(
        2, base=8, multipliers=(1, 2), blocks=1, heads=2, classes=3, vector_dim=2, time_input=time_input
    )
    model = Denoiser(network, VPSDE(), "velocity", time_input=time_input)
    checkpoint.save(tmp_path / "a", model)
    loaded = checkpoint.load(tmp_path / "a")
    assert same_tensors(loaded, model) and loaded.time_input == time_input
    assert checkpoint.describe(tmp_path / "a")["ema"] is False


@pytest.mark.parametrize(
    "number", [np.float32, np.float64, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64)]
)
def test_numbers_of_numpy_and_torch_come_back(tmp_path, number, unchecked):
    for sde in (
        VPSDE(number(0.1), 20.0),
        EDM(number(0.1), np.int64(20)),
        VESDE(number(0.1), number(3)),
        VPSDE(schedule=Cosine(number(0.1))),
    ):
        checkpoint.save(tmp_path / "m", Denoiser(networks.MLP(2), sde, Karras(number(0.7))))
        loaded = checkpoint.load(tmp_path / "m")
        t = torch.linspace(0.15, 0.95, 5, dtype=torch.float64)
        torch.testing.assert_close(loaded.sde.log_snr(t), sde.log_snr(t), rtol=1e-7, atol=1e-7)
        assert dict(loaded.predicts.config)["sigma_data"] == float(number(0.7))


def test_without_an_average_the_model_is_loaded_and_an_average_cannot_be_asked_for(tmp_path):
    model = random_model()
    checkpoint.save(tmp_path / "a", model)
    assert same_tensors(checkpoint.load(tmp_path / "a"), model)
    with pytest.raises(CheckpointError, match="expected ema weights"):
        checkpoint.load(tmp_path / "a", weights="ema")


def test_a_learned_schedule_is_weights(tmp_path):
    schedule = Learned(12.0, -9.0, hidden=5)
    with torch.no_grad():
        schedule.weight.copy_(torch.tensor([0.3, -0.1, 1.0, 1 / 3, -2.0]))
    checkpoint.save(tmp_path / "a", random_model(VPSDE(schedule=schedule)), dtype=torch.float16)
    loaded = checkpoint.load(tmp_path / "a").sde.schedule
    assert same_tensors(loaded, schedule) and (loaded.log_snr_max, loaded.log_snr_min) == (12.0, -9.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_of_the_network_comes_back(tmp_path, dtype):
    model = random_model().to(dtype)
    checkpoint.save(tmp_path / "a", model)
    assert checkpoint.load(tmp_path / "a").dtype == dtype and same_tensors(
        checkpoint.load(tmp_path / "a"), model
    )


def mixed(seed: int = 0) -> Denoiser:
    """A bfloat16 network whose last layer is in float32, with digits that bfloat16 lacks."""
    model = random_model(seed=seed)
    last = {name: value.clone() for name, value in model.network.out.state_dict().items()}
    model.to(torch.bfloat16).network.out.float().load_state_dict(last)
    return model


def without_dtypes(description, tensors):
    del description["dtypes"]


def test_the_dtype_of_each_tensor_comes_back(tmp_path):
    model, average = mixed(), random_model(seed=1)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16, torch.float32}
    checkpoint.save(tmp_path / "a", model, ema=average)
    assert same_tensors(checkpoint.load(tmp_path / "a", weights="model"), model)
    assert same_tensors(checkpoint.load(tmp_path / "a"), average)
    checkpoint.save(tmp_path / "small", model, dtype=torch.float16)
    small = checkpoint.load(tmp_path / "small")
    for p, q in zip(model.parameters(), small.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p.half().to(p.dtype), q)
    for b, c in zip(model.buffers(), small.buffers(), strict=True):
        assert b.dtype == c.dtype and torch.equal(b, c)


def test_files_without_dtypes_of_tensors_load_in_the_one_dtype(tmp_path):
    checkpoint.save(tmp_path / "a", mixed(), ema=mixed(), training=checkpoint.Training({}, {}))
    resigned(tmp_path / "a", without_dtypes)
    assert same_tensors(checkpoint.load(tmp_path / "a"), mixed().to(torch.bfloat16))
    model, average = mixed(seed=1), mixed(seed=1)
    checkpoint.restore(tmp_path / "a", model, average)
    assert same_tensors(model, mixed()) and same_tensors(average, mixed())


def test_a_run_is_not_resumed_in_other_dtypes(tmp_path):
    checkpoint.save(tmp_path / "a", mixed(), ema=mixed(), training=checkpoint.Training({}, {}))
    model = mixed(seed=1).to(torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"expected dtypes .*, as in the model given; found .*out\.weight"
    ):
        checkpoint.restore(tmp_path / "a", model, model)


@pytest.mark.parametrize("name", ["int64", "load", "no_dtype", 3])
def test_wrong_dtypes_of_tensors_are_refused(tmp_path, name):
    def change(description, tensors):
        description["dtypes"] = {"model.out.weight": name}

    checkpoint.save(tmp_path / "a", random_model())
    resigned(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match="does not rebuild a model"):
        checkpoint.load(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_small_file_rounds_parameters_once_and_nothing_else(tmp_path, dtype):
    model = random_model()
    checkpoint.save(tmp_path / "full", model)
    checkpoint.save(tmp_path / "small", model, dtype=dtype)
    loaded = checkpoint.load(tmp_path / "small")
    assert loaded.dtype == torch.float32
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p.to(dtype).float(), q), name
    for (name, b), c in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(b, c), name
    assert os.path.getsize(tmp_path / "small") < 0.8 * os.path.getsize(tmp_path / "full")
    with pytest.raises(CheckpointError, match="exact weights"):
        checkpoint.save(tmp_path / "x", model, dtype=dtype, training=checkpoint.Training({}, {}))


class Mine(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.tied = self.linear.weight
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x, time):
        return self.linear(x)


def test_a_network_of_the_users_own_is_given_at_loading(tmp_path):
    model = Denoiser(Mine(), VPSDE())
    checkpoint.save(tmp_path / "a", model)
    given = Mine()
    loaded = checkpoint.load(tmp_path / "a", network=given)
    assert loaded.network is given and same_tensors(loaded, model)
    with pytest.raises(CheckpointError, match=r"found 'Mine'; pass load\(\.\.\., network="):
        checkpoint.load(tmp_path / "a")
    wide = Mine(4)
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of shape \(4, 4\), found \(3, 3\)"):
        checkpoint.load(tmp_path / "a", network=wide)
    assert all(torch.equal(before[k], v) for k, v in wide.state_dict().items())
    with pytest.raises(CheckpointError, match=r"missing bias, weight, not expected count, linear.bias"):
        checkpoint.load(tmp_path / "a", network=nn.Linear(3, 3))


def test_only_tied_and_strided_weights_are_copied_to_be_saved():
    plain, table = torch.rand(64, 64), torch.rand(8, 4)
    tensors = {"plain": plain, "tied": plain[2:4], "strided": table.T}
    with Work() as work:
        content = serialize(tensors, {})
    assert sorted(size for size in work.made if size) == [table.nbytes, plain[2:4].nbytes]
    loaded = safetensors.torch.load(content)
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())


def test_a_class_that_only_has_the_name_of_ours_is_not_ours(tmp_path):
    class MLP(Mine):
        pass

    checkpoint.save(tmp_path / "a", Denoiser(MLP(), VPSDE()))
    with pytest.raises(CheckpointError, match="pass load"):
        checkpoint.load(tmp_path / "a")


def test_a_compiled_network_is_saved_as_itself(tmp_path):
    model = random_model()
    checkpoint.save(tmp_path / "a", Denoiser(torch.compile(model.network), model.sde))  # pyright: ignore
    assert same_tensors(checkpoint.load(tmp_path / "a"), model)


def test_what_has_no_description_is_refused(tmp_path):
    class OwnSDE(VPSDE):
        pass

    class OwnLinear(Linear):
        pass

    own = Denoiser(Mine(), VPSDE()).predicts.__class__("own", lambda a, s: (a, s))
    for model in (
        random_model(OwnSDE()),
        random_model(VPSDE(schedule=OwnLinear())),
        Denoiser(Mine(), VPSDE(), own),
    ):
        with pytest.raises(CheckpointError, match=r"expected (one of the|a prediction)"):
            checkpoint.save(tmp_path / "a", model)
    with pytest.raises(CheckpointError, match="JSON"):
        checkpoint.save(tmp_path / "a", random_model(), metadata={"x": {1, 2}})
    assert not list(tmp_path.iterdir())


def test_loading_leaves_the_global_state_alone_and_goes_to_the_device(saved, device):
    state = torch.get_rng_state()
    loaded = checkpoint.load(saved, device=device)
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(p.device.type == device.type for p in loaded.parameters())
    with torch.inference_mode():
        assert same_tensors(checkpoint.load(saved), checkpoint.load(saved))


# ---- damage


@pytest.mark.parametrize("trials", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(saved, trials):
    assert not unnoticed(saved, flipped_bits(saved.read_bytes(), trials))
    checkpoint.load(saved)


def test_every_truncation_and_extension_is_found(saved):
    content = saved.read_bytes()
    assert not unnoticed(saved, truncations(content, 160))
    for more in (b"\0", b"x" * 100):
        saved.write_bytes(content + more)
        with pytest.raises(CheckpointError, match="SHA-256"):
            checkpoint.load(saved)


def test_a_file_that_passes_is_counted(saved):
    assert unnoticed(saved, [b"", saved.read_bytes(), saved.read_bytes()[:-1]]) == [1]


def test_what_is_no_checkpoint_is_refused_without_side_effects(tmp_path):
    files = foreign_files(tmp_path)
    before = sorted(tmp_path.iterdir())
    for file in files:
        with pytest.raises(CheckpointError, match=f"{file.name}: expected"):
            checkpoint.load(file)
    assert sorted(tmp_path.iterdir()) == before and not (tmp_path / "executed").exists()


def test_fuzzed_headers_end_in_an_error_of_ours_or_in_a_good_model(saved):
    outcomes = set()
    for content in fuzzed_headers(saved.read_bytes(), 300):
        saved.write_bytes(content)
        try:
            checkpoint.load(saved)
            outcomes.add("loaded")
        except CheckpointError as error:
            outcomes.add("signature" if "SHA-256" in str(error) else "content")
    assert {"signature", "content"} <= outcomes


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_with_a_right_signature_are_refused(saved, name):
    change, message = HOSTILE[name]
    resigned(saved, change)
    state = torch.get_rng_state()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved)
    assert time.perf_counter() - start < 5 and torch.equal(state, torch.get_rng_state())


def test_the_resigned_file_itself_is_a_good_one(saved):
    before = checkpoint.load(saved)
    resigned(saved, lambda description, tensors: None)
    assert same_tensors(checkpoint.load(saved), before)


def test_nan_is_not_saved_and_does_not_replace_the_good_file(saved):
    content = saved.read_bytes()
    bad = random_model()
    with torch.no_grad():
        bad.network.out.bias[1] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinity in model\.out\.bias"):
        checkpoint.save(saved, bad)
    with torch.no_grad():
        bad.network.out.bias[1] = 1e30
    with pytest.raises(CheckpointError, match="another dtype"):
        checkpoint.save(saved, bad, dtype=torch.float16)
    assert saved.read_bytes() == content and os.listdir(saved.parent) == [saved.name]


# ---- crashes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
@pytest.mark.parametrize("trials", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_while_saving_leaves_the_newest_file_or_the_one_before(tmp_path, trials):
    path = tmp_path / "model.safetensors"
    good, files = kill_9(path, trials)
    assert good == trials and files <= 2  # never more than one temporary file
    checkpoint.save(path, random_model())
    assert os.listdir(tmp_path) == [path.name]


def test_stale_temporary_files_are_removed_and_files_of_others_are_not(tmp_path):
    path = tmp_path / "m[1].safetensors"
    stale = tmp_path / ".m[1].safetensors.0123abcd.tmp"
    others = [
        tmp_path / n
        for n in (".m1.safetensors.0123abcd.tmp", ".m[1].safetensors.notes.tmp", "m[1].safetensors.tmp")
    ]
    for file in [stale, *others]:
        file.write_text("x")
    checkpoint.save(path, random_model())
    assert not stale.exists() and all(file.exists() for file in others)


@pytest.mark.skipif(os.name != "posix", reason="advisory locks are POSIX")
def test_a_temporary_file_that_is_being_written_is_left_alone(tmp_path):
    import fcntl

    path = tmp_path / "model.safetensors"
    with open(tmp_path / ".model.safetensors.0123abcd.tmp", "wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        checkpoint.save(path, random_model())
        assert os.path.exists(writer.name)
    checkpoint.save(path, random_model())
    assert not os.path.exists(writer.name)


@pytest.mark.skipif(os.name != "posix", reason="advisory locks are POSIX")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EIO], ids=errno.errorcode.get)
def test_file_systems_without_locks_take_files_too(tmp_path, monkeypatch, number):
    import fcntl

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    stale = tmp_path / ".a.0123abcd.tmp"
    stale.touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    if number == errno.EIO:
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpoint.save(tmp_path / "a", random_model())
    else:
        checkpoint.save(tmp_path / "a", random_model())
        assert same_tensors(checkpoint.load(tmp_path / "a"), random_model())
    assert stale.exists()  # somebody may be writing it


@pytest.mark.skipif(os.name != "posix", reason="resource limits are POSIX")
def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, random_model())
    content = path.read_bytes()
    lines = full_disk(path, (0, 7, 500, 1000, 4096, 10_000, 100_000, 500_000))
    assert len(lines) == 8
    assert all(
        "File too large" in line and "unchanged" in line and "Free some space" in line for line in lines
    )
    assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(tmp_path / "file" / "model", random_model())
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(tmp_path / "folder", random_model())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_file_is_synced_before_it_takes_its_place_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)),
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    checkpoint.save(tmp_path / "model", random_model())
    assert len(calls) == 3 and calls[0].endswith(".tmp") and calls[1:] == ["replace", tmp_path.name]


def test_a_link_stays_a_link_and_folders_are_made(tmp_path):
    real, link = tmp_path / "new" / "deep" / "real", tmp_path / "link"
    checkpoint.save(real, random_model())
    link.symlink_to(real)
    checkpoint.save(link, random_model(seed=5))
    assert link.is_symlink() and same_tensors(checkpoint.load(real), random_model(seed=5))


# ---- resuming: all or nothing


def test_restore_wants_the_same_model_and_a_training_state(saved, tmp_path):
    def model(**options):
        return random_model(seed=9, classes=4, **options)

    with pytest.raises(CheckpointError, match="weights only"):
        checkpoint.restore(saved, model(), model())
    path = tmp_path / "run"
    tensors = {"a.b": torch.arange(3), "c": torch.tensor(1.5, dtype=torch.float64)}
    checkpoint.save(
        path,
        random_model(classes=4),
        ema=random_model(seed=1, classes=4),
        training=checkpoint.Training(tensors, {"step": 3}),
    )
    a, b = model(), model()
    got = checkpoint.restore(path, a, b)
    assert got.values == {"step": 3} and got.tensors.keys() == tensors.keys()
    assert all(torch.equal(got.tensors[k], tensors[k]) for k in tensors)
    assert same_tensors(a, random_model(classes=4)) and same_tensors(b, random_model(seed=1, classes=4))
    for other, message in (
        (model(sde=VPSDE(0.1, 19.0)), "expected sde"),
        (model(predicts="velocity"), "expected predicts"),
        (model().double(), "expected dtype"),
        (random_model(classes=5), "expected network"),
    ):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            checkpoint.restore(path, other, other)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_the_network_names_are_those_of_the_package():
    assert {"MLP", "UNet"} <= set(networks.__all__)


def test_only_a_denoiser_is_saved(tmp_path, unchecked):
    model = Denoiser(networks.MLP(2), VPSDE())
    guided = guidance.classifier_free(model, 2.0, null={"label": -1})
    with pytest.raises(CheckpointError, match="expected a Denoiser to save, found NoneType"):
        checkpoint.save(tmp_path / "a", None)
    for wrong in (guided, model.network):
        with pytest.raises(
            CheckpointError, match=f"expected a Denoiser to save, found {type(wrong).__name__}"
        ):
            checkpoint.save(tmp_path / "a", wrong)
        with pytest.raises(
            CheckpointError, match=f"expected a Denoiser to save, found {type(wrong).__name__}"
        ):
            checkpoint.save(tmp_path / "a", model, ema=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_are_stored_in_a_floating_dtype(tmp_path, dtype):
    """Those of a small network would all be 0 as integers, without a word."""
    model = Denoiser(networks.MLP(2, 8, 1), VPSDE())
    with pytest.raises(CheckpointError, match="expected a floating dtype to store weights in, found torch"):
        checkpoint.save(tmp_path / "a", model, dtype=dtype)
    assert not list(tmp_path.iterdir())
