"""Finds a checkpoint's chat templates, in the places and the order in which transformers looks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import listed, read_json

FOLDER = "additional_chat_templates"


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A checkpoint's templates by name: "default", and any others, such as "tool_use".

    The default template is chat_template.jinja; without that file, chat_template.json (an older form) or
    tokenizer_config.json holds it, and may hold several. Further templates are in additional_chat_templates.

    Args:
        folder: The checkpoint.
        config: Its tokenizer_config.json.

    Returns:
        Template sources by name; no "default" if the checkpoint has none.

    Raises:
        CheckpointError: A template can't be read, or isn't a string.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        found = {"default": _read(file)}
    elif (old := folder / "chat_template.json").is_file():
        found = _named(read_json(old).get("chat_template"), old)
    else:
        found = _named(config.get("chat_template"), folder / "tokenizer_config.json")
    return found | {path.stem: _read(path) for path in listed(folder / FOLDER, "*.jinja")}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def _named(value: Any, path: Path) -> dict[str, str]:
    """Templates by name, from a JSON file's chat_template: null, a string, or a list of {"name", "template"}."""
    given = value if isinstance(value, list) else [] if value is None else [{"name": "default", "template": value}]
    found = {t.get("name"): t.get("template") for t in given if isinstance(t, Mapping)}
    if not isinstance(found.get("default"), str | None):
        raise CheckpointError(f"{path}: chat_template isn't a string")
    return {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}
