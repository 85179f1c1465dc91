"""Calls of every kind, and ways to strike a thread with an exception while they run."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import mlx_mtp
from mlx_mtp import MTPModel
from tests.support.random_controls import even_tokens_first

PACKAGE = os.path.dirname(mlx_mtp.__file__) + os.sep

QUESTION = "What is a drafter?"
STORY = "Tell me a short story about a fox."
REPEAT = "Repeat after me: the quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog."
GREEDY = {"max_tokens": 10, "temperature": 0.0}
SAMPLED = {"max_tokens": 12, "temperature": 1.0, "seed": 7}

Line = tuple[str, int]
Texts = list[list[int]]
"""The tokens of the answers of a call, as far as they came."""

Tracer = Callable[[FrameType, str, Any], Any]


class Strike(BaseException):
    """What strikes, in three kinds that programs treat in different ways."""


class Interrupted(Strike, KeyboardInterrupt):
    """As Ctrl-C."""


class NoMemoryError(Strike, MemoryError):
    """As an allocation that fails."""


class BrokenError(Strike, RuntimeError):
    """As an error of MLX's."""


KINDS = (Interrupted, NoMemoryError, BrokenError)


def generated(lm: MTPModel, texts: Texts, prompt: Any, **options: Any) -> None:
    """Calls `generate`."""
    results = lm.generate(prompt, **options)
    texts += [it.tokens for it in (results if isinstance(results, list) else [results])]


def streamed(lm: MTPModel, texts: Texts, prompt: Any, **options: Any) -> None:
    """Calls `stream`, and has what came until it was struck."""
    texts.append([])
    for chunk in lm.stream(prompt, **options):
        texts[0] += chunk.tokens


def awaited(lm: MTPModel, texts: Texts, prompt: Any, **options: Any) -> None:
    """Calls `astream`, likewise."""
    texts.append([])

    async def read() -> None:
        async for chunk in lm.astream(prompt, **options):
            texts[0].extend(chunk.tokens)

    asyncio.run(read())


def batched(lm: MTPModel, texts: Texts, *prompts: Any, **options: Any) -> None:
    """Calls `generate_batch`, two at a time."""
    texts += [it.tokens for it in lm.generate_batch(prompts, 2, **options)]


def conversed(lm: MTPModel, texts: Texts) -> None:
    """Has a conversation of two turns; the second finds the KV of the first."""
    chat = lm.chat()
    for text in (QUESTION, "Why?"):
        texts.append([])
        for chunk in chat.send(text, **GREEDY):
            texts[-1] += chunk.tokens


def left_early(lm: MTPModel, texts: Texts) -> None:
    """Closes a stream in the middle."""
    with lm.stream(STORY, **{**SAMPLED, "max_tokens": 2000, "ignore_eos": True}) as stream:
        texts.append(list(next(stream).tokens)[:1])


def asked_otherwise(lm: MTPModel, texts: Texts) -> None:
    """Everything that isn't a text: the same thread serves it."""
    texts.append(lm.propose([2, 40, 41, 42], 3))
    with lm.models() as (target, _):
        texts.append([target.config.vocab_size])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompt.safetensors"
        lm.save_prompt(QUESTION, file)
        texts.append([lm.load_prompt(file)])
        with lm.trace(Path(folder) / "trace.json"):
            texts.append(lm.generate(QUESTION, **GREEDY).tokens)
    texts.append(list(lm.logits([2, 40]).shape))


def unloaded(lm: MTPModel, texts: Texts) -> None:
    """Unloads the model, and has it loaded again."""
    lm.unload()
    texts.append(lm.generate(QUESTION, **GREEDY).tokens)


def loaded(_: MTPModel, texts: Texts) -> None:
    """Loads another model."""
    with mlx_mtp.load() as other:
        texts.append(other.generate(QUESTION, **GREEDY).tokens)


CALLS: dict[str, Callable[[MTPModel, Texts], None]] = {
    "greedy": lambda lm, texts: streamed(lm, texts, QUESTION, **GREEDY),
    "sampled": lambda lm, texts: generated(lm, texts, STORY, draft_length=3, **SAMPLED),
    "stop": lambda lm, texts: streamed(lm, texts, STORY, stop=["e"], **{**GREEDY, "max_tokens": 30}),
    "several": lambda lm, texts: generated(lm, texts, QUESTION, n=3, **SAMPLED),
    "grammar": lambda lm, texts: generated(
        lm, texts, QUESTION, response_format={"type": "regex", "pattern": "([A-Z][a-z]+ ){1,3}[0-9]+"}, **SAMPLED
    ),
    "penalties": lambda lm, texts: generated(
        lm, texts, STORY, repetition_penalty=1.3, logprobs=2, logits_processors=[even_tokens_first], **SAMPLED
    ),
    "host drafts": lambda lm, texts: generated(lm, texts, REPEAT, prediction=REPEAT, **{**GREEDY, "max_tokens": 20}),
    "chunks": lambda lm, texts: generated(lm, texts, [2, *(30 + i % 900 for i in range(150))], **GREEDY),
    "exact": lambda lm, texts: generated(lm, texts, QUESTION, exactness="invariant", **{**GREEDY, "max_tokens": 4}),
    "asyncio": lambda lm, texts: awaited(lm, texts, QUESTION, **SAMPLED),
    "batch": lambda lm, texts: batched(lm, texts, QUESTION, STORY, REPEAT, **{**GREEDY, "max_tokens": 5}),
    "chat": conversed,
    "left early": left_early,
    "other": asked_otherwise,
    "unload": unloaded,
    "load": loaded,
}
"""What may run; each gives the same in every run, whatever runs beside it."""


def trace_here(tracer: Tracer | None) -> None:
    """Begins to trace this thread, also in those functions of the package that it is in; None ends it."""
    sys.settrace(tracer)
    frame: FrameType | None = sys._getframe()
    while frame:
        if frame.f_code.co_filename.startswith(PACKAGE):
            frame.f_trace = tracer
        frame = frame.f_back


def recorder(lines: set[Line]) -> Tracer:
    """A tracer that notes the package's lines."""

    def trace(frame: FrameType, event: str, _: Any) -> Tracer | None:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        if event == "line":
            lines.add((name, frame.f_lineno))
        return trace

    return trace


def striker(line: Line, kind: type[Strike], done: list[Line]) -> Tracer:
    """A tracer that raises at a line, once, and then adds it to `done`."""

    def trace(frame: FrameType, event: str, _: Any) -> Tracer | None:
        if done or frame.f_code.co_filename != line[0]:
            return None
        if event == "line" and frame.f_lineno == line[1]:
            done.append(line)
            raise kind
        return trace

    return trace


def strike_thread(ident: int, kind: type[Strike]) -> bool:
    """Has an exception raised in a thread at its next bytecode that allows it; False if the thread has ended."""
    return ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind)) == 1


@dataclass
class Caller:
    """A call in a thread.

    Attributes:
        name: Which of CALLS.
        texts: What it got.
        error: What ended it; None if nothing did.
        finished: Whether it came to its end.
    """

    name: str
    texts: Texts = field(default_factory=list)
    error: BaseException | None = None
    finished: bool = False
    thread: threading.Thread | None = None

    def run(self, lm: MTPModel, tracer: Tracer | None = None) -> None:
        """Makes the call in this thread."""
        try:
            trace_here(tracer)
            CALLS[self.name](lm, self.texts)
            self.finished = True
        except BaseException as error:
            self.error = error
        finally:
            sys.settrace(None)

    def start(self, lm: MTPModel, tracer: Tracer | None = None) -> None:
        """Makes the call in a thread of its own."""
        self.thread = threading.Thread(target=self.run, args=(lm, tracer), daemon=True)
        self.thread.start()
