"""Reads the text files that lie beside this module."""

from __future__ import annotations

import re
from pathlib import Path


def read(name: str) -> list[tuple[list[str], str]]:
    """The sections of a file: one or more headings (## ...) that stand together, and the text below them."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    _, *parts = re.split(r"^((?:## .+\n)+)", text, flags=re.MULTILINE)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [([line[3:] for line in headings.splitlines()], body.strip()) for headings, body in pairs]
