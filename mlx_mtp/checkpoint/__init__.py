"""Checkpoints: where they are, what they hold, and models made of them. Below decoding, tuning and the interfaces.

Modules are imported by name; nothing is imported here, since what waits for no model should start without MLX.
"""
