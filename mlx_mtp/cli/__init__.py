"""The command line: `mlx-mtp`, one module per command.

Commands import MLX when they run, so that `--help` is quick and a faster BLAS can be loaded before.
Exit codes: 0 done, 1 the work failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import MTPError
from . import batch, chat, convert, generate, info, tune
from . import options as o

# What typer raises for wrong use; it has no public name for it.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Gemma 4 with its multi-token-prediction drafters, on MLX. Without a model: the embedded demo pair.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="batch", short_help="Answers the prompts of a file, several at a time.")(batch.batch)
app.command(name="chat")(chat.chat)
app.command(name="convert")(convert.convert)
app.command(name="generate")(generate.generate)
app.command(name="info", short_help="Shows what a model is, and whether it fits in memory.")(info.info)
app.command(name="tune", short_help="Measures which batch and draft length suit this machine.")(tune.tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-mtp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def main() -> None:
    """Runs the command line."""
    # A stream that is closed is None, and what is printed to None goes to stdout.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mlx_mtp").setLevel(logging.INFO)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; the tokenizer refuses what isn't UTF-8
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that isn't UTF-8 lacks characters
    try:
        sys.exit(app(standalone_mode=False))
    except (MTPError, _UsageError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, MTPError) else 2)
    except typer.Abort:  # Ctrl-C outside an answer
        # At once: the interpreter would wait for the thread that is just loading a model.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(o.INTERRUPTED)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        # What stdout still holds can't be written (its reader has gone, or its disk is full): the interpreter must
        # not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: {o.os_message(error)}", file=sys.stderr)
        sys.exit(1)


def _message(error: Exception) -> str:
    """What an error says, in one line."""
    if not isinstance(error, _UsageError):
        return str(error)
    command = error.ctx.command_path if error.ctx else "mlx-mtp"
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; {command} --help shows what there is"
