"""What `recommend` returns: a ranking of candidates, best first, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..sde import LinearSDE
from ..solvers.base import TableSolver
from ..tableau import Tableau
from .candidates import Candidate, GridFunction
from .surrogate import Surrogate


class DensityRule(NamedTuple):
    """How `likelihood.log_prob` integrates: the order of its method and a grid."""

    order: int
    grid: GridFunction
    grid_name: str

    @property
    def name(self) -> str:
        return f"log_prob(order={self.order}) on {self.grid_name}"

    def __repr__(self) -> str:
        return self.name


class Ranked(NamedTuple):
    """A candidate, its grid steps, and its expected error."""

    candidate: Candidate | DensityRule
    steps: int
    error: float


@dataclass(frozen=True)
class Recommendation:
    """A ranking of candidates, best first, and why.

    ranking    candidates with their steps and errors: for deterministic solvers the distance from the exact
               solution, root mean square per coordinate, median over noises (on a Gaussian the root mean
               square); for stochastic solvers the 2-Wasserstein distance of the output's law per root of the
               dimension; for likelihoods the median error in nats per dimension
    why        in words
    surrogate  of the data
    """

    sde: LinearSDE
    calls: int
    need: str
    end: float | None
    seed: int
    ranking: tuple[Ranked, ...]
    why: str
    surrogate: Surrogate
    seconds: float

    @property
    def best(self) -> Ranked:
        return self.ranking[0]

    @property
    def solver(self) -> TableSolver:
        """For `sample(model, shape, r.solver, steps=r.steps, grid=r.grid)`."""
        if isinstance(self.best.candidate, DensityRule):
            raise ValueError(
                "expected another need: likelihoods have no solver, but "
                f"log_prob(model, x, order={self.best.candidate.order}, grid=r.grid(sde, r.steps))"
            )
        return self.best.candidate.solver

    @property
    def grid(self) -> GridFunction:
        return self.best.candidate.grid

    @property
    def steps(self) -> int:
        return self.best.steps

    @property
    def table(self) -> Tableau:
        """The best candidate as a table, from noise to data."""
        return self.solver.tableau(self.sde, self.grid(self.sde, self.steps, self.end))

    def __repr__(self) -> str:
        head = f"{self.calls} calls for {self.need}: {self.best.candidate.name}, {self.steps} steps"
        lines = [f"  {r.error:9.2e}  {r.candidate.name}" for r in self.ranking[:8]]
        if len(self.ranking) > 8:
            lines += ["        ...", f"  {self.ranking[-1].error:9.2e}  {self.ranking[-1].candidate.name}"]
        return "\n".join([head, self.why, "", "      error  candidate", *lines])
