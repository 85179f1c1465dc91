"""What every test process needs."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

import mlx_mtp
from mlx_mtp.server.app import make_app
from mlx_mtp.server.registry import Models
from tests.support import browser, dispatches, display, node
from tests.support.server import entry, running

MISSING = {
    name: what
    for name, what in (
        ("test_server_page.py", "" if browser.find_chromium() else "no Chromium or Chrome"),
        ("test_server_javascript.py", "" if node.find_client() else "no node with the packages of tests/javascript"),
        ("test_example_app.py", display.missing()),
    )
    if what
}
"""Tests that can't run here, and why."""

collect_ignore = list(MISSING)


def pytest_configure() -> None:
    """Makes tests the same everywhere.

    Ctrl-C works in the commands that they start: a shell's background jobs, and their children, ignore it. Profiles
    that the user has made of this machine aren't used. Kernels can be counted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    dispatches.prepare()
    os.environ["MLX_MTP_PROFILES"] = os.path.join(os.devnull, "profiles")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which tests couldn't run."""
    for name, what in MISSING.items():
        terminalreporter.line(f"tests/{name} wasn't run: {what}", yellow=True)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> None:
    """Gives a test the package's loggers as Python makes them, whatever ran before it in this process."""
    logging.getLogger("mlx_mtp").setLevel(logging.NOTSET)
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "mlx_mtp":
            logging.getLogger(name).disabled = False


@pytest.fixture(scope="module")
def lm() -> Iterator[mlx_mtp.MTPModel]:
    """The embedded pair."""
    with mlx_mtp.load() as model:
        yield model


@pytest.fixture(scope="module")
def address(lm: mlx_mtp.MTPModel) -> Iterator[str]:
    """The address of a server that offers it as "demo"."""
    with running(make_app(Models([entry("demo", lm)]))) as url:
        yield url
