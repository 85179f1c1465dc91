"""What the bodies of all interfaces have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from ..errors import PromptError
from ..session.options import GenerationOptions


class Body(BaseModel):
    """The body of a request. A field that it doesn't have is an error that names it."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_numbers(cls, body: Any) -> Any:
        """Refuses NaN and infinity: Python reads them, but JSON has none, so no response could repeat them."""
        left = [body]
        while left:
            value = left.pop()
            if isinstance(value, dict | list):
                left += value.values() if isinstance(value, dict) else value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is NaN or infinite")
        return body


def options_of(**given: Any) -> GenerationOptions:
    """The options that are given, by name; None leaves one out.

    Raises:
        PromptError: A value can't be used.
    """
    return GenerationOptions(**{name: value for name, value in given.items() if value is not None})


def joined_text(content: Any, kinds: Sequence[str] = ("text",)) -> Any:
    """The content of a message with its parts joined.

    Args:
        content: A string, or a list of parts; anything else is returned as it is.
        kinds: Types of parts that hold text.

    Raises:
        PromptError: A part holds something else, an image for example.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind not in kinds:
            raise PromptError(f"content has a part of the type {kind!r}: this server reads text only")
        if not isinstance(text, str):
            raise PromptError("content has a part whose text isn't a string")
        texts.append(text)
    return "".join(texts)
