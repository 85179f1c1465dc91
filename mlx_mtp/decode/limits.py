"""Limits of draft length and temperature. Imports nothing, so the command line can show them without loading MLX."""

from typing import TypeGuard

MAX_DRAFT_LENGTH = 15
"""Longest draft length that a request can have."""

MAX_AUTO_LENGTH = 7
"""Longest draft length that "auto" chooses: with the newest token it makes a block of 8, the most that Metal's fused
attention kernel takes. For some models the kernel takes fewer, see `draft_length.longest_auto`."""

MAX_TEMPERATURE = 1000
"""Highest temperature: far below it tokens are about equally likely, and temperature * noise must fit a float32."""


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False don't count as one."""
    return isinstance(value, int) and not isinstance(value, bool)
