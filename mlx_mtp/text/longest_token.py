"""How few tokens a text can have: known from the longest token, before the text is encoded."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}

_KEEPING = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
"""What a pre-tokenizer may do with a separator: all but removing it."""


def longest_token(library: tokenizers.Tokenizer) -> int | None:
    """The most characters of a text that one token can stand for.

    Returns:
        Their number; None where a token can stand for any number, since the tokenizer shortens texts or drops parts.
    """
    model, vocabulary = library.model, library.get_vocab()
    if library.truncation or not isinstance(model, tokenizers.models.BPE) or not model.byte_fallback:
        return None
    stripping = any(token.lstrip or token.rstrip for token in library.get_added_tokens_decoder().values())
    if stripping or not vocabulary.keys() >= _BYTES:
        return None
    if not _keeps_length(_state(library.normalizer)) or not _keeps_all(_state(library.pre_tokenizer)):
        return None
    return max(map(len, vocabulary))


def _state(part: Any) -> dict[str, Any]:
    """What tokenizer.json says of a part; {} if there is none."""
    found: dict[str, Any] = json.loads(part.__getstate__()) if part else {}
    return found


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    pattern = normalizer.get("pattern", {}).get("String", "")
    return not normalizer or (normalizer["type"] == "Replace" and 0 < len(pattern) <= len(normalizer["content"]))


def _keeps_all(splitter: dict[str, Any]) -> bool:
    return not splitter or (splitter["type"] == "Split" and splitter.get("behavior") in _KEEPING)
