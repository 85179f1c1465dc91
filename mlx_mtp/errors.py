"""The package's exceptions.

Every failure that a user can cause or fix raises one of these, with a message of one line that says what to do; a file
that can't be written (`save_prompt`, `trace`) raises an OSError that names it. Any other exception is a defect of the
package.
"""

from __future__ import annotations

import traceback

_LONGEST = 2_000
"""Longest message, in characters: more than any of ours needs, and still readable."""


class MTPError(Exception):
    """Base class of the package's exceptions.

    Messages quote names and values from files of any origin, so they are made safe to print: one line of printable
    characters without control sequences, cut if it is very long.
    """

    def __init__(self, message: str) -> None:
        """Makes the message safe to print."""
        super().__init__(printable(message))


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


def printable(message: str) -> str:
    """A message as one line of printable characters, cut if it is very long."""
    if not message.isprintable():
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[: 2 * _LONGEST])
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."


def one_line(error: Exception) -> str:
    """The type and the beginning of another library's error, for use in a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


class RaisedAt(Exception):  # noqa: N818 - it is the cause of an error, and is never raised itself
    """Where an exception was raised in another thread, as text; the cause of that exception once it is `detached`."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def detached(error: BaseException) -> BaseException:
    """The same exception without its stack frames, which it has as text from then on.

    Frames keep alive all that their functions used, and so would whoever keeps the exception: weights and KV, here.
    """
    if error.__traceback__ is not None:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        error.__cause__, error.__context__, error.__traceback__ = RaisedAt(text), None, None
    return error
