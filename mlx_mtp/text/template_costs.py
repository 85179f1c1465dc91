"""What the steps of a chat template cost, known before they run: upper bounds in characters.

A character stands for a byte or more of memory and for some 200 ns of work, so what is slow for its size costs more
than its size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from math import inf
from typing import Any

from jinja2 import TemplateError

ELEMENT = 8
"""Cost of a list element: the bytes of a reference."""

MOST_PARTS = 1 << 18
"""Most values within a value, counting repeated ones: more than a conversation that fills the longest context has."""

MOST_WIDTH = 10_000
"""Largest number that string filters and methods accept, such as a width to pad to; also bits of an integer, and the
longest text for what takes quadratic time."""

_COMPARED = 64
"""Comparisons of characters that cost as much as one character."""

_FACTORS = {"tojson": 16, "urlencode": 12, "escape": 5, "e": 5, "forceescape": 5, "title": 4, "wordcount": 8}
"""Cost for each character of what a filter takes: how much longer its result may be, or how slow it is."""

_SEARCHED_BACKWARDS = ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim")
"""What Python does in time proportional to the product of the lengths, at worst."""

_REFUSED = ("translate", "encode", "decode")
"""Methods that chats don't need, and whose results or times are hard to bound beforehand."""

_WIDE = re.compile(r"[0-9]{5}|\*|\{[^}]*\{")
"""Field widths of a format that are large, or given by an argument."""

_DIGITS = re.compile("[0-9]+")

_FLOAT = 400
"""Longest print of a float without a width, rounded up: 1e308 has 309 digits."""


class BudgetError(TemplateError):
    """A template exceeds its budget of time or memory."""


def size(value: Any) -> int:
    """Characters of a text, elements of a list; 1 for what has no length."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 1


def printed_length(value: Any, most: float = inf) -> int:
    """Length of a value in print, roughly, in characters.

    Raises:
        BudgetError: It exceeds `most`, or the value has more than MOST_PARTS parts.
    """
    amount, parts, waiting = 0, 0, [value]
    while waiting:
        it = waiting.pop()
        parts += 1
        if isinstance(it, Mapping):
            waiting += [*it.keys(), *it.values()]
        elif isinstance(it, list | tuple):
            waiting += it
        amount += len(it) if isinstance(it, str | bytes) else ELEMENT
        amount += it.bit_length() // 3 if isinstance(it, int) else 0
        if amount > most or parts + len(waiting) > MOST_PARTS:
            raise BudgetError(f"a value has more than {most:,} characters or {MOST_PARTS:,} parts")
    return amount


def cost_of(name: str, value: Any, given: list[Any], most: int) -> int:
    """Cost of a filter or a method.

    Args:
        name: Of the filter or method.
        value: What it is applied to.
        given: The arguments.
        most: What is left to spend.

    Raises:
        BudgetError: It costs too much, or there is no useful bound.
    """
    value, *given = (it.decode("latin-1") if isinstance(it, bytes) else it for it in (value, *given))
    width = max((abs(arg) for arg in given if isinstance(arg, int)), default=0)
    if width > MOST_WIDTH:
        raise BudgetError(f"{name} with {width} is too much")
    if isinstance(value, str):
        return len(value) * _FACTORS.get(name, 1) + _text_cost(name, value, given, width, most)
    if name in ("tojson", "string"):
        return printed_length(value, most) * _FACTORS.get(name, 1)
    copies = name in ("list", "sort", "batch", "slice", "unique", "reverse") and isinstance(value, Sized)
    return size(value) * (ELEMENT if copies else 1)


def _text_cost(name: str, value: str, given: list[Any], width: int, most: int) -> int:
    """What a filter or a method of a text costs beyond reading it."""
    lengths = [len(arg) for arg in given if isinstance(arg, str)]
    first = given[0] if given and isinstance(given[0], str) else None
    if name in _REFUSED or (name == "striptags" and len(value) > MOST_WIDTH):
        raise BudgetError(f"{name} may take too much")
    if name in ("list", "sort", "batch", "slice", "unique", "reverse"):
        return ELEMENT * len(value)
    if name in ("indent", "expandtabs"):
        return (1 + value.count("\n") + value.count("\t")) * max([8, width, *lengths])
    if name == "replace" and first is not None and len(lengths) > 1:
        return value.count(first) * lengths[1]
    if name in ("split", "rsplit", "splitlines"):
        pieces = value.count(first) if first else len(value) // 2
        return ELEMENT * pieces + len(value) * sum(lengths) // _COMPARED
    if name in _SEARCHED_BACKWARDS:
        return len(value) * sum(lengths) // _COMPARED
    if name == "join" and given:
        parts = given[0] if isinstance(given[0], list | tuple) else ()
        return len(value) * len(parts) + printed_length(parts, most)
    if name in ("format", "format_map", "%"):
        if _WIDE.search(value):
            raise BudgetError("a format with wide fields is too much")
        widest = max(map(int, _DIGITS.findall(value)), default=0)
        return (value.count("%") + value.count("{")) * (widest + _FLOAT + printed_length(given, most))
    return 0
