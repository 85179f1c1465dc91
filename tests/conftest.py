"""What every test process needs."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Makes Ctrl-C work in the commands that tests start: a shell's background jobs, and their children, ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
