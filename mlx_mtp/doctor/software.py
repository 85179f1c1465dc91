"""What is installed: Python, packages and extras, by their metadata; imports none of them."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata

from ..system.version import VERSION

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "huggingface_hub", "tokenizers")
"""Packages whose versions a report should have."""

_NO_FEATURES = ("test", "cuda")
"""Extras to leave out: one is for development, the other shows in the versions."""


@dataclass(frozen=True)
class Software:
    """What is installed.

    Attributes:
        version: This package's version.
        python: Python's version.
        packages: Versions of those of PACKAGES that are installed.
        mlx_needed: The oldest version of MLX that this package works with; None if its metadata isn't there.
        extras: Extras of this package that make sense on this system, and whether all that they ask for is installed.
    """

    version: str
    python: str
    packages: dict[str, str]
    mlx_needed: str | None
    extras: dict[str, bool]


def read() -> Software:
    """Asks this Python."""
    requirements = _requirements()
    mlx = next((found[1] for it in requirements if (found := re.match(r"mlx(?:\[\w+\])?>=([\d.]+)", it))), None)
    extras: dict[str, bool] = {}
    for it in requirements:
        extra, system = re.search(r"extra == ['\"]([\w-]+)", it), re.search(r"sys_platform == ['\"](\w+)", it)
        if extra and extra[1] not in _NO_FEATURES and (not system or system[1] == sys.platform):
            name = re.split(r"[^\w.-]", it)[0]
            extras[extra[1]] = extras.get(extra[1], True) and installed(name) is not None
    versions = {name: version for name in PACKAGES if (version := installed(name))}
    return Software(VERSION, platform.python_version(), versions, mlx, extras)


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    """What this package asks for; nothing if it runs from a folder without having been installed."""
    try:
        return metadata.requires("mlx-mtp") or []
    except metadata.PackageNotFoundError:
        return []
