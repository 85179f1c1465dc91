"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux CPU wheel ships the reference BLAS. Its float32 matrix product is 20 to 40 times slower than OpenBLAS's, and
a pass over five tokens takes as long as five passes over one, so that speculative decoding gains nothing. MLX imports
the standard names (`cblas_sgemm`), and the dynamic linker prefers a library that was loaded globally before MLX.

Nothing happens on macOS, where MLX uses Accelerate and Metal, nor on import of the package: only the command line and
the scripts call `use_openblas`. OpenBLAS's results for one row and for a block of rows differ in the last bit; those of
the reference BLAS don't.
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
    """Makes MLX multiply float32 matrices with OpenBLAS in this process.

    Takes the system's library, else the one of the package scipy-openblas32, which the extra `fast-cpu` installs. Uses
    one thread unless OPENBLAS_NUM_THREADS is set: decoding is bound by memory, and more threads cost more than they
    gain on shared cores.

    Returns:
        A description such as "OpenBLAS 0.3.23 (system)". None if nothing was done: not on Linux, MLX is imported
        already, MLX's CUDA backend is installed, MLX_MTP_OPENBLAS is 0, or no library was found.
    """
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0" or "mlx.core" in sys.modules or _has_cuda_backend():
        return None
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for origin, name in _candidates():
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018 - raises AttributeError if the library's names have a prefix
            library.openblas_get_config.restype = ctypes.c_char_p
            words = library.openblas_get_config().decode("ascii", "replace").split()
        except (OSError, AttributeError):
            continue
        return f"{' '.join(words[:2])} ({origin})"
    return None


def has_openblas() -> bool:
    """Whether MLX multiplies with OpenBLAS in this process, no matter who loaded it."""
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
    """The libraries to try, best first: origin, and name for the dynamic linker."""
    yield "system", "libopenblas.so.0"
    found = importlib.util.find_spec("scipy_openblas32")
    for folder in (found.submodule_search_locations or []) if found else []:
        yield "package scipy-openblas32", str(Path(folder) / "lib" / "libopenblas_python.so")
