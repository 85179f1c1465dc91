"""Environment variables for MLX's Metal backend, which reads them once, when it makes its first array.

Doesn't import MLX, so that they can be set before. The values come from reading MLX 0.32 (mlx/backend/metal/device.cpp
and scaled_dot_product_attention.cpp); their gain hasn't been measured, since no Mac was at hand.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

DEFAULTS = {
    # MLX commits a command buffer after this many kernels or millions of elements read, 40 and 40 by default. Each
    # commit costs about 20 microseconds of GPU time, and the experts of one layer alone have 40 million elements. The
    # number of kernels must stay small: up to 11 buffers are in flight, and they must hold less than a step of E2B,
    # which has 738 kernels, so that the KV a step has read is free again when the next step writes it.
    "MLX_MAX_OPS_PER_BUFFER": "64",
    "MLX_MAX_MB_PER_BUFFER": "400",
    # Number of keys from which MLX uses its fused attention kernel for single tokens with heads of 512, as in the full
    # layers. 0 is always, also with a mask.
    "MLX_SDPA_D512_MIN_KL": "0",
}
"""Values by variable."""


def set_defaults(environment: MutableMapping[str, str], platform: str = sys.platform) -> None:
    """Sets the variables that aren't set, on a Mac; a user's own values stay.

    Args:
        environment: `os.environ`.
        platform: `sys.platform`.
    """
    if platform == "darwin":
        for name, value in DEFAULTS.items():
            environment.setdefault(name, value)
