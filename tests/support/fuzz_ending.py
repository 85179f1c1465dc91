"""A batch of cases that the tests of the fuzzer make up. It imports little, so its processes start at once."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import Any


def ending(kinds: list[str], seed: int, numbers: range, state: Any, out: Connection) -> None:
    """Case 3 is wrong, 5 ends the process, and 7 takes too much."""
    for number in numbers:
        state[0], state[1] = number, state[1] + 1
        if number == 3:
            out.send((number, "is wrong", ""))
        elif number == 5:
            os._exit(1)
        elif number == 7:
            out.send((number, "", "takes too much"))
            break
    out.send(None)
