"""The command line for tests: in this process, which is quick, or in one of its own, as a user starts it."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import mlx.core  # noqa: F401  # first, or a command would load OpenBLAS into the process of the tests

from mlx_mtp.cli import main

Done = subprocess.CompletedProcess[str]


def arguments(*args: object) -> list[str]:
    """What starts `mlx-mtp` with these arguments."""
    return [sys.executable, "-m", "mlx_mtp", *map(str, args)]


def start(*args: object, stdin: str = "", **environment: str) -> Done:
    """Runs `mlx-mtp` in a process of its own: for what is about processes, streams, encodings and imports."""
    return subprocess.run(
        arguments(*args),
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=300,
        env={**os.environ, **environment},
    )


def run(*args: object, stdin: str = "") -> Done:
    """The same in this process, in which MLX is loaded already and multiplies with its own BLAS.

    For all that a command does with its arguments, files and models. Ctrl-C would end the process of the tests.
    """
    typed = io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")), "utf-8")
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        # Files, because `main` closes the descriptor of a stdout that can't be written to.
        with paths[0].open("w", encoding="utf-8") as out, paths[1].open("w", encoding="utf-8") as err:
            # pytest has set up logging, so that `main` doesn't.
            log, shown = logging.getLogger("mlx_mtp"), logging.StreamHandler(err)
            before = log.level
            log.addHandler(shown)
            try:
                with mock.patch.multiple(sys, argv=["mlx-mtp", *map(str, args)], stdin=typed, stdout=out, stderr=err):
                    main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                log.removeHandler(shown)
                log.setLevel(before)
        return Done(args, code, *(path.read_text("utf-8", "surrogateescape") for path in paths))
