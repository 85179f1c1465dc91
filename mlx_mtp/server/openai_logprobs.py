"""Log-probabilities as OpenAI's interfaces write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..decode.logprobs import TokenLogprob
from ..text.control_tokens import CHANNEL_END
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import CALL, QUOTE


class TextLogprobs:
    """Log-probabilities of an answer's text: those of thoughts, tool calls and special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begins before the first token."""
        self._tokenizer, self._in_call = tokenizer, False
        self._kept: list[TokenLogprob] = []

    def push(self, scores: Sequence[TokenLogprob]) -> None:
        """Takes those of the next tokens."""
        for score in scores:
            name = self._tokenizer.special.get(score.token)
            if name is None:
                if not self._in_call:
                    self._kept.append(score)
            elif name == CHANNEL_END:
                self._kept.clear()  # what came before was thought; its beginning may be part of the prompt
            elif name != QUOTE:
                self._in_call = name == CALL

    def pop(self) -> list[dict[str, Any]]:
        """Those that have come since the last time; call it when text has."""
        kept, self._kept = self._kept, []
        return [self._written(score) for score in kept]

    def _written(self, score: TokenLogprob) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, raw = token_name(self._tokenizer, token)
            return {"token": text, "logprob": logprob, "bytes": raw}

        return entry(score.token, score.logprob) | {"top_logprobs": [entry(*it) for it in score.top]}


def token_name(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """A token's text, and its bytes. A token that is part of a character has the text U+FFFD."""
    name = tokenizer.special.get(token)
    if name is not None:
        return name, list(name.encode())
    raw = tokenizer.library.id_to_token(token) or ""
    characters = tokenizer.characters()
    text = characters.push(token) + characters.finish()
    if len(raw) == 6 and raw.startswith("<0x"):  # a single byte, as in SentencePiece's vocabularies
        return text, [int(raw[3:5], 16)]
    return text, list(text.encode())
