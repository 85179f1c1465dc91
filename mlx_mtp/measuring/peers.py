"""Peers: other programs that decode with the same weights, each in a process of its own, see peer_protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MTPError
from ..system.blas import has_openblas
from .peer_protocol import Job, Measured

PEERS = ("mlx-lm", "mlx-vlm")
"""Names of the peers, as one installs them."""

_ROOT = Path(__file__).parents[2]
"""What a peer's environment needs on its path to find this package."""


def check_installed(names: Sequence[str]) -> None:
    """Checks that peers can be run by this Python, before anything is loaded.

    Raises:
        MTPError: One of them isn't installed.
    """
    for name in names:
        if find_spec(name.replace("-", "_")) is None:
            raise MTPError(f"there is no {name} to compare with: pip install {name}")


class Peer:
    """A running peer; closing it ends its process.

    Attributes:
        name: One of PEERS.
        drafts: Whether it can use the drafter.
        version: Its version.
    """

    def __init__(self, name: str, job: Job, python: str | Path = sys.executable) -> None:
        """Starts a peer and waits until it has loaded the models.

        Args:
            name: One of PEERS.
            job: What to load.
            python: The Python of an environment that has the peer.

        Raises:
            MTPError: It failed, or multiplies with another BLAS.
        """
        self.name, self.drafts = name, name == "mlx-vlm" and job["drafter"] is not None
        # What a peer says besides is only wanted if it fails.
        self._said = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see `close`
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(  # noqa: S603 - one of our own modules
            [python, "-m", f"mlx_mtp.measuring.peer_{name.replace('-', '_')}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for us: a peer that has ended can't be asked any more
        )  # fmt: skip
        try:
            about = self._ask(job)
            self.version = str(about["version"])
            if about["openblas"] != has_openblas():
                with_, without = (name, "mlx-mtp") if about["openblas"] else ("mlx-mtp", name)
                raise MTPError(f"{with_} multiplies with OpenBLAS and {without} doesn't: install the same for both")
        except BaseException:
            self.close()
            raise

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, draft_length: int) -> Measured:
        """Decodes a batch greedily, and measures that.

        Args:
            prompts: Token ids of each row.
            tokens: Tokens of each row, whatever they are.
            draft_length: Tokens to draft in a round; 0 for plain decoding.

        Raises:
            MTPError: The peer failed.
        """
        asked = {"prompts": [list(it) for it in prompts], "tokens": tokens, "draft_length": draft_length}
        found: Measured = self._ask(asked)
        return found

    def close(self) -> None:
        """Ends the process, whatever it is doing, and those that it has started: they hold its pipes open."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._said.close()

    def _ask(self, what: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        try:
            stdin.write(json.dumps(what) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and what it said is read below
        if line := stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._said.seek(0)
        said = [line.strip() for line in self._said if line.strip()]
        raise MTPError(f"{self.name} failed with this pair: {said[-1] if said else 'it said nothing'}")
