"""Checkpoints: finding them, reading what they contain, and making models from them.

Nothing is imported here, so that parts that need no model can be used without loading MLX.
"""
