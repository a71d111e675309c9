"""diffusers (Hugging Face): a network such as UNet2DModel and the configuration of the scheduler it was
trained with are a denoiser. (Our solvers as a diffusers scheduler: interop.scheduler.)

Only the configuration's process and prediction are read. Its grid is not used, and predictions are never
clipped or thresholded: samplers of ours take any grid, and what changes predictions is a denoiser.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import grids, solvers
from ..denoiser import DATA, FLOW, NOISE, SCORE, VELOCITY, Denoiser, Karras, Prediction
from ..sampling import GridFunction
from ..sde import EDM, VESDE, VPSDE, LinearSDE, Rectified
from ..solvers.base import Solver
from ..tableau import Tableau
from ..text import spell

PREDICTIONS = {"epsilon": NOISE, "sample": DATA, "v_prediction": VELOCITY}


class Convention(NamedTuple):
    """What a network was trained for: its process, what it predicts, and what it is given for time, `label`
    of a `time_input` of `Denoiser`."""

    sde: LinearSDE
    predicts: Prediction
    time_input: str
    label: Callable[[Tensor], Tensor]


def convention(scheduler: Any) -> Convention:
    """The convention that a scheduler's configuration stands for. `scheduler` is a scheduler, or the mapping
    in its scheduler_config.json.

    A table of betas       VPSDE.from_betas; label i - 1 = t N - 1, a float, kept within 0..N - 1, so that a
                           time is matched to the label of its noise level
    flow matching          Rectified; the flow; label N t
    EDM...                 EDM, Karras(sigma_data); label log(sigma)/4
    ScoreSdeVe             VESDE, the score; label sigma

    Raises ValueError for what none of these describes.
    """
    if isinstance(scheduler, Mapping):
        scheduler = _made(scheduler)
    name, config = type(scheduler).__name__, dict(scheduler.config)
    steps, kind = config.get("num_train_timesteps", 1000), config.get("prediction_type", "epsilon")
    if config.get("invert_sigmas"):
        raise ValueError("expected noise levels that fall with the timesteps, found invert_sigmas=True")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or kind == "flow_prediction":
        return Convention(Rectified(), FLOW, "t", lambda t: t * steps)
    if name.startswith("EDM") and kind == "epsilon":
        process = EDM(config["sigma_min"], config["sigma_max"])
        return Convention(process, Karras(config["sigma_data"]), "log_snr", lambda log_snr: -log_snr / 8)
    if name.startswith("ScoreSdeVe"):
        process = VESDE(config["sigma_min"], config["sigma_max"])
        return Convention(process, SCORE, "log_snr", lambda log_snr: (-0.5 * log_snr).exp())
    betas = _betas(scheduler)
    if betas is None or kind not in PREDICTIONS or config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"expected a scheduler with betas that predicts {sorted(PREDICTIONS)}, or one of flow matching, "
            f"EDM or ScoreSdeVe, found {name} with prediction_type={kind!r}; wrap the network by hand as "
            "Denoiser(network, sde, predicts)"
        )
    last = len(betas) - 1
    return Convention(_table(betas), PREDICTIONS[kind], "index", lambda label: label.clamp(0, last))


def _betas(scheduler: Any) -> Tensor | None:
    """Those that it has, or those of its `alphas_cumprod` where these are others: some change them alone."""
    betas, products = (getattr(scheduler, name, None) for name in ("betas", "alphas_cumprod"))
    if betas is None or products is None:
        return betas
    betas, products = betas.double(), products.double()
    if torch.allclose((1 - betas).cumprod(0), products, rtol=1e-4, atol=1e-7):
        return betas
    return 1 - products / torch.cat([products.new_ones(1), products[:-1]])


def _table(betas: Tensor) -> VPSDE:
    """The process of a table. Raises ValueError where no signal is left at its end."""
    betas = betas.double()
    if float(betas.max()) >= 1:
        raise ValueError(
            "expected betas below 1, found 1: with rescale_betas_zero_snr no signal is left at the last "
            "index and log-SNR is infinite there; pass a scheduler made with trained_betas = betas[:-1]"
        )
    return VPSDE.from_betas(betas)


def _made(config: Mapping[str, Any]) -> Any:
    """The scheduler of a configuration file."""
    import diffusers  # pyright: ignore

    known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    name = config.get("_class_name")
    if name not in known:
        raise ValueError(f"expected _class_name to be a scheduler of diffusers, found {name!r}")
    return getattr(diffusers, name).from_config(config)


class Network(nn.Module):
    """A network of diffusers, called as ours are: `network(x, time, **cond)`.

    `label` turns time into what it is given; the condition "label" is passed on as class_labels, others under
    their own names. Of twice as many channels as x has, the first half is the prediction and the rest a
    learned variance, which no sampler here needs.
    """

    def __init__(self, network: nn.Module, label: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.label = network, label

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        if "label" in cond:
            cond["class_labels"] = cond.pop("label")
        out = self.network(x, self.label(time), **cond)
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        return predicted(out, x)


def predicted(out: Tensor, x: Tensor) -> Tensor:
    """The part of a network's output that is the prediction: the first half of twice as many channels."""
    doubled = out.ndim == x.ndim and out.ndim > 1 and out.shape[1] == 2 * x.shape[1]
    return out[:, : x.shape[1]] if doubled else out


def denoiser(network: nn.Module, scheduler: Any) -> Denoiser:
    """A network of diffusers, trained with this scheduler (or its configuration), as a denoiser.

    `x` may have any floating dtype, the network keeps its own. Class labels are the condition "label" (or
    class_labels); other conditions go to the network as keywords, such as encoder_hidden_states. The process
    is that of `convention`: for another one, with the same network matched by noise level, use `under`.
    """
    sde, predicts, time_input, label = convention(scheduler)
    return Denoiser(Network(network, label), sde, predicts, time_input)


def scheduler(solver: Solver | Tableau, like: Any, grid: GridFunction = grids.quadratic) -> Any:
    """A fixed-grid solver on a grid, or a table such as a tuned one, as a diffusers scheduler for a network
    trained with the scheduler `like`: for `pipe.scheduler = scheduler(solvers.unipc(3), pipe.scheduler)`.

    It is an `interop.scheduler.TableauScheduler`, whose configuration holds the solver and the grid by name,
    or the table itself, so that `save_pretrained` and `from_pretrained` of a pipeline keep it. Raises
    ValueError for solvers without a table, for what has no name, and for processes other than a table of
    betas or flow matching.
    """
    from .scheduler import TableauScheduler

    predicts = convention(like).predicts
    words = {made.name: word for word, made in (*PREDICTIONS.items(), ("flow_prediction", FLOW))}
    if predicts.name not in words:
        raise ValueError(f"expected a scheduler with betas, or of flow matching, found {type(like)}")
    process = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    config: dict[str, Any] = {name: like.config[name] for name in process if name in like.config}
    if isinstance(solver, Tableau):
        chosen: dict[str, Any] = {"table": json.loads(solver.to_json())}
    else:
        chosen = {
            "solver": _named(repr(solver), solvers.parse, repr),
            "grid": _named(spell(grid), grids.parse, spell),
        }
    return TableauScheduler(**config, prediction_type=words[predicts.name], **chosen)


def _named(text: str, parse: Callable[[str], Any], spelled: Callable[[Any], str]) -> str:
    """A text that stands for what it was made from."""
    try:
        known = spelled(parse(text)) == text
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"expected a solver and a grid that a configuration can name, found {text}; pass the table that "
            "they make"
        )
    return text
