"""What is wrong with a machine, and what to do about it; a pure function of the facts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .facts import Facts

OLDEST_MACOS = 14
"""Oldest version of macOS that MLX runs on, by its documentation."""

WIRING_MACOS = 15
"""Oldest version that lets a program wire memory, see system/wired.py."""

_ROOM = 10 * 10**9
"""Bytes that the smallest pair, E2B, has on the hub, rounded up."""


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        what: What is wrong.
        todo: What to do about it.
    """

    what: str
    todo: str


def find(facts: Facts) -> list[Problem]:
    """What is wrong, the most important first."""
    return [*_system(facts), *_mlx(facts), *_gpu(facts), *_cache(facts), *_profiles(facts)]


def _system(facts: Facts) -> Iterator[Problem]:
    machine = facts.machine
    if machine.macos is None:
        return
    if not machine.apple_silicon:
        yield Problem("this Mac has an Intel processor, and MLX needs Apple silicon", "use a Mac with an M chip")
    elif machine.architecture != "arm64":
        yield Problem(
            f"this Python is built for {machine.architecture} and runs under Rosetta: MLX can't use the GPU",
            "install Python for Apple silicon (python.org, Homebrew in /opt/homebrew, or uv), make a new environment "
            "with it and install mlx-mtp there; if the terminal runs under Rosetta, clear that in its Get Info window",
        )
    if machine.macos < (OLDEST_MACOS,):
        yield Problem(f"{machine.system} is too old for MLX", f"update to macOS {OLDEST_MACOS} or later")
    elif machine.macos < (WIRING_MACOS,):
        yield Problem(
            f"{machine.system} can't keep a model's memory resident, so that a large model may be slow after pauses",
            f"update to macOS {WIRING_MACOS} or later",
        )


def _mlx(facts: Facts) -> Iterator[Problem]:
    have, needed = facts.software.packages.get("mlx"), facts.software.mlx_needed
    if have and needed and _numbers(have) < _numbers(needed):
        yield Problem(f"mlx {have} is older than {needed}, which mlx-mtp needs", "pip install --upgrade mlx")
    elif facts.mlx_error:
        yield Problem(f"MLX can't be imported ({facts.mlx_error})", "pip install --force-reinstall mlx")


def _gpu(facts: Facts) -> Iterator[Problem]:
    gpu, machine = facts.gpu, facts.machine
    if gpu is None or gpu.device == "gpu":
        return
    if machine.macos:
        if machine.apple_silicon and machine.architecture == "arm64":
            yield Problem(
                "MLX finds no GPU, so that models run on the CPU, many times as slow",
                "outside a virtual machine, run pip install --force-reinstall mlx mlx-metal",
            )
    elif machine.nvidia:
        yield Problem("there is an NVIDIA GPU, and models run on the CPU", "pip install 'mlx-mtp[cuda]'")
    elif not gpu.openblas:
        yield Problem("models run on the CPU with a slow BLAS", "pip install 'mlx-mtp[fast-cpu]'")


def _cache(facts: Facts) -> Iterator[Problem]:
    for it in facts.cache:
        if it.state == "incomplete":
            yield Problem(f"{it.repository} isn't complete: {it.problem}", f"mlx-mtp get {it.repository}")
        elif it.state == "damaged":
            folder = it.folder.parents[1]
            yield Problem(
                f"{it.repository} is damaged: {it.problem}", f"delete {folder}, then mlx-mtp get {it.repository}"
            )
    if facts.cache_free < _ROOM:
        yield Problem(
            f"the disk of the hub's cache has {facts.cache_free / 1e9:.1f} GB free: too little for any Gemma 4",
            "make room, or set HF_HOME to a folder on another disk",
        )


def _profiles(facts: Facts) -> Iterator[Problem]:
    for it in facts.profiles:
        if it.why_not:
            model = f" {it.profile.key.model}" if it.profile else ""
            yield Problem(f"a saved profile isn't used: {it.why_not}", f"mlx-mtp tune{model}, or delete the file")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
