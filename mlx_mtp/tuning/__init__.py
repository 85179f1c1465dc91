"""Measures which batch size and draft length suit a pair on this machine.

`acceptance` counts accepted drafts, `costs` times rounds, `choose` picks a setting from both. The result is saved as a
profile (mlx_mtp/profile.py). Not here: the draft length of a running batch (decode/draft_length.py).
"""
