"""`python -m mlx_mtp` is `mlx-mtp`."""

from .cli import main

main()
