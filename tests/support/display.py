"""A display for windows: the desktop's, or a virtual one on machines without."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def missing() -> str | None:
    """What windows lack here, for a message; None if they can be shown."""
    if importlib.util.find_spec("_tkinter") is None:
        return "this Python has no tkinter"
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and shutil.which("Xvfb") is None:
        return "there is neither a display nor Xvfb"
    return None


@contextmanager
def display() -> Iterator[None]:
    """Shows windows in a virtual display during the block, where there is Xvfb; else on the desktop."""
    program = shutil.which("Xvfb")
    if program is None:
        yield
        return
    before, (read, write) = os.environ.get("DISPLAY"), os.pipe()
    # It chooses a free number by itself, and writes it once it takes connections.
    options = ["-displayfd", str(write), "-screen", "0", "900x700x24", "-nolisten", "tcp"]
    server = subprocess.Popen([program, *options], pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        with open(read) as number:
            os.environ["DISPLAY"] = f":{number.readline().strip()}"
        yield
    finally:
        os.environ.pop("DISPLAY")
        os.environ |= {} if before is None else {"DISPLAY": before}
        server.terminate()
        server.wait()
