"""`python -m benchmarks`: parts that succeed, fail, hang or are not there, and the report of them; and the
benchmarks of speed, of which the short versions run here on next to nothing."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scoresde import VPSDE, grids, solvers

main = pytest.importorskip(
    "benchmarks.__main__", reason="run from the root of the repository, with `python -m pytest`"
)

from benchmarks import accuracy, guidance, overhead, sampling_speed, training_speed, tuning  # noqa: E402
from benchmarks.__main__ import OUT, Part  # noqa: E402
from benchmarks.overhead import Case  # noqa: E402

GOOD = """
import json, sys, pathlib
out = pathlib.Path(sys.argv[1])
print("noise\\n\\n# Title\\n\\n| a |\\n|---|\\n| 1 |")
(out / "shown.png").write_bytes(b"png")
row = {"method": "DPM-Solver++ 2M", "steps": 3, "shape": [4, 1], "milliseconds": {"sample": 2.0, "loop": 1.0}}
(out / "sampling_speed.json").write_text(json.dumps({"rows": [row]}))
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    room = tmp_path / "modules"
    for name, source in {
        "sampling_speed": GOOD,
        "written": "import sys, pathlib; pathlib.Path(sys.argv[1], 'written.md').write_text('| file |')",
        "bad": "print('on the way'); raise SystemExit(3)",
        "slow": "import time; print('begun', flush=True); time.sleep(60)",
    }.items():
        (room / "parts").mkdir(parents=True, exist_ok=True)
        (room / "parts" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(room)
    monkeypatch.setenv("PYTHONPATH", f"{room}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    names = ("sampling_speed", "written", "bad", "slow")
    made = [Part(f"parts.{name}", f"{name}?", (OUT,)) for name in names]
    return [*made, Part("parts.absent", "?", ()), Part("parts.bad", "?", (), ("no_such_package",))]


def test_one_report_of_everything(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "PARTS", parts)
    out = tmp_path / "out"
    assert main.main(["--out", str(out), "--limit", "3"]) == 1
    report, printed = (out / "report.md").read_text(), capsys.readouterr().out
    assert "[4/6] slow: slow?" in printed and "not done after 3 s" in printed
    assert "| [bad](#bad) | bad? | 0 | failed: exit status 3 |" in report and "on the way" in report
    assert "failed: not done after 3 s" in report and "begun" in report
    assert "skipped: there is no parts.absent" in report
    assert "skipped: needs no_such_package" in report and "## absent" not in report
    # What was printed before the title is left out; headings go below those of the report.
    assert "\n### Title\n\n| a |\n|---|\n| 1 |\n" in report and "noise" not in report
    assert "![shown](sampling_speed/shown.png)" in report and "![overview](overview.png)" in report
    assert (out / "overview.png").read_bytes()[:4] == b"\x89PNG"
    assert "\n| file |\n" in report
    assert main.main(["--out", str(out), "--only", "written"]) == 0


def test_every_benchmark_that_is_there_is_known():
    folder = Path(main.__file__).parent
    helpers = {"__init__", "__main__", "peers", "problems", "coupled", "digits_checkpoint"}
    helpers |= {"hostile", "bad_inputs", "options"}
    alone = {"damage", "mutation", "sweep", "sde_default"}  # of the tests, of a release, of a default: long
    there = {path.stem for path in folder.glob("*.py")} - helpers - alone
    assert there <= {part.title for part in main.PARTS}


def ended(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a benchmark whose command line goes no further."""
    monkeypatch.setattr("sys.argv", [name, *words.split()])
    with pytest.raises(SystemExit) as found:
        importlib.import_module(f"benchmarks.{name}").main()
    return found.value.code


@pytest.mark.parametrize("name", ["accuracy", "digits", "recommend", "sde_default", "tuning", "tuning_grid"])
def test_help_is_the_whole_docstring_and_runs_nothing(name, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    assert ended(name, "--help", monkeypatch) == 0
    assert importlib.import_module(f"benchmarks.{name}").__doc__.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("accuracy", "--calls 0", "expected a whole number of at least 1, found '0'"),
        ("tuning", "--calls 5 -3", "found '-3'"),
        ("recommend", "--more-samples 0", "found '0'"),  # what no sample tells would be chance
        ("recommend", "--mixtures none", "found 'none'"),
        ("guidance", "--each 1", "expected at least 2, found '1'"),  # a spread takes two
        ("mutation", "--count 0", "found '0'"),
    ],
)
def test_wrong_numbers_are_refused(name, words, says, monkeypatch, capsys):
    assert ended(name, words, monkeypatch) == 2
    assert says in capsys.readouterr().err


def test_tuning_says_which_calls_there_are(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tuning", "--problems", "ring", "--calls", "6", "7"])
    monkeypatch.setattr(tuning, "board", lambda name: pytest.fail("a problem was begun"))
    with pytest.raises(ValueError, match=r"calls in accuracy_ring.json \(\[5, 6, .*\), found 7"):
        tuning.main()


def test_a_report_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected results accuracy_NAME\.json in .*, found none"):
        accuracy.report(tmp_path, "accuracy", accuracy.DEFAULT, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", sampling_speed.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_implementations_of_a_sampler_agree(method, dtype, unchecked):
    torch.manual_seed(0)
    one = sampling_speed.case(method, (2, 1, 8, 8), 4, "eager", dtype, torch.device("cpu"))
    with torch.no_grad():
        drawn = {name: run() for name, run in one.runs.items()}
    assert drawn.pop("sample").x.shape == (2, 1, 8, 8)
    size = drawn["loop"].abs().max()
    for name in {"execute", "diffusers"} & set(drawn):  # the others take the network's output for data
        assert (drawn[name] - drawn["loop"]).abs().max() <= (1e-3 if dtype == torch.float32 else 0.03) * size


def test_what_cannot_run_is_in_the_table(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(sampling_speed, "case", refuse)
    setting = {"method": "DDIM", "shape": (2, 1, 8, 8), "steps": 2, "mode": "eager", "dtype": torch.float32}
    cpu = torch.device("cpu")
    row = sampling_speed.measured({**setting, "turns": 1}, cpu, sampling_speed.Clock(cpu))
    assert row["skipped"] == "no compiler"
    other = {**row, "milliseconds": {"sample": 4.0, "loop": 2.0}}
    del other["skipped"]
    table = sampling_speed.report([row, other], "cpu")
    assert "| skipped: no compiler |" in table
    assert "| DDIM | 2x1x8x8 | 2 | eager | float32 | 4.0 | 2.0 | 500 | 0.50 |" in table


def test_milliseconds_are_of_whole_runs(monkeypatch):
    made = Case("DDIM", "eager", "2x1x8x8", {"sample": lambda: None}, steps=4)
    monkeypatch.setattr(sampling_speed, "case", lambda **given: made)
    setting = {"method": "DDIM", "shape": (2, 1, 8, 8), "steps": 4, "mode": "eager", "dtype": torch.float32}
    clock = lambda function, repeats=1: 0.25  # noqa: E731  seconds a call
    row = sampling_speed.measured({**setting, "turns": 3}, torch.device("cpu"), clock)
    assert row["milliseconds"] == {"sample": pytest.approx(250.0)}


def test_the_spread_is_the_median_distance_to_another_one():
    x = torch.tensor([0.0, 1.0, 3.0, 7.0, 7.5]).view(5, 1, 1, 1)  # 1, 1, 2, 0.5, 0.5
    assert guidance.spread(x) == 1.0


@pytest.mark.parametrize("name", training_speed.LOOPS)
def test_every_loop_trains(name, monkeypatch, unchecked):
    if not training_speed.usable(name):
        pytest.skip("needs accelerate")
    made, build = [], training_speed.unet
    monkeypatch.setattr(training_speed, "unet", lambda *args: made.append(build(*args)) or made[-1])
    with training_speed.one_precision():
        steps = training_speed.LOOPS[name]((2, 1, 8, 8), "no", torch.device("cpu"), 2)
        before = [p.detach().clone() for p in made[0].parameters()]
        steps(2)
    assert any(not p.equal(q) for p, q in zip(made[0].parameters(), before, strict=True))


def test_the_table_of_training():
    row = {
        "shape": [4, 1, 8, 8],
        "precision": "no",
        "milliseconds": {"fit": 2.0, "by hand": 1.0},
        "mebibytes": {"fit": 10.2},
    }
    table = training_speed.report([row], "cpu")
    assert "| 4x1x8x8 | no | 2.0 | 1.0 |  | 2000 | 0.50 |  | 10 |  |  |" in table


def test_diffusers_keeps_its_tables_on_the_host(monkeypatch):
    given = []

    def scheduler(name, *tables, **config):
        given.extend(tables)
        return SimpleNamespace()

    monkeypatch.setattr(overhead.peers, "diffusers_scheduler", scheduler)
    sde, x = VPSDE(), torch.empty(1, 2, device="meta")
    table = solvers.ddim().tableau(sde, grids.log_snr(sde, 3))
    alpha, sigma = sde.alpha(table.times), sde.sigma(table.times)
    overhead.in_diffusers("DDIMScheduler", table, alpha, sigma, torch.nn.Identity(), x, x)
    assert [(one.device.type, len(one)) for one in given] == [("cpu", 4), ("cpu", 4)]
