"""The short version of every benchmark, and one report of them that a person can read.

    python -m benchmarks [--out outputs/benchmarks] [--only accuracy overhead ...] [--limit 900]

Each runs in a process of its own, one after the other, about ten minutes in all. Writes report.md and the
pictures that it shows to the folder, and what each benchmark writes to a folder inside. One that fails, or
takes longer than the limit, has what it last said in the report, and the rest goes on; one that is not there,
or cannot run here, is skipped and says why. The long versions, whose results are committed in
benchmarks/results, are `python -m benchmarks.NAME`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OUT = "{out}"  # in arguments: the benchmark's own folder


class Part(NamedTuple):
    """A benchmark: its module, the question that it answers, the arguments of its short version, and packages
    that it cannot do without."""

    name: str
    question: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.name.rpartition(".")[2]


def _part(name: str, question: str, arguments: str, *needs: str) -> Part:
    return Part(f"benchmarks.{name}", question, tuple(arguments.split()), needs)


PARTS = [
    _part(
        "accuracy",
        "How far from the exact probability-flow solution is each ODE solver, ours and public ones?",
        "--quick --problems ring --calls 5 10 20 --out {out}",
        "matplotlib",
    ),
    _part(
        "accuracy_sde",
        "How far from the exact law is the output of each stochastic solver, ours and public ones?",
        "--quick --problems gaussian --calls 10 20 --out {out}",
        "matplotlib",
    ),
    _part("adaptive", "How many calls does an adaptive solver take to an error of 1e-4?", "--quick"),
    _part("overhead", "What does a step cost beside the network?", "--quick --out {out}"),
    _part(
        "sampling_speed", "How long does a batch of samples take, network included?", "--quick --out {out}"
    ),
    _part("training_speed", "What does a step of training cost?", "--quick --out {out}"),
    _part("likelihood", "How many calls does a log-likelihood take?", "--quick --problems gaussian ring"),
    _part(
        "guidance",
        "Does guidance draw the digits that were asked for, and at what price?",
        "--steps 300 --each 10 --out {out}",
        "matplotlib",
        "sklearn",
    ),
    _part("reliability", "What happens with bad inputs, interruptions and damaged files?", "--quick"),
    _part(
        "digits",
        "Which solver is best on a trained model, at how many calls?",
        "--quick --out {out} --runs {out}/runs",
        "matplotlib",
        "sklearn",
    ),
    _part(
        "recommend",
        "Are solvers ranked rightly without a call of the network?",
        "--mixtures 2 --calls 10 --out {out}",
        "matplotlib",
    ),
    _part(
        "recommend_digits",
        "Is what is recommended for the digits good on their network?",
        "--n 16 --calls 10 --stride 20 --out {out}",
        "sklearn",
    ),
    _part(
        "tuning",
        "How much does tuning a table gain on noises it has not seen?",
        "--quick --problems ring --calls 6 10 --out {out}",
    ),
    _part(
        "tuning_grid",
        "How much does tuning the grid alone gain over the best fixed one?",
        "--problems ring --calls 6 10 --seconds 5 --out {out}",
    ),
]


class Outcome(NamedTuple):
    """What became of a part: "ok", "skipped: ...", "failed: ..."; what it printed; its folder."""

    part: Part
    verdict: str
    seconds: float
    printed: str
    folder: Path


def obstacle(part: Part) -> str | None:
    """Why a part cannot run here, or None."""
    if importlib.util.find_spec(part.name) is None:
        return f"there is no {part.name}"
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}" if missing else None


def run(part: Part, out: Path, limit: float) -> Outcome:
    """Run a part to its end, or for `limit` seconds."""
    folder = out / part.title
    reason = obstacle(part)
    if reason is not None:
        return Outcome(part, f"skipped: {reason}", 0.0, "", folder)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", part.name, *(a.replace(OUT, str(folder)) for a in part.arguments)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    started, verdict = time.perf_counter(), "ok"
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=limit, check=False
            ).returncode
            verdict = verdict if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            verdict = f"failed: not done after {limit:g} s"
    seconds = time.perf_counter() - started
    return Outcome(part, verdict, seconds, log.read_text(encoding="utf-8", errors="replace"), folder)


# ---- the report


def text(outcome: Outcome) -> str:
    """What a section says: the Markdown that the part wrote, or else printed; of a failure the last lines."""
    if outcome.verdict.startswith("failed"):
        last = "\n".join(outcome.printed.splitlines()[-25:])
        return f"```\n{last or '(nothing was printed)'}\n```"
    written = outcome.folder / f"{outcome.part.title}.md"
    found = written.read_text(encoding="utf-8") if written.exists() else tables(outcome.printed)
    # Sections of the report are headed ##.
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in found.strip().splitlines())


def tables(printed: str) -> str:
    """The last tables of a print, from the line that is as wide as a table's rule or a title on."""
    lines = printed.splitlines()
    titles = [i for i, line in enumerate(lines) if line.startswith("# ")]
    rules = [i - 1 for i, line in enumerate(lines) if line.startswith("|---") and i]
    begin = titles[-1] if titles else rules[0] if rules else 0
    return "\n".join(lines[begin:])


def report(outcomes: Sequence[Outcome], out: Path) -> str:
    """The report, in Markdown; pictures are those in the folders."""
    import torch

    import scoresde

    seconds = sum(outcome.seconds for outcome in outcomes)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    lines = [
        "# Benchmarks of scoresde: the short versions",
        "",
        f"scoresde {scoresde.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs ({threads} thread each), "
        f"{time.strftime('%Y-%m-%d %H:%M')}, {seconds / 60:.0f} minutes.",
        "",
        "| benchmark | question | seconds | |",
        "|---|---|---|---|",
    ]
    for part, verdict, took, *_ in outcomes:
        name = f"[{part.title}](#{part.title})" if not verdict.startswith("skipped") else part.title
        lines.append(f"| {name} | {part.question} | {took:.0f} | {verdict} |")
    lines += ["", *_shown(overview(outcomes, out), out)]
    for outcome in outcomes:
        if outcome.verdict.startswith("skipped"):
            continue
        words = " ".join(outcome.part.arguments).replace(OUT, "FOLDER")
        lines += ["", f"## {outcome.part.title}", "", f"{outcome.part.question}  "]
        lines += [f"`python -m {outcome.part.name} {words}`, {outcome.seconds:.0f} s: {outcome.verdict}", ""]
        lines += [text(outcome), ""]
        for picture in sorted(outcome.folder.rglob("*.png")):
            lines += _shown(picture, out)
    return "\n".join(lines).rstrip() + "\n"


def _shown(picture: Path | None, out: Path) -> list[str]:
    return [] if picture is None else [f"![{picture.stem}]({picture.relative_to(out).as_posix()})", ""]


Bars = dict[str, float]


def _overhead(record: dict[str, Any]) -> tuple[str, Bars]:
    names = ("loop", "execute", "diffusers", "k-diffusion", "azula")
    rows = [row for row in record["microseconds_per_step"] if row["method"] == "DPM-Solver++ 2M"]
    row = rows[0]
    title = f"{row['method']}: a step beside the network, µs\n(state {row['state']})"
    return title, {_ours(name, "execute"): row[name] for name in names if row.get(name)}


def _sampling(record: dict[str, Any]) -> tuple[str, Bars]:
    row = next(r for r in record["rows"] if r["method"] == "DPM-Solver++ 2M" and "milliseconds" in r)
    title = f"{row['method']}, {row['steps']} steps, network included, ms\n(batch {row['shape'][0]})"
    return title, {_ours(name, "sample"): value for name, value in row["milliseconds"].items()}


def _training(record: dict[str, Any]) -> tuple[str, Bars]:
    row = record["rows"][0]
    title = f"a step of training, ms\n(batch {row['shape'][0]})"
    return title, {_ours(name, "fit"): value for name, value in row["milliseconds"].items()}


def _ours(name: str, own: str) -> str:
    return "scoresde" if name == own else "loop by hand" if name in ("loop", "by hand") else name


PANELS: dict[str, Callable[[dict[str, Any]], tuple[str, Bars]]] = {
    "overhead": _overhead,
    "sampling_speed": _sampling,
    "training_speed": _training,
}


def overview(outcomes: Sequence[Outcome], out: Path) -> Path | None:
    """A picture of the speeds, ours beside others; None where there is nothing to draw, or no matplotlib."""
    panels = []
    for outcome in outcomes:
        file = outcome.folder / f"{outcome.part.title}.json"
        if outcome.verdict == "ok" and outcome.part.title in PANELS and file.exists():
            panels.append(PANELS[outcome.part.title](json.loads(file.read_text(encoding="utf-8"))))
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 2.8), squeeze=False)
    for axis, (title, bars) in zip(axes[0], panels, strict=True):
        names = list(reversed(bars))
        colors = ["#1f77b4" if name == "scoresde" else "#bbbbbb" for name in names]
        drawn = axis.barh(names, [bars[name] for name in names], color=colors)
        axis.bar_label(drawn, fmt=" %.3g", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(out / "overview.png", dpi=110)
    plt.close(figure)
    return out / "overview.png"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.title for part in PARTS]
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of report.md")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=str(names))
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for each benchmark")
    options = parser.parse_args(arguments)
    chosen = [part for part in PARTS if part.title in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    try:
        for number, part in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {part.title}: {part.question}", flush=True)
            outcomes.append(run(part, options.out, options.limit))
            print(f"    {outcomes[-1].seconds:.0f} s, {outcomes[-1].verdict}", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted: the report has what was done", flush=True)
    path = options.out / "report.md"
    path.write_text(report(outcomes, options.out), encoding="utf-8")
    print(f"written to {path}")
    return int(any(outcome.verdict.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
