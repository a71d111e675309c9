"""The Python code of README.md and the examples in docstrings run and say what they say.

A comment line right above a block of README.md changes what is done with it:
`<!-- slow -->` marks it as slow, `<!-- skip: reason -->` leaves it out.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def code_blocks(markdown: str) -> Iterator[tuple[int, str, str]]:
    """(line, note, code) of every Python block; line is that of its first line of code."""
    for match in BLOCK.finditer(markdown):
        yield markdown.count("\n", 0, match.start("code")) + 1, match["note"] or "", match["code"]


def as_parameter(line: int, note: str, code: str):
    marks = [pytest.mark.slow] if note == "slow" else []
    if note.startswith("skip: "):
        marks = [pytest.mark.skip(reason=note.removeprefix("skip: "))]
    return pytest.param(line, code, id=f"line {line}", marks=marks)


def run_block(line: int, code: str, name: str = "README.md") -> dict[str, object]:
    """Runs `code`, with line numbers that fit the file it comes from, and returns its variables."""
    variables: dict[str, object] = {"__name__": "__main__"}
    exec(compile("\n" * (line - 1) + code, name, "exec"), variables)
    return variables


def docstring_examples(source: str, module: str) -> Iterator[doctest.DocTest]:
    """The examples of every docstring in `source`.

    Read from the syntax tree: doctest's own finder silently passes over functions that carry a wrapper, such
    as the tests' type checker.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and ">>>" in text:
                name = f"{module}.{getattr(node, 'name', '__doc__')}"
                yield doctest.DocTestParser().get_doctest(text, {}, name, module, node.body[0].lineno - 1)


def run_examples(examples: list[doctest.DocTest], variables: dict[str, object]) -> str:
    """Runs the examples, each docstring with its own copy of `variables`; returns a report of what failed."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        example.globs = dict(variables)
        runner.run(example, out=report.append)
    return "".join(report)


def modules_with_examples() -> Iterator[str]:
    for path in sorted((ROOT / "scoresde").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if any(True for _ in docstring_examples(path.read_text(encoding="utf-8"), module)):
            yield module


README = [as_parameter(*block) for block in code_blocks((ROOT / "README.md").read_text(encoding="utf-8"))]
MODULES = list(modules_with_examples())


def test_a_note_belongs_to_the_block_below_it():
    text = "<!-- command: x -->\n```bash\nls\n```\n```python\n0\n```\n<!-- skip: y -->\n```python\n1\n```\n"
    assert [(note, code) for _, note, code in code_blocks(text)] == [("", "0\n"), ("skip: y", "1\n")]


@pytest.mark.parametrize(("line", "code"), README)
def test_readme(line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # where the README's network is
    monkeypatch.chdir(tmp_path)
    run_block(line, code)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    report = run_examples(list(docstring_examples(source, name)), vars(module))
    assert not report, report


def test_the_commands_are_one_line_each():
    """What continuous integration runs is what the README says."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("quickstart", "tests"):
        block = rf"^<!-- command: {name} -->\n```bash\n[^\n]+\n```$"
        assert len(re.findall(block, text, re.MULTILINE)) == 1, name


SAMPLE = """
<!-- slow -->
```python
x = 1
```
text
<!-- skip: needs a GPU -->
```python
1 / 0
```
```bash
ls
```
```python
y = 2
z = y / 0
```
"""


EXAMPLES = '''
def f():
    """Two.

    >>> one + 1
    2
    """

class A:
    def g(self):
        """>>> one
        3
        """
'''


def test_blocks_of_a_readme_are_found_and_can_fail():
    blocks = list(code_blocks(SAMPLE))
    assert [(line, note) for line, note, _ in blocks] == [(4, "slow"), (9, "skip: needs a GPU"), (15, "")]
    marks = [[mark.name for mark in as_parameter(*block).marks] for block in blocks]
    assert marks == [["slow"], ["skip"], []]
    assert run_block(blocks[0][0], blocks[0][2])["x"] == 1
    with pytest.raises(ZeroDivisionError) as error:
        run_block(blocks[2][0], blocks[2][2])
    assert error.traceback[-1].lineno + 1 == 16


def test_examples_in_docstrings_are_found_and_can_fail():
    examples = list(docstring_examples(EXAMPLES, "m"))
    assert [example.name for example in examples] == ["m.f", "m.g"]
    assert not run_examples(examples[:1], {"one": 1})
    report = run_examples(examples, {"one": 1})
    assert 'File "m", line 11, in m.g' in report and report.split()[-4:] == ["Expected:", "3", "Got:", "1"]
