"""The harness itself: annotations are checked at run time, and the false alarms of all workers add up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scoresde.testing import profiles

PACKAGE = """
from __future__ import annotations
from jaxtyping import Float
from torch import Tensor

def add(x: Float[Tensor, "b"], y: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    return x[:1] + y[:1] if len(x) == 5 else x
"""

TESTS = """
import pytest, torch
from scoresde import add

@pytest.mark.parametrize("sizes", [(3, 4), (5, 5)])  # wrong arguments; a wrong result
def test_shapes_are_checked(sizes):
    x, y = map(torch.ones, sizes)
    with pytest.raises(Exception, match="Type-check error"):
        add(x, y)

def test_unchecked(unchecked):
    assert len(add(torch.ones(3), torch.ones(4))) == 3

def test_threads():
    assert torch.get_num_threads() == 1

@pytest.mark.cuda
def test_cuda():
    assert torch.cuda.is_available()

@pytest.mark.parametrize("i", range(4))
def test_spends(alpha_ledger, i):
    assert 0.5 > alpha_ledger.spend(3e-7, f"claim {i}")
"""


@pytest.mark.slow
def test_a_run_of_its_own(tmp_path: Path):
    """Everything passes, and yet the run fails: four assertions on two workers spend 1.2e-6 of 1e-6."""
    (tmp_path / "scoresde").mkdir()
    (tmp_path / "scoresde" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "scoresde" / "testing").mkdir()
    (tmp_path / "scoresde" / "testing" / "__init__.py").touch()
    shutil.copy(profiles.__file__, tmp_path / "scoresde" / "testing")
    (tmp_path / "test_inner.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    for name in ("conftest.py", "typecheck.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert "4 statistical assertions, false alarm probability at most 1.2e-06" in run.stdout
    assert "EXCEEDED" in run.stdout
    assert " passed" in run.stdout and " failed" not in run.stdout
