"""`mlx-mtp generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from . import options as o


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Default: what stdin holds.", metavar="PROMPT", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or repository. Default: the demo pair.", metavar="MODEL")
    ] = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    adapter: o.Adapter = None,
    draft_length: o.DraftLength = "auto",
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.", metavar="TEXT")
    ] = None,
    system: o.System = None,
    think: o.Think = False,
    raw: o.Raw = False,
    no_sanitize: o.NoSanitize = False,
    exactness: o.Exactness = "fast",
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    as_json: o.Json = False,
    trace: o.TraceFile = None,
    debug: o.Debug = False,
) -> None:
    """Answers one prompt on stdout."""
    o.check_decoding(draft_length, exactness)
    if stop and not all(stop):
        raise typer.BadParameter("an empty text would stop everything", param_hint="--stop")
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one to stdin", param_hint="PROMPT")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
    if raw and (system or think):
        raise typer.BadParameter("there is no system prompt and no thinking without a chat", param_hint="--raw")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    asked = prompt if raw else messages

    with o.load(model, drafter, no_draft, quantize, quantize_drafter, adapter=adapter) as lm, o.tracing(lm, trace):
        given: dict[str, Any] = {
            "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "seed": seed, "stop": stop, "draft_length": draft_length, "exactness": exactness, "thinking": think,
            "sanitize": not no_sanitize, "chat_template": not raw,
        }  # fmt: skip
        try:
            if as_json:
                answer = lm.generate(asked, **given)
                assert not isinstance(answer, list)
                print(json.dumps(answer.as_dict()))  # ASCII, which is the same in every encoding
                return
            chunks = o.show(lm.stream(asked, **given))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(o.INTERRUPTED) from None
        print(flush=True)
        print(o.status(chunks[-1].stats), file=sys.stderr)
