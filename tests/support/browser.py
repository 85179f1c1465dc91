"""The browser to see the server's page in: the Chromium, or what is made of it, that this machine has.

As a command, it succeeds if there is one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

from tests.support.node import PACKAGES

COMMANDS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "microsoft-edge")
APPLICATIONS = ("Chromium", "Google Chrome", "Microsoft Edge")


def find_chromium() -> str | None:
    """Path of the program: a command, one of macOS's applications, or what npm brought; None if there is none."""
    places = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in APPLICATIONS]
    places.append(str(PACKAGES / ".chromium" / "chromium"))
    return next((found for it in [*COMMANDS, *places] if (found := shutil.which(it))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Runs it without a window."""
    from playwright.sync_api import sync_playwright  # not above: whoever only looks for a browser needn't wait for it

    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=find_chromium()) as browser:
        yield browser


if __name__ == "__main__":
    sys.exit(find_chromium() is None)
