"""How much may be asked for: drafts and temperature. Imports nothing: the command line's help has them without MLX."""

MAX_DRAFT_LENGTH = 15
"""Longest draft that can be asked for."""

MAX_AUTO_LENGTH = 7
"""Longest draft chosen by itself: with the newest token, the 8 tokens that the fused attention kernels on Metal take at
most. Of some models they take fewer, see `engine.longest_auto`."""

MAX_TEMPERATURE = 1000
"""Highest temperature: all tokens are about equally likely long before, and its noise must stay a float32."""
