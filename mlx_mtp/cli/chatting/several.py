"""Shows several answers to a message: side by side in a wide terminal, else one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .screen import Screen, Terminal, silent_keys

if TYPE_CHECKING:
    from ...session.answer import Chunk

_NARROWEST = 36
"""Columns of the terminal that an answer needs for lines that read well."""


def show_several(screen: Screen, chunks: Iterator[tuple[int, Chunk]], n: int) -> None:
    """Shows answers as they come.

    Args:
        screen: Where.
        chunks: Numbers of answers, from 0, and their chunks.
        n: Number of answers.
    """
    if isinstance(screen, Terminal) and screen.console.width >= n * _NARROWEST and not screen.drafts:
        from .columns import Columns

        with silent_keys(), screen.status:
            Columns(screen, n).show(chunks)
    else:
        _one_by_one(screen, chunks, n)


def _one_by_one(screen: Screen, chunks: Iterator[tuple[int, Chunk]], n: int) -> None:
    held: list[deque[Chunk]] = [deque() for _ in range(n)]

    def answer(i: int) -> Iterator[Chunk]:
        """An answer's chunks; those of others that come meanwhile are held."""
        while True:
            while held[i]:
                chunk = held[i].popleft()
                yield chunk
                if chunk.finish_reason:
                    return
            if (came := next(chunks, None)) is None:
                return
            held[came[0]].append(came[1])

    for i in range(n):
        screen.note(f"--- answer {i + 1} ---")
        try:
            screen.show(answer(i))
        except KeyboardInterrupt:
            for later in range(i + 1, n):
                screen.note(f"--- answer {later + 1} ---")
                screen.show(held[later])
            raise
