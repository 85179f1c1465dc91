"""What can be asked of a generation: one place for the names, the defaults and the checks."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from ..decode.request import check_draft_length
from ..decode.sampling import SamplingOptions, is_int
from ..errors import PromptError

if TYPE_CHECKING:
    from .generation_config import GenerationDefaults


class OptionFields(TypedDict, total=False):
    """`GenerationOptions` as keyword arguments, but for `max_tokens`, which every call names itself."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    draft_length: int | str
    exactness: str
    ignore_eos: bool
    thinking: bool
    tools: Sequence[Mapping[str, Any]] | None
    stop_token_ids: Sequence[int] | None
    sanitize: bool
    chat_template: bool
    cancel: threading.Event | None


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a text is generated; every call takes these, one by one by name or as this object.

    Attributes:
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
        cancel: Set it, from any thread, to end the text within a round (or a chunk of the prompt); what there is by
            then is returned, with the finish reason "cancelled".

    Raises:
        PromptError: A value can't be used.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    draft_length: int | str = "auto"
    exactness: str = "fast"
    ignore_eos: bool = False
    thinking: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    stop_token_ids: Sequence[int] | None = None
    sanitize: bool = True
    chat_template: bool = True
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise PromptError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")
        SamplingOptions(**{name: value for name in _SAMPLING if (value := getattr(self, name)) is not None})
        check_draft_length(self.draft_length, self.exactness)
        if not isinstance(self.stop_strings, Sequence) or not all(isinstance(it, str) for it in self.stop_strings):
            raise PromptError(f"stop must be a string or a list of strings, not {self.stop!r}")
        for name in ("sanitize", "chat_template"):
            if not isinstance(flag := getattr(self, name), bool):
                raise PromptError(f"{name} must be True or False, not {flag!r}")
        if self.cancel is not None and not isinstance(self.cancel, threading.Event):
            raise PromptError(f"cancel must be a threading.Event, not {self.cancel!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationOptions:
        """Options by name.

        Raises:
            PromptError: A value can't be used, or nothing has such a name.
        """
        if unknown := given.keys() - {field.name for field in fields(cls)}:
            raise PromptError(f"unknown options: {', '.join(sorted(map(str, unknown)))}")
        return cls(**given)

    @property
    def stop_strings(self) -> Sequence[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop

    def sampling(self, defaults: GenerationDefaults, seed: int) -> SamplingOptions:
        """How tokens are chosen, with a model's defaults for what was left open."""
        given = {name: getattr(self, name) for name in _SAMPLING if name != "seed"}
        filled = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
        return SamplingOptions(**filled, seed=seed)


_SAMPLING = tuple(field.name for field in fields(SamplingOptions))
