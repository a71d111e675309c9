"""Exponential multistep solvers: one family, named presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..grids import Grid
from ..schedules import check_numbers
from ..sde import LinearSDE
from ..tableau import Tableau
from .base import Card, TableSolver
from .singlestep import STAGES, singlestep_solver
from .weights import RULES, STORED, VARIABLES, Tau, singular_step, step_weights


def multistep_table(
    sde: LinearSDE,
    grid: Grid,
    *,
    order: int,
    corrector: int,
    stored: str,
    variable: str,
    tau: Tau,
    rule: str,
    name: str,
) -> Tableau:
    """Predictor of the given order, optionally followed by a corrector of order `corrector` that uses the new
    output; one call a step (PEC).

    The corrector costs no row: it shares base and noise with the predictor, so it only adds `sum_j (c_j -
    b_j) m_j`, which the next row does before it predicts. Order grows from 1 over the first steps. A last
    step to sigma = 0 returns D; a first step from alpha = 0 is exact for constant D and its output is then
    forgotten.
    """
    first = int(torch.isinf(grid.lam[0]))
    last = len(grid) - int(torch.isinf(grid.lam[-1]))
    steps, width = len(grid), _memory(order, corrector)
    keep, noise = torch.empty(2, steps, dtype=torch.float64)
    mix, correct = torch.zeros(2, steps, width, dtype=torch.float64)
    regular = torch.arange(steps)[first:last]
    options = {"stored": stored, "variable": variable, "tau": tau, "rule": rule}
    for p, rows in _by_order(regular, order):  # step k -> k + 1 from outputs k, k - 1, ...
        keep[rows], mix[rows, :p], noise[rows] = _steps(sde, grid.t, rows, range(0, -p, -1), options)
    for p, rows in _by_order(regular, corrector) if corrector else ():
        corrected = rows[rows > first]  # step k - 1 -> k from outputs k, k - 1, ...: applied in row k
        if len(corrected):
            correct[corrected, :p] = _steps(sde, grid.t, corrected - 1, range(1, 1 - p, -1), options)[1]
    if corrector:
        correct[first + 1 : last, 1:] -= mix[first : last - 1, :-1]
        mix[first + 1 : last] += keep[first + 1 : last, None] * correct[first + 1 : last]
    skip, out = STORED[stored].rows(sde.alpha(grid.t[:-1]), sde.sigma(grid.t[:-1]))
    for k in {*range(first), *range(last, steps)}:
        keep[k], mix[k, 0], noise[k] = singular_step(sde, grid.t[k], grid.t[k + 1], stored, tau)
    return Tableau(grid.t, skip, out, keep, mix, noise, name)


def _memory(order: int, corrector: int) -> int:
    """How many outputs a row uses; with a corrector also those of the prediction that it takes back."""
    return max(order + 1, corrector) if corrector else order


def _by_order(rows: Tensor, order: int) -> list[tuple[int, Tensor]]:
    """Rows grouped by the order that the outputs since the first of them allow."""
    groups = [*((p, rows[p - 1 : p]) for p in range(1, order)), (order, rows[order - 1 :])]
    return [(p, group) for p, group in groups if len(group)]


def _steps(
    sde: LinearSDE, t: Tensor, rows: Tensor, lags: range, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the steps rows -> rows + 1 from the outputs at rows + lags."""
    return step_weights(sde, t[rows], t[rows + 1], t[rows[:, None] + torch.tensor(list(lags))], **options)


@dataclass(frozen=True)
class Exponential:
    """Members of the family: predictor order, corrector order (0: none), what is remembered, the polynomial's
    variable, the noise level, the rule for the weights.

    stored    "data" | "noise" | "velocity" | "flow"
    variable  "lam" | "sigma/alpha" | "sigma" (sigma/(alpha + sigma)) | "t"
    tau       0 is the probability-flow ODE, 1 the reverse SDE; a number or a function of lam
    rule      "exact" | "bh1" | "bh2" | "half3" | "backward" | "adams", see `step_weights`
    """

    order: int
    corrector: int = 0
    stored: str = "data"
    variable: str = "lam"
    tau: Tau = 0.0
    rule: str = "exact"

    def __post_init__(self) -> None:
        whole = all(isinstance(p, int) and not isinstance(p, bool) for p in (self.order, self.corrector))
        if not (whole and 1 <= self.order <= 8 and 0 <= self.corrector <= 8):
            raise ValueError(
                f"expected an order in 1..8 and a corrector order in 0..8, found {self.order!r}, "
                f"{self.corrector!r}"
            )
        for value, known in (
            (self.stored, STORED),
            (self.variable, VARIABLES),
            (self.rule, {**RULES, "adams": None}),
        ):
            if value not in known:
                raise ValueError(f"expected one of {sorted(known)}, found {value!r}")
        if self.rule == "adams" and (self.order > 4 or self.corrector):
            raise ValueError(
                f"expected order 1..4 and no corrector for rule 'adams', found {self.order}, {self.corrector}"
            )
        if not callable(self.tau):
            check_numbers(tau=self.tau)
        if not callable(self.tau) and not 0 <= self.tau < math.inf:
            raise ValueError(f"expected a noise level tau >= 0, found {self.tau}")

    def __call__(self, sde: LinearSDE, grid: Grid, name: str) -> Tableau:
        return multistep_table(sde, grid, name=name, **{f.name: getattr(self, f.name) for f in fields(self)})

    @property
    def stochastic(self) -> bool:
        return callable(self.tau) or self.tau > 0

    def card(self, reference: str) -> Card:
        """What exact integration gives: a corrector reads an output at a predicted state, which is right to
        one order more than the predictor; published rules lower the order to that of two nodes."""
        order = min(self.corrector, self.order + 1) if self.corrector else self.order
        if self.rule in ("half3", "backward", "adams"):
            order = min(order, 2)
        properties = {
            "marginal_exact": self.stored == "data" or (self.stored != "velocity" and not self.stochastic),
            "clock_free": self.variable != "t",
            "scale_covariant": self.stored != "velocity",
        }
        declared = frozenset(key for key, holds in properties.items() if holds)
        memory = _memory(self.order, self.corrector)
        if self.stochastic:
            return Card(None, min(2, order), 1, True, reference, declared, memory=memory)
        return Card(order, None, 1, False, reference, declared, memory=memory)


def exponential(
    order: int = 2,
    *,
    corrector: int = 0,
    stored: str = "data",
    variable: str = "lam",
    tau: Tau = 0.0,
    rule: str = "exact",
) -> TableSolver:
    """Any member of the family; the arguments are those of `Exponential`. Raises ValueError for values it
    does not have."""
    member = Exponential(order, corrector, stored, variable, tau, rule)
    return _preset(
        "exponential",
        member,
        tuple((f.name, getattr(member, f.name)) for f in fields(member)),
        "exact integration of the semilinear ODE or SDE",
    )


def _preset(name: str, member: Exponential, options: tuple, reference: str) -> TableSolver:
    return TableSolver(name, lambda sde, grid: member(sde, grid, name), member.card(reference), options)


def _order(order: int, highest: int) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"expected an order in 1..{highest}, found {order!r}")


def dpm(order: int = 2, singlestep: bool = False, rule: str = "exact") -> TableSolver:
    """DPM-Solver: noise remembered, polynomial in lam (Lu et al. 2022, arXiv:2206.00927). Orders 1 to 3.

    rule (multistep): "exact", or as published, "bh2" (2M) and "half3" (3M, second order).
    """
    return _dpm("dpm", "noise", order, singlestep, rule, "Lu et al. 2022, arXiv:2206.00927")


def dpmpp(order: int = 2, singlestep: bool = False, rule: str = "exact") -> TableSolver:
    """DPM-Solver++: data remembered, polynomial in lam (Lu et al. 2022, arXiv:2211.01095). Orders 1 to 3;
    order 1 is DDIM.

    rule (multistep): "exact", or as published, "bh2" (2M) and "half3" (3M, second order: its last term lacks
    a factor 2).
    """
    return _dpm("dpmpp", "data", order, singlestep, rule, "Lu et al. 2022, arXiv:2211.01095")


def _dpm(name: str, stored: str, order: int, singlestep: bool, rule: str, reference: str) -> TableSolver:
    _order(order, 3)
    options = (("order", order), ("singlestep", singlestep), ("rule", rule))
    if singlestep:
        if rule != "exact":
            raise ValueError(f"expected rule='exact' for the singlestep solver, found {rule!r}")
        return singlestep_solver(name, order, STAGES[order], stored, options=options, reference=reference)
    return _preset(name, Exponential(order, stored=stored, rule=rule), options, reference)


def sde_dpmpp(order: int = 2, eta: float = 1.0, singlestep: bool = False, rule: str = "exact") -> TableSolver:
    """SDE-DPM-Solver++: the reverse SDE with `tau^2 = eta`, data remembered (Lu et al. 2022,
    arXiv:2211.01095; k-diffusion's 2M and 3M SDE). Weak order min(order, 2).

    rule (multistep): "exact" (2M "heun"), or as published "bh2" (2M "midpoint"), "half3" (3M). singlestep:
    order 2, one Brownian path inside the step.
    """
    _order(order, 3)
    options = (("order", order), ("eta", eta), ("singlestep", singlestep), ("rule", rule))
    reference = "Lu et al. 2022, arXiv:2211.01095"
    check_numbers(eta=eta)
    if not 0 <= eta < math.inf:
        raise ValueError(f"expected eta >= 0, found {eta}")
    if singlestep:
        if order == 3 or rule != "exact":
            raise ValueError(
                f"expected order 1 or 2 and rule='exact' for the singlestep solver, found order {order} and "
                f"{rule!r}"
            )
        return singlestep_solver(
            "sde_dpmpp",
            order,
            STAGES[order],
            "data",
            tau=math.sqrt(eta),
            options=options,
            reference=reference,
        )
    return _preset("sde_dpmpp", Exponential(order, tau=math.sqrt(eta), rule=rule), options, reference)


def unipc(order: int = 2, rule: str = "exact", stored: str = "data") -> TableSolver:
    """UniPC: predictor of order p, corrector of order p + 1, one call a step (Zhao et al. 2023,
    arXiv:2302.04867). Measured order p + 1.

    rule: "exact", or as published "bh1", "bh2", which differ only in two-node formulas.
    """
    _order(order, 6)
    if rule not in ("exact", "bh1", "bh2"):
        raise ValueError(f"expected rule 'exact', 'bh1' or 'bh2', found {rule!r}")
    options = (("order", order), ("rule", rule), ("stored", stored))
    return _preset(
        "unipc",
        Exponential(order, order + 1, stored, rule=rule),
        options,
        "Zhao et al. 2023, arXiv:2302.04867",
    )


def deis(order: int = 3, variable: str = "t") -> TableSolver:
    """DEIS: noise remembered, exact integration of its polynomial in t (tAB), sigma/alpha (rhoAB) or lam
    (Zhang and Chen 2023, arXiv:2204.13902). Orders 1 to 4."""
    _order(order, 4)
    return _preset(
        "deis",
        Exponential(order, stored="noise", variable=variable),
        (("order", order), ("variable", variable)),
        "Zhang and Chen 2023, arXiv:2204.13902",
    )


def adams(order: int = 4, rule: str = "exact") -> TableSolver:
    """Adams-Bashforth on `d(x/alpha) = eps d(sigma/alpha)`: noise remembered, polynomial in sigma/alpha.
    Orders 1 to 4.

    rule "exact": weights of the actual nodes (LMS of k-diffusion). rule "adams": weights of equidistant
    nodes, as in iPNDM and PLMS (Liu et al. 2022, arXiv:2202.09778): second order off such grids.
    """
    _order(order, 4)
    if rule not in ("exact", "adams"):
        raise ValueError(f"expected rule 'exact' or 'adams', found {rule!r}")
    return _preset(
        "adams",
        Exponential(order, stored="noise", variable="sigma/alpha", rule=rule),
        (("order", order), ("rule", rule)),
        "Liu et al. 2022, arXiv:2202.09778",
    )


def sa(order: int = 3, corrector: int = 4, tau: Tau = 1.0, stored: str = "data") -> TableSolver:
    """SA-Solver: stochastic Adams predictor and corrector with noise level tau, a number or a function of lam
    (Xue et al. 2023, arXiv:2309.05019)."""
    options = (("order", order), ("corrector", corrector), ("tau", tau), ("stored", stored))
    return _preset(
        "sa", Exponential(order, corrector, stored, tau=tau), options, "Xue et al. 2023, arXiv:2309.05019"
    )


def seeds(order: int = 1) -> TableSolver:
    """SEEDS: the reverse SDE with noise remembered (Gonzalez et al. 2023, arXiv:2305.14267). Its injected
    noise does not keep the law of a point mass at finite steps. Orders 1 to 3."""
    _order(order, 3)
    return _preset(
        "seeds",
        Exponential(order, stored="noise", tau=1.0),
        (("order", order),),
        "Gonzalez et al. 2023, arXiv:2305.14267",
    )


def er_noise_level(lam: Tensor) -> Tensor:
    """tau of ER-SDE's noise function `phi(k) = k (exp(k^0.3) + 10)`, k = sigma/alpha: `tau^2 = k phi'/phi - 1
    = 0.3 k^0.3 / (1 + 10 exp(-k^0.3))`."""
    power = (-0.3 * lam).exp()
    return (0.3 * power / (1 + 10 * (-power).exp())).sqrt()


def er_sde(order: int = 3, rule: str = "exact", tau: Tau = er_noise_level) -> TableSolver:
    """ER-SDE-Solver: data remembered, polynomial in sigma/alpha, noise level from the paper's noise function
    (Cui et al. 2023, arXiv:2309.06169). Orders 1 to 3.

    rule "exact", or "backward", the published third-order update.
    """
    _order(order, 3)
    if rule not in ("exact", "backward"):
        raise ValueError(f"expected rule 'exact' or 'backward', found {rule!r}")
    return _preset(
        "er_sde",
        Exponential(order, variable="sigma/alpha", tau=tau, rule=rule),
        (("order", order), ("rule", rule)),
        "Cui et al. 2023, arXiv:2309.06169",
    )
