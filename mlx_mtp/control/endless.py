"""Finds JSON schemas that no finite value fits, since a part needs itself: a model could follow them without end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def endless_part(schema: Any) -> str | None:
    """The reference of a part that no finite value fits; None if there is none.

    Args:
        schema: A JSON schema, the root of its references. References that lead out of it, or nowhere, are left alone.

    Raises:
        RecursionError: It is nested too deeply.
    """
    parts = {name: part for name in references(schema) if (part := referred(schema, name)) is not None}
    users = defaultdict(list)
    for name, part in parts.items():
        for used in references(part):
            users[used].append(name)
    ending, waiting = set[str](), list(parts)
    while waiting:
        name = waiting.pop()
        if name not in ending and _ends(parts[name], parts, ending):
            ending.add(name)
            waiting += users[name]
    return next((name for name in parts if name not in ending), None)


def referred(schema: Any, reference: str) -> Any:
    """The part of a schema that a reference like "#/$defs/item" leads to; None if there is none."""
    part = schema
    for escaped in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
        step = escaped.replace("~1", "/").replace("~0", "~")
        if not isinstance(part, Mapping) or step not in part:
            return None
        part = part[step]
    return part


def references(value: Any) -> Iterator[str]:
    """All references in a schema."""
    if isinstance(value, Mapping):
        if isinstance(found := value.get("$ref"), str):
            yield found
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from references(part)


def _ends(schema: Any, parts: Mapping[str, Any], ending: set[str]) -> bool:
    """Whether a finite value may fit, as far as is known: `ending` are the parts that one fits."""
    if not isinstance(schema, Mapping):
        return True
    if isinstance(found := schema.get("$ref"), str):
        return found in ending or found not in parts
    for way, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        choices = schema.get(way)
        endings = [_ends(part, parts, ending) for part in choices] if isinstance(choices, list | tuple) else []
        if endings and not enough(endings):
            return False
    return all(_ends(part, parts, ending) for part in _needed(schema))


def _needed(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of what every value has that fits a schema: required properties, or an item."""
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "const" in schema or "enum" in schema or not isinstance(kinds, Sequence) or len(kinds) != 1:
        return []
    kind = str(kinds[0]).lower()
    fields, required = schema.get("properties"), schema.get("required")
    if kind == "object" and isinstance(fields, Mapping) and isinstance(required, Sequence):
        return [part for name, part in fields.items() if name in required]
    return [schema.get("items")] if kind == "array" and schema.get("minItems") else []
