"""The main job on real data: scikit-learn's 1797 handwritten digits (8x8 pixels), a model, its samples.

The digits are in three parts: the model sees `train`, samples are compared with `held_out`, and the judge, a
classifier, is made from `judge`: what measures the samples has seen nothing that the model has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import grids, losses, networks, solvers
from .denoiser import Denoiser, Karras
from .laws import Gaussian
from .metrics import energy_distance, nearest_distance
from .sampling import sample
from .sde import VPSDE
from .solvers import Solver
from .tableau import Step
from .train import Run, fit

SHAPE = (1, 8, 8)
CLASSES = 10
SIZES = {"train": 1000, "held_out": 397, "judge": 400}
SIGMA_DATA = 0.75  # standard deviation of a pixel on the scale [-1, 1]


class Labelled(NamedTuple):
    """Images (N, 1, 8, 8) with pixels in [-1, 1], and their classes (N,)."""

    x: Tensor
    label: Tensor


class Digits(NamedTuple):
    """The three parts."""

    train: Labelled
    held_out: Labelled
    judge: Labelled


def load() -> Digits:
    """The digits inside scikit-learn, always in the same three parts, each with its share of every class."""
    sklearn = _sklearn()
    x, label = sklearn.datasets.load_digits(return_X_y=True)
    parts, rest = [], torch.arange(len(label))
    for size in list(SIZES.values())[:-1]:
        chosen, rest = sklearn.model_selection.train_test_split(
            rest, train_size=size, stratify=label[rest], random_state=0
        )
        parts.append(chosen)
    images = torch.as_tensor(x, dtype=torch.float32).view(-1, *SHAPE) / 8 - 1
    labels = torch.as_tensor(label, dtype=torch.int64)
    return Digits(*(Labelled(images[part], labels[part]) for part in (*parts, rest)))


def denoiser(seed: int = 0) -> Denoiser:
    """An untrained class-conditional U-Net under the linear VP-SDE, preconditioned as in Karras et al. (2022,
    arXiv:2206.00364).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed a GPU's generator for good
        network = networks.UNet(
            1, base=24, multipliers=(1, 2, 2), blocks=1, dropout=0.25, classes=CLASSES, time_input="log_snr"
        )
    return Denoiser(network, VPSDE(), predicts=Karras(SIGMA_DATA), time_input="log_snr")


def training(model: Denoiser, data: Labelled, *, steps: int, **options: Any) -> Run:
    """`train.fit` with noise levels around those where digits take shape, and all outputs weighted alike."""
    return fit(
        model,
        (data.x, data.label),
        weight=partial(losses.edm, sigma_data=SIGMA_DATA),
        times=partial(losses.log_normal, mean=-0.8, std=1.2),
        **{"steps": steps, "lr": 3e-3, "ema_decay": 0.998, "label_dropout": 0.1, **options},
    )


def labels(n: int, device: torch.device | str = "cpu") -> Int[Tensor, " n"]:
    """The classes 0, 1, ..., 9, 0, ... of n samples."""
    return torch.arange(n, device=device) % CLASSES


class Judge:
    """A classifier made from labelled images: logistic regression on radial basis functions around them."""

    def __init__(self, data: Labelled) -> None:
        sklearn = _sklearn()
        features = sklearn.kernel_approximation.Nystroem(gamma=0.03, n_components=len(data.x), random_state=0)
        regression = sklearn.linear_model.LogisticRegression(C=100.0, max_iter=2000)
        self._classifier = sklearn.pipeline.make_pipeline(features, regression)
        self._classifier.fit(_pixels(data.x), data.label.numpy())

    def log_probs(self, x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 10"]:
        """Log-probabilities of the classes, not below log(1e-4), where they say no more; float64."""
        return torch.as_tensor(self._classifier.predict_proba(_pixels(x))).clamp_min(1e-4).log()

    def accuracy(self, x: Float[Tensor, "n 1 8 8"], label: Int[Tensor, " n"]) -> float:
        """The share of images that are recognised as what they should be."""
        return float((self.log_probs(x).argmax(1) == label.cpu()).double().mean())


@dataclass(frozen=True)
class Quality:
    """How samples compare with `held_out`.

    accuracy         of the judge on the classes that were asked for
    energy_distance  between the judge's log-probabilities of samples and of held-out digits; 0 if they agree
    nearest          median distance to the nearest training digit, over that of held-out digits; well below 1
                     if the training digits are memorised
    copies           share of samples that are nearer to a training digit than 99 % of the held-out digits are
    """

    accuracy: float
    energy_distance: float
    nearest: float
    copies: float


class Examiner:
    """Measures samples; made once from the three parts."""

    def __init__(self, data: Digits) -> None:
        self.data, self.judge = data, Judge(data.judge)
        self.reference = self.judge.log_probs(data.held_out.x)
        self.distances = nearest_distance(data.held_out.x, data.train.x)

    def __call__(self, x: Float[Tensor, "n 1 8 8"], label: Int[Tensor, " n"]) -> Quality:
        """The quality of samples x of the classes `label`, with pixels clipped to [-1, 1]."""
        x = x.detach().float().cpu().clamp(-1, 1)
        nearest = nearest_distance(x, self.data.train.x)
        return Quality(
            self.judge.accuracy(x, label),
            energy_distance(self.judge.log_probs(x), self.reference),
            float(nearest.median() / self.distances.median()),
            float((nearest < self.distances.quantile(0.01)).double().mean()),
        )

    def floor(self, splits: int = 20) -> Quality:
        """What real digits reach: `held_out` itself.

        Its energy distance is the mean over random halves, with the same classes in both, against each other.
        """
        x, label = self.data.held_out
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(len(x), generator=generator) for _ in range(splits)]
        sorted_orders = [order[label[order].argsort(stable=True)] for order in orders]
        halves = [(self.reference[order[::2]], self.reference[order[1::2]]) for order in sorted_orders]
        energy = sum(energy_distance(a, b) for a, b in halves) / splits
        return replace(self(x, label), energy_distance=energy)


def gaussian(data: Labelled, n: int, seed: int = 0) -> Float[Tensor, "n 1 8 8"]:
    """Draws of the Gaussian with the images' mean and full covariance. It knows no shapes, and no classes."""
    x = data.x.flatten(1).double()
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(x.mean(0), x.mT.cov()).sample(n, generator=generator).float().view(n, *SHAPE)


# ---- solvers side by side


@dataclass(frozen=True)
class Sampler:
    """A solver on a grid, from t = 1 to `end`."""

    name: str
    solver: Solver
    steps: int
    grid: Callable[..., grids.Grid]
    end: float


# Euler-Maruyama stops before t = 0, since its last step adds noise: at 1e-3 a standard deviation of 0.01.
SAMPLERS = (
    Sampler("DDPM", solvers.ddpm(), 1000, grids.uniform, 0.0),
    Sampler("Euler-Maruyama", solvers.euler_maruyama(), 250, grids.uniform, 1e-3),
    Sampler("DDIM", solvers.ddim(), 20, grids.quadratic, 0.0),
    Sampler("DPM-Solver++(2M)", solvers.dpmpp(2), 20, grids.quadratic, 0.0),
)

# What good samples are; the energy distance is in units of the Gaussian's. Asked of TARGETED.
TARGETS = {"accuracy": 0.93, "energy_distance": 0.1, "nearest": 0.8, "copies": 0.03}
TARGETED = ("DDPM", "DPM-Solver++(2M)")
REAL, GAUSSIAN = "real digits", "Gaussian"


@dataclass(frozen=True)
class Row:
    """A line of the table, with its images."""

    name: str
    calls: int
    seconds: float
    quality: Quality
    x: Tensor

    def as_dict(self) -> dict[str, Any]:
        """All but the images."""
        return {"name": self.name, "calls": self.calls, "seconds": self.seconds, **asdict(self.quality)}


def compare(
    model: Denoiser, data: Digits, n: int, seed: int = 0, *, progress: bool = False
) -> tuple[list[Row], list[Step]]:
    """n samples from each of SAMPLERS, from the same seed, beside real digits and a Gaussian.

    And how the first one got there: eleven steps and the end, for three of its samples (or all n).
    """
    examiner, label, shown = Examiner(data), labels(n), _shown(n)
    real = data.held_out.x[_one_of_each(data.held_out.label, label)]
    normal = gaussian(data.train, n, seed)
    rows = [Row(REAL, 0, 0.0, examiner.floor(), real), Row(GAUSSIAN, 0, 0.0, examiner(normal, label), normal)]
    frames: list[Step] = []
    for sampler in SAMPLERS:
        drawn = sample(
            model,
            (n, *SHAPE),
            sampler.solver,
            steps=sampler.steps,
            grid=sampler.grid,
            end=sampler.end,
            seed=seed,
            condition={"label": label.to(model.device)},
            callback=None if frames else partial(_frame, sampler.steps, shown),
            progress=progress,
        )
        frames = frames or [
            *drawn.path,
            Step(sampler.steps, drawn.end, drawn.x[shown].cpu(), drawn.x[shown].cpu()),
        ]
        rows.append(
            Row(sampler.name, drawn.network_calls, drawn.seconds, examiner(drawn.x, label), drawn.x.cpu())
        )
    return rows, frames


def _shown(n: int) -> slice:
    """Three of n samples: those from the fourth on if there are as many, else the last, or all."""
    start = max(0, min(3, n - 3))
    return slice(start, start + 3)


def _frame(steps: int, shown: slice, step: Step) -> Step | None:
    """The step, for the samples shown, if it is one of eleven spread over the way."""
    if step.k not in torch.linspace(0, steps - 1, 11).round().tolist():
        return None
    return Step(step.k, step.t, step.x[shown].cpu(), step.denoised[shown].cpu())


def _one_of_each(found: Tensor, wanted: Tensor) -> Tensor:
    """Indices of images of the classes `wanted`, each image at most once until a class has no more."""
    pools = [(found == c).nonzero().flatten() for c in range(CLASSES)]
    return torch.stack([pools[int(c)][i // CLASSES % len(pools[int(c)])] for i, c in enumerate(wanted)])


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        ("solver", "network calls", "seconds", "judge accuracy", "energy distance", "nearest ratio", "copies")
    ]
    for row in rows:
        q, calls = row.quality, str(row.calls) if row.calls else "-"
        seconds = f"{row.seconds:.1f}" if row.calls else "-"
        lines.append(
            (
                row.name,
                calls,
                seconds,
                f"{q.accuracy:.3f}",
                f"{q.energy_distance:.3f}",
                f"{q.nearest:.2f}",
                f"{q.copies:.1%}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    ruled = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in ruled
    )


LEGEND = """- Judge accuracy: share of samples taken for the class asked for, by a classifier that saw none of
  these digits.
- Energy distance: between the judge's log-probabilities of the samples and of held-out digits. Unbiased for
  independent samples; here a little below 0 for equal laws, since both sides have the same classes.
  Real digits: one half of the held-out digits against the other.
- Nearest ratio: median distance to the nearest training digit, over that of held-out digits; well below 1 if
  the training digits are memorised.
- Copies: share of samples that are nearer to a training digit than 99 % of the held-out digits are.
- Gaussian: with the mean and full covariance of the training digits; it has no classes."""


def verdict(rows: Sequence[Row]) -> str:
    """A line for each of TARGETED: are its samples good."""
    unit = next(row.quality.energy_distance for row in rows if row.name == GAUSSIAN)
    return "\n".join(_judgement(row, unit) for row in rows if row.name in TARGETED)


def _judgement(row: Row, unit: float) -> str:
    q, energy = row.quality, row.quality.energy_distance / unit
    checks = {
        f"accuracy {q.accuracy:.3f} >= {TARGETS['accuracy']}": q.accuracy >= TARGETS["accuracy"],
        f"energy distance {energy:.3f} <= {TARGETS['energy_distance']} of the Gaussian's": q.energy_distance
        <= TARGETS["energy_distance"] * unit,
        f"nearest ratio {q.nearest:.2f} >= {TARGETS['nearest']}": q.nearest >= TARGETS["nearest"],
        f"copies {q.copies:.1%} <= {TARGETS['copies']:.0%}": q.copies <= TARGETS["copies"],
    }
    missed = [text for text, met in checks.items() if not met]
    return f"{row.name}: " + (f"MISSED {', '.join(missed)}" if missed else f"good ({', '.join(checks)})")


def _pixels(x: Tensor) -> Any:
    return x.detach().flatten(1).double().cpu().numpy()


def _sklearn() -> Any:
    """scikit-learn, with the parts that are used here."""
    try:
        import sklearn.datasets
        import sklearn.kernel_approximation
        import sklearn.linear_model
        import sklearn.model_selection
        import sklearn.pipeline
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is missing: pip install 'scoresde[examples]'"
        ) from error
    return sklearn
