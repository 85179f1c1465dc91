"""The options of a generation: their names, defaults and checks."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

from ..decode.request import check_draft_length
from ..decode.sampling import SamplingOptions, is_int
from ..errors import PromptError

if TYPE_CHECKING:
    from .generation_config import GenerationDefaults


class OptionFields(TypedDict, total=False):
    """`GenerationOptions` as keyword arguments, except `max_tokens`, which every call names itself."""

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
    """How a text is generated. Every call takes these options by name or as this object.

    Attributes:
        max_tokens: Most tokens to generate.
        temperature: 0 is greedy. None, here and for the next three, takes the value of the model's generation_config.
        top_k: Sample only from the k most probable tokens; 0 for all.
        top_p: Sample only from the most probable tokens that together reach this probability.
        min_p: Sample only from tokens with at least this share of the best token's probability.
        seed: The same seed gives the same text, with and without a drafter. None takes a new one each time.
        stop: Strings that end the text, which doesn't include them. The name of a special token ("<turn|>") stands
            for that token.
        draft_length: Tokens to draft in a round, 0 for plain decoding, or "auto".
        exactness: "fast"; "invariant" (one block width for the whole run, so that the draft length can't change the
            text on any backend); or "stepwise" (verifies token by token: the same bits as plain decoding, and no
            faster).
        ignore_eos: Whether to continue after the model's own stop tokens: those of its generation_config, of Gemma 4's
            chat format, and its tokenizer's `eos_token`.
        thinking: Whether the chat template asks the model to think first.
        tools: Tools that the model may call, as in OpenAI's interface: {"type": "function", "function": {"name",
            "description", "parameters"}}, where "parameters" is a JSON schema. `Generation.tool_calls` holds the
            calls that fit them, `Generation.tool_errors` describes those that don't.
        stop_token_ids: Further token ids that end the text.
        sanitize: Whether a special token's name ("<turn|>") in a message or a tool is encoded as plain text. False
            encodes it as the special token; the model then can't tell it from one of the chat template.
        chat_template: False completes a string as it is, after the token that begins texts: without messages, thinking
            or tools. The names of special tokens in it are encoded as special tokens.
        cancel: Setting it, from any thread, ends the text within a round (or a chunk of the prompt). The text so far
            is returned with the finish reason "cancelled".

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

    def updated(self, values: Mapping[str, Any]) -> GenerationOptions:
        """These options with some values replaced, by name.

        Raises:
            PromptError: A value can't be used, or there is no option of that name.
        """
        if unknown := values.keys() - {field.name for field in fields(self)}:
            raise PromptError(f"unknown options: {', '.join(sorted(map(str, unknown)))}")
        return replace(self, **values) if values else self

    @property
    def stop_strings(self) -> Sequence[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop

    def sampling(self, defaults: GenerationDefaults, seed: int) -> SamplingOptions:
        """The sampling options, with a model's defaults for those that are None."""
        given = {name: getattr(self, name) for name in _SAMPLING if name != "seed"}
        filled = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
        return SamplingOptions(**filled, seed=seed)


_SAMPLING = tuple(field.name for field in fields(SamplingOptions))


def resolve_options(
    options: GenerationOptions | None, max_tokens: int | None, overrides: Mapping[str, Any]
) -> GenerationOptions:
    """The options of a call.

    Args:
        options: The object that the call was given; None for the defaults.
        max_tokens: Replaces that of `options`, unless None.
        overrides: Options by name, which replace those of `options`.

    Raises:
        PromptError: `options` isn't a `GenerationOptions`, a value can't be used, or there is no option of that name.
    """
    if options is None:
        options = GenerationOptions()
    if not isinstance(options, GenerationOptions):
        raise PromptError(f"options must be GenerationOptions, not {options!r}")
    return options.updated(overrides if max_tokens is None else {"max_tokens": max_tokens, **overrides})
