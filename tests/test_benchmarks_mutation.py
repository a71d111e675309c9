"""Planted mistakes: every module of the library is offered, and each mistake changes what runs."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

mutation = pytest.importorskip(
    "benchmarks.mutation", reason="run from the root of the repository, with `python -m pytest`"
)

# What needs a GPU, what shows and tells, and the checks that tests are made of.
ELSEWHERE = ("noise_kernel.py", "digits.py", "plots.py", "cli/", "testing/", "__init__.py")


def test_mistakes_are_planted_in_every_module_of_the_library():
    package = mutation.ROOT / "scoresde"
    there = {str(file.relative_to(mutation.ROOT)) for file in package.rglob("*.py")}
    offered = [file for module in mutation.MODULES for file in mutation.files_of(module, 0)]
    assert {f for f in there - set(offered) if not any(part in f for part in ELSEWHERE)} == set()
    assert len(offered) == len(set(offered))


@pytest.mark.parametrize("module", mutation.MODULES)
def test_every_pattern_matches(module):
    for pattern in [pattern for patterns in mutation.MODULES[module] for pattern in patterns]:
        assert mutation._python_files(pattern), pattern


def test_a_planted_mistake_changes_one_node():
    file = mutation.ROOT / "scoresde" / "ddpm.py"
    right, found = ast.unparse(ast.parse(file.read_text())), mutation.mistakes("ddpm", file)
    for mistake in random.Random(0).sample(found, 40):
        wrong = mistake.source()
        assert wrong != right, mistake
        compile(wrong, Path(mistake.file).name, "exec")
