"""What every test may ask for: a device, a dtype, a ledger of false alarms; and what every run does.

Annotations of scoresde are checked at run time (jaxtyping's shapes, by beartype) unless --no-typecheck is
given or the test asks for the fixture `unchecked`. Hypothesis profiles are ci (default), quick, fresh and
nightly, chosen by --hypothesis-profile or the environment variable HYPOTHESIS_PROFILE.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; xdist's workers inherit it

import jaxtyping
import numpy as np
import pytest
import torch

ALPHA_BUDGET = 1e-6  # probability that a run of the whole suite fails although nothing is wrong
LEDGER = pytest.StashKey["AlphaLedger"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("scoresde")
    group.addoption("--device", default="cpu", help="device of the tests that take one (default: cpu)")
    group.addoption("--dtype", default="float64", help="dtype of the tests that take one (default: float64)")
    group.addoption("--no-typecheck", action="store_true", help="do not check annotations at run time")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # tolerances of float32 are those of 24 bits
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in the background; some tests interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[LEDGER] = AlphaLedger()
    dtype = config.getoption("dtype")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise pytest.UsageError(f"expected --dtype float64, float32 or bfloat16, found {dtype}")
    if config.getoption("device").startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs an NVIDIA GPU and a CUDA build of torch; found none")
    if not config.getoption("no_typecheck"):
        if "scoresde" in sys.modules:
            raise pytest.UsageError("scoresde was imported before its annotations could be checked")
        jaxtyping.install_import_hook("scoresde", "typecheck.check")
    from scoresde.testing import profiles  # not before: its annotations are checked too

    profiles.load()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("dtype"))


@pytest.fixture(scope="session")
def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of a state for a network of `dtype`: float32 for bfloat16, which states may not have."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on those before it. (hypothesis seeds random and numpy for every example.)"""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No run-time type checks in this test: torch.compile cannot trace them, and they cost time."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


class AlphaLedger:
    """Adds up the probabilities with which correct code fails: `assert p > alpha_ledger.spend(1e-9, "...")`.

    By the union bound a run of correct code fails with at most their sum, which must not exceed ALPHA_BUDGET.
    """

    def __init__(self) -> None:
        self.spent: list[tuple[str, float]] = []

    def spend(self, alpha: float, claim: str) -> float:
        """Book one statistical assertion (one call for each time it is evaluated) and return its alpha."""
        if not 0 < alpha < ALPHA_BUDGET:
            raise ValueError(f"expected 0 < alpha < {ALPHA_BUDGET:g} for '{claim}', found {alpha:g}")
        self.spent.append((claim, alpha))
        return alpha

    @property
    def total(self) -> float:
        return sum(alpha for _, alpha in self.spent)


@pytest.fixture(scope="session")
def alpha_ledger(request: pytest.FixtureRequest) -> AlphaLedger:
    return request.config.stash[LEDGER]


# Under xdist each worker keeps its own ledger and hands it over when it ends; the controller adds them up.
@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[LEDGER].spent += getattr(node, "workeroutput", {}).get("alpha_spent", [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    ledger = session.config.stash[LEDGER]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["alpha_spent"] = ledger.spent
    elif ledger.total > ALPHA_BUDGET and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    ledger = config.stash[LEDGER]
    if not ledger.spent:
        return
    excess = ledger.total > ALPHA_BUDGET
    terminalreporter.section("false alarms", red=excess)
    terminalreporter.line(
        f"{len(ledger.spent)} statistical assertions, false alarm probability at most {ledger.total:.2g} "
        f"(budget {ALPHA_BUDGET:g}{': EXCEEDED, the run fails' if excess else ''})"
    )
    for claim, alpha in sorted(ledger.spent, key=lambda entry: -entry[1])[: 10 if excess else 0]:
        terminalreporter.line(f"  {alpha:.1e}  {claim}")
