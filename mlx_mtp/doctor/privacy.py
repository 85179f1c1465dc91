"""Takes the user's name, the machine's and their folders out of what is to be published."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHORTEST = 3
"""Fewest characters of a name that is looked for: shorter ones are in many words and say nothing of anybody."""


class Scrubber:
    """Replaces names and folders in texts."""

    def __init__(self, folders: Mapping[Path, str]) -> None:
        """Looks up the names.

        Args:
            folders: Folders that may lie outside the home folder, and what to write for them.
        """
        home = Path.home()
        # The home folder comes first: its ~ says more than the name of a folder in it.
        places = [*((it, "~") for it in (home, home.resolve()) if it.name), *folders.items()]
        self._folders = [(re.compile(rf"{re.escape(str(it))}(?![\w-])"), shown) for it, shown in places]
        host = platform.node()
        names = {home.name: "USER", _user(): "USER", host: "HOST", host.partition(".")[0]: "HOST"}
        self._names = {name: shown for name, shown in names.items() if len(name) >= _SHORTEST}

    def text(self, text: str) -> str:
        """A text without the names."""
        for folder, shown in self._folders:
            text = folder.sub(shown, text)
        for name, shown in self._names.items():
            text = re.sub(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", shown, text, flags=re.IGNORECASE)
        return text

    def everything(self, value: Any) -> Any:
        """JSON values without the names; keys stay."""
        if isinstance(value, dict):
            return {key: self.everything(it) for key, it in value.items()}
        if isinstance(value, list | tuple):
            return [self.everything(it) for it in value]
        return self.text(value) if isinstance(value, str) else value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in containers
        return ""
