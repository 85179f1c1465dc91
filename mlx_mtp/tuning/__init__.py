"""Which batch and draft length suit a machine and a pair: measured.

`acceptance` counts how often drafts are kept, `costs` times rounds, `choose` picks a setting from both. What was
measured is kept as a profile (mlx_mtp/profile.py).
"""
