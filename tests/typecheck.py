"""The runtime type checker of the tests: beartype, where an int may stand for a float (PEP 484)."""

import contextlib
import random

from beartype import BeartypeConf, beartype

# Of a long list beartype looks at one item, by a draw from `random`, whose state hypothesis' strategies must
# leave alone. It gets a generator of its own.
with contextlib.suppress(ImportError):
    from beartype._check.code import codemain

    codemain.getrandbits = random.Random(0).getrandbits

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
