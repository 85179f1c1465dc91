"""Converts Gemma 4 checkpoints to MLX folders: `python -m weights_convert SRC DST`, or `mlx-mtp convert`."""

from .converter import Format, convert

__all__ = ["Format", "convert"]
