"""`mlx-mtp batch`: answers the prompts of a JSONL file.

Each answer is written as soon as it is finished. So after an interruption the same command continues: it skips lines
whose answers are in the output. In the end, the output is sorted in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import MTPError, PromptError
from ..files import parse_json, replacing, writable
from . import options as o
from . import render
from .generation import generating

if TYPE_CHECKING:
    from ..api import MTPModel
    from ..session.options import GenerationOptions


@generating()
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
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Answers the prompts of a file, several at a time; can be stopped and run again.

    A line of IN.jsonl has "prompt" (text, messages or token ids), and may have "id" and options of its own:
    max_tokens, temperature, top_k, top_p, min_p, seed, draft_length, exactness, stop, stop_token_ids, thinking, tools,
    tool_choice, thinking_budget, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, logprobs,
    response_format, prediction, ignore_eos, sanitize, chat_template.
    A line of OUT.jsonl has "index" and "id", and either text, tokens, finish_reason and stats, or "error". The next
    run tries lines with an error again, and keeps answers, even if its options differ.
    """
    size = _size(batch_size)
    try:
        lines = source.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise PromptError(f"{source} isn't UTF-8") from None
    if str(output) == "-" or (output.exists() and not output.is_file()):
        raise PromptError(f"{output} isn't a plain file: give one for the answers")
    output = writable(output)  # the file behind a link, so that the link stays
    if output == source.resolve():
        raise PromptError(f"{output} is the input: choose another name for the answers")
    # Errors may be due to the model or an option, so their lines are tried again.
    done = {i: answer for i, answer in _finished(output, lines).items() if "error" not in answer}
    todo = [i for i, line in enumerate(lines) if line.strip() and i not in done]
    generation = replace(generation, chat_template=not raw)
    try:
        output.open("a").close()  # fail before the model is loaded
        with (
            o.load(model, drafter, no_draft, quantize, quantize_drafter, adapter=adapter) as lm,
            o.tracing(lm, trace),
            _appending(output, done) as file,
        ):
            answers = _answers(lm, lines, todo, size, generation)
            with render.progress("prompts", len(todo)) as report:
                for number, answer in enumerate(answers, 1):
                    done[answer["index"]] = answer
                    file.write(_line(answer))
                    file.flush()
                    report(number)
    except KeyboardInterrupt:
        print(f"\nstopped: {len(done)} answers are in {output}; the same command continues", file=sys.stderr)
        raise typer.Exit(o.INTERRUPTED) from None
    _write(output, dict(sorted(done.items())))
    if failed := sum("error" in answer for answer in done.values()):
        raise MTPError(f'{failed} of {len(done)} lines have no answer: see their "error" in {output}')


def _answers(
    lm: MTPModel, lines: list[str], todo: list[int], size: int | Literal["auto"], generation: GenerationOptions
) -> Iterator[dict[str, Any]]:
    """Yields the answers to the lines `todo`, as they are finished."""
    from ..decode.noise import row_seed

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
        PromptError: The line isn't a JSON object with a prompt.
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
    """The fields that identify an answer: its line's index from 0, the line's own id, and a hash of the line."""
    try:
        name = parse_json(line, parse_constant=_no_constant).get("id")
    except (ValueError, AttributeError):
        name = None
    return {"index": index, "id": name, "line_sha256": hashlib.sha256(line.encode()).hexdigest()}


def _no_constant(name: str) -> None:
    """Refuses NaN and infinities, which Python's parser accepts."""
    raise ValueError(f"{name} isn't a JSON value")


def _finished(output: Path, lines: list[str]) -> dict[int, dict[str, Any]]:
    """Answers of an earlier run to lines that haven't changed.

    Raises:
        PromptError: The file isn't the output of an earlier run on this input.
    """
    if not output.exists():
        return {}
    done = {}
    text = output.read_text("utf-8", errors="replace")
    whole, _, rest = text.rpartition("\n")  # a killed run may have left an incomplete line
    for line in whole.split("\n") if whole else ():
        try:
            answer = parse_json(line)
            index, digest = int(answer["index"]), answer["line_sha256"]
        except (ValueError, KeyError, TypeError, OverflowError):
            raise PromptError(f"{output} exists and isn't the output of this command: choose another name") from None
        if 0 <= index < len(lines) and digest == _head(index, lines[index])["line_sha256"]:
            done[index] = answer
    begin = '{"index"'
    if rest and not whole and rest[: len(begin)] != begin[: len(rest)]:
        raise PromptError(f"{output} exists and isn't the output of this command: choose another name")
    if whole and not done:
        raise PromptError(f"{output} has the answers of another input: choose another name")
    return done


def _write(output: Path, answers: Mapping[int, dict[str, Any]]) -> None:
    """Makes the file hold just these answers."""
    with replacing(output) as aside:
        aside.write_text("".join(map(_line, answers.values())), "utf-8")


@contextmanager
def _appending(output: Path, answers: Mapping[int, dict[str, Any]]) -> Iterator[IO[str]]:
    """Makes the file hold just these answers, and opens it for more.

    Raises:
        MTPError: They can't be written.
    """
    _write(output, answers)
    try:
        with output.open("a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise MTPError(f"{output} can't be written: {error.strerror or error}; the same command continues") from None


def _line(answer: dict[str, Any]) -> str:
    try:
        return json.dumps(answer, ensure_ascii=False).encode().decode() + "\n"
    except UnicodeEncodeError:  # a lone surrogate in an id
        return json.dumps(answer) + "\n"


def _size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter("expected auto or a whole number from 1", param_hint="--batch-size")
    return int(text)
