"""The package's exceptions.

Every failure that a user can cause or cure is one of these, and its message is one line that says what to do. Anything
else that is raised is a defect of the package.
"""

from __future__ import annotations


class MTPError(Exception):
    """Base of all errors the package raises on purpose."""


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
