"""The command line: solvers by name, the commands end to end in small, and errors of one line."""

from __future__ import annotations

import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from scoresde import VPSDE, checkpoint, cli, digits, grids, solvers
from scoresde.networks import MLP
from scoresde.select import Comparison, pool
from scoresde.select.runs import How, Runner
from scoresde.tableau import Tableau
from scoresde.train.run import Run

CHECKPOINT = Path(__file__).parents[1] / "benchmarks" / "digits.safetensors"


def failing(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line that the command complains with."""
    assert cli.main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("scoresde: ")
    return lines[0]


@pytest.mark.parametrize(
    ("text", "solver"),
    [
        ("dpmpp", solvers.dpmpp()),
        (" dpmpp ( order = 3 ) ", solvers.dpmpp(order=3)),
        ("ddpm(variance='large')", solvers.ddpm(variance="large")),
        ("ddim(eta=0.5)", solvers.ddim(eta=0.5)),
        ("deis(order=2, variable='lam')", solvers.deis(order=2, variable="lam")),
        ("dpmpp(order=2, singlestep=True)", solvers.dpmpp(order=2, singlestep=True)),
        ("heun()", solvers.heun()),
        ("dpmpp(3)", solvers.dpmpp(3)),
    ],
)
def test_solvers_by_name(text: str, solver):
    parsed, grid = cli.parse_solver(text)
    assert repr(parsed) == repr(solver) and grid is None
    times = torch.linspace(1, 0.01, 5, dtype=torch.float64)
    assert parsed.tableau(VPSDE(), times).mix.equal(solver.tableau(VPSDE(), times).mix)


def test_solvers_are_named_as_they_print(unchecked: None):
    """All of them but those that were made with a function."""
    printed = [name for name in solvers.examples() if "<" not in name]
    assert len(printed) > 60
    for name in printed:
        assert repr(cli.parse_solver(name)[0]) == name


MALICIOUS = [
    "",
    "__import__('os').system('touch hacked')",
    "dpmpp(order=__import__('os').system('touch hacked'))",
    "dpmpp(order=open('hacked', 'w'))",
    "dpmpp(order=[open('hacked', 'w') for _ in (1,)])",
    "dpmpp(order=(lambda: 2)())",
    "dpmpp(order=order)",
    "predictor_corrector(predictor=open('hacked', 'w'))",
    "predictor_corrector(predictor=ddpm(variance=open('hacked', 'w')))",
    "predictor_corrector(predictor=1)",
    "dpmpp(**{'order': 2})",
    "dpmpp(*[2])",
    "dpmpp(*[3])",
    "dpmpp().solve",
    "dpmpp()()",
    "solvers.dpmpp()",
    "dpmpp if 1 else 2",
    "dpmpp; open('hacked', 'w')",
    "dpmpp\nopen('hacked', 'w')",
    "dpmpp(order=2",
    "dpmpp(order=2, order=3)",
    "(" * 5000,
    "dpmpp(order=" + "9" * 5000 + ")",
    "Card",
    "examples",
    "card()",
    "base",
    "__builtins__",
    "from_tableau(table=1)",
    "dpmpp(order=9)",
    "dpmpp(order='two')",
    "dpmpp(ordre=2)",
    "dpmpp\0",
]


@pytest.mark.parametrize("text", MALICIOUS)
def test_nothing_but_solvers(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        cli.parse_solver(text)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"ordre.*expected dpmpp\(order: 'int' = 2"):
        cli.parse_solver("dpmpp(ordre=2)")


def test_a_table_brings_its_grid(tmp_path: Path):
    table = solvers.dpmpp(2).tableau(VPSDE(), grids.quadratic(VPSDE(), 5))
    path = tmp_path / "table.json"
    path.write_text(table.to_json())
    solver, grid = cli.parse_solver(str(path))
    assert solver.tableau(VPSDE(), grid).mix.equal(table.mix)
    times = table.times.clone()
    times[0] = 0.9
    path.write_text(replace(table, times=times, start=1.0).to_json())
    solver, grid = cli.parse_solver(str(path))
    assert grid.tolist() == table.ends.tolist() and solver.tableau(VPSDE(), grid).times.equal(times)
    path.write_text('{"format": "else"}')
    with pytest.raises(ValueError, match="Tableau"):
        cli.parse_solver(str(path))


def test_solvers_lists_all(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["solvers"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}  " in printed for name in solvers.examples())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps from each solver."""
    monkeypatch.setattr(
        digits, "SAMPLERS", tuple(replace(s, steps=min(s.steps, 20)) for s in digits.SAMPLERS)
    )


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str], short: None, unchecked: None):
    assert (
        cli.main(["quickstart", "--seconds", "2", "--n", "24", "--out", str(tmp_path / "new" / "out")]) == 0
    )
    out = tmp_path / "new" / "out"
    names = ["checkpoint.safetensors", "report.json", "report.md", "samples.png", "trajectory.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(out.joinpath(name).stat().st_size < 150_000 for name in names[1:])
    report = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["real digits", "Gaussian", "DDPM", "Euler-Maruyama", "DDIM", "DPM-Solver++(2M)"]
    for row in rows.values():
        numbers = [
            row[key] for key in ("calls", "seconds", "accuracy", "energy_distance", "nearest", "copies")
        ]
        assert all(math.isfinite(number) for number in numbers)
    assert [row["calls"] for row in rows.values()] == [0, 0, 20, 20, 20, 20]
    assert report["training"]["steps"] >= 1 and report["training"]["seconds"] >= 2
    captured = capsys.readouterr()
    table = [line for line in captured.out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1
    assert all(line in (out / "report.md").read_text() for line in table)
    assert "training" in captured.err and "2/2 s" in captured.err
    assert checkpoint.describe(out / "checkpoint.safetensors")["metadata"]["shape"] == [1, 8, 8]


@pytest.mark.parametrize("n", [2, 3])
def test_quickstart_of_the_fewest_samples(n: int, tmp_path: Path, short: None, unchecked: None):
    assert cli.main(["quickstart", "--steps", "1", "--n", str(n), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "trajectory.png").stat().st_size > 1000


def test_interrupt_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unchecked: None
):
    """Ctrl-C in the third step: it is finished and saved; going on as the message says gives the same run."""
    step = Run._train_step

    def interrupted(run: Run) -> None:
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        step(run)

    out = tmp_path / "digits.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_step", interrupted)
        assert cli.main(["train", "--steps", "5", "--device", "cpu", "--out", str(out)]) == 130
    assert (
        f"Saved after step 3 to {out}. Go on with: scoresde train --out {out} --resume"
        in capsys.readouterr().err
    )
    assert checkpoint.describe(out)["training"]["step"] == 3
    assert cli.main(["train", "--steps", "5", "--device", "cpu", "--out", str(out), "--resume"]) == 0
    assert checkpoint.describe(out)["training"]["step"] == 5

    whole = tmp_path / "whole.safetensors"
    assert cli.main(["train", "--steps", "5", "--device", "cpu", "--out", str(whole)]) == 0
    pairs = zip(checkpoint.load(out).parameters(), checkpoint.load(whole).parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_interrupt_while_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unchecked: None
):
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "compare", stop)
    assert cli.main(["quickstart", "--steps", "1", "--out", str(tmp_path)]) == 130
    assert f"The model is in {tmp_path / 'checkpoint.safetensors'}." in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_sample_pictures_and_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None):
    array, again, picture = tmp_path / "a" / "x.npy", tmp_path / "y.npy", tmp_path / "x.png"
    options = ["--solver", "ddpm(variance='large')", "--steps", "6", "--grid", "uniform", "--end", "0"]
    assert cli.main(["sample", str(CHECKPOINT), "--n", "4", "--out", str(array), *options]) == 0
    assert "4 samples by ddpm" in capsys.readouterr().out
    assert cli.main(["sample", str(CHECKPOINT), "--n", "2", "--out", str(again), *options]) == 0
    x, y = np.load(array), np.load(again)
    assert x.shape == (4, 1, 8, 8) and np.isfinite(x).all()
    np.testing.assert_allclose(x[:2], y, atol=1e-4)
    assert (
        cli.main(
            ["sample", str(CHECKPOINT), "--n", "20", "--label", "3", "--steps", "3", "--out", str(picture)]
        )
        == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_label_is_the_class_that_is_drawn(tmp_path: Path, unchecked: None):
    judge = digits.Judge(digits.load().judge)
    for label in (0, 4):
        out = tmp_path / f"{label}.npy"
        assert (
            cli.main(["sample", str(CHECKPOINT), "--n", "10", "--label", str(label), "--out", str(out)]) == 0
        )
        assert judge.accuracy(torch.as_tensor(np.load(out)), torch.full((10,), label)) >= 0.7


def test_a_network_for_vectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from scoresde import Denoiser

    path, out = tmp_path / "mlp.safetensors", tmp_path / "x.npy"
    checkpoint.save(path, Denoiser(MLP(3, 8, 1), VPSDE()))
    assert "as in --shape" in failing(capsys, "sample", str(path), "--out", str(out))
    assert cli.main(["sample", str(path), "--n", "5", "--shape", "3", "--out", str(out)]) == 0
    assert np.load(out).shape == (5, 3)
    picture = str(tmp_path / "x.png")
    with monkeypatch.context() as patched:
        patched.setattr(Denoiser, "forward", None)  # it is said before the model is called
        patched.setattr(Denoiser, "rows", None)
        said = failing(capsys, "sample", str(path), "--shape", "3", "--out", picture)
        flow = failing(capsys, "sample", str(path), "--shape", "2", "8", "8", "--out", picture)
    assert "expected images (n, c, h, w) of 1 or 3 channels for a picture, found (64, 3): give" in said
    assert "found (64, 2, 8, 8): give --out samples.npy" in flow
    assert "without classes" in failing(
        capsys, "sample", str(path), "--shape", "3", "--label", "1", "--out", str(out)
    )


COMPARE = ["compare", str(CHECKPOINT), "--calls", "3,4", "--n", "8", "--solvers", "ddim", "dpmpp(2)"]
GRIDS = ["--grids", "quadratic", "karras(rho=5)"]


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None):
    """Every file says the same; the same command again makes nothing anew."""
    out = tmp_path / "new" / "out"
    assert cli.main([*COMPARE, *GRIDS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    names = ["comparison.csv", "comparison.json", "comparison.md", "comparison.png", "runs"]
    assert sorted(path.name for path in out.iterdir()) == names
    found = Comparison.from_json((out / "comparison.json").read_text())
    assert {row.name for row in found.rows} == {
        f"{solver} on {grid}" for solver in ("ddim", "dpmpp(2)") for grid in ("quadratic", "karras(rho=5)")
    }
    assert [found.about.n, found.budgets(), found.about.shape] == [8, [3, 4], (1, 8, 8)]
    assert str(found) in printed and str(found) in (out / "comparison.md").read_text()
    assert len((out / "comparison.csv").read_text().splitlines()) == 1 + 8
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*COMPARE, *GRIDS, "--out", str(out)]) == 0
    again = Comparison.from_json((out / "comparison.json").read_text())
    assert again.rows == found.rows and again.about.calls == 0


def test_compare_with_data_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None):
    table = solvers.dpmpp(2).tableau(VPSDE(), grids.quadratic(VPSDE(), 6))
    (tmp_path / "mine.json").write_text(table.to_json())
    np.save(tmp_path / "data.npy", digits.load().held_out.x.numpy())
    listed = ["--solvers", "ddpm", str(tmp_path / "mine.json"), "--grids", "quadratic"]
    options = ["--data", str(tmp_path / "data.npy"), "--out", str(tmp_path), "--n", "20", "--calls", "6"]
    assert cli.main(["compare", str(CHECKPOINT), *listed, *options]) == 0
    found = Comparison.from_json((tmp_path / "comparison.json").read_text())
    assert {row.name for row in found.rows} == {"ddpm on quadratic", str(tmp_path / "mine.json")}
    assert found.about.floor is not None and "energy distance" in capsys.readouterr().out


def test_interrupted_compare_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unchecked: None
):
    measured = Runner.measured

    def interrupted(run: Runner, how: How, kept: int | None):
        if len(list((tmp_path / "runs").glob("*.json"))) == 3:
            raise KeyboardInterrupt
        return measured(run, how, kept)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "measured", interrupted)
        assert cli.main([*COMPARE, *GRIDS, "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert "interrupted. The same command goes on." in captured.err and "Left out" in captured.out
    assert len(Comparison.from_json((tmp_path / "comparison.json").read_text()).rows) == 3
    assert cli.main([*COMPARE, *GRIDS, "--out", str(tmp_path)]) == 0
    assert len(Comparison.from_json((tmp_path / "comparison.json").read_text()).rows) == 8


def test_recommend_and_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unchecked: None
):
    """For data of one's own, and for a checkpoint; the table of the best one can be sampled with."""
    few = [candidate for candidate in pool() if candidate.grid_name == "quadratic"][:4]
    monkeypatch.setattr(sys.modules["scoresde.select.recommend"], "pool", lambda stochastic=False: few)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(200, 2)).astype("float32"))
    data, table = ["--data", str(tmp_path / "data.npy")], tmp_path / "new" / "table.json"
    assert cli.main(["recommend", *data, "--calls", "5,8"]) == 0
    printed = capsys.readouterr().out
    assert "5 calls for samples: " in printed and "8 calls for samples: " in printed
    assert cli.main(["recommend", str(CHECKPOINT), "--calls", "4", "--out", str(table)]) == 0
    printed = capsys.readouterr().out
    assert f"scoresde sample {CHECKPOINT} --solver {table}" in printed
    best = printed.split(": ")[1].split(",")[0].partition("(")[0]
    made = Tableau.from_json(table.read_text())
    assert made.name.startswith(best) and len(made) == 4
    out = ["--out", str(tmp_path / "x.npy"), "--n", "3"]
    assert cli.main(["sample", str(CHECKPOINT), "--solver", str(table), *out]) == 0
    assert "4 network calls" in capsys.readouterr().out
    assert np.load(tmp_path / "x.npy").shape == (3, 1, 8, 8)


def test_tune_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None):
    table = tmp_path / "new" / "table.json"
    options = ["--solver", "dpmpp(2)", "--calls", "3", "--n", "4", "--seconds", "0.1"]
    assert cli.main(["tune", str(CHECKPOINT), *options, "--out", str(table)]) == 0
    printed = capsys.readouterr().out
    made = Tableau.from_json(table.read_text())
    assert len(made) == 3 and "A table of 3 network calls" in printed and "dpmpp(2)" in printed
    out = tmp_path / "x.npy"
    assert cli.main(["sample", str(CHECKPOINT), "--solver", str(table), "--n", "2", "--out", str(out)]) == 0
    assert np.isfinite(np.load(out)).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sample", "missing.safetensors"], "missing.safetensors"),
        (["sample", __file__], "expected"),
        (["sample", str(CHECKPOINT), "--solver", "dpm++"], "expected a solver"),
        (["sample", str(CHECKPOINT), "--solver", "missing.json"], "missing.json"),
        (["sample", str(CHECKPOINT), "--label", "10"], "from 0 to 9"),
        (["sample", str(CHECKPOINT), "--out", "samples.txt"], ".png or .npy"),
        (["sample", str(CHECKPOINT), "--n", "0"], "at least 1 sample"),
        (["sample", str(CHECKPOINT), "--steps", "0"], "steps"),
        (["compare", str(CHECKPOINT), "--n", "-5"], "at least 1 sample, found -5"),
        (["tune", str(CHECKPOINT), "--n", "-5"], "at least 1 sample, found -5"),
        (["compare", str(CHECKPOINT), "--seconds", "nan"], "expected seconds >= 0, found nan"),
        (["recommend", str(CHECKPOINT), "--out", f"{__file__}/a.json"], "expected a file in a folder, found"),
        (["sample", str(CHECKPOINT), "--out", f"{__file__}/a.png"], "expected a file in a folder, found"),
        (["tune", str(CHECKPOINT), "--out", f"{__file__}/a.json"], "expected a file in a folder, found"),
        (["sample", str(CHECKPOINT), "--device", "abacus"], "abacus"),
        (["sample", str(CHECKPOINT), "--device", "meta"], "expected a device of this machine"),
        (["quickstart", "--n", "1"], "at least 2 samples"),
        (["quickstart", "--resume", "--out", "nowhere"], "leave out --resume"),
        (["train", "--steps", "0"], "steps"),
        (["train", "--steps", "1", "--out", str(Path(__file__).parent)], "expected a file to write, found"),
        (["sample", str(CHECKPOINT), "--grid", "carré"], "expected a grid"),
        (["sample", str(CHECKPOINT), "--grid", "karras(rho='a')"], "; expected karras("),
        (["sample", str(CHECKPOINT), "--grid", "ddpm"], "expected a VP-SDE made by VPSDE.from_betas"),
        (["compare", "missing.safetensors"], "missing.safetensors"),
        (["compare", str(CHECKPOINT), "--calls", "5;10"], 'as in "5,10,20"'),
        (["compare", str(CHECKPOINT), "--calls", "0"], "numbers of network calls"),
        (["compare", str(CHECKPOINT), "--solvers", "ddpm"], "deterministic solvers"),
        (["compare", str(CHECKPOINT), "--solvers", "dpm++"], "expected a solver"),
        (["compare", str(CHECKPOINT), "--grids", "open('hacked', 'w')"], "expected a grid"),
        (["compare", str(CHECKPOINT), "--data", "data.csv"], "an .npy file"),
        (["recommend"], "expected data to recommend for"),
        (["recommend", str(CHECKPOINT), "--calls", "5,8", "--out", "table.json"], "one number of calls"),
        (
            ["recommend", str(CHECKPOINT), "--need", "likelihood", "--out", "a.json"],
            "a need that has solvers",
        ),
        (["recommend", str(CHECKPOINT), "--out", "table.txt"], "expected a .json file"),
        (["tune", str(CHECKPOINT), "--out", "table.txt"], "expected a .json file"),
        (["tune", str(CHECKPOINT), "--solver", "adaptive_ode"], "a solver that is a table"),
        (["tune", str(CHECKPOINT), "--solver", "ddpm"], "deterministic"),
    ],
)
def test_one_clear_line(
    args: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A table that takes a minute would be lost."""
    for work in ("choosing.tuned", "choosing.ranked", "sampling.draw"):
        monkeypatch.setattr(f"scoresde.cli.{work}", None)
    for command, name in (("sample", "a.npy"), ("tune", "a.json"), ("recommend", "b.json")):
        (tmp_path / name).mkdir()
        said = failing(capsys, command, str(CHECKPOINT), "--out", str(tmp_path / name))
        assert "expected a file to write, found the folder" in said


def test_an_empty_file_is_no_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "empty.npy"
    path.touch()
    assert "expected an array of numbers in" in failing(capsys, "recommend", "--data", str(path))


def test_without_scikit_learn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "scoresde[examples]" in failing(capsys, "train")


def test_wrong_words_end_with_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main(["sample"])
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_threads_are_tried_out_for_what_calculates_and_put_back(monkeypatch, capsys):
    tried = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("scoresde.cli.common._convolution_seconds", lambda n: tried.append(n) or 1 / n)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert cli.main(["solvers"]) == 0 and not tried
    before = torch.get_num_threads()
    assert cli.main(["sample", "no.such.file"]) == 2 and tried
    assert torch.get_num_threads() == before
