"""Gathers all facts of `mlx-mtp doctor`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import one_line
from ..system.blas import has_openblas, use_openblas
from . import machine, software

if TYPE_CHECKING:
    from ..checkpoint.cache import CachedModel
    from ..profile import SavedProfile


@dataclass(frozen=True)
class Gpu:
    """What MLX says of the GPU.

    Attributes:
        device: "gpu" or "cpu": where models run.
        metal: Whether Metal can be used.
        limits: MLX's description of the device, such as Metal's limits in bytes.
        wired_at_most: Bytes that may be wired for models; 0 without Metal.
        openblas: Whether models that run on the CPU multiply with OpenBLAS.
    """

    device: str
    metal: bool
    limits: dict[str, str | int]
    wired_at_most: int
    openblas: bool


@dataclass(frozen=True)
class Facts:
    """All facts.

    Attributes:
        machine: The machine.
        software: What is installed.
        mlx_error: Why MLX can't be imported; None if it can. What follows is empty then.
        gpu: The GPU; None if MLX can't be imported.
        folders: Folders whose paths may be personal, and what to call them: mostly the variables that name them.
        cache_folder: The hub's cache.
        cache_free: Bytes free on its disk.
        cache: The Gemma 4 models in it.
        profiles: The saved profiles.
    """

    machine: machine.Machine
    software: software.Software
    mlx_error: str | None
    gpu: Gpu | None
    folders: dict[Path, str]
    cache_folder: Path
    cache_free: int
    cache: list[CachedModel]
    profiles: list[SavedProfile]


def gather() -> Facts:
    """Asks this machine for everything."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    common: dict[str, Any] = {
        "machine": machine.read(),
        "software": software.read(),
        "folders": {Path(constants.HF_HOME): "$HF_HOME", cache: "$HF_HUB_CACHE", Path(sys.prefix): "PYTHON"},
        "cache_folder": cache,
        "cache_free": shutil.disk_usage(there).free,
    }
    use_openblas()  # as all commands, before MLX is imported
    try:
        gpu = read_gpu()
    except Exception as error:  # a broken installation can fail in any way
        failed = one_line(error)
        return Facts(**common, mlx_error=failed, gpu=None, cache=[], profiles=[])
    from .. import profile
    from ..checkpoint.cache import cached_models

    common["folders"][profile.profile_folder()] = "$MLX_MTP_PROFILES"
    return Facts(**common, mlx_error=None, gpu=gpu, cache=cached_models(), profiles=profile.saved_profiles())


def read_gpu() -> Gpu:
    """Asks MLX.

    Raises:
        Exception: MLX can't be imported.
    """
    import mlx.core as mx

    from ..system.wired import WIRED

    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    return Gpu(device, mx.metal.is_available(), dict(mx.device_info()), WIRED.most, has_openblas())
