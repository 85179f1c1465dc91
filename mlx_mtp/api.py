"""The public Python interface: `load` returns an `MTPModel`, which turns prompts into text.

This module joins the parts: the session that owns the models (session/owner.py), the calls that generate
(session/calls.py), the tokenizer and the profile. Decoding is in decode/, text in text/, conversations in chat.py.

Everything here may be called from several threads at a time; all calls share one batch.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import mlx.core as mx

from . import profile as profiles
from .checkpoint.description import DrafterDescription, TargetDescription
from .checkpoint.load import check_fits
from .checkpoint.pair import find_pair
from .checkpoint.progress import ProgressCallback
from .decode.inspect import logits_after, proposal
from .decode.noise import row_seed as row_seed
from .decode.scheduler import MAX_ROWS
from .errors import MTPError
from .files import expanded
from .models.drafter import Drafter
from .models.target import Target
from .session.answer import Chunk, Generation
from .session.calls import BatchPrompt, Calls, Prompt
from .session.generation_config import read_generation
from .session.inbox import Stream
from .session.loading import check_arguments, load_models, load_tokenizer
from .session.options import GenerationOptions, resolve_options
from .session.owner import Session
from .session.tracing import tracing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .chat import Chat
    from .session.options import OptionFields


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
    idle_unload: float | None = None,
    progress: ProgressCallback | None = None,
) -> MTPModel:
    """Loads a target and its drafter.

    Args:
        target: A folder or a hub repository ("google/gemma-4-E4B-it"); None for the embedded demo pair.
        drafter: A folder or a repository. None finds the target's own: merged into its files, in a folder beside it,
            or in the hub's cache; if there is none that can be used, a warning says why. False loads no drafter.
        quantize: Bits (2, 3, 4, 5, 6 or 8) to quantise both models to while loading, but not what is stored quantised.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantised weights. None takes the checkpoint's
            own; on the CPU, where 16-bit arithmetic is slow, float32. float16 is faster than bfloat16 on M1 and M2.
        profile: What `mlx-mtp tune` measured for this pair here: "auto" for the saved profile, if there is one; a file;
            or None. Sets a batch's rows (8 without one) and first estimates of what rounds cost, learnt while decoding.
        drafter_position: Position of the drafter's queries: "committed" (the last committed token's), "bonus" (one
            more, as in transformers) or "auto" (the profile's, else the first). Changes acceptance, never the text.
        cache_bytes: Most bytes of KV to keep of finished texts; None takes a quarter of what the models leave.
        adapter: Folder of a LoRA adapter for the target, as mlx-lm or PEFT writes it; weights may be quantised. The
            drafter isn't adapted, so acceptance may be lower.
        quantize_drafter: The drafter's precision. "auto": beside a quantised target, its format with at least 4 bits;
            with a clustered head (E2B, E4B), which gains little, only if `quantize` is given. A number: bits, in groups
            of 64. None or "none": as stored. Never changes the text.
        idle_unload: Seconds without calls after which the model is unloaded, see `MTPModel.unload`; None for never.
        progress: Called with an `mlx_mtp.Progress` while files are downloaded and weights read, mostly in other threads
            than the caller's, but never in two at once. An exception in it ends the loading, after a running download.

    Raises:
        CheckpointError: A checkpoint is missing, damaged, or not a Gemma 4 model, or overflows in float16.
        PairingError, MemoryBudgetError: The drafter was made for another target; the weights don't fit in memory.
        ProfileError: The profile's file is damaged, or was measured with something else.
        MTPError: Another argument can't be used.
    """
    check_arguments(target, drafter, drafter_position, cache_bytes, idle_unload)
    pair = find_pair(target, drafter, quantize, dtype, quantize_drafter, check=check_fits, progress=progress)
    adapter = None if adapter is None else expanded(adapter)
    tuned = profiles.profile_for(profile, *pair, adapter)
    if drafter_position == "auto":
        drafter_position = (tuned and tuned.drafter_position) or "committed"
    return MTPModel(*pair, drafter_position, cache_bytes, tuned, adapter, idle_unload, progress)


class MTPModel:
    """A target with its drafter, ready to generate. Made by `load`.

    Attributes:
        description: The target's `checkpoint.description.TargetDescription`, read before the weights.
        folder, config: The target's folder, and its `config.TargetConfig`.
        drafter_description, drafter_folder, drafter_config: The same for the drafter; None without one.
        drafter_format: The `quantization.Format` that the drafter was quantised to while loading, or None.
        adapter: Folder of the target's LoRA adapter, or None.
        tokenizer: The target's `text.tokenizer.Tokenizer`; None if its folder has none: prompts are token ids then.
        defaults: The target's `session.generation_config.GenerationDefaults`.
        profile: The pair's `profile.Profile`, or None.
        kv_budget: Bytes that the KV of all rows may take.
    """

    def __init__(
        self,
        description: TargetDescription,
        drafter_description: DrafterDescription | None,
        position: str,
        cache_bytes: int | None,
        profile: profiles.Profile | None,
        adapter: Path | None = None,
        idle_unload: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        self.profile, self.adapter = profile, adapter
        self.description, self.folder, self.config = description, description.folder, description.config
        self.drafter_description = own = drafter_description
        self.drafter_folder = own.folder if own else None
        self.drafter_config = own.config if own else None
        self.drafter_format = own.quantize if own else None
        self.defaults = read_generation(description)
        suppressed = tuple(self.defaults.suppress_tokens)
        self._session = Session(
            partial(load_models, description, own, adapter, position, cache_bytes, profile, suppressed, progress),
            idle_unload,
        )
        # Dropping the model closes the session, which doesn't refer to it; also if an interrupt strikes from here on.
        weakref.finalize(self, self._session.close).atexit = False
        self._session.start()
        self.kv_budget, rows = self._session.capacity.kv_budget, profile.rows if profile else MAX_ROWS
        self.tokenizer = load_tokenizer(self.folder, self.defaults.stop_tokens)
        self._calls = Calls(self._session, self.tokenizer, self.config, self.defaults, self.folder, rows)

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
                "content", or token ids, used as they are. If the last message is the assistant's and has no tool
                calls, the text continues it.
            max_tokens: Most tokens to generate; None takes that of `options`, by default 256.
            n: Number of generations, 1 to `session.calls.MOST_ANSWERS`. They share one prefill; the i-th runs with
                `row_seed(seed, i)`, so the first equals that of n = 1.
            options: See `GenerationOptions`.
            **more: Options by name, see `GenerationOptions`; they replace those of `options`.

        Returns:
            The generation; a list of n generations for n > 1.

        Raises:
            PromptError: The prompt or an option can't be used.
            MemoryBudgetError: The KV doesn't fit, even alone.
            MTPError: Decoding failed, or the model is closed.
        """
        results = self._calls.generate(prompt, resolve_options(options, max_tokens, more), n)
        return results if n > 1 else results[0]

    def generate_batch(
        self,
        prompts: Sequence[BatchPrompt],
        batch_size: int | Literal["auto"] = "auto",
        *,
        max_tokens: int | None = None,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> list[Generation]:
        """Generates a text for each of several prompts, decoding them together.

        Each text is the same as its prompt gets alone.

        Args:
            prompts: Prompts as for `generate`, or dicts with "prompt" and options, which replace the common ones.
            batch_size: Prompts that decode at a time; "auto" for the number of the profile, or 8 without one.
            max_tokens: As for `generate`, for all prompts.
            options: Likewise. The i-th prompt gets `row_seed(seed, i)`, so the first gets the seed itself.
            **more: Likewise.

        Returns:
            The generations, in the order of the prompts.

        Raises:
            MTPError: As for `generate`. If a prompt or an option can't be used, nothing is generated.
        """
        return self._calls.generate_batch(prompts, batch_size, resolve_options(options, max_tokens, more))

    def generate_each(
        self,
        prompts: Iterable[BatchPrompt],
        batch_size: int | Literal["auto"] = "auto",
        *,
        max_tokens: int | None = None,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> Stream[tuple[int, Generation | MTPError]]:
        """As `generate_batch`, but yields each generation when it is finished.

        Arguments are those of `generate_batch`. A prompt is taken only when the batch has room for it, so there may be
        any number. A prompt that can't be used yields its error and doesn't end the others.

        Returns:
            An iterator over pairs: the index of a prompt, and its generation or error. Closing it, from any thread,
            ends what is running.

        Raises:
            PromptError: A common option can't be used, or `prompts` is a single prompt.
        """
        return self._calls.generate_each(prompts, batch_size, resolve_options(options, max_tokens, more))

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> Stream[Chunk]:
        """Generates text piece by piece; generation starts when the first chunk is requested.

        Arguments and errors are those of `generate`; a prompt or an option that can't be used raises here, not at the
        first chunk. Closing or dropping the iterator, from any thread, ends the generation.
        """
        (answer,) = self._calls.prepare(prompt, resolve_options(options, max_tokens, more))
        return self._calls.stream(answer)

    def astream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: doesn't block the event loop; cancelling the task ends the generation.

        The call itself encodes the prompt and compiles a grammar, which takes seconds for the first grammar of a large
        vocabulary: `await asyncio.to_thread(lm.astream, prompt, ...)` leaves the event loop free meanwhile.
        """
        (answer,) = self._calls.prepare(prompt, resolve_options(options, max_tokens, more))
        return self._calls.astream(answer)

    def chat(self, system: str | None = None, thinking: bool = False, *, rolling: bool = False) -> Chat:
        """Starts a conversation; see `chat.Chat`."""
        from .chat import Chat

        self._session.check_open()
        return Chat(self, system=system, thinking=thinking, rolling=rolling)

    def save_prompt(self, prompt: Prompt, path: str | Path) -> None:
        """Prefills a prompt and saves its KV to a file, for `load_prompt` in another process.

        Args:
            prompt: As for `generate`. Longer prompts that begin with the same tokens can use it too: for example
                messages that begin with the same system prompt.
            path: A .safetensors file.

        Raises:
            PromptError: The prompt can't be used.
            MemoryBudgetError: Its KV doesn't fit.
            OSError: The file can't be written.
        """
        tokens = self.encode(prompt)
        self._session.run(lambda owned: owned.scheduler.save_prompt(tokens, expanded(path)))

    def load_prompt(self, path: str | Path) -> int:
        """Loads a saved prompt; later prompts that begin with its tokens aren't prefilled up to its end.

        Returns:
            Its number of tokens.

        Raises:
            CheckpointError: The file is missing, damaged, or was saved by another model.
            MemoryBudgetError: It is larger than `cache_bytes` of `load`.
        """
        return self._session.call(lambda owned: owned.scheduler.load_prompt(expanded(path)))

    def trace(self, path: str | Path) -> AbstractContextManager[None]:
        """Records the work of host and device as a Chrome trace, until the block ends or the models are unloaded.

        Raises:
            MTPError: Another trace is being recorded.
            OSError: The file can't be written.
        """
        return tracing(self._session, path)

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
        return self._session.run(lambda owned: logits_after(owned.target, tokens))

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        """Drafts k tokens after a prompt, greedily.

        Args:
            tokens: Token ids of the prompt.
            k: Number of drafts, from 1 to the positions left in the context.

        Returns:
            k + 1 token ids: the target's own next token, then the drafts after it.

        Raises:
            PromptError: As for `logits`, or k is out of range, or there is no drafter.
        """
        suppressed = self.defaults.suppress_tokens
        return self._session.run(lambda owned: proposal(owned.target, owned.drafter, tokens, k, suppressed))

    def models(self) -> AbstractContextManager[tuple[Target, Drafter | None]]:
        """Lends the target and the drafter to this thread for the block, to measure them; all rows wait meanwhile."""
        return self._session.lend()

    @property
    def loaded(self) -> bool:
        """Whether the models are in memory, see `unload`."""
        return self._session.loaded

    def limit_kv(self, most: int) -> None:
        """Sets how many bytes the KV of rows and the prompt cache may take, for a process with several models.

        At first, and after `unload`, that is what the weights leave. The cache drops what no longer fits.

        Raises:
            MemoryBudgetError: Requests that run or wait need more; the limit stays as it was.
        """
        self.kv_budget = self._session.call(lambda owned: owned.limit_kv(most))

    def unload(self) -> None:
        """Frees the memory of weights and KV; the next call loads the models again, from the same files.

        Waits until no call runs or waits, in any thread; a stream counts until it is read to its end or closed. To have
        the memory at once, cancel them. Kept KV is lost. A call that can't load the models fails as `load` does.
        """
        self._session.unload()

    def close(self) -> None:
        """Frees the models for good. Running calls fail within a round, later ones at once, except another `close`."""
        self._session.close()

    def __enter__(self) -> MTPModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
