"""The browser to see the server's page in: the Chromium, or what is made of it, that this machine has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

COMMANDS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "microsoft-edge")
APPLICATIONS = ("Chromium", "Google Chrome", "Microsoft Edge")


def find_chromium() -> str | None:
    """Path of the program, a command or one of macOS's applications; None if this machine has none."""
    commands = (shutil.which(name) for name in COMMANDS)
    applications = (f"/Applications/{name}.app/Contents/MacOS/{name}" for name in APPLICATIONS)
    return next(filter(None, commands), None) or next((it for it in applications if Path(it).exists()), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Runs it without a window."""
    from playwright.sync_api import sync_playwright  # not above: whoever only looks for a browser needn't wait for it

    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=find_chromium()) as browser:
        yield browser
