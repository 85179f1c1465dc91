"""What every test process needs."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path


def pytest_configure() -> None:
    """Makes tests the same everywhere.

    Ctrl-C works in the commands that they start: a shell's background jobs, and their children, ignore it. Profiles
    that the user has made of this machine aren't used. MLX compiles formulas if it finds a C++ compiler, which it asks
    for once: tests that count kernels (dispatches.py) have them compiled into graphs that never run.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not shutil.which("g++"):
        compiler = Path(tempfile.mkdtemp()) / "g++"
        compiler.touch(0o755)
        os.environ["PATH"] = f"{compiler.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["MLX_MTP_PROFILES"] = os.path.join(os.devnull, "profiles")
