"""The command line: `mlx-mtp`, one module per command.

Commands import MLX when they run, so that `--help` is quick and a faster BLAS can be loaded before.
Exit codes: 0 done, 1 the work failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import MTPError
from . import chat, convert, generate, info

app = typer.Typer(
    help="Gemma 4 with its multi-token-prediction drafters, on MLX. Without a model: the embedded demo pair.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="chat")(chat.chat)
app.command(name="convert")(convert.convert)
app.command(name="generate")(generate.generate)
app.command(name="info")(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-mtp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mlx_mtp").setLevel(logging.INFO)
    try:
        app()
    except MTPError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has gone; the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
