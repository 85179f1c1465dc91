"""Node and the packages of tests/javascript, which `scripts/test` installs there with npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "javascript"
PACKAGES = FOLDER / "node_modules"


def find_client() -> Path | None:
    """The folder of OpenAI's client; None if it, or node, is missing."""
    client = PACKAGES / "openai"
    return client if shutil.which("node") and client.exists() else None


def play(address: str, part: str, request: dict[str, Any], more: Any = None) -> Any:
    """Plays a part of client.mjs against a server; returns what it printed."""
    arguments = [f"{address}/v1", part, json.dumps(request), json.dumps(more)]
    done = subprocess.run(
        ["node", FOLDER / "client.mjs", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
