"""Guidance on digits: judge accuracy, distance to real digits and spread against the scale, for guidance by a
classifier and without one.

    python -m benchmarks.guidance                  (about five minutes on two idle CPU cores)

The model is benchmarks/digits.safetensors, class-conditional with a null class. Guided by a classifier it
runs without its classes, under a noise-conditional classifier that is trained here on the digits that the
model has seen; the judge is another one, on other digits (see `scoresde.digits`). Forty samples of each
class, 20 steps of DPM-Solver++(2M), against as many held-out digits of that class:

accuracy   share of samples that the judge takes for the class asked for
distance   median distance of a sample to the nearest held-out digit of its class, over that of the
           class-conditional model at scale 1; mean over the classes
spread     median distance of a sample to the nearest other one of its class, over that of as many held-out
           digits; mean over the classes

Goals: by a classifier accuracy >= 0.95, without >= 0.97, at a scale with distance <= 1.3 and spread >= 0.8.
Writes results/guidance.md, .json and .png, and results/guidance_inverse.png, the only thing that
`python -m benchmarks.guidance --inverse` makes: digits of which the upper half is known, and paths between
the latents of two digits of one class.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import (
    checkpoint,
    decode,
    digits,
    encode,
    grids,
    guidance,
    losses,
    networks,
    plots,
    sample,
    solvers,
    train,
)
from scoresde.denoiser import BaseDenoiser
from scoresde.metrics import nearest_distance

from .options import count, several

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SOLVER, STEPS = solvers.dpmpp(2), 20
GOALS = {"classifier": 0.95, "classifier-free": 0.97}
DISTANCE, SPREAD = 1.3, 0.8


class Row(NamedTuple):
    """One line of the table."""

    method: str
    scale: float
    accuracy: float
    distance: float
    spread: float
    seconds: float

    @property
    def good(self) -> bool:
        goal = GOALS.get(self.method, 2.0)
        return self.accuracy >= goal and self.distance <= DISTANCE and self.spread >= SPREAD


def trained_classifier(data: digits.Labelled, sde: object, steps: int, seed: int = 0) -> guidance.Classifier:
    """A classifier of noisy digits, at the noise levels at which the model was trained."""
    torch.manual_seed(seed)
    network = networks.NoisyClassifier(
        1, digits.CLASSES, base=24, blocks=1, dropout=0.25, time_input="log_snr"
    )
    run = train.fit_classifier(
        guidance.Classifier(network, sde, "log_snr"),
        (data.x, data.label),
        steps=steps,
        times=lambda sde, u: losses.log_normal(sde, u, mean=-0.4, std=1.4),
        lr=2e-3,
        weight_decay=0.05,
        ema_decay=0.998,
        cosine=True,
        every=max(1, steps // 10),
        seed=seed,
    )
    for progress in run:
        print(progress, flush=True)
    return run.ema


def accuracy_at(classifier: guidance.Classifier, data: digits.Labelled) -> dict[float, float]:
    """Share of noisy held-out digits that the classifier recognises, by sigma/alpha."""
    found = {}
    for ratio in (0.05, 0.5, 1.0, 2.0, 4.0):
        t = classifier.sde.time(torch.tensor(1 / ratio**2, dtype=torch.float64).log())
        mean, std = classifier.sde.marginal(data.x, t)
        noise = torch.randn(data.x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            guess = classifier(mean + std * noise, t).argmax(1)
        found[ratio] = float((guess == data.label).double().mean())
    return found


class Measure:
    """Samples of the classes `digits.labels(n)` against held-out digits."""

    def __init__(self, data: digits.Digits, each: int) -> None:
        self.judge = digits.Judge(data.judge)
        held = data.held_out
        self.real = [held.x[held.label == c][:each] for c in range(digits.CLASSES)]
        self.real_spread = [spread(x) for x in self.real]
        self.unit: list[float] | None = None

    def __call__(self, x: Tensor, label: Tensor) -> tuple[float, float, float]:
        x = x.float().clamp(-1, 1)
        parts = [x[label == c] for c in range(digits.CLASSES)]
        far = [float(nearest_distance(a, b).median()) for a, b in zip(parts, self.real, strict=True)]
        self.unit = far if self.unit is None else self.unit
        distance = sum(a / b for a, b in zip(far, self.unit, strict=True)) / len(far)
        wide = sum(spread(a) / b for a, b in zip(parts, self.real_spread, strict=True)) / len(far)
        return self.judge.accuracy(x, label), distance, wide


def spread(x: Tensor) -> float:
    """Median distance to the nearest other one."""
    apart = torch.cdist(x.flatten(1).double(), x.flatten(1).double()) + torch.eye(len(x)) * 1e9
    return float(apart.amin(1).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=count, default=1200, help="training steps of the classifier")
    parser.add_argument("--each", type=several, default=40, help="samples of each class")
    parser.add_argument("--inverse", action="store_true", help="only the pictures of inverse problems")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    model = checkpoint.load(HERE / "digits.safetensors").float().eval()
    picture({**inverse(model, data), **between(model, data)}, options.out / "guidance_inverse.png")
    if options.inverse:
        return
    label = digits.labels(options.each * digits.CLASSES)
    started = time.perf_counter()
    classifier = trained_classifier(data.train, model.sde, options.steps)
    noisy = accuracy_at(classifier, data.held_out)
    print(f"classifier: {time.perf_counter() - started:.0f} s, accuracy by sigma/alpha {noisy}", flush=True)

    measure, rows, pictures = Measure(data, options.each), [], {}
    null = model.given(label=torch.full_like(label, -1))
    free = {"label": label}

    def measured(method: str, scale: float, guided: BaseDenoiser) -> None:
        drawn = sample(
            guided, (len(label), *digits.SHAPE), SOLVER, steps=STEPS, grid=grids.quadratic, end=0, seed=7
        )
        rows.append(Row(method, scale, *measure(drawn.x, label), drawn.seconds))
        pictures[f"{method} {scale:g}"] = drawn.x[:20]
        print(rows[-1], flush=True)

    measured("conditional", 1.0, model.given(**free))
    measured("unconditional", 0.0, null)
    for scale in (1.0, 2.0, 3.0, 5.0, 8.0):
        measured("classifier", scale, guidance.classifier(null, classifier.log_prob(label), scale))
    for scale in (1.25, 1.5, 2.0, 3.0):
        measured(
            "classifier-free", scale, guidance.classifier_free(model, scale, null={"label": -1}).given(**free)
        )

    shown = {name: x for name, x in pictures.items() if name in pictures_worth_it(rows)}
    write(rows, noisy, options)
    picture({"real": data.held_out.x[:20], **shown}, options.out / "guidance.png")


def picture(rows: dict[str, Tensor], path: Path) -> None:
    plots.image_rows(rows, columns=20, title="guidance on digits").savefig(path, dpi=110)


def pictures_worth_it(rows: list[Row]) -> list[str]:
    """The plain models, and of each method the best scale."""
    names = ["conditional 1", "unconditional 0"]
    for method in GOALS:
        mine = [row for row in rows if row.method == method]
        best = max(mine, key=lambda row: (row.good, row.accuracy))
        names.append(f"{method} {best.scale:g}")
    return names


def inverse(model: BaseDenoiser, data: digits.Digits) -> dict[str, Tensor]:
    """Held-out digits with their lower half unknown, completed without classes."""
    x = data.held_out.x[:20]
    mask = torch.zeros(1, *digits.SHAPE)
    mask[..., :4, :] = 1
    plain = model.given(label=torch.full((len(x),), -1))
    found = {"upper half known": torch.where(mask.bool(), x, torch.zeros(()))}
    for name, guided in {
        "inpaint": guidance.inpaint(plain, mask, x),
        "linear_inverse": guidance.linear_inverse(plain, lambda x: x * mask, x * mask, 1e-2),
    }.items():
        found[name] = sample(
            guided, x.shape, solvers.ddpm(), steps=100, grid=grids.quadratic, end=0, seed=3
        ).x
    return found


def between(model: BaseDenoiser, data: digits.Digits) -> dict[str, Tensor]:
    """From one digit to another of its class: the latents, by great circles, and back."""
    held, count = data.held_out, 10
    found = {}
    for c in (3, 8):
        cond = {"label": torch.full((2,), c)}
        ends = held.x[held.label == c][:2].float()
        latent = encode(model, ends, solvers.dpmpp(2), steps=60, end=1e-3, condition=cond).x.flatten(1)
        a, b = latent
        angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
        w = torch.linspace(0, 1, count)[:, None]
        path = (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
        cond = {"label": torch.full((count,), c)}
        x = decode(
            model, path.view(-1, *digits.SHAPE), solvers.dpmpp(2), steps=60, end=1e-3, condition=cond
        ).x
        found[f"from {c} to {c}"] = x
    return found


def write(rows: list[Row], noisy: dict[float, float], options: argparse.Namespace) -> None:
    lines = [
        "| method | scale | judge accuracy | distance | spread | seconds | goals |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "" if row.method not in GOALS else "met" if row.good else "-"
        numbers = f"{row.accuracy:.3f} | {row.distance:.2f} | {row.spread:.2f} | {row.seconds:.1f}"
        lines.append(f"| {row.method} | {row.scale:g} | {numbers} | {verdict} |")
    for method, goal in GOALS.items():
        good = [f"{row.scale:g}" for row in rows if row.method == method and row.good]
        lines += [
            "",
            f"{method}: accuracy >= {goal}, distance <= {DISTANCE}, spread >= {SPREAD} "
            + (f"met at scale {', '.join(good)}" if good else "MISSED"),
        ]
    levels = ", ".join(f"{ratio:g}: {accuracy:.3f}" for ratio, accuracy in noisy.items())
    lines += [
        "",
        f"The guide recognises noisy held-out digits, by sigma/alpha: {levels}.",
        "",
        "```",
        __doc__.strip(),
        "```",
    ]
    (options.out / "guidance.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    record = {"rows": [row._asdict() for row in rows], "guide": noisy, "options": settings}
    (options.out / "guidance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
