"""What MLX's Metal backend reads from the environment, once, when it makes its first array on a Mac.

Without MLX, so that it can be set before that. From reading MLX 0.32 (mlx/backend/metal/device.cpp and
scaled_dot_product_attention.cpp); what it gains was not measured here, since no Mac was at hand.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

DEFAULTS = {
    # Kernels, and millions of elements read, after which a command buffer is committed, which costs about 20
    # microseconds of the GPU's time: 40 and 40 unless said, and an expert bank alone has 40 million elements.
    # Not more kernels: up to 11 buffers are in flight, and a step of E2B, which has 738, must be longer than these, so
    # that what it has read is free again when the next one writes it.
    "MLX_MAX_OPS_PER_BUFFER": "64",
    "MLX_MAX_MB_PER_BUFFER": "400",
    # Fewest keys from which single tokens with heads of 512 get a kernel of their own, as the full layers have; 0 for
    # any number, and for masks like ours too.
    "MLX_SDPA_D512_MIN_KL": "0",
}


def set_defaults(environment: MutableMapping[str, str], platform: str = sys.platform) -> None:
    """Sets what isn't set, on a Mac; a user's own values stay."""
    if platform == "darwin":
        for name, value in DEFAULTS.items():
            environment.setdefault(name, value)
