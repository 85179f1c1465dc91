"""Measures which batch size and draft length suit a model on this machine: `mlx-mtp tune` as a script.

python scripts/tune_batch_size.py MODEL [--quantize 4] [--objective throughput] [--plot FILE.png] [--json]
"""

from __future__ import annotations

import sys

from mlx_mtp.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    main()
