"""`mlx-mtp generate`: answers one prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .generation import generating, json_file

if TYPE_CHECKING:
    from ..session.options import GenerationOptions


@generating()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Default: read it from stdin.", metavar="PROMPT", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or repository. Default: the demo pair.", metavar="MODEL")
    ] = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    adapter: o.Adapter = None,
    *,
    generation: GenerationOptions,
    stop: o.Stop = None,
    tools: Annotated[
        Any,
        typer.Option(
            help="JSON file with a list of tools, as in OpenAI's interface.", metavar="FILE", parser=json_file
        ),
    ] = None,
    tool_choice: Annotated[
        str | None, typer.Option(help="auto, none, required, or the name of a tool.", metavar="CHOICE")
    ] = None,
    system: o.System = None,
    think: o.Think = False,
    raw: o.Raw = False,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    as_json: o.Json = False,
    trace: o.TraceFile = None,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Answers one prompt, on stdout."""
    o.check_stop(stop)
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one to stdin", param_hint="PROMPT")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
    if raw and (system or think):
        raise typer.BadParameter("--system and --think need the chat template", param_hint="--raw")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    asked = prompt if raw else messages
    generation = replace(
        generation, stop=stop, thinking=think, chat_template=not raw, tools=tools, tool_choice=tool_choice
    )
    with o.load(model, drafter, no_draft, quantize, quantize_drafter, adapter=adapter) as lm, o.tracing(lm, trace):
        try:
            if as_json:
                answer = lm.generate(asked, options=generation)
                print(json.dumps(answer.as_dict()))  # ASCII, so that the encoding of stdout doesn't matter
                return
            chunks = o.show(lm.stream(asked, options=generation))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(o.INTERRUPTED) from None
        print(flush=True)
        print(o.status(chunks[-1].stats), file=sys.stderr)
