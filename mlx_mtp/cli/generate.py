"""`mlx-mtp generate`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

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
    exactness: o.Exactness = "fast",
    quantize: o.Quantize = None,
    as_json: o.Json = False,
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
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})

    with o.load(model, drafter, no_draft, quantize) as lm:
        stream = lm.stream(
            messages, max_tokens, temperature, top_k, top_p, min_p, seed, stop, draft_length, exactness, thinking=think
        )
        try:
            chunks = list(stream) if as_json else o.show(stream)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(o.INTERRUPTED) from None
        last = chunks[-1]
        if as_json:
            answer = {
                "text": "".join(c.text for c in chunks),
                "thought": "".join(c.thought for c in chunks),
                "tokens": [t for c in chunks for t in c.tokens],
                "finish_reason": last.finish_reason,
                "stats": dataclasses.asdict(last.stats) | last.stats.rates(),
            }
            print(json.dumps(answer, ensure_ascii=False))
        else:
            print(flush=True)
            print(o.status(last.stats), file=sys.stderr)
