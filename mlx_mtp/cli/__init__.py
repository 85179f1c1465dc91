"""The command line `mlx-mtp`: one module per command.

Commands import MLX only when they run, so that `--help` is fast and a faster BLAS can be loaded first.
Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.
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
from . import batch, bench, chat, convert, doctor, generate, get, info, models, serve, tune, verify
from . import options as o

# The base class of typer's errors of usage, for which it has no public name.
_UsageError: Any = typer.BadParameter.__base__

_FIRST_STEPS = """\
mlx-mtp chat      talks to the small demo pair, without a download; chat MODEL to any Gemma 4
mlx-mtp models    lists the sizes of Gemma 4: what fits in memory here, and how fast it is predicted to be
mlx-mtp get E4B   downloads that size with its drafter, and says how to chat with it
mlx-mtp doctor    says what this machine is, and what is wrong if something doesn't work
mlx-mtp --help    lists all commands; each of them has --help too"""

app = typer.Typer(
    help="Gemma 4 with its multi-token-prediction drafters, on MLX. Without a model: the embedded demo pair.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="batch", short_help="Answers the prompts of a file, several at a time.")(batch.batch)
app.command(name="bench", short_help="Measures speed and memory, also beside other programs.")(bench.bench)
app.command(name="chat")(chat.chat)
app.command(name="convert")(convert.convert)
app.command(name="doctor", short_help="Shows the machine, what is wrong with it, and what to do.")(doctor.doctor)
app.command(name="generate")(generate.generate)
app.command(name="get", short_help="Downloads a model and its drafter.")(get.get)
app.command(name="info", short_help="Shows a model's sizes, and whether it fits in memory.")(info.info)
app.command(name="models", short_help="Lists the models: what is downloaded, what fits, how fast.")(models.models)
app.command(name="serve", short_help="Serves models over HTTP, as OpenAI's and Anthropic's interfaces.")(serve.serve)
app.command(name="tune", short_help="Measures which batch and draft length suit this machine.")(tune.tune)
app.command(name="verify", short_help="Checks on this machine that drafting changes no text.")(verify.verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-mtp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback prints it
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(_FIRST_STEPS, file=sys.stderr)
        raise typer.Exit(2)


def main() -> None:
    """Runs the command line, and exits."""
    _prepare_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mlx_mtp").setLevel(logging.INFO)
    try:
        sys.exit(app(standalone_mode=False))
    except (MTPError, _UsageError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, MTPError) else 2)
    except typer.Abort:  # Ctrl-C outside an answer
        # A normal exit would wait for a thread that may be loading a model.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(o.INTERRUPTED)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        # The buffer of stdout can't be written (closed pipe, full disk): keep the interpreter from trying it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: {o.os_message(error)}", file=sys.stderr)
        sys.exit(1)


def _prepare_streams() -> None:
    """Makes the standard streams usable whatever they are."""
    # A closed stream is None, and print(file=None) prints to stdout.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - open until the process ends
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as for arguments; the tokenizer refuses invalid UTF-8
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that isn't UTF-8 can't show all characters


def _message(error: Exception) -> str:
    """The message of an error in one line."""
    if not isinstance(error, _UsageError):
        return str(error)
    command = error.ctx.command_path if error.ctx else "mlx-mtp"
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; {command} --help shows what there is"
