"""OpenAI's plain completions: `/v1/completions`. The prompt is completed as it is, without a chat template."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import Field

from ..decode.logprobs import TokenLogprob
from ..session.answer import Generation
from ..session.calls import Prompt
from .events import event
from .openai_chat import finish_reason
from .openai_common import MOST_CHOICES, SamplingBody, usage
from .openai_logprobs import token_name
from .service import Answers, Job


class CompletionBody(SamplingBody):
    """The body of a request.

    Attributes:
        prompt: A text, several, token ids, or several lists of them.
        echo, suffix, best_of: Only the values that ask for nothing.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: int | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    user: Any = None  # ignored

    def job(self, most_tokens: int) -> Job:
        """What the request asks for.

        Args:
            most_tokens: `max_tokens` of a request that doesn't say.

        Raises:
            PromptError: A value can't be used.
        """
        options = self.options(most_tokens, logprobs=self.logprobs, chat_template=False)
        return Job(prompts=self._prompts, options=options, model=self.model, n=self.n or 1)

    @property
    def _prompts(self) -> Sequence[Prompt]:
        prompt = self.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return prompt if several else [prompt]  # type: ignore[return-value, list-item]  # mypy doesn't follow `several`


class CompletionReply:
    """The response to a request: whole, or as events."""

    def __init__(self, body: CompletionBody, answers: Answers) -> None:
        """Takes a request and its answers."""
        self._body, self._answers = body, answers
        self._id = f"cmpl-{secrets.token_hex(12)}"

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The response object."""
        choices = [
            self._choice(i, it.text, it.logprobs, finish_reason(it.finish_reason, called=False))
            for i, it in enumerate(generations)
        ]
        return self._object(choices) | {"usage": usage(generations, self._body.n or 1)}

    async def events(self) -> AsyncGenerator[str, None]:
        """The response as server-sent events."""
        async for i, chunk in self._answers.chunks():
            if chunk.text or chunk.logprobs or chunk.finish_reason:
                reason = chunk.finish_reason and finish_reason(chunk.finish_reason, called=False)
                choice = self._choice(i, chunk.text, chunk.logprobs, reason) | self._body.spans(chunk)
                yield event(self._object([choice]))
        if self._body.with_usage:
            yield event(self._object([]) | {"usage": usage(self._answers.generations(), self._body.n or 1)})
        yield "data: [DONE]\n\n"

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        answers = self._answers
        return {
            "id": self._id,
            "object": "text_completion",
            "created": answers.begun,
            "model": answers.model,
            "choices": choices,
        }

    def _choice(self, i: int, text: str, scores: Sequence[TokenLogprob] | None, reason: str | None) -> dict[str, Any]:
        return {"index": i, "text": text, "logprobs": self._logprobs(scores), "finish_reason": reason}

    def _logprobs(self, scores: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Log-probabilities as lists with an entry for each token; offsets are within these tokens' text."""
        if scores is None:
            return None
        tokenizer = self._answers.tokenizer
        scores = [it for it in scores if it.token not in tokenizer.special]
        names = [token_name(tokenizer, it.token)[0] for it in scores]
        offsets = [0, *accumulate(map(len, names))][: len(names)]
        return {
            "tokens": names,
            "token_logprobs": [it.logprob for it in scores],
            "top_logprobs": [{token_name(tokenizer, token)[0]: value for token, value in it.top} for it in scores],
            "text_offset": offsets,
        }
