"""OpenBLAS in place of MLX's own BLAS: when it is taken, and that MLX then really uses it."""

from __future__ import annotations

import os
import subprocess
import sys

PROBE = """
import ctypes, sys
{before}
from mlx_mtp.system.blas import use_openblas
found = use_openblas()
import mlx.core as mx, numpy as np
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 64, 64)).astype(np.float32)
assert np.allclose(np.array(mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu)), a @ b, atol=1e-4)
# The global scope is what the linker searches first for the names that MLX imports.
standard = hasattr(ctypes.CDLL(None), "openblas_get_config")
print(found or "none", standard, sep="|")
"""


# Hides the system's OpenBLAS, as on a machine where none is installed.
NO_SYSTEM_LIBRARY = """
real = ctypes.CDLL.__init__
def fake(self, name, *rest, **named):
    if name == "libopenblas.so.0":
        raise OSError(name)
    real(self, name, *rest, **named)
ctypes.CDLL.__init__ = fake
"""


def probe(before: str = "", **environment: str) -> list[str]:
    """[description or "none", are its names in the global scope] of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(before=before)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().split("|")


def test_a_fast_library_is_found_on_linux_only():
    description, is_global = probe()
    if sys.platform == "linux":
        assert description.startswith("OpenBLAS 0.")
        assert is_global == "True"
    else:
        assert description == "none"


def test_the_packaged_library_serves_where_the_system_has_none():
    description, is_global = probe(NO_SYSTEM_LIBRARY)
    if sys.platform == "linux":
        assert description.startswith("OpenBLAS 0.") and "package" in description
        assert is_global == "True"
    else:
        assert description == "none"


def test_without_any_library_mlx_keeps_its_own():
    """As after a plain `pip install mlx-mtp`: the package is in the extra `fast-cpu`."""
    nothing_installed = NO_SYSTEM_LIBRARY + "sys.modules['scipy_openblas32'] = None"
    assert probe(nothing_installed) == ["none", "False"]


def test_switched_off_by_the_environment():
    assert probe(MLX_MTP_OPENBLAS="0")[0] == "none"


def test_too_late_when_mlx_is_imported():
    assert probe("import mlx.core")[0] == "none"
