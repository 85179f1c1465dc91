"""What every test process needs."""

from __future__ import annotations

import os
import signal

from tests.support import dispatches, display

collect_ignore = ["test_example_app.py"] if display.missing() else []


def pytest_configure() -> None:
    """Makes tests the same everywhere.

    Ctrl-C works in the commands that they start: a shell's background jobs, and their children, ignore it. Profiles
    that the user has made of this machine aren't used. Kernels can be counted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    dispatches.prepare()
    os.environ["MLX_MTP_PROFILES"] = os.path.join(os.devnull, "profiles")


def pytest_report_header() -> str | None:
    """Says what isn't tested on this machine."""
    lacking = display.missing()
    return f"not tested: tests/test_example_app.py, because {lacking}" if lacking else None
