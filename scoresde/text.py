"""Calls in text, `name(value, option=value, ...)`: for command lines and configuration files.

They are read from a syntax tree; nothing is evaluated, and only names of a given list can be called.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a text may name: `makers` by name, a word for them, an example, and where to look them up."""

    word: str
    example: str
    makers: Mapping[str, Callable[..., Any]]
    see: str = ""


def read_call(text: str, kind: Kind) -> Any:
    """What `name` or `name(value, option=value, ...)` makes; values are Python literals, or calls of the same
    kind. Raises ValueError, in one line, for anything else."""
    wrong = ValueError(
        f'expected a {kind.word} as in "{kind.example}", with plain values; found {str(text)[:80]!r}'
    )
    if not isinstance(text, str) or len(text) > 400:
        raise wrong
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise wrong from None
    return _made(ast.Call(node, [], []) if isinstance(node, ast.Name) else node, kind, wrong)


def spell(function: Callable[..., Any]) -> str:
    """The text of a function with options given by functools.partial: `karras(rho=5.0)`."""
    if not isinstance(function, partial):
        return function.__name__
    values = [*map(_spelled, function.args)]
    options = [f"{name}={_spelled(value)}" for name, value in function.keywords.items()]
    return f"{spell(function.func)}({', '.join([*values, *options])})"


def _spelled(value: Any) -> str:
    return spell(value) if callable(value) else repr(value)


def _made(node: ast.AST, kind: Kind, wrong: ValueError) -> Any:
    """What the syntax tree of `name(option=value, ...)` stands for."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise wrong
    name = node.func.id
    if name not in kind.makers:
        known = ", ".join(sorted(kind.makers))
        raise ValueError(f"expected a {kind.word} from {known}; found {name!r}.{kind.see}")
    keywords = [keyword.arg for keyword in node.keywords]
    if None in keywords or len(set(keywords)) < len(keywords):  # **{...}, or a name twice
        raise wrong
    values = [_value(value, kind, wrong) for value in node.args]
    options = {str(keyword.arg): _value(keyword.value, kind, wrong) for keyword in node.keywords}
    maker = kind.makers[name]
    try:
        return maker(*values, **options)
    except (TypeError, AttributeError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"{what}; expected {name}{inspect.signature(maker)}") from error


def _value(node: ast.expr, kind: Kind, wrong: ValueError) -> Any:
    if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id in kind.makers):
        return _made(ast.Call(node, [], []) if isinstance(node, ast.Name) else node, kind, wrong)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise wrong from None
