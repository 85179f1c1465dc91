"""What OpenAI's interfaces share: fields and usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..session.answer import Chunk, Generation
from ..session.options import GenerationOptions
from .bodies import Body, options_of

MOST_CHOICES = 128
"""Largest `n`, as in OpenAI's interface."""


class StreamOptions(Body):
    """How a response is streamed."""

    include_usage: bool | None = None
    include_spans: bool | None = None  # beyond OpenAI's interface
    include_obfuscation: Any = None  # ignored: there is no encryption whose side channel it would close


class IgnoredFields(Body):
    """What chat and responses ignore: it has no meaning for a model on this machine, or asks for less than it does."""

    metadata: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None


class SamplingBody(Body):
    """Fields of chat and plain completion. Null is the same as a missing field."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    # Beyond OpenAI's interface, as other local servers have them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    draft_length: int | Literal["auto"] | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def spans(self, chunk: Chunk) -> dict[str, Any]:
        """The field `spans` of a streamed choice: the chunk's text by tokens, each a draft or not; {} if not wanted."""
        wanted = self.stream_options and self.stream_options.include_spans
        return {"spans": [span._asdict() for span in chunk.spans]} if wanted else {}

    def options(self, most_tokens: int, **more: Any) -> GenerationOptions:
        """The options of the fields that are given.

        Args:
            most_tokens: `max_tokens` of a request that doesn't say.
            **more: Further options; None leaves one out.

        Raises:
            PromptError: A value can't be used.
        """
        given = {name: getattr(self, name) for name in _OPTIONS} | more
        if given["max_tokens"] is None:
            given["max_tokens"] = most_tokens
        return options_of(**given)


_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "draft_length",
)
"""Fields of `SamplingBody` that are options of the same name."""


def usage(generations: Sequence[Generation], n: int) -> dict[str, Any]:
    """Usage of a response.

    Args:
        generations: All its answers.
        n: Answers to each prompt, which counts once.
    """
    prompts, stats = generations[::n], [it.stats for it in generations]
    prompt = sum(it.stats.prompt_tokens for it in prompts)
    completion = sum(it.generated_tokens for it in stats)
    accepted = sum(it.accepted for it in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(it.stats.cached_tokens for it in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(it.drafted for it in stats) - accepted,
        },
    }
