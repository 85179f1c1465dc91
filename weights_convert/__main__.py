"""`python -m weights_convert SRC DST` is `mlx-mtp convert SRC DST`."""

import sys

from mlx_mtp.cli import main

sys.argv.insert(1, "convert")
main()
