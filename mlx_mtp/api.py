"""The public Python interface: `load` gives an `MTPModel`, which turns prompts into text.

Puts the parts together: the session that owns the models (session/owner.py), the tokeniser, the options of a call. The
decoding itself is in decode/, text matters in text/, conversations in chat.py.

Everything here may be called from any thread, and from several at once: they share one batch.
"""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import mlx.core as mx

from . import profile as profiles
from .checkpoint.description import DrafterDescription, TargetDescription
from .checkpoint.load import check_fits
from .checkpoint.pair import DEMO as DEMO
from .checkpoint.pair import find_pair
from .decode.inspect import logits_after, proposal
from .decode.sampling import is_int, row_seed
from .decode.scheduler import MAX_ROWS, Scheduler
from .decode.trace import Trace
from .errors import MTPError, PromptError
from .files import expanded
from .models.drafter import POSITIONS, Drafter
from .models.target import Target
from .session.answer import Chunk, Generation
from .session.calls import Calls, Prompt, chosen_options, common_options, several
from .session.generation_config import read_generation
from .session.inbox import Inbox, Stream
from .session.loading import load_models
from .session.options import GenerationOptions
from .session.owner import Session
from .text.tokenizer import Tokenizer, has_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .chat import Chat
    from .session.options import OptionFields

log = logging.getLogger(__name__)

MOST_ANSWERS = 256
"""Most generations of one call: each has buffers of its own, and nothing is returned before the last is finished."""


def load(
    target: str | Path | None = None,
    drafter: str | Path | Literal[False] | None = None,
    quantize: int | None = None,
    dtype: str | None = None,
    profile: str | Path | None = "auto",
    drafter_position: str = "auto",
    cache_bytes: int | None = None,
    adapter: str | Path | None = None,
    quantize_drafter: int | Literal["auto", "none"] | None = "auto",
) -> MTPModel:
    """Loads a target and its drafter.

    Args:
        target: A folder or a hub repository ("google/gemma-4-E4B-it"); None for the embedded demo pair.
        drafter: The same for the drafter. None takes the target's own: merged into its files, or found by its name,
            for a folder beside it or in the hub's cache; if none can be used, a warning says why. False loads none.
        quantize: Bits (2, 3, 4, 5, 6 or 8) to quantise both models to while loading; a drafter that is quantised
            already stays as it is. None takes the target as stored.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantised weights. None is the checkpoint's
            own; on the CPU, where 16-bit arithmetic is slow, float32. float16 is faster than bfloat16 on M1 and M2,
            and too small for what some models compute: that is an error, see `decode.overflow`.
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
        quantize_drafter: How precise the drafter is. "auto" loads it in the target's own format (bits, groups, mode),
            but with 4 bits at least, if the target is quantised and it isn't; one with a clustered head (E2B's and
            E4B's, which hardly gain) only if `quantize` is given. Bits quantise it to these, in groups of 64; None or
            "none" takes it as stored. Changes speed, memory and acceptance, never the text.

    Raises:
        CheckpointError: A checkpoint is missing, damaged, or not a Gemma 4 model, or overflows in float16.
        PairingError: The drafter was made for another target.
        MemoryBudgetError: The weights don't fit in this machine's memory.
        ProfileError: The profile's file is damaged, or was measured with something else.
    """
    if not isinstance(target, str | Path | None) or not (drafter is False or isinstance(drafter, str | Path | None)):
        raise MTPError("target and drafter must be folders or repository names: strings or paths")
    if drafter_position not in (*POSITIONS, "auto"):
        raise MTPError(f"drafter_position must be auto, {' or '.join(POSITIONS)}, not {drafter_position!r}")
    pair = find_pair(target, drafter, quantize, dtype, quantize_drafter, check=check_fits)
    adapter = None if adapter is None else expanded(adapter)
    tuned = profiles.profile_for(profile, *pair, adapter)
    if drafter_position == "auto":
        drafter_position = (tuned and tuned.drafter_position) or "committed"
    if cache_bytes is not None and (not is_int(cache_bytes) or cache_bytes < 0):
        raise MTPError(f"cache_bytes must be a whole number of bytes or None, not {cache_bytes!r}")
    return MTPModel(*pair, drafter_position, cache_bytes, tuned, adapter)


class MTPModel:
    """A target with its drafter, ready to generate. Made by `load`.

    Attributes:
        adapter: Folder of the target's LoRA adapter, or None.
        description, drafter_description: What was known of both models before they were loaded, as
            `checkpoint.description.Description`; None for no drafter.
        config: The target's `config.TargetConfig`.
        drafter_config: The drafter's `config.DrafterConfig`, or None.
        drafter_format: The `quantization.Format` that the drafter was quantised to while loading, or None.
        tokenizer: The target's `text.tokenizer.Tokenizer`, or None if its folder has none (then prompts are token ids).
        defaults: The target's generation_config, as `session.generation_config.GenerationDefaults`.
        profile: What is known of this pair on this machine, as `profile.Profile`, or None.
        kv_budget: Bytes that all rows together may take for KV.
    """

    def __init__(
        self,
        description: TargetDescription,
        drafter_description: DrafterDescription | None,
        position: str,
        cache_bytes: int | None,
        profile: profiles.Profile | None,
        adapter: Path | None = None,
    ):
        self.profile, self.adapter = profile, adapter
        self.description, self.folder, self.config = description, description.folder, description.config
        self.drafter_description = own = drafter_description
        self.drafter_folder = own.folder if own else None
        self.drafter_config = own.config if own else None
        self.drafter_format = own.quantize if own else None
        self.defaults = read_generation(description)
        self._session = Session(
            partial(
                load_models,
                description,
                own,
                adapter,
                position,
                cache_bytes,
                profile,
                tuple(self.defaults.suppress_tokens),
            )
        )
        # The session doesn't refer to this model, so that dropping the model ends it and gives its memory back.
        weakref.finalize(self, self._session.close).atexit = False
        self.kv_budget = self._session.owned().kv_budget
        folder = self.folder
        self.tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
        if self.tokenizer and self.tokenizer.seems_base(self.defaults.stop_tokens):
            log.warning(
                "%s has no chat template and seems to be a base model, which can't chat: chat_template=False (--raw) "
                "completes text as it is", folder,
            )  # fmt: skip
        self._calls = Calls(
            self._session, self.tokenizer, self.config, self.defaults, folder, profile.rows if profile else MAX_ROWS
        )

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        n: Literal[1] = 1,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        n: int,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> Generation | list[Generation]: ...

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        n: int = 1,
        options: GenerationOptions | None = None,
        **more: Any,
    ) -> Generation | list[Generation]:
        """Generates text.

        Args:
            prompt: A string (a user's message, put into the chat template), messages as dicts with "role" and
                "content", or token ids, used as they are. A last message of the assistant's, without tool calls, is
                continued.
            max_tokens: Most tokens to generate; 256 unless said.
            n: Number of generations, side by side, at most MOST_ANSWERS. The prompt is prefilled once; the i-th runs
                with `row_seed(seed, i)`, so the first is what n = 1 gives.
            options: See `session.options.GenerationOptions`.
            **more: The same by name (temperature, top_k, top_p, min_p, seed, stop, draft_length, exactness,
                ignore_eos, thinking, tools, stop_token_ids, sanitize, chat_template, cancel), in place of those.

        Returns:
            The generation; a list of them for n > 1.

        Raises:
            PromptError: The prompt or an option can't be used.
            MemoryBudgetError: The KV doesn't fit, even alone.
            MTPError: Decoding failed, or the model is closed.
        """
        if not is_int(n) or not 1 <= n <= MOST_ANSWERS:
            raise PromptError(f"n must be a whole number from 1 to {MOST_ANSWERS}, not {n!r}: make several calls")
        chosen = chosen_options(options, max_tokens, more)
        seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
        tokens = self._calls.tokens(prompt, chosen)
        answers = [self._calls.prepare(tokens, chosen, row_seed(seed, i)) for i in range(n)]
        for _ in self._calls.together(iter(answers), n, inbox := Inbox()):
            pass
        del inbox
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
        common = common_options(options)
        answers = [self._calls.one_of_many(i, prompt, common) for i, prompt in enumerate(several(prompts))]
        for _ in self._calls.together(iter(answers), self._calls.batch_size(batch_size), inbox := Inbox()):
            pass
        del inbox
        return [answer.generation() for answer in answers]

    def generate_each(
        self, prompts: Iterable[Prompt | Mapping[str, Any]], batch_size: int | Literal["auto"] = "auto", **options: Any
    ) -> Stream[tuple[int, Generation | MTPError]]:
        """As `generate_batch`, but yields what is finished at once, and takes prompts only when there is room.

        Args:
            prompts: As for `generate_batch`, any number.
            batch_size: As for `generate_batch`.
            **options: As for `generate_batch`.

        Returns:
            An iterator over the index of a prompt, and its generation, or why there is none. Closing it, from any
            thread, ends what is running.
        """
        inbox = Inbox()
        return Stream(self._calls.each(prompts, batch_size, common_options(options), inbox), inbox.close)

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> Stream[Chunk]:
        """Generates text piece by piece, from the first piece that is asked for on.

        Closing the iterator, from any thread, ends the generation; so does dropping it. The arguments, and the
        errors, are those of `generate`; errors are raised at once, not at the first chunk.
        """
        inbox = Inbox()
        return Stream(self._calls.chunks(self._calls.prepared(prompt, max_tokens, options, more), inbox), inbox.close)

    def astream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: the event loop stays free, and a task that is cancelled ends at once."""
        return self._calls.achunks(self._calls.prepared(prompt, max_tokens, options, more), Inbox())

    def chat(self, system: str | None = None, thinking: bool = False) -> Chat:
        """Starts a conversation; see `chat.Chat`."""
        from .chat import Chat

        self._session.owned()
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
        self._session.run(lambda it: it.scheduler.save_prompt(tokens, expanded(path)))

    def load_prompt(self, path: str | Path) -> int:
        """Takes a saved prompt into memory; prompts that begin like it start where it ends.

        Returns:
            Its number of tokens.

        Raises:
            CheckpointError: The file is missing, damaged, or was saved by another model.
            MemoryBudgetError: It is larger than all that is kept for prompts (`cache_bytes`).
        """
        return self._session.call(lambda it: it.scheduler.load_prompt(expanded(path)))

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Records what host and device do meanwhile, as a Chrome trace; see `decode.trace`.

        Raises:
            MTPError: Another trace is being recorded.
            OSError: The file can't be written.
        """

        def begin(scheduler: Scheduler) -> Trace:
            if scheduler.engine.trace:
                raise MTPError("a trace is being recorded already, and there can be only one at a time")
            scheduler.engine.trace = Trace(path)
            return scheduler.engine.trace

        def end(scheduler: Scheduler) -> None:
            scheduler.engine.trace = None

        trace = self._session.call(lambda it: begin(it.scheduler))
        try:
            yield
        finally:
            with suppress(MTPError):  # closed meanwhile
                self._session.call(lambda it: end(it.scheduler))
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
        options = GenerationOptions(thinking=thinking, tools=tools, sanitize=sanitize, chat_template=chat_template)
        return self._calls.tokens(prompt, options)

    def logits(self, tokens: Sequence[int]) -> mx.array:
        """The target's logits float32 [len(tokens), vocab] after each of the tokens.

        Raises:
            PromptError: Empty, too long, or a token id outside the vocabulary.
        """
        prompt = _ids(tokens)
        return self._session.run(lambda it: logits_after(it.target, prompt))

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
        self._session.owned()
        if self.drafter_config is None:
            raise PromptError("there is no drafter to propose with: load one with drafter=")
        prompt, config = _ids(tokens), self.config.text
        room = config.max_positions - len(prompt)
        if not is_int(k) or not 1 <= k <= max(1, room):
            raise PromptError(f"k must be a whole number from 1 to the {room:,} tokens that fit, not {k!r}")

        suppressed = self.defaults.suppress_tokens
        return self._session.run(lambda it: proposal(it.target, cast(Drafter, it.drafter), prompt, k, suppressed))

    @contextmanager
    def models(self) -> Iterator[tuple[Target, Drafter | None]]:
        """The target and the drafter, for this thread alone meanwhile; for what measures them."""
        with self._session.lend() as models:
            yield models

    def close(self) -> None:
        """Lets go of the models and their memory; whoever waits for a text gets an error within a round.

        Calling anything afterwards is an error; closing twice isn't. May be called from any thread.
        """
        self._session.close()

    def __enter__(self) -> MTPModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ids(tokens: Sequence[int]) -> Sequence[int]:
    """Token ids, checked to be that."""
    if not isinstance(tokens, Sequence) or not all(is_int(token) for token in tokens):
        raise PromptError("expected a list of token ids (ints): lm.encode(prompt) gives them")
    return tokens
