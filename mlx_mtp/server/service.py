"""Runs jobs: from a job to rows of a model's running batch, and from their chunks to the response.

Not here: what requests and responses look like (the translations).
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from ..api import MTPModel, row_seed
from ..errors import PromptError
from ..session.answer import Chunk, Generation
from ..session.calls import Prompt
from ..session.options import GenerationOptions
from ..text.tokenizer import Tokenizer
from .errors import RequestError
from .metrics import Metrics
from .registry import Entry, Models
from .settings import ServerOptions

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a request asks for.

    Attributes:
        prompts: Prompts as for `MTPModel.generate`.
        options: Options of all answers.
        model: Name of the model; None for the first one.
        n: Answers to each prompt. They are those of `MTPModel.generate(prompt, n=n)`.
    """

    prompts: Sequence[Prompt]
    options: GenerationOptions
    model: str | None = None
    n: int = 1


class Service:
    """Starts jobs on the models of a server.

    Attributes:
        models: The models.
        options: The limits.
        metrics: Counts what has ended.
    """

    def __init__(self, models: Models, options: ServerOptions) -> None:
        """Takes the models and the limits."""
        self.models, self.options, self.metrics = models, options, Metrics(models)
        self._running: set[threading.Event] = set()

    async def start(self, job: Job) -> Answers:
        """Checks a job and starts it; the caller must close what it returns. May be cancelled while it waits.

        Raises:
            RequestError: There is no such model, it can't be loaded, or the queue is full.
            PromptError, MemoryBudgetError: The request can't be served.
        """
        entry, count = self.models.find(job.model), len(job.prompts) * job.n
        entry.take(count, self.options.max_queue)
        try:
            lm = await self.models.loaded(entry)
            cancel = threading.Event()
            streams = await _to_its_end(self._streams, lm, job, cancel)
        except PromptError as error:
            entry.give(count)
            folder = entry.lm.folder if entry.lm else entry.name
            raise RequestError(400, str(error).replace(str(folder), entry.name)) from error
        except BaseException:
            entry.give(count)
            raise
        self._running.add(cancel)
        return Answers(entry, lm, streams, cancel, self.options.time_limit, self._ended)

    def end_answers(self) -> None:
        """Ends all running answers; each ends within a round, with what it has."""
        for cancel in self._running:
            cancel.set()

    async def count_tokens(self, job: Job) -> int:
        """The number of tokens of a job's prompts; errors as for `start`."""
        entry = self.models.find(job.model)
        entry.take(1, self.options.max_queue)
        try:
            lm = await self.models.loaded(entry)
            return sum(map(len, await _to_its_end(self._encoded, lm, job)))
        finally:
            entry.give(1)

    def _ended(self, cancel: threading.Event, model: str, last: Sequence[Chunk]) -> None:
        self._running.discard(cancel)
        self.metrics.count(model, [(chunk.finish_reason or "unfinished", chunk.stats) for chunk in last])

    def _streams(self, lm: MTPModel, job: Job, cancel: threading.Event) -> list[AsyncIterator[Chunk]]:
        """Prepares the rows of a job; runs in a thread, because encoding and compiling a grammar take time."""
        if lm.tokenizer is None:
            raise PromptError(f"{lm.folder} has no tokenizer, and a server writes text")
        seed = secrets.randbits(32) if job.options.seed is None else job.options.seed
        try:
            return [
                lm.astream(prompt, options=replace(job.options, seed=row_seed(seed, i), cancel=cancel))
                for prompt in self._encoded(lm, job)
                for i in range(job.n)
            ]
        except RecursionError:
            raise PromptError("the request is nested too deeply") from None

    def _encoded(self, lm: MTPModel, job: Job) -> list[list[int]]:
        """The token ids of a job's prompts."""
        options, most = job.options, self.options.max_prompt_tokens
        encoded = [
            lm.encode(prompt, options.thinking, options.tools, options.sanitize, options.chat_template)
            for prompt in job.prompts
        ]
        for prompt in encoded:
            if most is not None and len(prompt) > most:
                raise PromptError(f"the prompt has {len(prompt)} tokens, and this server takes at most {most}")
        return encoded


class Answers:
    """The answers of a job while they are generated.

    Attributes:
        model: Name of the model.
        tokenizer: Its tokenizer.
        count: Number of answers.
        begun: When the job was started, in seconds since the epoch.
    """

    def __init__(
        self,
        entry: Entry,
        lm: MTPModel,
        streams: Sequence[AsyncIterator[Chunk]],
        cancel: threading.Event,
        time_limit: float,
        ended: Callable[[threading.Event, str, Sequence[Chunk]], None],
    ) -> None:
        """Takes over the places of an entry and its rows.

        Args:
            entry: The model's; `close` gives the places back.
            lm: The model.
            streams: One for each answer.
            cancel: Ends all of them.
            time_limit: Seconds after which they end.
            ended: Called with `cancel`, the model's name, and the last chunk of each answer that has any.
        """
        self.model, self.count, self.begun = entry.name, len(streams), int(time.time())
        assert lm.tokenizer is not None
        self.tokenizer: Tokenizer = lm.tokenizer
        self._entry, self._streams, self._cancel, self._ended = entry, streams, cancel, ended
        self._chunks: list[list[Chunk]] = [[] for _ in streams]
        self._timer = asyncio.get_running_loop().call_later(time_limit, cancel.set)
        self._waiting: dict[asyncio.Future[Chunk], int] = {}
        self._closed = False

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Yields the chunks of all answers as they arrive, each with the number of its answer.

        Raises:
            MTPError: Decoding failed.
        """
        if self.count == 1:  # as below, without a task for each chunk
            async for chunk in self._streams[0]:
                self._chunks[0].append(chunk)
                yield 0, chunk
            return
        for i, stream in enumerate(self._streams):
            self._waiting[asyncio.ensure_future(anext(stream))] = i
        while self._waiting:
            done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = self._waiting.pop(task)
                chunk = task.result()
                self._chunks[i].append(chunk)
                yield i, chunk
                if not chunk.finish_reason:
                    self._waiting[asyncio.ensure_future(anext(self._streams[i]))] = i

    async def all(self) -> list[Generation]:
        """Waits for the whole answers; errors as for `chunks`."""
        async for _ in self.chunks():
            pass
        return self.generations()

    def generations(self) -> list[Generation]:
        """The answers, once `chunks` is exhausted."""
        return [Generation.joined(chunks) for chunks in self._chunks]

    async def close(self) -> None:
        """Ends the answers and gives their places back."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        for stream in self._streams:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()
        self._entry.give(self.count)
        self._ended(self._cancel, self.model, [chunks[-1] for chunks in self._chunks if chunks])


async def _to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function in a thread. A caller that is cancelled waits for its end nevertheless.

    A thread can't be stopped, and its request must keep its place in the queue as long: a client that asks and leaves
    again and again could otherwise have any number of them.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.gather(working, return_exceptions=True)
        raise
