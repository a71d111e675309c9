"""What the command lines of benchmarks have in common."""

from __future__ import annotations

import argparse


def parser(text: str | None) -> argparse.ArgumentParser:
    """One whose help begins with a docstring as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def count(text: str) -> int:
    """A whole number of at least 1, for `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def several(text: str) -> int:
    """A whole number of at least 2, for `type`."""
    if count(text) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, found {text!r}")
    return int(text)
