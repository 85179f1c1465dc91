"""How many tokens may be drafted. Imports nothing: the command line's help has these figures without MLX or numpy."""

MAX_DRAFT_LENGTH = 15
"""Longest draft that can be asked for."""

MAX_AUTO_LENGTH = 7
"""Longest draft chosen by itself: with the newest token, the 8 rows that the fused attention kernels on Metal take."""
