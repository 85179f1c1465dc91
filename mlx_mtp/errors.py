"""The package's exceptions.

Every failure that a user can cause or cure is one of these, and its message is one line that says what to do. Anything
else that is raised is a defect of the package.
"""

from __future__ import annotations

_LONGEST = 2_000
"""Characters of a message: what the longest ones of ours need, and what a person reads."""


class MTPError(Exception):
    """Base of all errors the package raises on purpose.

    Messages quote names and values from files of any origin. Whatever these hold, a message is one line of printable
    characters: no line breaks, nothing that a terminal would obey, and never longer than a person reads.
    """

    def __init__(self, message: str):
        """Takes the message."""
        if not message.isprintable():
            message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[: 2 * _LONGEST])
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")


class CheckpointError(MTPError):
    """A checkpoint can't be used: missing, truncated or corrupt file, unknown architecture, wrong names or shapes."""


class PairingError(MTPError):
    """The drafter was made for another target; the message names the sizes that clash."""


class ProfileError(MTPError):
    """A saved profile can't be used: damaged, or measured with another model, machine or version."""


class PromptError(MTPError):
    """The prompt can't be used: empty, malformed, out of vocabulary, or longer than the model's context."""


class MemoryBudgetError(MTPError):
    """The work doesn't fit in memory; the message says what is needed, what there is, and what to change."""


def one_line(error: Exception) -> str:
    """Kind and beginning of another library's error, for a message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
