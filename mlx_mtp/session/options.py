"""The options of a generation: their names, defaults and checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

from ..decode.limits import is_int
from ..decode.logprobs import MOST_LOGPROBS
from ..decode.request import check_draft_length
from ..decode.sampling import SamplingOptions
from ..errors import PromptError

if TYPE_CHECKING:
    import mlx.core as mx

    from .generation_config import GenerationDefaults

MOST_STOPS, MOST_STOP_CHARACTERS = 1_000, 100_000
"""Most stop strings, and their characters in all: a text is searched for each of them with each token."""


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
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    response_format: Mapping[str, Any] | None
    tool_choice: str | Mapping[str, Any] | None
    thinking_budget: int | None
    logits_processors: Sequence[Callable[[Sequence[int], mx.array], mx.array]] | None
    prediction: str | Sequence[int] | Mapping[str, Any] | None
    prefill_progress: Callable[[int, int], object] | None


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
        cancel: Setting it, from any thread, ends the text within a round (or a chunk of the prompt, or once an unloaded
            model is loaded again). The text so far is returned with the finish reason "cancelled".
        repetition_penalty: Divides the positive logits, and multiplies the negative ones, of tokens that the prompt or
            the text has (as transformers does; mlx-lm looks at the last 20 tokens only). 1 changes nothing.
        presence_penalty: Subtracted from the logits of tokens that the text has, as OpenAI does: not the prompt's.
        frequency_penalty: Subtracted from a token's logit once for each time that the text has it.
        logit_bias: Added to logits, by token id. Bias comes first, then the three penalties in this order.
        logprobs: For every token its log-probability, and those of this many most likely ones (0 to 20) beside it, of
            the model's own distribution: before penalties, biases, grammars, temperature and filters.
        response_format: What the answer must be: {"type": "json_object"}, {"type": "json_schema", "json_schema":
            {"schema": ...}}, {"type": "regex", "pattern": ...} or {"type": "grammar", "grammar": ...} in llguidance's
            Lark syntax. {"type": "text"} asks for nothing. Thoughts are free. Needs the extra `structured`.
        tool_choice: "auto"; "none" for no call; "required", or a tool's name (or OpenAI's dict with it), for one call
            or more that keep to the tools' schemas.
        thinking_budget: Most tokens of thought; then the thought is closed as the chat format does it.
        logits_processors: Functions of the token ids so far (the prompt's included) and float32 logits [1, vocab] that
            return other logits, called after the penalties. Each call is made in Python, once for every position that
            is verified, while the device waits.
        prediction: What most of the text is expected to be, as when a text is edited: a string, token ids, or OpenAI's
            {"type": "content", "content": ...}. It is drafted from and changes nothing but the speed.
        prefill_progress: Called with (done, total), the prompt tokens that are prefilled and those of the whole prompt:
            when the prefill begins (done counts tokens from the prompt cache), and after every chunk. It runs in the
            model's thread, which decodes nothing meanwhile: hand the numbers to your own thread and return. It can't
            use the model. An exception in it ends this text with a PromptError, and no other text. Of n answers it
            reports the first. A batch reports each prompt: give each its own, in its dict, to tell them apart.

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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    thinking_budget: int | None = None
    logits_processors: Sequence[Callable[[Sequence[int], mx.array], mx.array]] | None = None
    prediction: str | Sequence[int] | Mapping[str, Any] | None = None
    prefill_progress: Callable[[int, int], object] | None = None

    def __post_init__(self) -> None:
        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise PromptError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")
        SamplingOptions(**{name: value for name in _SAMPLING if (value := getattr(self, name)) is not None})
        check_draft_length(self.draft_length, self.exactness)
        if not isinstance(self.stop_strings, Sequence) or not all(isinstance(it, str) for it in self.stop_strings):
            raise PromptError(f"stop must be a string or a list of strings, not {self.stop!r}")
        if len(self.stop_strings) > MOST_STOPS or sum(map(len, self.stop_strings)) > MOST_STOP_CHARACTERS:
            raise PromptError(f"stop has more than {MOST_STOPS} strings, or {MOST_STOP_CHARACTERS:,} characters in all")
        for name in ("sanitize", "chat_template"):
            if not isinstance(flag := getattr(self, name), bool):
                raise PromptError(f"{name} must be True or False, not {flag!r}")
        if self.cancel is not None and not isinstance(self.cancel, threading.Event):
            raise PromptError(f"cancel must be a threading.Event, not {self.cancel!r}")
        if self.logprobs is not None and (not is_int(self.logprobs) or not 0 <= self.logprobs <= MOST_LOGPROBS):
            raise PromptError(f"logprobs must be a whole number from 0 to {MOST_LOGPROBS}, not {self.logprobs!r}")
        if self.prefill_progress is not None and not callable(self.prefill_progress):
            raise PromptError(f"prefill_progress must be a function of two numbers, not {self.prefill_progress!r}")
        _check_penalties(self)
        _check_rules(self)

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


_LARGEST = 1e30
"""Largest penalty or bias in size: any multiple that a text can come to is still finite in float32."""


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _check_penalties(options: GenerationOptions) -> None:
    """Checks penalties and biases.

    Raises:
        PromptError: A value can't be used.
    """
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if not _is_number(getattr(options, name)):
            raise PromptError(f"{name} must be a number of at most {_LARGEST:g} in size")
    if options.repetition_penalty < 1 / _LARGEST:
        raise PromptError(f"repetition_penalty must be above 0, at least {1 / _LARGEST:g}")
    bias = {} if options.logit_bias is None else options.logit_bias
    if not isinstance(bias, Mapping):
        raise PromptError(f"logit_bias must be a dict from token ids to numbers, not {bias!r}")
    if any(not _is_number(value) and value != -float("inf") for value in bias.values()):
        raise PromptError(f"logit_bias must hold numbers of at most {_LARGEST:g} in size, or -inf")


def _check_rules(options: GenerationOptions) -> None:
    """Checks the other options about what a text may say, as far as that needs no model.

    Raises:
        PromptError: A value can't be used.
    """
    if options.response_format is not None and not isinstance(options.response_format, Mapping):
        raise PromptError(f'response_format must be a dict with a "type", not {options.response_format!r}')
    if options.tool_choice is not None and not isinstance(options.tool_choice, str | Mapping):
        raise PromptError(f"tool_choice must be auto, none, required or a tool's name, not {options.tool_choice!r}")
    budget = options.thinking_budget
    if budget is not None and (not is_int(budget) or budget < 0):
        raise PromptError(f"thinking_budget must be a whole number from 0, not {budget!r}")
    processors = options.logits_processors
    if processors is not None and not (isinstance(processors, Sequence) and all(map(callable, processors))):
        raise PromptError("logits_processors must be a list of functions of token ids and logits")
