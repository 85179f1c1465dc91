"""Prompts to verify and measure with: questions of several kinds, and the same at the end of long texts."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from ..checkpoint.pair import DEMO
from ..errors import PromptError

if TYPE_CHECKING:
    from ..api import MTPModel

PROMPTS: dict[str, tuple[str, ...]] = {
    "chat": (
        "What is speculative decoding?",
        "What is the capital of France, and what is it known for?",
        "How many minutes are 3 hours?",
    ),
    "code": (
        "Write a Python function that reverses a string.",
        "Write a Python function that counts the words of a text.",
        "Write a Python function that adds two numbers.",
    ),
    "JSON": (
        "Give me a JSON record for a book.",
        "Write a JSON object that describes a city.",
        "Give me the JSON for a person named Anna.",
    ),
    "prose": (
        "Tell me a short story about a fox.",
        "Describe a walk along a river in autumn.",
        "Tell me about the history of the bicycle.",
    ),
}
"""Questions by kind of text; the tuner measures acceptance on their answers."""

QUESTIONS = tuple(chain.from_iterable(zip(*PROMPTS.values(), strict=True)))
"""The same in an order in which the first few are of different kinds."""

_PRIME = 7919
"""Step between token ids of a prompt for a model that comes without a tokenizer: no id comes twice for long."""


def question(lm: MTPModel, number: int) -> list[int]:
    """Token ids of a short prompt, any number of them; those of a model without a tokenizer mean nothing."""
    if lm.tokenizer is None:
        return _arbitrary(lm, number, 24)
    return lm.encode(QUESTIONS[number % len(QUESTIONS)])


def prompt_of(lm: MTPModel, number: int, tokens: int) -> list[int]:
    """Token ids of a prompt of exactly so many tokens: a text, then a question about something else.

    Args:
        lm: The pair.
        number: Which prompt; different ones have different questions.
        tokens: Length, at least that of the question in the chat format.

    Raises:
        PromptError: It would be shorter than the question.
    """
    if lm.tokenizer is None:
        return _arbitrary(lm, number, tokens)
    asked = QUESTIONS[number % len(QUESTIONS)]
    least = lm.encode(asked)
    if tokens < len(least):
        raise PromptError(f"a prompt of {tokens} tokens can't hold the question, which takes {len(least)}")
    text = (DEMO / "README.md").read_text("utf-8")
    before = 0  # tokens of the chat format that come before the message
    for before, (one, other) in enumerate(zip(least, lm.encode(f"{text}\n\n{asked}"), strict=False)):  # noqa: B007
        if one != other:
            break
    missing = tokens - len(least)
    filling = lm.encode(text, chat_template=False)
    turned = (filling * (missing // len(filling) + 2))[number : number + missing]
    return [*least[:before], *turned, *least[before:]]


def _arbitrary(lm: MTPModel, number: int, tokens: int) -> list[int]:
    # The ids at the ends of a vocabulary are special tokens.
    low, high = lm.config.text.vocab_size // 4, lm.config.text.vocab_size // 2
    return [low + (number + i * _PRIME) % (high - low) for i in range(tokens)]
