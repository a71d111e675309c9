"""Plants single-token mistakes in the library and counts how many its tests catch.

    python -m benchmarks.mutation --modules schedules ddpm laws tableau solvers --count 30 --seed 1

Mistakes are drawn uniformly, with the printed seed, from all that the syntax tree of the modules offers:
operators, comparisons, constants, signs, names that are easily confused, dropped roots, squares, statements
and `not`, swapped arguments and branches. Docstrings, annotations, imports and error messages are left out.
Each is written into a copy of the tree, and the module's own tests run there, first those whose names hold
the name of the changed function, class or file, up to the first failure, at most --timeout seconds. A run
starts only if those tests pass without a mistake, so that a failure is the mistake's. A test that takes more
than half the time fails, and so does none without a mistake.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from .options import count

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("scoresde", "tests", "benchmarks", "pyproject.toml", "README.md", "constraints.txt")

PROCESS = ("schedules", "sde", "ddpm", "denoiser", "losses")
SAMPLING = ("noise", "grids", "tableau", "sampling")
OTHERS = ("metrics", "energy", "text")
CARD = "tests/test_card.py"
PROPERTIES = {name: f"tests/test_properties_{name}.py" for name in ("process", "solvers", "guidance")}

# module -> files in which mistakes are planted; tests that should notice, its own and then the properties;
# patterns below the root
MODULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{
        name: ((f"scoresde/{name}.py",), (f"tests/test_{name}*.py", PROPERTIES["process"]))
        for name in PROCESS
    },
    "laws": (
        tuple(f"scoresde/{name}.py" for name in ("laws", "engines", "spectrum")),
        ("tests/test_laws*.py", PROPERTIES["process"]),
    ),
    **{
        name: ((f"scoresde/{name}.py",), (f"tests/test_{name}*.py", PROPERTIES["solvers"]))
        for name in SAMPLING
    },
    **{name: ((f"scoresde/{name}*",), (f"tests/test_{name}*.py",)) for name in OTHERS},
    **{
        name: ((f"scoresde/solvers/{name}*.py",), (f"tests/test_{name}*.py", CARD, PROPERTIES["solvers"]))
        for name in ("adaptive", "langevin", "external")
    },
    "solvers": (("scoresde/solvers/*.py",), ("tests/test_solvers*.py", CARD, PROPERTIES["solvers"])),
    "variance": (("scoresde/variance.py", "scoresde/solvers/learned.py"), ("tests/test_variance*.py",)),
    **{name: ((f"scoresde/{name}/*.py",), (f"tests/test_{name}*.py",)) for name in ("select", "interop")},
    "checkpoint": (("scoresde/checkpoint/*.py",), ("tests/test_checkpoint*.py",)),
    "guidance": (
        ("scoresde/guidance/*.py", "scoresde/gradients.py"),
        ("tests/test_guidance*.py", PROPERTIES["guidance"]),
    ),
    "likelihood": (("scoresde/likelihood/*.py",), ("tests/test_likelihood*.py", PROPERTIES["guidance"])),
    "networks": (("scoresde/networks/*.py",), ("tests/test_networks*.py",)),
    "train": (("scoresde/train/*.py",), ("tests/test_train*.py",)),
}
ELSEWHERE = {"solvers": ("adaptive", "langevin", "external", "variance")}  # files that are another module's

# To swap the arguments of these is no mistake.
SYMMETRIC = ("max", "min", "torch.maximum", "torch.minimum", "torch.promote_types")

ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
}
ORDERED = (ast.Sub, ast.Div, ast.Pow, ast.MatMult)
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
CONFUSED = [
    ("alpha", "sigma"), ("s", "t"), ("lam_s", "lam_t"), ("x0", "xt"), ("a", "b"), ("p", "q"), ("low", "high"),
    ("start", "stop"), ("start", "end"), ("first", "last"), ("before", "after"), ("mean", "std"),
    ("keep", "mix"), ("skip", "out"), ("min", "max"), ("minimum", "maximum"), ("sin", "cos"),
    ("exp", "expm1"),
    ("log", "log1p"), ("floor", "ceil"), ("any", "all"), ("sum", "mean"), ("sum", "prod"),
    ("zeros_like", "ones_like"),
    ("zeros", "ones"), ("cumsum", "cumprod"), ("sqrt", "square"), ("amin", "amax"), ("argmin", "argmax"),
    ("sinh", "cosh"), ("steps", "order"), ("rows", "steps"),
]  # fmt: skip
DROPPED = {
    "sqrt",
    "square",
    "exp",
    "expm1",
    "log",
    "log1p",
    "abs",
    "neg",
    "reciprocal",
    "cumsum",
    "flip",
    "double",
    "clone",
    "detach",
}

Change = Callable[[ast.AST], ast.AST]
Address = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Mistake:
    """One changed node: where, what it was, what it becomes; its address in the syntax tree, and which of its
    changes it is.
    """

    module: str
    file: str
    line: int
    kind: str
    was: str
    becomes: str
    address: Address
    number: int

    def source(self) -> str:
        """The file with this mistake."""
        tree = ast.parse((ROOT / self.file).read_text())
        for address, node, scope in _places(tree):
            if address == self.address:
                return ast.unparse(_planted(tree, address, list(_changes(node, scope))[self.number][1]))
        raise RuntimeError(f"{self.file} was changed while this ran")

    def words(self) -> list[str]:
        """What a test of the changed place is likely to be called: its functions, classes, and the file."""
        node: Any = ast.parse((ROOT / self.file).read_text())
        found = [Path(self.file).stem]
        for name, i in self.address:
            node = getattr(node, name) if i is None else getattr(node, name)[i]
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append(node.name.strip("_").lower())
        return found


WORDS = "SCORESDE_MUTATION_WORDS"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Where this module is a plugin of pytest: the tests whose names hold most of the words come first."""
    words = os.environ.get(WORDS, "").split()
    items.sort(key=lambda item: -sum(word in item.name.lower() for word in words))


# All mistakes of one file


def mistakes(module: str, file: Path) -> list[Mistake]:
    """Every mistake that the file offers."""
    found = []
    for address, node, scope in _places(ast.parse(file.read_text())):
        for number, (kind, change) in enumerate(_changes(node, scope)):
            was, becomes = ast.unparse(node), ast.unparse(change(copy.deepcopy(node)))
            if was != becomes:
                found.append(
                    Mistake(
                        module,
                        str(file.relative_to(ROOT)),
                        getattr(node, "lineno", 0),
                        kind,
                        was,
                        becomes,
                        address,
                        number,
                    )
                )
    return found


SKIPPED_FIELDS = {"annotation", "returns", "type_comment", "type_params"}
SKIPPED_NODES = (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Raise, ast.Global, ast.Nonlocal)


def _places(tree: ast.AST) -> Iterator[tuple[Address, ast.AST, set[str]]]:
    """(address, node, names known there) of all nodes that may be changed."""

    def walk(node: ast.AST, address: Address, scope: set[str]) -> Iterator[tuple[Address, ast.AST, set[str]]]:
        if isinstance(node, SKIPPED_NODES) or _is_docstring(node) or _is_listing(node):
            return
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            scope = scope | _names(node)
        if address:
            yield address, node, scope
        for name, value in ast.iter_fields(node):
            if name in SKIPPED_FIELDS:
                continue
            for i, child in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(child, ast.AST):
                    yield from walk(child, (*address, (name, i)), scope)

    yield from walk(tree, (), _names(tree))


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_listing(node: ast.AST) -> bool:
    """`__all__ = ...`, and aliases of types, which are annotations by another name."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
        return False
    return node.targets[0].id == "__all__" or (
        isinstance(node.value, ast.Subscript)
        and node.targets[0].id[:1].isupper()
        and not node.targets[0].id.isupper()
    )


def _names(node: ast.AST) -> set[str]:
    """Names bound in a function, or at the top of a module."""
    found = (
        {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
        if not isinstance(node, ast.Module)
        else set()
    )
    inside = node.body if isinstance(node, ast.Module) else list(ast.walk(node))
    return found | {
        target.id
        for child in inside
        for target in ast.walk(child)
        if isinstance(target, ast.Name)
        and isinstance(target.ctx, ast.Store)
        and not isinstance(child, ast.FunctionDef | ast.ClassDef)
    }


def _changes(node: ast.AST, scope: set[str]) -> Iterator[tuple[str, Change]]:
    """(kind, change) of all mistakes at one node; a change gets a copy of it."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            if type(op) in ARITHMETIC:
                yield "operator", lambda n: _with(n, op=ARITHMETIC[type(op)]())
            if isinstance(node, ast.BinOp) and isinstance(op, ORDERED):
                yield "operands swapped", lambda n: _with(n, left=n.right, right=n.left)
            if isinstance(node, ast.BinOp) and isinstance(op, ast.Pow):
                yield "power dropped", lambda n: n.left
            if isinstance(node, ast.AugAssign):
                yield "statement dropped", lambda n: ast.Pass()
        case ast.Compare(ops=[op]):
            for other in COMPARISONS[type(op)]:
                yield "comparison", lambda n, other=other: _with(n, ops=[other()])
        case ast.BoolOp(op=op):
            yield "and/or", lambda n: _with(n, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub()):
            yield "sign", lambda n: n.operand
        case ast.UnaryOp(op=ast.Not()):
            yield "not dropped", lambda n: n.operand
        case ast.Constant(value=bool()):
            yield "bool", lambda n: ast.Constant(not n.value)
        case ast.Constant(value=int()):
            yield "constant", lambda n: ast.Constant(n.value + 1)
        case ast.Constant(value=float()):
            yield "constant", lambda n: ast.Constant(2 * n.value if n.value else 1.0)
        case ast.Name(ctx=ast.Load()):
            for other in _confused(node.id):
                if other in scope or (other in ("min", "max", "any", "all", "sum")):
                    yield "name", lambda n, other=other: _with(n, id=other)
        case ast.Attribute(ctx=ast.Load()):
            for other in _confused(node.attr):
                yield "name", lambda n, other=other: _with(n, attr=other)
        case ast.IfExp():
            yield "branches swapped", lambda n: _with(n, body=n.orelse, orelse=n.body)
        case ast.If() if not node.orelse:
            yield "statement dropped", lambda n: ast.Pass()
        case ast.Expr():
            yield "statement dropped", lambda n: ast.Pass()
        case ast.Call():
            swappable = ast.unparse(node.func) not in SYMMETRIC and len(node.args) >= 2
            if swappable and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
                yield "arguments swapped", lambda n: _with(n, args=[n.args[1], n.args[0], *n.args[2:]])
            if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED and not node.keywords:
                inner = _operand(node)
                if inner is not None:
                    yield f"{node.func.attr} dropped", lambda n: _operand(n) or n


def _operand(call: ast.Call) -> ast.expr | None:
    """x of `x.sqrt()` and `torch.sqrt(x)`."""
    assert isinstance(call.func, ast.Attribute)
    if isinstance(call.func.value, ast.Name) and call.func.value.id in ("torch", "math", "np"):
        return call.args[0] if len(call.args) == 1 else None
    return call.func.value


def _confused(name: str) -> list[str]:
    return [b if name == a else a for a, b in CONFUSED if name in (a, b)]


def _with(node: ast.AST, **fields: object) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def _planted(tree: ast.AST, address: Address, change: Change) -> ast.AST:
    """The tree with the node at the address changed."""
    parent = tree
    for name, i in address[:-1]:
        value = getattr(parent, name)
        parent = value if i is None else value[i]
    name, i = address[-1]
    value = getattr(parent, name)
    new = change(value if i is None else value[i])
    if i is None:
        setattr(parent, name, new)
    else:
        value[i] = new
    return ast.fix_missing_locations(tree)


# Running tests


class Tree:
    """A copy of what the tests need, with scoresde's files written back from their syntax trees, as the
    mistakes are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", "*.png", "*.pyc")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, folder / name)

    def write(self, file: str, source: str) -> str:
        """Replace a file; returns what was there."""
        before = (self.folder / file).read_text()
        (self.folder / file).write_text(source)
        return before

    def run(
        self, tests: list[str], timeout: float, words: Iterable[str] = (), each: float = 0.0
    ) -> tuple[str, float, str]:
        """("passed" | "failed" | "unfinished", seconds, the end of the output). Tests whose names hold most
        of `words` come first; one that takes longer than `each` seconds fails."""
        environment = {
            **os.environ,
            WORDS: " ".join(words),
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-p",
            "benchmarks.mutation",
            "-o",
            f"faulthandler_timeout={each}",
            "-o",
            "faulthandler_exit_on_timeout=true",
            *tests,
        ]
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "unfinished", time.monotonic() - started, ""
        if done.returncode not in (0, 1, 2, 3):  # 2, 3: the mistake broke an import, also that of conftest
            raise RuntimeError(
                f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return "passed" if done.returncode == 0 else "failed", time.monotonic() - started, done.stdout[-1500:]


def files_of(module: str, which: int) -> list[str]:
    """Files of a module (which = 0) or its tests (1), below the root."""
    found: list[str] = []
    for pattern in MODULES[module][which]:
        found += [f for f in _python_files(pattern) if f not in found]
    if which == 0:
        others = {f for other in ELSEWHERE.get(module, ()) for f in files_of(other, 0)}
        found = [f for f in found if Path(f).name != "__init__.py" and f not in others]
    if not found:
        raise SystemExit(
            f"expected files {MODULES[module][which]} for the module {module}, found none; "
            f"correct MODULES in {Path(__file__).name}"
        )
    return found


def _python_files(pattern: str) -> list[str]:
    """The files that match, those in matching folders included."""
    matches = [g for f in ROOT.glob(pattern) for g in (f.rglob("*.py") if f.is_dir() else [f])]
    return sorted(str(f.relative_to(ROOT)) for f in matches if f.suffix == ".py")


def unharmed(tree: Tree, module: str, limit: float) -> None:
    """Refuses to go on if a module's tests fail without any mistake, and prints what time they take."""
    outcome, seconds, output = tree.run(files_of(module, 1), 10 * limit, each=limit / 2)
    if outcome != "passed":
        raise SystemExit(f"the tests of {module} must pass before mistakes are planted:\n{output}")
    late = "; what only their end would catch survives" if seconds > limit else ""
    print(f"without a mistake: {module}: passed in {seconds:.0f} s{late}", flush=True)


def attempt(tree: Tree, mistake: Mistake, limit: float) -> tuple[str, float, str]:
    before = tree.write(mistake.file, mistake.source())
    try:
        tests = files_of(mistake.module, 1)
        outcome, seconds, output = tree.run(tests, limit, mistake.words(), limit / 2)
        return outcome, seconds, _failed_test(output)
    finally:
        tree.write(mistake.file, before)


def _failed_test(output: str) -> str:
    named = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return named[0].split(" - ")[0] if named else ""


def draw(offered: list[Mistake], count: int, least: int, seed: int) -> list[Mistake]:
    """`least` of each module, and uniformly from all the rest up to `count`."""
    rng = random.Random(seed)
    chosen: list[Mistake] = []
    for module in dict.fromkeys(m.module for m in offered):
        own = [m for m in offered if m.module == module]
        chosen += rng.sample(own, min(least, len(own)))
    rest = [m for m in offered if m not in chosen]
    return chosen + rng.sample(rest, max(0, min(count - len(chosen), len(rest))))


def report(results: list[dict], offered: list[Mistake], seed: int) -> str:
    lines = [
        f"Seed {seed}; {len(results)} mistakes drawn from {len(offered)}.",
        "",
        "| module | offered | drawn | caught | survived |",
        "|---|---|---|---|---|",
    ]
    for module in [*dict.fromkeys(m.module for m in offered), "all"]:
        own = [r for r in results if module in (r["module"], "all")]
        caught = sum(r["caught"] for r in own)
        count = sum(module in (m.module, "all") for m in offered)
        share = f" ({caught / len(own):.0%})" if own else ""
        lines.append(f"| {module} | {count} | {len(own)} | {caught}{share} | {len(own) - caught} |")
    survivors = [r for r in results if not r["caught"]]
    lines += ["", "Survivors:" if survivors else "No survivors.", ""]
    lines += [
        f"- {r['file']}:{r['line']} ({r['kind']}): `{_short(r['was'])}` -> `{_short(r['becomes'])}`"
        for r in survivors
    ]
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 110 else line[:107] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--modules",
        nargs="+",
        choices=sorted(MODULES),
        default=["schedules", "ddpm", "laws", "tableau", "solvers"],
    )
    parser.add_argument("--count", type=count, default=30, help="mistakes in all")
    parser.add_argument("--least", type=int, default=0, help="mistakes in each module at least")
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock, printed")
    parser.add_argument("--timeout", type=float, default=40.0)
    parser.add_argument("--workers", type=count, default=2)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of mutation.json and mutation.md",
    )
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    offered = [
        m for module in options.modules for file in files_of(module, 0) for m in mistakes(module, ROOT / file)
    ]
    drawn = draw(offered, options.count, options.least, seed)
    print(f"seed {seed}: {len(drawn)} of {len(offered)} mistakes in {', '.join(options.modules)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Tree] = SimpleQueue()
        made = [Tree(Path(folder) / str(i)) for i in range(options.workers)]
        for tree in made:
            for file in {m.file for m in drawn}:
                tree.write(file, ast.unparse(ast.parse((ROOT / file).read_text())))
            trees.put(tree)

        def somewhere(task: Callable[[Tree], Any]) -> Any:
            tree = trees.get()
            try:
                return task(tree)
            finally:
                trees.put(tree)

        def sound(module: str) -> None:
            somewhere(lambda tree: unharmed(tree, module, options.timeout))

        def one(mistake: Mistake) -> dict:
            outcome, seconds, test = somewhere(lambda tree: attempt(tree, mistake, options.timeout))
            caught = outcome == "failed"
            change = f"{_short(mistake.was)} -> {_short(mistake.becomes)}"
            shown = f"{mistake.file}:{mistake.line} ({mistake.kind}): {change}"
            print(f"{'caught  ' if caught else 'SURVIVED'} {seconds:5.1f} s  {shown}  {test}", flush=True)
            return {
                **{k: v for k, v in asdict(mistake).items() if k not in ("address", "number")},
                "outcome": outcome,
                "caught": caught,
                "test": test,
            }

        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(sound, dict.fromkeys(m.module for m in drawn)))
            results = list(pool.map(one, drawn))
    text = report(results, offered, seed)
    print("\n" + text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mutation.md").write_text(text)
    (options.out / "mutation.json").write_text(
        json.dumps({"seed": seed, "offered": len(offered), "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
