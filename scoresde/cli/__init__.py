"""The command `scoresde`: train, sample, choose a solver, and the main job on real digits, `quickstart`.

What a user gets wrong ends with one line on the terminal and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro

from .choosing import compare, recommend, tune
from .common import best_threads, parse_solver
from .sampling import list_solvers, sample
from .training import quickstart, train

__all__ = ["main", "parse_solver"]


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (default: those of the process); the exit code."""
    commands: dict[str, Callable[..., None]] = {
        **{f.__name__: best_threads()(f) for f in (quickstart, train, sample, compare, recommend, tune)},
        "solvers": list_solvers,
    }
    description = "Score-based generative models around one VP-SDE. Begin with: scoresde quickstart"
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="scoresde", description=description, args=args)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"scoresde: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nscoresde: interrupted. {interrupt}", file=sys.stderr)
        return 130
    return 0
