"""Converts Gemma 4 checkpoints to MLX folders: `python -m weights_convert SRC DST`, or `mlx-mtp convert`."""

from mlx_mtp.checkpoint.quantization import Format, Scheme

from .check import Agreement, compare
from .converter import Conversion, convert, prepare
from .files import verify_sums
from .learned import Learning

__all__ = ["Agreement", "Conversion", "Format", "Learning", "Scheme", "compare", "convert", "prepare", "verify_sums"]
