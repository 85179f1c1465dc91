"""Takes the screenshot of the server's page that docs/server.md shows: the embedded pair answers two questions.

Needs Chromium or Chrome.

    python scripts/screenshot_page.py [docs/server_page.png]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mlx_mtp.system.blas import use_openblas

use_openblas()  # before MLX is imported

import typer

import mlx_mtp
from mlx_mtp.server.app import make_app
from mlx_mtp.server.registry import Models
from tests.support.browser import chromium
from tests.support.server import entry, running

QUESTIONS = ("What is a drafter?", "Write a Python function.")


def main(
    path: Annotated[Path, typer.Argument(help="Where to write the image, a PNG")] = Path("docs/server_page.png"),
) -> None:
    """Asks the questions in the page, and takes its picture."""
    with mlx_mtp.load() as lm, running(make_app(Models([entry("demo", lm)]))) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1120, "height": 740})
        page.goto(address)
        page.fill("#temperature", "0")
        for answers, question in enumerate(QUESTIONS, start=1):
            page.fill("#text", question)
            page.click("#send")
            page.locator(".figures:not(:empty)").nth(answers - 1).wait_for()
        page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    typer.run(main)
