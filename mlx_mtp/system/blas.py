"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux CPU wheel ships the reference BLAS, whose float32 matrix product is 20 to 40 times slower than OpenBLAS and
takes as long for five tokens as for five single ones, so that checking drafts in one pass gains nothing. MLX imports
the standard names (`cblas_sgemm`), and the dynamic linker prefers a library that was loaded globally before it.

Not done here: anything on macOS (MLX uses Accelerate and Metal there), and anything on import of the package. Only the
command line and the scripts call `use_openblas`, because OpenBLAS's kernels for one row and for a block of rows differ
in the last bit, while the reference BLAS's don't.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SWITCH = "MLX_MTP_OPENBLAS"
"""Environment variable: "0" keeps MLX's own BLAS."""


def use_openblas() -> str | None:
    """Let MLX multiply float32 matrices with OpenBLAS from now on, in this process.

    Takes the system's library, else the one from the package scipy-openblas32, which the extra `fast-cpu` installs.
    Uses one thread unless OPENBLAS_NUM_THREADS says otherwise: generation is bound by memory, and threads that wait for
    a shared core cost more than they bring.

    Returns: a description such as "OpenBLAS 0.3.23 (system)", or None when nothing was done: not on Linux, MLX already
        imported, MLX's CUDA backend installed, switched off with MLX_MTP_OPENBLAS=0, or no library found.
    """
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0" or "mlx.core" in sys.modules or _has_cuda_backend():
        return None
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for origin, name in _candidates():
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018 - raises AttributeError when the names carry a prefix
            library.openblas_get_config.restype = ctypes.c_char_p
            words = library.openblas_get_config().decode("ascii", "replace").split()
        except (OSError, AttributeError):
            continue
        return f"{' '.join(words[:2])} ({origin})"
    return None


def has_openblas() -> bool:
    """Whether MLX's products are OpenBLAS's in this process, whoever loaded it."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "openblas_get_config")


def _has_cuda_backend() -> bool:
    for name in ("mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def _candidates() -> Iterator[tuple[str, str]]:
    """(origin, name for the dynamic linker) of the libraries to try, best first."""
    yield "system", "libopenblas.so.0"
    found = importlib.util.find_spec("scipy_openblas32")
    for folder in (found.submodule_search_locations or []) if found else []:
        yield "package scipy-openblas32", str(Path(folder) / "lib" / "libopenblas_python.so")
