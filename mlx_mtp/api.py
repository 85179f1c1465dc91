"""The public Python interface: `load` gives an `MTPModel`, which turns prompts into text.

Puts the parts together (checkpoint, tokeniser, decode engine) and holds what outlives a request: the models and a few
KV buffers. The decoding itself is in decode/, text matters in text.py, conversations in chat.py.

Calls may come from several threads; they take turns, round by round once their prompts are prefilled. MLX ties
unfinished work to the thread that began it, except on a stream made for this, which is what a model works on, under a
lock.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx

from . import checkpoint
from .decode.engine import Engine, Request, Stats, check_prompt, token_limit
from .decode.round import draft, first_state
from .decode.sampling import Sampler, SamplingOptions, row_seed
from .errors import MTPError, PromptError
from .models.drafter import POSITIONS
from .text import StopStrings, StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from .chat import Chat

DEMO = Path(__file__).parent / "demo"
"""The embedded demo pair: folders `target` and `drafter`."""

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]

_IDLE_ENGINES = 1
"""KV buffers kept between requests, for prompts that begin with what they hold."""


@dataclass(frozen=True)
class Generation:
    """One finished generation.

    Attributes:
        text: The answer, without special tokens; cut before a stop string.
        thought: What the model thought before, if it did.
        tokens: All generated token ids, up to and including the stop token, or the end of the stop string.
        finish_reason: "stop" (a stop token or stop string) or "length" (`max_tokens`, or the context is full).
        stats: What it took.
    """

    text: str
    thought: str
    tokens: list[int]
    finish_reason: str
    stats: Stats


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed generation; the texts of all chunks, joined, are `Generation.text`.

    Attributes:
        text: New text; may be empty while a character or a possible stop string is incomplete.
        thought: New text of the model's thoughts.
        tokens: New token ids.
        finish_reason: Set in the last chunk, see `Generation`.
        stats: The running statistics, one object for all chunks of a generation.
    """

    text: str
    thought: str
    tokens: list[int]
    finish_reason: str | None
    stats: Stats


def load(
    target: str | Path | None = None,
    drafter: str | Path | Literal[False] | None = None,
    quantize: int | None = None,
    dtype: str | None = None,
    profile: str | None = "auto",
    drafter_position: str = "auto",
) -> MTPModel:
    """Loads a target and its drafter.

    Args:
        target: A folder or a hub repository ("google/gemma-4-E4B-it"); None for the embedded demo pair.
        drafter: The same for the drafter. None finds the target's "-assistant" sibling, if there is one; False
            loads none.
        quantize: Bits (2, 3, 4, 5, 6 or 8) to quantise both models to while loading; None takes them as stored.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantised weights. None is the checkpoint's
            own; on the CPU, where 16-bit arithmetic is slow, float32.
        profile: Measured costs of this machine: "auto" for those that were saved, None for none. None can be saved
            yet, so both mean that the draft length is learnt while running.
        drafter_position: Position of the drafter's queries: "committed" (the last committed token's), "bonus" (one
            further, as transformers has it) or "auto" ("committed" so far). Changes acceptance, never the text.

    Raises:
        CheckpointError: A checkpoint is missing, damaged, or not a Gemma 4 model.
        PairingError: The drafter was made for another target.
        MemoryBudgetError: The weights don't fit in this machine's memory.
    """
    if profile not in ("auto", None):
        raise MTPError(f"profile must be 'auto' or None, not {profile!r}: there are no saved profiles yet")
    if drafter_position not in (*POSITIONS, "auto"):
        raise MTPError(f"drafter_position must be auto, {' or '.join(POSITIONS)}, not {drafter_position!r}")
    folder, drafter_folder = find_pair(target, drafter)
    if drafter_position == "auto":
        drafter_position = "committed"
    return MTPModel(folder, drafter_folder, quantize, dtype, drafter_position)


def find_pair(
    target: str | Path | None, drafter: str | Path | Literal[False] | None, weights: bool = True
) -> tuple[Path, Path | None]:
    """The folders of a target and its drafter, as `load` takes them; without `weights` only their descriptions."""
    if target is None:
        target, drafter = DEMO / "target", DEMO / "drafter" if drafter is None else drafter
    folder = checkpoint.find(target, weights)
    if drafter is None:
        return folder, checkpoint.find_drafter(target, weights)
    return folder, checkpoint.find(drafter, weights) if drafter else None


class MTPModel:
    """A target with its drafter, ready to generate. Made by `load`.

    Attributes:
        config: The target's `config.TargetConfig`.
        drafter_config: The drafter's `config.DrafterConfig`, or None.
        tokenizer: The target's `text.Tokenizer`, or None if its folder has none (then prompts are token ids).
        defaults: The target's generation_config, as `checkpoint.GenerationDefaults`.
    """

    def __init__(
        self, folder: Path, drafter_folder: Path | None, quantize: int | None, dtype: str | None, position: str
    ):
        self.folder, self.drafter_folder = folder, drafter_folder
        self._closed = False
        self._lock = threading.RLock()
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._idle: list[Engine] = []
        self.drafter_config, self._drafter = None, None
        with self._turn():
            self.config, self._target = checkpoint.load_target(folder, dtype, quantize)
            if drafter_folder is not None:
                self.drafter_config, self._drafter = checkpoint.load_drafter(
                    drafter_folder, self.config, position, dtype, quantize
                )
        self.defaults = checkpoint.read_generation(folder)
        self.tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None

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
    ) -> Generation | list[Generation]:
        """Generates text.

        Args:
            prompt: A string (a user's message, put into the chat template), messages as dicts with "role" and
                "content", or token ids, used as they are.
            max_tokens: Most tokens to generate.
            temperature: 0 is greedy. This and the next three default to the model's generation_config.
            top_k: Only the k best tokens; 0 for all.
            top_p: Only the best tokens that together reach this probability.
            min_p: Only tokens with at least this share of the best one's probability.
            seed: Same seed, same text, with and without a drafter; None for a new one each time.
            stop: Strings that end the text; they aren't part of it.
            draft_length: Tokens to draft a round, 0 for plain decoding, or "auto".
            exactness: "fast", "invariant" (one block width for the whole run, so that the draft length can't matter
                on any backend) or "stepwise" (verifies token by token: plain decoding, bit for bit, and no faster).
            n: Number of generations, one after the other. The prompt is prefilled once; the i-th runs with
                `row_seed(seed, i)`, so the first is what n = 1 gives.
            ignore_eos: Whether to go on after a stop token.
            thinking: Whether the chat template asks the model to think first.

        Returns:
            The generation; a list of them for n > 1.

        Raises:
            PromptError: The prompt or an option can't be used.
        """
        if n < 1:
            raise PromptError(f"n must be at least 1, not {n}")
        seed = secrets.randbits(32) if seed is None else seed
        tokens = self.encode(prompt, thinking)
        results = []
        for i in range(n):
            chunks = list(
                self.stream(
                    tokens, max_tokens, temperature, top_k, top_p, min_p, row_seed(seed, i), stop, draft_length,
                    exactness, ignore_eos,
                )
            )  # fmt: skip
            text, thought = "".join(chunk.text for chunk in chunks), "".join(chunk.thought for chunk in chunks)
            ids = [t for chunk in chunks for t in chunk.tokens]
            results.append(Generation(text, thought, ids, chunks[-1].finish_reason or "length", chunks[-1].stats))
        return results if n > 1 else results[0]

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
        engine: Engine | None = None,
    ) -> Generator[Chunk, None, None]:
        """Generates text piece by piece; closing the iterator cancels the rest.

        Args:
            engine: KV buffers to run on, from `new_engine`; None takes some of the model's own.

        The other arguments, and the errors, are those of `generate`; errors are raised at once, not at the first
        chunk.
        """
        self._check_open()
        defaults = self.defaults
        sampling = SamplingOptions(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            min_p=defaults.min_p if min_p is None else min_p,
            seed=secrets.randbits(32) if seed is None else seed,
        )
        request = Request(
            prompt=self.encode(prompt, thinking),
            max_tokens=max_tokens,
            sampling=sampling,
            draft_length=draft_length,
            exactness=exactness,
            stop_tokens=frozenset() if ignore_eos else frozenset(defaults.stop_tokens),
            suppress_tokens=defaults.suppress_tokens,
        )
        check_prompt(request.prompt, self.config.text)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        if stops and self.tokenizer is None:
            raise PromptError(f"stop strings need a tokenizer, and {self.folder} has none")
        return self._chunks(request, StopStrings(stops), engine)

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

        return Chat(self, system=system, thinking=thinking)

    def new_engine(self) -> Engine:
        """KV buffers of their own for a series of related prompts, to be passed to `stream`."""
        self._check_open()
        return Engine(self._target, self._drafter)

    def encode(self, prompt: Prompt, thinking: bool = False) -> list[int]:
        """Token ids of a prompt, as `generate` takes it.

        Raises:
            PromptError: Empty, malformed, or text without a tokenizer.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty")
            prompt = [{"role": "user", "content": prompt}]
        tokens = [t for t in prompt if isinstance(t, int) and not isinstance(t, bool)]
        messages = [m for m in prompt if isinstance(m, Mapping)]
        if len(tokens) == len(prompt):
            return tokens
        if len(messages) != len(prompt):
            raise PromptError("a prompt is a string, a list of messages (dicts), or a list of token ids (ints)")
        if self.tokenizer is None:
            raise PromptError(f"{self.folder} has no tokenizer.json: give the prompt as token ids")
        return self.tokenizer.chat(messages, thinking=thinking)

    def logits(self, tokens: Sequence[int]) -> mx.array:
        """The target's logits float32 [len(tokens), vocab] after each of the tokens.

        Raises:
            PromptError: Empty, too long, or a token id outside the vocabulary.
        """
        parts: list[mx.array] = []
        with self._turn():
            self.new_engine().prefill(
                tokens, lambda hidden: parts.append(self._target.logits(hidden)[0].astype(mx.float32))
            )
            logits = mx.concatenate(parts)
            mx.eval(logits)
        return logits

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        """What the drafter proposes after a prompt, greedily.

        Args:
            tokens: The prompt.
            k: Number of drafts.

        Returns:
            The target's own next token, then the k drafts after it.

        Raises:
            PromptError: As `logits`, or k below 1, or there is no drafter.
        """
        if self._drafter is None:
            raise PromptError("there is no drafter to propose with: load one with drafter=")
        if k < 1:
            raise PromptError(f"k must be at least 1, not {k}")
        with self._turn():
            kv, hidden, _ = self.new_engine().prefill(tokens)
            sampler = Sampler([SamplingOptions()], None, self.defaults.suppress_tokens, self.config.text.vocab_size)
            state = first_state(self._target, sampler, hidden, mx.array([len(tokens)], dtype=mx.int32))
            drafts = draft(self._target, self._drafter, kv, sampler, state, k)
            return cast("list[int]", mx.concatenate([state.tokens, drafts[0]]).tolist())

    def close(self) -> None:
        """Lets go of the models and their memory. Calling anything afterwards is an error; closing twice isn't."""
        with self._lock:
            self._closed = True
            self._idle.clear()
            self._target = self._drafter = None  # type: ignore[assignment]
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
        with self._lock, mx.stream(self._stream):
            self._check_open()
            yield

    def _chunks(self, request: Request, stops: StopStrings, engine: Engine | None) -> Generator[Chunk, None, None]:
        own = engine is None
        if engine is None:
            with self._turn():
                engine = self._idle.pop() if self._idle else self.new_engine()
        stats, decoder = Stats(), StreamDecoder(self.tokenizer, request.prompt) if self.tokenizer else None
        rounds = engine.stream(request, stats)
        try:
            reason = None
            while reason is None:
                with self._turn():
                    tokens = next(rounds)
                if stats.generated_tokens and tokens[-1] in request.stop_tokens:
                    reason = "stop"
                elif stats.generated_tokens >= token_limit(request, self.config.text):
                    reason = "length"
                text = thought = ""
                for i, token in enumerate(tokens):
                    answer, idea = decoder.push([token]) if decoder else ("", "")
                    text, thought = text + stops.push(answer), thought + idea
                    if stops.hit:  # what the round holds after it depends on how much was drafted
                        stats.generated_tokens -= len(tokens) - i - 1
                        tokens = tokens[: i + 1]
                        break
                if decoder and reason:
                    text += stops.push(decoder.finish()) + stops.finish()
                reason = "stop" if stops.hit else reason
                yield Chunk(text, thought, tokens, reason, stats)
        finally:
            with self._lock:
                rounds.close()
                if own and not self._closed:
                    self._idle = [*self._idle, engine][-_IDLE_ENGINES:]
