"""`mlx-mtp batch`: answers the prompts of a JSONL file.

Every answer is written when it is there, so a run that was killed goes on where it stopped: lines whose answer is in
the output already are left out. When all are there, the output is put into the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import MTPError, PromptError
from ..files import parse_json, replacing, writable
from . import options as o
from . import render

if TYPE_CHECKING:
    from ..api import MTPModel
    from ..session.options import GenerationOptions


@o.generating()
def batch(
    source: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help='Lines such as {"prompt": "...", "max_tokens": 100}.')
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="File for the answers.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or repository. Default: the demo pair.", metavar="MODEL")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Prompts that decode at a time.", metavar="auto|N")] = "auto",
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    adapter: o.Adapter = None,
    *,
    generation: GenerationOptions,
    raw: o.Raw = False,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    trace: o.TraceFile = None,
    debug: o.Debug = False,
) -> None:
    """Answers the prompts of a file, several at a time; can be stopped and run again.

    A line of IN.jsonl has "prompt" (text, messages or token ids), and may have "id" and options of its own:
    max_tokens, temperature, top_k, top_p, min_p, seed, draft_length, exactness, stop, stop_token_ids, thinking, tools,
    ignore_eos, sanitize, chat_template.
    A line of OUT.jsonl has its "index" and "id", and text, tokens, finish_reason and stats, or "error"; lines with an
    error are tried again by the next run, and answers stay, with whatever options they were made.
    """
    size = _size(batch_size)
    try:
        lines = source.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise PromptError(f"{source} isn't UTF-8") from None
    if str(output) == "-" or (output.exists() and not output.is_file()):
        raise PromptError(f"{output} is no plain file, which it takes to go on after a stop: name one for the answers")
    output = writable(output)  # a link stays one
    if output == source.resolve():
        raise PromptError(f"{output} is the input: choose another name for the answers")
    # What went wrong may have been the model's or an option's fault.
    done = {i: answer for i, answer in _finished(output, lines).items() if "error" not in answer}
    todo = [i for i, line in enumerate(lines) if line.strip() and i not in done]
    generation = replace(generation, chat_template=not raw)
    try:
        output.open("a").close()  # before anything takes long
        with (
            o.load(model, drafter, no_draft, quantize, quantize_drafter, adapter=adapter) as lm,
            o.tracing(lm, trace),
            _only(output, done) as file,
        ):
            answers = _answers(lm, lines, todo, size, generation)
            with render.progress("prompts", len(todo)) as report:
                for number, answer in enumerate(answers, 1):
                    done[answer["index"]] = answer
                    file.write(_line(answer))
                    file.flush()
                    report(number)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on: {len(done)} answers are in {output}", file=sys.stderr)
        raise typer.Exit(o.INTERRUPTED) from None
    _only(output, dict(sorted(done.items()))).close()
    if failed := sum("error" in answer for answer in done.values()):
        raise MTPError(f'{failed} of {len(done)} lines couldn\'t be answered: see their "error" in {output}')


def _answers(
    lm: MTPModel, lines: list[str], todo: list[int], size: int | Literal["auto"], generation: GenerationOptions
) -> Iterator[dict[str, Any]]:
    """The answers to some lines, as they are finished."""
    from ..decode.sampling import row_seed

    bad: list[dict[str, Any]] = []
    sent: list[int] = []

    def prompts() -> Iterator[dict[str, Any]]:
        for i in todo:
            try:
                item = _parse(lines[i])
            except PromptError as error:
                bad.append(_head(i, lines[i]) | {"error": str(error)})
                continue
            sent.append(i)
            # A line's seed depends on its place in the file, not on what was answered in an earlier run.
            own = {} if generation.seed is None else {"seed": row_seed(generation.seed, i)}
            yield own | item

    for place, result in lm.generate_each(prompts(), size, options=generation):
        while bad:
            yield bad.pop(0)
        i = sent[place]
        head = _head(i, lines[i])
        if isinstance(result, MTPError):
            yield head | {"error": str(result)}
        else:
            yield head | result.as_dict()
    yield from bad


def _parse(line: str) -> dict[str, Any]:
    """A line's prompt and options.

    Raises:
        PromptError: It is no JSON object with a prompt.
    """
    try:
        item = parse_json(line, parse_constant=_no_constant)
    except ValueError as error:
        raise PromptError(f"not JSON: {error}") from None
    if not isinstance(item, dict) or "prompt" not in item:
        raise PromptError('not an object with "prompt"')
    item.pop("id", None)
    return item


def _head(index: int, line: str) -> dict[str, Any]:
    """What identifies an answer: its line's number from 0, the line's own id, and a hash of the line."""
    try:
        name = parse_json(line, parse_constant=_no_constant).get("id")
    except (ValueError, AttributeError):
        name = None
    return {"index": index, "id": name, "line_sha256": hashlib.sha256(line.encode()).hexdigest()}


def _no_constant(name: str) -> None:
    """NaN and the infinities, which Python reads and JSON doesn't have."""
    raise ValueError(f"{name} is no JSON value")


def _finished(output: Path, lines: list[str]) -> dict[int, dict[str, Any]]:
    """Answers of an earlier run to lines that are the same now.

    Raises:
        PromptError: The file holds something else.
    """
    if not output.exists():
        return {}
    done = {}
    text = output.read_text("utf-8", errors="replace")
    whole, _, rest = text.rpartition("\n")  # a killed run may have left half a line
    for line in whole.split("\n") if whole else ():
        try:
            answer = parse_json(line)
            index, digest = int(answer["index"]), answer["line_sha256"]
        except (ValueError, KeyError, TypeError, OverflowError):
            raise PromptError(f"{output} exists and isn't the output of this command: choose another name") from None
        if 0 <= index < len(lines) and digest == _head(index, lines[index])["line_sha256"]:
            done[index] = answer
    if rest and not whole and not rest.startswith('{"index"'):
        raise PromptError(f"{output} exists and isn't the output of this command: choose another name")
    if whole and not done:
        raise PromptError(f"{output} has answers to other lines than those of this input: choose another name")
    return done


def _only(output: Path, answers: Mapping[int, dict[str, Any]]) -> IO[str]:
    """Leaves nothing but these answers in the file, and opens it for more."""
    with replacing(output) as aside:
        aside.write_text("".join(map(_line, answers.values())), "utf-8")
    return output.open("a", encoding="utf-8")


def _line(answer: dict[str, Any]) -> str:
    try:
        return json.dumps(answer, ensure_ascii=False).encode().decode() + "\n"
    except UnicodeEncodeError:  # half of a surrogate pair, in an id
        return json.dumps(answer) + "\n"


def _size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter("expected auto or a whole number from 1", param_hint="--batch-size")
    return int(text)
