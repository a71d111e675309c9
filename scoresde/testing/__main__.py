"""`python -m scoresde.testing MODULE:SAMPLER`: certify a sampler, whoever wrote it.

    python -m scoresde.testing my_samplers:heun --order 2
    python -m scoresde.testing my_samplers:dpmpp --process my_samplers:process --tolerance 1e-4

SAMPLER is a function `sampler(denoise, x, times, noise)`, as in scoresde/testing/black_box.py, or an object
with `.tableau(sde, times)` or `.solve(model, x, times, noise=...)`. The exit status is 1 if a verdict is
FAIL.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from typing import Any

from .certify import certify


def named(text: str) -> Any:
    """The object that `MODULE:NAME` names. Importing what the user names is what this command is for; nothing
    else in the package imports by name."""
    if text.count(":") != 1:
        raise argparse.ArgumentTypeError(f"expected MODULE:NAME, found {text!r}")
    try:
        return pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"cannot import {text!r}: {error}; run it where the module is"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Print the certificate; 0 if it passed."""
    parser = argparse.ArgumentParser(
        prog="python -m scoresde.testing",
        description="Certify a sampler: a function sampler(denoise, x, times, noise), or a solver.",
    )
    parser.add_argument("sampler", metavar="MODULE:SAMPLER", help="what to certify")
    parser.add_argument(
        "--process", default="scoresde:VPSDE", metavar="MODULE:SDE",
        help="the process that its times belong to, or a function that makes it (default: %(default)s); "
        "scoresde:EDM if its times are noise levels",
    )  # fmt: skip
    parser.add_argument("--order", type=int, help="the order claimed (weak order of a stochastic sampler)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-9,
        help="of what should hold to rounding (default: %(default)g); 1e-4 for a sampler in float32",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        sampler, process = named(given.sampler), named(given.process)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    process: Any = process() if callable(process) else process
    certificate = certify(sampler, process, order=given.order, tolerance=given.tolerance, name=given.sampler)
    print(certificate)
    return 0 if certificate.passed else 1


if __name__ == "__main__":
    sys.exit(main())
