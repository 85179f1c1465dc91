"""Conversations in files, and what the chat keeps between sessions in the user's data folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import MTPError
from ...files import data_folder, parse_json, read_bytes, replacing

_PRIVATE = 0o600
"""Mode of what is kept: others have no business in what the user wrote."""

_MOST_HISTORY = 2**20
"""Largest history in bytes; the older half is dropped when it is larger: all of it is read at every start."""

Messages = Sequence[Mapping[str, Any]]


class Store:
    """What is kept between sessions: the messages that were entered, and the last conversation."""

    def __init__(self) -> None:
        """Takes the folder, which may not exist yet."""
        self._folder = data_folder() / "chat"
        self._last, self._before = self._folder / "last.json", self._folder / "before.json"
        self._kept = False

    def history(self) -> Path:
        """The file of the messages that were entered, which exists then, private and not too large.

        Raises:
            OSError: It can't be made.
        """
        self._make_folder()
        path = self._folder / "history"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _PRIVATE))
        path.chmod(_PRIVATE)
        if path.stat().st_size > _MOST_HISTORY:
            newest = path.read_bytes()[-_MOST_HISTORY // 2 :]
            with replacing(path) as aside:
                aside.write_bytes(newest[newest.find(b"\n# ") + 1 :])  # each entry begins with the time, after a "#"
        return path

    def keep(self, messages: Messages) -> None:
        """Keeps a conversation for `resume`, in place of the one that this session kept before.

        Raises:
            OSError: It can't be written.
        """
        self._make_folder()
        with replacing(self._last) as aside:
            aside.chmod(_PRIVATE)
            _write(aside, messages)
            if not self._kept and self._last.exists():
                os.replace(self._last, self._before)
        self._kept = True

    def resume(self) -> Messages:
        """The last conversation before this session's own.

        Raises:
            MTPError: There is none, or its file is damaged.
        """
        # A process that was killed between the two steps of `keep` has left only the one before.
        path = self._before if self._kept or not self._last.exists() else self._last
        if not path.exists():
            raise MTPError("no earlier conversation is kept")
        return read_conversation(path)

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_conversation(path: Path, messages: Messages) -> None:
    """Writes a conversation as JSON; if that fails, an older file stays as it is.

    Args:
        path: The file.
        messages: Its messages; the system prompt is the first.

    Raises:
        OSError: The file can't be written.
        ValueError: The name can't be one of a file.
    """
    with replacing(path) as aside:
        _write(aside, messages)


def _write(path: Path, messages: Messages) -> None:
    path.write_text(json.dumps(messages, ensure_ascii=False, indent=2) + "\n", "utf-8")


def read_conversation(path: Path) -> Messages:
    """Reads a conversation; `Chat.restore` checks its messages.

    Raises:
        MTPError: The file can't be read, or isn't JSON.
    """
    try:
        messages: Messages = parse_json(read_bytes(path).decode("utf-8-sig"))
    except OSError as error:
        raise MTPError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise MTPError(f"{path} isn't a saved conversation: {error}") from None
    return messages
