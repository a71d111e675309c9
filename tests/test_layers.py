"""The import order of the rooms, a light `import scoresde`, and nothing that runs code from data.

Reads the syntax trees of the package; every rule is also shown to report a planted offender.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scoresde"

# A room and the rooms it stands on. It may import those and whatever they stand on, at the top of a module or
# inside a function. What `if TYPE_CHECKING` imports is a word in a signature, not a dependency, and is free.
_WORKSHOP = ["sampling", "likelihood", "metrics", "guidance", "energy", "ddpm", "networks", "laws"]
STANDS_ON: dict[str, list[str]] = {
    "text": [],
    "schedules": [],
    "noise": ["noise_kernel"],
    "noise_kernel": [],
    "networks": ["gradients"],
    "spectrum": [],
    "engines": ["spectrum"],
    "metrics": [],
    "sde": ["schedules"],
    "ddpm": ["denoiser"],
    "grids": ["sde", "text"],
    "denoiser": ["sde"],
    "variance": ["denoiser"],
    "gradients": [],
    "energy": ["denoiser", "gradients"],
    "guidance": ["variance", "gradients"],
    "laws": ["sde", "denoiser", "engines"],
    "tableau": ["laws", "noise", "sde"],
    "solvers": ["tableau", "grids", "variance", "ddpm"],
    "sampling": ["solvers", "grids", "noise"],
    "likelihood": ["sampling"],
    "losses": ["variance", "ddpm"],
    "checkpoint": ["variance", "networks"],
    "train": ["losses", "checkpoint", "metrics"],
    "select": [*_WORKSHOP],
    "interop": [*_WORKSHOP, "checkpoint"],
    "plots": [*_WORKSHOP, "select", "losses"],
    "testing": [*_WORKSHOP, "select", "train", "interop", "plots"],
    "digits": [*_WORKSHOP, "train", "metrics"],
    "cli": [*_WORKSHOP, "select", "train", "interop", "plots", "digits"],
}
TORCH_ONLY = {"schedules", "noise", "networks", "engines", "gradients"}

# What may be imported while a module is imported: light, or there anyway since torch imports it.
LIGHT = {"torch", "jaxtyping", "numpy", "safetensors", "tqdm"}
LIGHT_IN_ROOM = {
    "cli": {"tyro"},
    "testing": {"hypothesis"},
    "interop": {"diffusers"},
    "noise_kernel": {"triton"},
}
HEAVY = ["torchsde", "scipy", "sklearn", "matplotlib", "accelerate", "diffusers", "tyro", "hypothesis"]

RUNS_CODE = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.serialization", "torch.jit.load", "torch.hub", "torch.package", "torch.export.load",
    "importlib.import_module", "runpy", "pkgutil.resolve_name",
}  # fmt: skip

# The one place that imports by name: `python -m scoresde.testing MODULE:SAMPLER` is there to run that code.
RUNS_CODE_ON_REQUEST = {("testing/__main__.py", "pkgutil.resolve_name")}


When = Literal["import", "call", "never"]  # at the top of a module, in a function, under `if TYPE_CHECKING`


class Import(NamedTuple):
    module: str  # absolute, with the imported name appended: "torch.nn", "scoresde.sde.VPSDE"
    line: int
    when: When


def imports(tree: ast.AST, package: str, when: When = "import") -> Iterator[Import]:
    """All imports in `tree`, a module of `package` (its dotted parent)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, when)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, when)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(ast.Module(node.body, []), package, "never")
            yield from imports(ast.Module(node.orelse, []), package, when)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(node, package, "call" if function and when == "import" else when)


def reachable(room: str, stands_on: dict[str, list[str]] = STANDS_ON) -> set[str]:
    """`room` and everything it stands on."""
    found, todo = set(), [room]
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += stands_on[here]
    return found


def used_names(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Every dotted name in `tree`, aliases spelled out: `import torch as t; t.load` gives torch.load."""
    spelled = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            spelled |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            spelled |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for found in imports(tree, package):
        yield found.module, found.line
    for node in ast.walk(tree):
        chain, base = [], node
        while isinstance(base, ast.Attribute):
            chain, base = [base.attr, *chain], base.value
        if isinstance(base, ast.Name):
            yield ".".join([spelled.get(base.id, base.id), *chain]), node.lineno


def problems(package: Path) -> list[str]:
    """What is wrong with the package in the folder `package`, one line each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        room = where.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parent = ".".join([package.name, *where.parts[:-1]])
        inside = [i for i in imports(tree, parent) if i.module.split(".")[0] == package.name]
        outside = [i for i in imports(tree, parent) if i not in inside]

        if room == "__init__":
            allowed, light = set(STANDS_ON), LIGHT
        elif room in STANDS_ON:
            allowed = reachable(room)
            light = {"torch", "jaxtyping"} if room in TORCH_ONLY else LIGHT | LIGHT_IN_ROOM.get(room, set())
        else:
            found.append(f"{where}: room '{room}' has no place in STANDS_ON (tests/test_layers.py)")
            continue

        targets = {
            (i.line, i.module.partition(".")[2].partition(".")[0]) for i in inside if i.when != "never"
        }
        for line, target in sorted(targets):
            if target not in allowed:
                what = f"room '{target}'" if target in STANDS_ON else f"'{target}', which is no room"
                found.append(f"{where}:{line}: '{room}' must not import {what}")
        for i in outside:
            top = i.module.split(".")[0]
            if i.when == "import" and top not in light | sys.stdlib_module_names:
                found.append(f"{where}:{i.line}: import {top} where it is used, not at the top of the module")
        for name, line in used_names(tree, parent):
            parts = name.split(".")
            if (where.as_posix(), name) in RUNS_CODE_ON_REQUEST:
                continue
            if any(".".join(parts[:k]) in RUNS_CODE for k in range(1, len(parts) + 1)):
                found.append(f"{where}:{line}: {name} can run code from data")
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.append(f"{where}:{node.value.lineno}: allow_pickle can run code from data")
    return found


def test_the_package_keeps_the_rules():
    assert not problems(PACKAGE), "\n".join(["", *problems(PACKAGE)])


def test_the_order_is_an_order():
    """No room stands on itself by way of others."""
    for room, below in STANDS_ON.items():
        assert all(room not in reachable(other) for other in below), room


# file -> source, and a part of the only line that must be reported (None: nothing)
OFFENDERS = [
    ("sde.py", "from .schedules import Linear\nimport math\nimport torch", None),
    ("sde.py", "from .laws import Gaussian", "'sde' must not import room 'laws'"),
    ("sde.py", "from . import laws", "'sde' must not import room 'laws'"),
    ("sde.py", "import scoresde.laws", "'sde' must not import room 'laws'"),
    ("sde.py", "from scoresde.laws import Gaussian as G", "'sde' must not import room 'laws'"),
    ("sde.py", "def f():\n    from scoresde import laws", "sde.py:2: 'sde' must not import room 'laws'"),
    ("sde.py", "if TYPE_CHECKING:\n    from .laws import Law", None),
    (
        "sde.py",
        "if typing.TYPE_CHECKING:\n    pass\nelse:\n    from .laws import Law",
        "'sde' must not import room",
    ),
    ("sde.py", "class A:\n    def f(self):\n        if self:\n            from . import laws", "sde.py:4:"),
    (
        "solvers/adams.py",
        "from ..denoiser import Denoiser\nfrom .exponential import x\nfrom .. import sde",
        None,
    ),
    ("solvers/adams.py", "from .base import sampling\nfrom . import sampling", None),
    ("solvers/adams.py", "from ..sampling import sample", "'solvers' must not import room 'sampling'"),
    ("solvers/adams.py", "from .. import sampling", "'solvers' must not import room 'sampling'"),
    ("networks/deep/unet.py", "from ... import sde", "'networks' must not import room 'sde'"),
    ("testing/checks.py", "from ..cli import main", "'testing' must not import room 'cli'"),
    ("laws.py", "from scoresde import VPSDE", "which is no room"),
    ("laws.py", "import scoresde", "which is no room"),
    ("attic.py", "", "room 'attic' has no place"),
    ("laws.py", "def f():\n    from scipy import stats", None),
    ("laws.py", "from scipy import stats", "import scipy where it is used"),
    (
        "laws.py",
        "try:\n    import torchsde\nexcept ImportError:\n    pass",
        "laws.py:2: import torchsde where",
    ),
    ("laws.py", "class A:\n    import sklearn.svm", "import sklearn where it is used"),
    ("plots.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure", None),
    (
        "plots.py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import matplotlib",
        "import matplotlib where it is used",
    ),
    ("schedules.py", "import numpy", "import numpy where it is used"),
    ("cli.py", "import tyro", None),
    ("train.py", "import tyro", "import tyro where it is used"),
    ("checkpoint.py", "model.eval()\ntorch.compile(model)\nre.compile('x')\nself.load(x)", None),
    ("checkpoint.py", "import pickle", "pickle can run code"),
    ("checkpoint.py", "def f():\n    from pickle import loads", "pickle.loads can run code"),
    ("checkpoint.py", "import torch\ntorch.load('x')", "checkpoint.py:2: torch.load can run code"),
    ("checkpoint.py", "import torch as t\nread = t.load", "checkpoint.py:2: torch.load can run code"),
    ("checkpoint.py", "from torch import load", "torch.load can run code"),
    ("checkpoint.py", "from torch import jit\njit.load('x')", "torch.jit.load can run code"),
    ("checkpoint.py", "eval('1')", "eval can run code"),
    ("checkpoint.py", "def f():\n    exec('1')", "checkpoint.py:2: exec can run code"),
    ("checkpoint.py", "numpy.load('x', allow_pickle=True)", "allow_pickle can run code"),
    ("checkpoint.py", "from importlib import import_module", "importlib.import_module can run code"),
    ("checkpoint.py", "import pkgutil\npkgutil.resolve_name('x:y')", "pkgutil.resolve_name can run code"),
    ("testing/checks.py", "from pkgutil import resolve_name", "pkgutil.resolve_name can run code"),
    ("testing/__main__.py", "import pkgutil\npkgutil.resolve_name('x:y')", None),
    ("testing/__main__.py", "from importlib import import_module", "importlib.import_module can run code"),
]


@pytest.mark.parametrize(("file", "source", "report"), OFFENDERS)
def test_offenders_are_reported(tmp_path: Path, file: str, source: str, report: str | None):
    path = tmp_path / "scoresde" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = sorted(set(problems(tmp_path / "scoresde")))
    if report is None:
        assert not found
    else:
        assert found and all(report in line for line in found), found


MEASURE = """
import sys, time
start = time.process_time(); import torch
torch_done = time.process_time(); import scoresde
done = time.process_time()
print(done - torch_done, *(name for name in {heavy} if name in sys.modules))
"""


def cost_of_import(root: Path, pairs: int) -> tuple[float, list[str]]:
    """CPU seconds that `import scoresde` adds to `import torch`, and which heavy packages came along.

    Both imports are timed in one fresh process, by processor time, so that a busy machine does not matter;
    the median of `pairs` of them, after one that writes the byte code.
    """
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", MEASURE.format(heavy=HEAVY)]
    runs = [
        subprocess.check_output(command, env=environment, cwd=root, text=True).split()
        for _ in range(pairs + 1)
    ]
    return statistics.median(float(run[0]) for run in runs[1:]), runs[0][1:]


@pytest.mark.slow
def test_import_is_light():
    seconds, heavy = cost_of_import(ROOT, pairs=3)
    assert not heavy
    assert seconds <= 0.2, f"import scoresde costs {seconds:.3f} s more than import torch"


@pytest.mark.slow
def test_a_heavy_import_is_noticed(tmp_path: Path):
    busy = "import time, scipy\nend = time.process_time() + 0.25\nwhile time.process_time() < end: pass"
    (tmp_path / "scoresde").mkdir()
    (tmp_path / "scoresde" / "__init__.py").write_text(busy)
    seconds, heavy = cost_of_import(tmp_path, pairs=1)
    assert seconds > 0.2 and heavy == ["scipy"]
