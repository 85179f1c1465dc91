"""The calls that generate: prompts and options become rows of the batch, and rows become answers."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ..config import TargetConfig
from ..decode.request import Request
from ..decode.sampling import is_int, row_seed
from ..errors import MTPError, PromptError
from ..text.stop_strings import StopStrings
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import Tools
from .answer import Answer, Chunk, Generation
from .generation_config import GenerationDefaults
from .inbox import Inbox, News, failure
from .options import GenerationOptions
from .owner import Session

T = TypeVar("T")

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


class Calls:
    """What all calls of a model have in common."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer | None,
        config: TargetConfig,
        defaults: GenerationDefaults,
        folder: Path,
        most_rows: int,
    ):
        """Takes what a model consists of; `most_rows` is the batch that it has unless told otherwise."""
        self._session, self._tokenizer, self._config = session, tokenizer, config
        self._defaults, self._folder, self._most_rows = defaults, folder, most_rows

    def prepared(
        self, prompt: Prompt, max_tokens: int | None, options: GenerationOptions | None, more: Mapping[str, Any]
    ) -> Answer:
        """An answer of its own, ready to be submitted."""
        chosen = chosen_options(options, max_tokens, more)
        seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
        return self.prepare(self.tokens(prompt, chosen), chosen, seed)

    def prepare(self, tokens: list[int], options: GenerationOptions, seed: int) -> Answer:
        """Checks options against the model, and prepares an answer."""
        scheduler = self._session.owned().scheduler
        stop_tokens, stops = self._stops(options)
        request = Request(
            prompt=tokens,
            max_tokens=options.max_tokens,
            sampling=options.sampling(self._defaults, seed),
            draft_length=options.draft_length,
            exactness=options.exactness,
            stop_tokens=stop_tokens,
        )
        scheduler.check(request)
        tools = Tools(options.tools) if options.tools else None
        return Answer(request, stops, self._tokenizer, tools, options.cancel)

    def tokens(self, prompt: Prompt, options: GenerationOptions) -> list[int]:
        """Token ids of a prompt.

        Raises:
            PromptError: Empty, malformed, or text without a tokenizer.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty")
            if not options.chat_template:
                if options.thinking or options.tools:
                    raise PromptError("thinking and tools need the chat template: leave out chat_template=False")
                return self._text_tokenizer().encode_raw(prompt)
            prompt = [{"role": "user", "content": prompt}]
        known = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else [None]
        tokens = [t for t in known if is_int(t)]
        messages = [m for m in known if isinstance(m, Mapping)]
        if not known:
            raise PromptError("the prompt is empty")
        if len(tokens) == len(known):
            return tokens
        if len(messages) != len(known):
            raise PromptError("a prompt is a string, a list of messages (dicts), or a list of token ids (ints)")
        if not options.chat_template:
            raise PromptError("messages need the chat template: give a string to complete it as it is")
        return self._text_tokenizer().chat(messages, options.thinking, options.tools, options.sanitize)

    def chunks(self, answer: Answer, inbox: Inbox) -> Generator[Chunk, None, None]:
        """Runs an answer, and yields what comes of it."""
        self._submit(answer, inbox)
        try:
            while answer.reason is None:
                news = inbox.get()
                yield from _chunks_of(answer, news)
        finally:
            inbox.close()

    async def achunks(self, answer: Answer, inbox: Inbox) -> AsyncIterator[Chunk]:
        """As `chunks`, for an event loop."""
        try:
            self._submit(answer, inbox)
            while answer.reason is None:
                news = await inbox.aget()
                for chunk in _chunks_of(answer, news):
                    yield chunk
        finally:
            inbox.close()

    def each(
        self, prompts: Iterable[Prompt | Mapping[str, Any]], batch_size: int | str, common: dict[str, Any], inbox: Inbox
    ) -> Generator[tuple[int, Generation | MTPError], None, None]:
        """See `MTPModel.generate_each`; `common` are the options of all prompts."""
        index: dict[int, int] = {}

        def answers() -> Iterator[Answer | tuple[int, MTPError]]:
            for i, prompt in enumerate(several(prompts)):
                try:
                    answer = self.one_of_many(i, prompt, common)
                except MTPError as error:
                    yield i, error
                else:
                    index[id(answer)] = i
                    yield answer

        with closing(self.together(answers(), self.batch_size(batch_size), inbox)) as finished:
            for answer in finished:
                yield answer if isinstance(answer, tuple) else (index.pop(id(answer)), answer.generation())

    def together(
        self, answers: Iterator[Answer | T], batch_size: int, inbox: Inbox
    ) -> Generator[Answer | T, None, None]:
        """Runs answers, `batch_size` at a time, and yields each when it is finished; anything else among them at once.

        Where they come from may take its time, or use the model itself.
        """
        running: dict[int, Answer] = {}
        try:
            while True:
                while len(running) < batch_size and (answer := next(answers, None)) is not None:
                    if isinstance(answer, Answer):
                        self._submit(answer, inbox, batch_size)
                        running[answer.row.number] = answer
                    else:
                        yield answer
                if not running:
                    return
                news = inbox.get()
                current = running.get(news.row.number)
                if current is None:
                    continue  # it has found a stop string before
                current.push(news)
                if news.error:
                    raise failure(news.error)
                if current.reason:
                    del running[news.row.number]
                    yield current
        finally:
            inbox.close()

    def one_of_many(self, i: int, prompt: Prompt | Mapping[str, Any], common: Mapping[str, Any]) -> Answer:
        """Prepares the i-th answer of a batch, see `generate_batch`."""
        own = {**common, "seed": row_seed(common["seed"], i)}
        if isinstance(prompt, Mapping):
            own |= prompt
            if "prompt" not in own:
                raise PromptError('a prompt with options is a dict with "prompt"')
            prompt = cast(Prompt, own.pop("prompt"))
        options = GenerationOptions.of(own)
        seed = secrets.randbits(32) if options.seed is None else options.seed
        return self.prepare(self.tokens(prompt, options), options, seed)

    def batch_size(self, batch_size: int | str) -> int:
        """Rows that decode at a time.

        Raises:
            PromptError: There is no such batch.
        """
        if batch_size == "auto":
            return self._most_rows
        if not is_int(batch_size) or batch_size < 1:
            raise PromptError(f"batch_size must be 'auto' or at least 1, not {batch_size!r}")
        return batch_size

    def _stops(self, options: GenerationOptions) -> tuple[frozenset[int], StopStrings]:
        """The tokens and the strings that end an answer."""
        tokenizer, strings = self._tokenizer, options.stop_strings
        if strings and tokenizer is None:
            raise PromptError(f"stop strings need a tokenizer, and {self._folder} has none")
        given = [] if options.stop_token_ids is None else options.stop_token_ids
        vocabulary = self._config.text.vocab_size
        if not isinstance(given, Sequence) or not all(is_int(token) and 0 <= token < vocabulary for token in given):
            raise PromptError(f"stop_token_ids must be a list of token ids below {vocabulary}, not {given!r}")
        tokens = set(given)
        if not options.ignore_eos:
            tokens.update(self._defaults.stop_tokens, tokenizer.stop_tokens if tokenizer else ())
        # Special tokens never become text, where a string could be found.
        special = {text: tokenizer.special_id(text) for text in strings} if tokenizer else {}
        tokens.update(token for token in special.values() if token is not None)
        return frozenset(tokens), StopStrings([text for text in strings if special[text] is None])

    def _text_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise PromptError(
                f"{self._folder} has no tokenizer.json: copy the original's there, or give token ids from Python"
            )
        return self._tokenizer

    def _submit(self, answer: Answer, inbox: Inbox, width: int = 0) -> None:
        answer.row = self._session.submit(answer.request, inbox, width, answer.cancel)


def _chunks_of(answer: Answer, news: News) -> Iterator[Chunk]:
    """What news of a row is for its reader: a chunk, or the last tokens and then the error that ended it."""
    if news.tokens or not news.error:
        yield answer.push(news)
    if news.error:
        raise failure(news.error)


def chosen_options(
    options: GenerationOptions | None, max_tokens: int | None, more: Mapping[str, Any]
) -> GenerationOptions:
    """The options of a call: an object, with what was given by name in its place."""
    given = dict(more) if max_tokens is None else {"max_tokens": max_tokens, **more}
    if options is None:
        return GenerationOptions(**given)
    if not isinstance(options, GenerationOptions):
        raise PromptError(f"options must be GenerationOptions, not {options!r}")
    return replace(options, **given) if given else options


def common_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of all prompts of a batch, with a seed to spread over them."""
    return {**options, "seed": secrets.randbits(32) if options.get("seed") is None else options["seed"]}


def several(prompts: Iterable[T]) -> Iterable[T]:
    """Prompts, checked to be no single one, whose letters would be taken for prompts."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise PromptError("expected a list of prompts: generate takes a single one")
    return prompts
