"""Damage and malice for files: random changes to JSON, to bytes, to safetensors headers, and hostile templates."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e308, 2**31 - 1, 2**31, 2**63, -(2**63), 2**64, 10**400,
    float("nan"), float("inf"), -float("inf"), "", "0", "a\nb", "\0", "\ud800", "../x", "/etc/passwd", "/dev/zero",
    "x" * 5000, "evil", [], {}, [None], [[]], {"": None}, [0] * 1000, {"a": {"a": {"a": []}}}, "full_attention",
    "sliding_attention", "float32", "F32", "U8", "proportional", "LORA", "affine", "{{ 1 }}", "(" * 300, "(a*)*b",
    "[0-9]{1,100000}", ["float32"], {"type": "string"}, {"$ref": "#"}, 512, 2**20,
]  # fmt: skip
"""Values that some field of some file might not expect."""


def damaged_json(rng: Random, value: Any, times: int | None = None) -> Any:
    """A copy of a JSON value in which a few places have changed."""
    value = json.loads(json.dumps(value))
    for _ in range(times or rng.choice([1, 1, 1, 2, 3, 6])):
        value = _changed(rng, value)
    return value


def _changed(rng: Random, value: Any, depth: int = 0) -> Any:
    """One place of a value changed: a random walk goes down, and stops somewhere."""
    if not isinstance(value, dict | list) or not value or (depth and rng.random() < 0.25):
        return _replaced(rng, value)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, way = rng.choice(keys), rng.randrange(8)
    if way == 0:
        del value[key]
    elif way == 1 and isinstance(value, dict):
        value[rng.choice([*keys, "evil", "", "auto_map", "quantization", "rope_scaling"])] = _odd(rng)
    elif way == 2 and isinstance(value, dict):
        value[rng.choice(keys)] = deepcopy(value[key])
    elif way == 3 and isinstance(value, list):
        value.insert(rng.randrange(len(value) + 1), deepcopy(value[key]))
    else:
        value[key] = _changed(rng, value[key], depth + 1)
    return value


def _replaced(rng: Random, value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice([value + 1, value - 1, value * 2, -value, str(value), [value], value * 2**33])
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice([value[:-1], value + value, value + "\n", value.upper(), [value]])
    if rng.random() < 0.03:
        return _deep(rng.choice([50, 101, 1_000, 3_000]), rng.random() < 0.5)
    return _odd(rng)


def _odd(rng: Random) -> Any:
    return deepcopy(rng.choice(ODD))


def _deep(depth: int, lists: bool) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def damaged_text(rng: Random, value: Any) -> bytes:
    """JSON with changed places; or the same bytes with some lost, changed, or twice."""
    if rng.random() < 0.85:
        try:
            return json.dumps(damaged_json(rng, value)).encode("utf-8", "surrogatepass")
        except RecursionError:
            return b"[" * 100_000
    return damaged_bytes(rng, json.dumps(value).encode())


def damaged_bytes(rng: Random, content: bytes, within: int | None = None) -> bytes:
    """Content in whose first `within` bytes a few were lost, changed, or come twice."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        most = min(len(found), within or len(found))
        if most == 0:
            break
        at, way = rng.randrange(most), rng.randrange(6)
        piece = found[at : at + rng.randrange(1, 60)]
        if way == 0:
            found[at] = rng.randrange(256)
        elif way == 1:
            found[at] = rng.choice(b'0129"[]{},:-e.\\u\n')
        elif way == 2:
            del found[at : at + len(piece)]
        elif way == 3:
            found[at:at] = piece
        elif way == 4:
            del found[at:]
        else:
            other = rng.randrange(most)
            found[other : other + len(piece)] = piece
    return bytes(found)


def damaged_header(rng: Random, content: bytes) -> bytes:
    """A safetensors file with a damaged header, or cut short."""
    end = 8 + int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        return damaged_bytes(rng, content, within=end)
    header = damaged_text(rng, json.loads(content[8:end]))
    length = len(header) if rng.random() < 0.95 else rng.choice([0, 1, len(header) + 1, 2**32, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + header + content[end:]


_EXPRESSIONS = (
    "messages", "messages[0]", "messages[0]['content']", "bos_token", "x", "loop", "range(10**9)", "range(300)", "'ab'",
    "10**9", "1", "0", "[]", "{}", "''.join", "self", "cycler", "joiner('a')", "namespace(a=1)", "lipsum", "dict",
    "tools", "messages.__class__", "''.__class__.__mro__", "x.__init__.__globals__", "self.__init__.__globals__",
    "cycler.__init__.__globals__.os", "().__class__.__base__.__subclasses__()", "raise_exception('no')",
    "raise_exception('a\\nb')", "strftime_now('%Y')", "strftime_now('%9999999d')", "'%999999999d'", "('a', 'b')",
    "messages|map(attribute='__class__')|list", "'{0.__class__}'.format(x)", "x|attr('__class__')", "caller()", "none",
    "'{:>999999999}'", "'a' * 10**8", "namespace.__init__", "range.__self__", "true.real", "joiner.__call__",
)  # fmt: skip
"""What templates compute with, harmless and not."""

_FILTERS = (
    "length", "upper", "list", "join", "tojson", "tojson(indent=10**8)", "sort", "reverse", "center(10**9)", "batch(2)",
    "batch(10**9)", "slice(10**8)", "indent(10**8)", "indent", "replace('a', 'a' * 1000)", "format(1)", "string", "sum",
    "map('upper')", "map(attribute='a.b.c')", "groupby('role')", "unique", "first", "last", "random", "int", "float",
    "select", "reject('odd')", "dictsort", "items", "safe", "escape", "truncate(10**9)", "wordcount", "round(10**9)",
    "filesizeformat", "striptags", "trim", "title", "urlencode", "default('x')", "abs", "max", "min", "attr('pop')",
)  # fmt: skip
"""What templates put after a bar."""


_OPERATORS = ("+", "*", "**", "%", "~", "//", "in", "and", "==")

_METHODS = ("join([1])", "format(1)", "append(1)", "items()", "zfill(10**9)", "mro()")

_STATEMENTS = (
    "{% include '/etc/passwd' %}", "{% import 'evil' as x %}", "{% extends 'evil' %}", "{% break %}", "{% raw %}",
    "{% endfor %}", "{#", "{{", "{% generation %}",
)  # fmt: skip


def hostile_template(rng: Random, depth: int = 0) -> str:
    """A random chat template that tries what it can."""
    if depth > 4:
        return "{{ " + _expression(rng) + " }}"
    inner = hostile_template(rng, depth + 1)
    way = rng.randrange(14)
    if way < 4:
        return "{{ " + _expression(rng) + " }}" + (inner if rng.random() < 0.5 else "")
    if way < 7:
        return "{% for x in " + _expression(rng) + " %}" + inner + "{% endfor %}"
    if way == 7:
        return "{% set x = " + _expression(rng) + " %}" + inner
    if way == 8:
        return (
            "{% set ns = namespace(a=['a']) %}{% for i in range(10**6) %}{% set ns.a = ns.a + ns.a %}"
            + inner
            + "{% endfor %}"
        )
    if way == 9:
        return "{% macro f(n) %}{{ f(n + 1) }}" + inner + "{% endmacro %}{{ f(0) }}"
    if way == 10:
        return "{% if " + _expression(rng) + " %}" + inner + "{% else %}x{% endif %}"
    if way == 11:
        return rng.choice(_STATEMENTS) + inner
    if way == 12:
        return "{% for x in range(400) %}" * rng.choice([2, 3, 25]) + inner + "{% endfor %}" * rng.choice([2, 3, 25])
    return "{{ " + rng.choice(["(", "[", "-", "not ", "{'a':"]) * rng.choice([3, 200, 3_000]) + "1 }}" + inner


def _expression(rng: Random, depth: int = 0) -> str:
    found = rng.choice(_EXPRESSIONS)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        way = rng.randrange(5)
        if way < 2:
            found = f"({found})|{rng.choice(_FILTERS)}"
        elif way == 2 and depth < 3:
            found = f"({found}) {rng.choice(_OPERATORS)} ({_expression(rng, depth + 1)})"
        elif way == 3:
            found = f"({found})[{rng.choice(['0', '-1', ':', '::-1', repr('role'), '10**9'])}]"
        else:
            found = (
                f"({found}).{rng.choice(['join([1])', 'format(1)', 'append(1)', 'items()', 'zfill(10**9)', 'mro()'])}"
            )
    return found
