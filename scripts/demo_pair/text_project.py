"""Questions and answers about the project itself (project.txt)."""

from __future__ import annotations

from .sections import read


def _answer(body: str) -> tuple[str, str]:
    """Answer and brief answer."""
    brief, answer = body.split("\n\n", 1)
    return answer, brief.removeprefix("> ")


PROJECT: list[tuple[list[str], str, str]] = [(questions, *_answer(body)) for questions, body in read("project.txt")]
"""Wordings of a question, the answer, the answer in brief."""
