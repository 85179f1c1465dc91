"""The public Python interface: `load` gives an `MTPModel`, which turns prompts into text.

Puts the parts together (checkpoint, tokeniser, decode engine) and holds what outlives a request: the models and a few
KV buffers. The decoding itself is in decode/, text matters in text.py, conversations in chat.py.

Calls may come from several threads; they take turns, each a step of the batch that all of them share. MLX ties
unfinished work to the thread that began it, except on a stream made for this, which is what a model works on, one turn
at a time.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import mlx.core as mx

from . import checkpoint, sizes
from .answer import Answer, Chunk, Generation
from .decode.draft_length import DraftLengthPolicy
from .decode.prefill import prefill
from .decode.request import Request, Row
from .decode.round import draft, first_state
from .decode.sampling import Sampler, SamplingOptions, is_int, row_seed
from .decode.scheduler import MAX_ROWS, Scheduler
from .decode.trace import Trace
from .errors import MTPError, PromptError
from .generation_config import read_generation
from .models.drafter import POSITIONS, Drafter
from .models.target import Target
from .pair import DEMO as DEMO
from .pair import find_pair, find_profile, way_out
from .paths import expanded
from .text import StopStrings, Tokenizer
from .tools import Tools
from .tuning import profile as profiles
from .turns import Turns

if TYPE_CHECKING:
    from .chat import Chat

log = logging.getLogger(__name__)

_OPTIONS = {
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "draft_length", "exactness", "ignore_eos",
    "thinking", "tools", "stop_token_ids", "sanitize", "chat_template",
}  # fmt: skip

_FORM = ("thinking", "tools", "sanitize", "chat_template")
"""Options that say how a prompt becomes tokens."""

T = TypeVar("T")

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


def load(
    target: str | Path | None = None,
    drafter: str | Path | Literal[False] | None = None,
    quantize: int | None = None,
    dtype: str | None = None,
    profile: str | Path | None = "auto",
    drafter_position: str = "auto",
    cache_bytes: int | None = None,
    adapter: str | Path | None = None,
) -> MTPModel:
    """Loads a target and its drafter.

    Args:
        target: A folder or a hub repository ("google/gemma-4-E4B-it"); None for the embedded demo pair.
        drafter: The same for the drafter. None takes the target's own: merged into its files, or found by its name,
            for a folder beside it or in the hub's cache; if none can be used, a warning says why. False loads none.
        quantize: Bits (2, 3, 4, 5, 6 or 8) to quantise both models to while loading; a drafter that is quantised
            already stays as it is. None takes both as stored.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantised weights. None is the checkpoint's
            own; on the CPU, where 16-bit arithmetic is slow, float32.
        profile: What `mlx-mtp tune` measured for this pair here: "auto" for the saved one, if there is one; a file;
            or None for none. It says how many rows a batch has, and what rounds cost to begin with; without one
            batches have 8 rows, and costs are learnt while running.
        drafter_position: Position of the drafter's queries: "committed" (the last committed token's), "bonus" (one
            further, as transformers has it) or "auto" (what the profile found better, else "committed"). Changes
            acceptance, never the text.
        cache_bytes: Most bytes of KV that are kept when a text is finished, for prompts that begin like it. None for a
            quarter of the memory that is left beside the models.
        adapter: Folder of a LoRA adapter for the target, as mlx-lm's or PEFT's fine-tuning writes it. It stays apart
            from the weights, which may be quantised. The drafter stays as it is: drafts may be accepted less often.

    Raises:
        CheckpointError: A checkpoint is missing, damaged, or not a Gemma 4 model.
        PairingError: The drafter was made for another target.
        MemoryBudgetError: The weights don't fit in this machine's memory.
        ProfileError: The profile's file is damaged, or was measured with something else.
    """
    if not isinstance(target, str | Path | None) or not (drafter is False or isinstance(drafter, str | Path | None)):
        raise MTPError("target and drafter must be folders or repository names: strings or paths")
    if drafter_position not in (*POSITIONS, "auto"):
        raise MTPError(f"drafter_position must be auto, {' or '.join(POSITIONS)}, not {drafter_position!r}")
    checkpoint.check_options(dtype, quantize)
    folder, drafter_folder = find_pair(target, drafter, check=lambda it: checkpoint.check_config(it, dtype, quantize))
    adapter = None if adapter is None else expanded(adapter)
    tuned = find_profile(profile, folder, drafter_folder, quantize, dtype, adapter)
    if drafter_position == "auto":
        drafter_position = (tuned and tuned.drafter_position) or "committed"
    if cache_bytes is not None and (not is_int(cache_bytes) or cache_bytes < 0):
        raise MTPError(f"cache_bytes must be a whole number of bytes or None, not {cache_bytes!r}")
    return MTPModel(folder, drafter_folder, quantize, dtype, drafter_position, cache_bytes, tuned, adapter)


class MTPModel:
    """A target with its drafter, ready to generate. Made by `load`.

    Attributes:
        adapter: Folder of the target's LoRA adapter, or None.
        config: The target's `config.TargetConfig`.
        drafter_config: The drafter's `config.DrafterConfig`, or None.
        tokenizer: The target's `text.Tokenizer`, or None if its folder has none (then prompts are token ids).
        defaults: The target's generation_config, as `generation_config.GenerationDefaults`.
        profile: What is known of this pair on this machine, as `tuning.profile.Profile`, or None.
        kv_budget: Bytes that all rows together may take for KV.
    """

    def __init__(
        self,
        folder: Path,
        drafter_folder: Path | None,
        quantize: int | None,
        dtype: str | None,
        position: str,
        cache_bytes: int | None,
        profile: profiles.Profile | None,
        adapter: Path | None = None,
    ):
        self.profile = profile
        self.folder, self.drafter_folder, self.adapter = folder, drafter_folder, adapter
        self._closed = False
        self._turns = Turns()
        self._wanted: list[int] = []
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self.drafter_config, self._drafter = None, None
        with self._turn():
            self.config, self._target = checkpoint.load_target(folder, dtype, quantize, adapter)
            if drafter_folder is not None:
                with way_out():
                    self.drafter_config, self._drafter = checkpoint.load_drafter(
                        drafter_folder, self.config, position, dtype, quantize
                    )
        self.defaults = read_generation(folder)
        self.kv_budget, cache_bytes = sizes.kv_budget(sizes.held_bytes(self._target, self._drafter), cache_bytes)
        self._most_rows = profile.rows if profile else MAX_ROWS
        self._scheduler = Scheduler(
            self._target,
            self._drafter,
            self.defaults.suppress_tokens,
            max_rows=self._most_rows,
            kv_budget=self.kv_budget,
            cache_bytes=cache_bytes,
            policy=DraftLengthPolicy(profile.prices if profile else None),
        )
        self.tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
        if self.tokenizer and self.tokenizer.seems_base(self.defaults.stop_tokens):
            log.warning(
                "%s has no chat template and seems to be a base model, which can't chat: chat_template=False (--raw) "
                "completes text as it is", folder,
            )  # fmt: skip

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        draft_length: int | str = "auto",
        exactness: str = "fast",
        n: int = 1,
        ignore_eos: bool = False,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        sanitize: bool = True,
        chat_template: bool = True,
    ) -> Generation | list[Generation]:
        """Generates text.

        Args:
            prompt: A string (a user's message, put into the chat template), messages as dicts with "role" and
                "content", or token ids, used as they are. A last message of the assistant's, without tool calls, is
                continued.
            max_tokens: Most tokens to generate.
            temperature: 0 is greedy. This and the next three default to the model's generation_config.
            top_k: Only the k best tokens; 0 for all.
            top_p: Only the best tokens that together reach this probability.
            min_p: Only tokens with at least this share of the best one's probability.
            seed: Same seed, same text, with and without a drafter; None for a new one each time.
            stop: Strings that end the text; they aren't part of it. One that is a special token's name ("<turn|>")
                stands for that token.
            draft_length: Tokens to draft a round, 0 for plain decoding, or "auto".
            exactness: "fast", "invariant" (one block width for the whole run, so that the draft length can't matter
                on any backend) or "stepwise" (verifies token by token: plain decoding, bit for bit, and no faster).
            n: Number of generations, side by side. The prompt is prefilled once; the i-th runs with
                `row_seed(seed, i)`, so the first is what n = 1 gives.
            ignore_eos: Whether to go on after the model's own stop tokens: those of its generation_config, of Gemma 4's
                chat format, and its tokenizer's `eos_token`.
            thinking: Whether the chat template asks the model to think first.
            tools: Tools that the model may call, as in OpenAI's interface: {"type": "function", "function": {"name",
                "description", "parameters"}}, the last one a JSON schema. `Generation.tool_calls` holds the calls that
                fit them, `Generation.tool_errors` says what doesn't.
            stop_token_ids: Further token ids that end the text.
            sanitize: Whether special tokens that are spelt out in a message or a tool ("<turn|>") are text. False
                makes them what they are for the model, which then can't tell a message's from the chat template's.
            chat_template: False completes a string as it is, after the token that begins texts: no chat, so no
                messages, thinking or tools, and special tokens that it spells out are those.

        Returns:
            The generation; a list of them for n > 1.

        Raises:
            PromptError: The prompt or an option can't be used.
        """
        if not is_int(n) or n < 1:
            raise PromptError(f"n must be a whole number from 1, not {n!r}")
        seed = secrets.randbits(32) if seed is None else seed
        tokens = self.encode(prompt, thinking, tools, sanitize, chat_template)
        answers = [
            self._answer(
                tokens, max_tokens, temperature, top_k, top_p, min_p, row_seed(seed, i), stop, draft_length,
                exactness, ignore_eos, stop_token_ids, tools,
            )
            for i in range(n)
        ]  # fmt: skip
        for _ in self._together(iter(answers), n):
            pass
        results = [answer.generation() for answer in answers]
        return results if n > 1 else results[0]

    def generate_batch(
        self, prompts: Sequence[Prompt | Mapping[str, Any]], batch_size: int | Literal["auto"] = "auto", **options: Any
    ) -> list[Generation]:
        """Generates texts for several prompts together; each is the text that the prompt gets alone.

        Args:
            prompts: Prompts as for `generate`, or dicts with "prompt" and options that are its own.
            batch_size: Prompts that decode at a time; "auto" for as many as the profile says, without one 8.
            **options: Those of `generate`, except `n`, for all prompts. `seed` is spread over them: the i-th one gets
                `row_seed(seed, i)`, and the first one the seed itself.

        Returns:
            The generations, in the order of the prompts.

        Raises:
            PromptError: A prompt or an option can't be used. Nothing is generated then.
            MemoryBudgetError: The KV of a prompt doesn't fit even alone.
        """
        options["seed"] = secrets.randbits(32) if options.get("seed") is None else options["seed"]
        answers = [self._one_of_many(i, prompt, options) for i, prompt in enumerate(_several(prompts))]
        for _ in self._together(iter(answers), self._batch_size(batch_size)):
            pass
        return [answer.generation() for answer in answers]

    def generate_each(
        self, prompts: Iterable[Prompt | Mapping[str, Any]], batch_size: int | Literal["auto"] = "auto", **options: Any
    ) -> Generator[tuple[int, Generation | MTPError], None, None]:
        """As `generate_batch`, but yields what is finished at once, and takes prompts only when there is room.

        Args:
            prompts: As for `generate_batch`, any number.
            batch_size: As for `generate_batch`.
            **options: As for `generate_batch`.

        Yields:
            The index of a prompt, and its generation, or why there is none.
        """
        options["seed"] = secrets.randbits(32) if options.get("seed") is None else options["seed"]
        index: dict[int, int] = {}

        def answers() -> Iterator[Answer | tuple[int, MTPError]]:
            for i, prompt in enumerate(_several(prompts)):
                try:
                    answer = self._one_of_many(i, prompt, options)
                except MTPError as error:
                    yield i, error
                else:
                    index[id(answer)] = i
                    yield answer

        with closing(self._together(answers(), self._batch_size(batch_size))) as finished:
            for answer in finished:
                yield answer if isinstance(answer, tuple) else (index.pop(id(answer)), answer.generation())

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        draft_length: int | str = "auto",
        exactness: str = "fast",
        ignore_eos: bool = False,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        sanitize: bool = True,
        chat_template: bool = True,
    ) -> Generator[Chunk, None, None]:
        """Generates text piece by piece; closing the iterator cancels the rest.

        The arguments, and the errors, are those of `generate`; errors are raised at once, not at the first chunk.
        """
        tokens = self.encode(prompt, thinking, tools, sanitize, chat_template)
        return self._chunks(
            self._answer(
                tokens, max_tokens, temperature, top_k, top_p, min_p, seed, stop, draft_length, exactness, ignore_eos,
                stop_token_ids, tools,
            )
        )  # fmt: skip

    def _answer(
        self,
        tokens: list[int],
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        draft_length: int | str = "auto",
        exactness: str = "fast",
        ignore_eos: bool = False,
        stop_token_ids: Sequence[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Answer:
        """Checks options, which are those of `generate`, and prepares an answer."""
        scheduler = self._scheduler  # `close` in another thread may take it away
        self._check_open()
        defaults = self.defaults
        sampling = SamplingOptions(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            min_p=defaults.min_p if min_p is None else min_p,
            seed=secrets.randbits(32) if seed is None else seed,
        )
        stop_tokens, stops = self._stops(stop, stop_token_ids, ignore_eos)
        request = Request(
            prompt=tokens,
            max_tokens=max_tokens,
            sampling=sampling,
            draft_length=draft_length,
            exactness=exactness,
            stop_tokens=stop_tokens,
        )
        scheduler.check(request)
        return Answer(request, stops, self.tokenizer, Tools(tools) if tools else None)

    def _stops(
        self, stop: str | Sequence[str] | None, stop_token_ids: Sequence[int] | None, ignore_eos: bool
    ) -> tuple[frozenset[int], StopStrings]:
        """The tokens and the strings that end an answer."""
        tokenizer = self.tokenizer
        strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
            raise PromptError(f"stop must be a string or a list of strings, not {stop!r}")
        if strings and tokenizer is None:
            raise PromptError(f"stop strings need a tokenizer, and {self.folder} has none")
        given = [] if stop_token_ids is None else stop_token_ids
        vocabulary = self.config.text.vocab_size
        if not isinstance(given, Sequence) or not all(is_int(token) and 0 <= token < vocabulary for token in given):
            raise PromptError(f"stop_token_ids must be a list of token ids below {vocabulary}, not {stop_token_ids!r}")
        tokens = set(given)
        if not ignore_eos:
            tokens.update(self.defaults.stop_tokens, tokenizer.stop_tokens if tokenizer else ())
        # Special tokens never become text, where a string could be found.
        special = {text: tokenizer.special_id(text) for text in strings} if tokenizer else {}
        tokens.update(token for token in special.values() if token is not None)
        return frozenset(tokens), StopStrings([text for text in strings if special[text] is None])

    async def astream(self, prompt: Prompt, **options: Any) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: the work runs in threads, so the event loop stays free."""
        chunks = self.stream(prompt, **options)
        step: asyncio.Future[Chunk | None] | None = None
        try:
            while True:
                # A thread can't be cancelled: the step goes on when the task is, and is waited for below.
                step = asyncio.ensure_future(asyncio.to_thread(next, chunks, None))
                if (chunk := await asyncio.shield(step)) is None:
                    return
                yield chunk
        finally:
            if step:
                await asyncio.wait([step])
            await asyncio.to_thread(chunks.close)

    def chat(self, system: str | None = None, thinking: bool = False) -> Chat:
        """Starts a conversation; see `chat.Chat`."""
        from .chat import Chat

        self._check_open()
        return Chat(self, system=system, thinking=thinking)

    def save_prompt(self, prompt: Prompt, path: str | Path) -> None:
        """Prefills a prompt and keeps its KV in a file, for `load_prompt` in another process.

        Args:
            prompt: As for `generate`. Prompts that begin with the same tokens are served too: give messages with a
                system prompt, and later the same ones with more after them.
            path: A .safetensors file.

        Raises:
            PromptError: The prompt can't be used.
            MemoryBudgetError: Its KV doesn't fit.
            OSError: The file can't be written.
        """
        tokens = self.encode(prompt)
        with self._turn():
            self._scheduler.save_prompt(tokens, expanded(path))

    def load_prompt(self, path: str | Path) -> int:
        """Takes a saved prompt into memory; prompts that begin like it start where it ends.

        Returns:
            Its number of tokens.

        Raises:
            CheckpointError: The file is missing, damaged, or was saved by another model.
            MemoryBudgetError: It is larger than all that is kept for prompts (`cache_bytes`).
        """
        with self._turn():
            return self._scheduler.load_prompt(expanded(path))

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Records what host and device do meanwhile, as a Chrome trace; see `decode.trace`.

        Raises:
            MTPError: Another trace is being recorded.
            OSError: The file can't be written.
        """
        with self._turn():
            if self._scheduler.trace:
                raise MTPError("a trace is being recorded already, and there can be only one at a time")
            trace = self._scheduler.trace = Trace(path)
        try:
            yield
        finally:
            if not self._closed:
                with self._turn():
                    self._scheduler.trace = None
            trace.close()

    def encode(
        self,
        prompt: Prompt,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sanitize: bool = True,
        chat_template: bool = True,
    ) -> list[int]:
        """Token ids of a prompt; the arguments are those of `generate`.

        Raises:
            PromptError: Empty, malformed, or text without a tokenizer.
        """
        for name, flag in (("sanitize", sanitize), ("chat_template", chat_template)):
            if not isinstance(flag, bool):
                raise PromptError(f"{name} must be True or False, not {flag!r}")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty")
            if not chat_template:
                if thinking or tools:
                    raise PromptError("thinking and tools need the chat template: leave out chat_template=False")
                return self._text_tokenizer().encode_raw(prompt)
            prompt = [{"role": "user", "content": prompt}]
        known = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else [None]
        tokens = [t for t in known if is_int(t)]
        messages = [m for m in known if isinstance(m, Mapping)]
        if not known:
            raise PromptError("the prompt is empty")
        if len(tokens) == len(known):
            return cast("list[int]", tokens)
        if len(messages) != len(known):
            raise PromptError("a prompt is a string, a list of messages (dicts), or a list of token ids (ints)")
        if not chat_template:
            raise PromptError("messages need the chat template: give a string to complete it as it is")
        return self._text_tokenizer().chat(messages, thinking, tools, sanitize)

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError(
                f"{self.folder} has no tokenizer.json: copy the original's there, or give token ids from Python"
            )
        return self.tokenizer

    def logits(self, tokens: Sequence[int]) -> mx.array:
        """The target's logits float32 [len(tokens), vocab] after each of the tokens.

        Raises:
            PromptError: Empty, too long, or a token id outside the vocabulary.
        """
        parts: list[mx.array] = []
        with self._turn():
            prefill(
                self._target,
                _ids(tokens),
                lambda hidden: parts.append(self._target.logits(hidden)[0].astype(mx.float32)),
            )
            logits = mx.concatenate(parts)
            mx.eval(logits)
        return logits

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        """What the drafter proposes after a prompt, greedily.

        Args:
            tokens: The prompt.
            k: Number of drafts, at most as many as the context has room for.

        Returns:
            The target's own next token, then the k drafts after it.

        Raises:
            PromptError: As `logits`, or k is no such number, or there is no drafter.
        """
        self._check_open()
        if self._drafter is None:
            raise PromptError("there is no drafter to propose with: load one with drafter=")
        tokens = _ids(tokens)
        room = self.config.text.max_positions - len(tokens)
        if not is_int(k) or not 1 <= k <= max(1, room):
            raise PromptError(f"k must be a whole number from 1 to the {room:,} tokens that fit, not {k!r}")
        with self._turn():
            kv, hidden = prefill(self._target, tokens)
            sampler = Sampler([SamplingOptions()], None, self.defaults.suppress_tokens, self.config.text.vocab_size)
            state = first_state(self._target, sampler, hidden, mx.array([len(tokens)], dtype=mx.int32))
            drafts = draft(self._target, self._drafter, kv, sampler, state, k)
            return cast("list[int]", mx.concatenate([state.tokens, drafts[0]]).tolist())

    @contextmanager
    def models(self) -> Iterator[tuple[Target, Drafter | None]]:
        """The target and the drafter, for this thread alone meanwhile; for what measures them."""
        with self._turn():
            yield self._target, self._drafter

    def close(self) -> None:
        """Lets go of the models and their memory. Calling anything afterwards is an error; closing twice isn't."""
        with self._turns.turn():
            if self._closed:
                return
            self._closed = True
            self._scheduler.close()
            self._scheduler = self._target = self._drafter = None  # type: ignore[assignment]
            mx.clear_cache()

    def __enter__(self) -> MTPModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise MTPError("the model is closed: load it again")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This thread's turn to work on the model."""
        with self._turns.turn(), mx.stream(self._stream):
            self._check_open()
            yield

    def _chunks(self, answer: Answer) -> Generator[Chunk, None, None]:
        with self._turn():
            row = self._submit(answer)
        try:
            while answer.reason is None:
                chunk = None
                with self._turn():  # a step a turn: others may wait for theirs
                    if not row.fresh:
                        self._run(row)
                    if tokens := row.take():
                        chunk = answer.push(tokens)
                if chunk:
                    yield chunk
        finally:
            row.cancel()

    def _together(self, answers: Iterator[Answer | T], batch_size: int) -> Generator[Answer | T, None, None]:
        """Runs answers, `batch_size` at a time, and yields each when it is finished; anything else among them at once.

        Where they come from may take its time, or use the model itself: they are never asked for during a turn.
        """
        running: list[Answer] = []
        self._wanted.append(batch_size)
        try:
            while True:
                arrived: list[Answer] = []
                while len(running) + len(arrived) < batch_size and (answer := next(answers, None)) is not None:
                    if isinstance(answer, Answer):
                        arrived.append(answer)
                    else:
                        yield answer
                if not running and not arrived:
                    return
                with self._turn():
                    for answer in arrived:
                        self._submit(answer)
                        running.append(answer)
                    if not any(answer.row.fresh for answer in running):
                        self._run(*(answer.row for answer in running))
                    for answer in running:
                        if tokens := answer.row.take():
                            answer.push(tokens)
                finished = [answer for answer in running if answer.reason]
                running = [answer for answer in running if not answer.reason]
                yield from finished
        finally:
            self._wanted.remove(batch_size)
            for answer in running:
                answer.row.cancel()

    def _submit(self, answer: Answer) -> Row:
        """Puts an answer's request into the queue of a batch that is as large as somebody wants it now."""
        self._scheduler.max_rows = max([self._most_rows, *self._wanted])
        answer.row = self._scheduler.submit(answer.request)
        return answer.row

    def _run(self, *rows: Row) -> None:
        """A step of all that is under way, for rows that wait for tokens."""
        for row in rows:
            if row.error:
                raise MTPError(f"this generation ended with another one: {row.error!r}") from row.error
        self._scheduler.step()

    def _one_of_many(self, i: int, prompt: Prompt | Mapping[str, Any], options: Mapping[str, Any]) -> Answer:
        """Prepares the i-th answer of a batch, see `generate_batch`."""
        own = {**options, "seed": row_seed(options["seed"], i)}
        if isinstance(prompt, Mapping):
            own |= prompt
            if "prompt" not in own:
                raise PromptError('a prompt with options is a dict with "prompt"')
            prompt = cast(Prompt, own.pop("prompt"))
        if unknown := own.keys() - _OPTIONS:
            raise PromptError(f"unknown options: {', '.join(sorted(map(str, unknown)))}")
        tools = own.get("tools")  # for the prompt, and for the answer
        form = {name: own.pop(name) for name in _FORM if name in own}
        return self._answer(self.encode(prompt, **form), **own, tools=tools)

    def _batch_size(self, batch_size: int | str) -> int:
        if batch_size == "auto":
            return self._most_rows
        if not is_int(batch_size) or batch_size < 1:
            raise PromptError(f"batch_size must be 'auto' or at least 1, not {batch_size!r}")
        return batch_size


def _several(prompts: Iterable[T]) -> Iterable[T]:
    """Prompts, checked to be no single one, whose letters would be taken for prompts."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise PromptError("expected a list of prompts: generate takes a single one")
    return prompts


def _ids(tokens: Sequence[int]) -> Sequence[int]:
    """Token ids, checked to be that."""
    if not isinstance(tokens, Sequence) or not all(is_int(token) for token in tokens):
        raise PromptError("expected a list of token ids (ints): lm.encode(prompt) gives them")
    return tokens
