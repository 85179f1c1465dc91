"""The machine: chip, cores, memory and operating system."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_SYSCTL = "/usr/sbin/sysctl"

_NAMES = (
    "machdep.cpu.brand_string", "hw.memsize", "hw.physicalcpu", "hw.optional.arm64", "kern.osproductversion",
    "iogpu.wired_limit_mb",
)  # fmt: skip

_MOST_LEVELS = 3
"""Kinds of cores to ask for; Apple's chips have two."""


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        system: Name and version of the operating system.
        macos: Version of macOS; None on other systems.
        chip: Name of the processor.
        cores: Number of cores by kind, such as {"Performance": 8, "Efficiency": 4}.
        memory: Bytes of memory.
        apple_silicon: Whether the processor is Apple's.
        architecture: What Python was built for, such as "arm64"; "x86_64" on Apple silicon means Rosetta.
        wired_limit: Bytes that a user of the Mac has set as the most that the GPU may wire; None for macOS's own limit.
        nvidia: Whether there is a driver for NVIDIA GPUs.
    """

    system: str
    macos: tuple[int, ...] | None
    chip: str
    cores: dict[str, int]
    memory: int
    apple_silicon: bool
    architecture: str
    wired_limit: int | None
    nvidia: bool


def read() -> Machine:
    """Asks this machine."""
    return _mac(sysctl()) if sys.platform == "darwin" else _linux()


def sysctl() -> dict[str, str]:
    """What macOS's `sysctl` says of the names that are used here; some exist on some machines only."""
    levels = (f"hw.perflevel{i}.{what}" for i in range(_MOST_LEVELS) for what in ("name", "physicalcpu"))
    # For names that don't exist it complains on stderr.
    done = subprocess.run([_SYSCTL, *_NAMES, *levels], capture_output=True, text=True, check=False)  # noqa: S603
    lines = (line.partition(": ") for line in done.stdout.splitlines())
    return {name: value for name, _, value in lines}


def _mac(found: dict[str, str]) -> Machine:
    cores = {
        found.get(f"hw.perflevel{i}.name", f"level {i}"): int(found[f"hw.perflevel{i}.physicalcpu"])
        for i in range(_MOST_LEVELS)
        if f"hw.perflevel{i}.physicalcpu" in found
    }
    version = found.get("kern.osproductversion", "")
    limit = int(found.get("iogpu.wired_limit_mb", "0"))
    return Machine(
        system=f"macOS {version}",
        macos=tuple(int(part) for part in re.findall(r"\d+", version)),
        chip=found.get("machdep.cpu.brand_string", "unknown"),
        cores=cores or {"cores": int(found.get("hw.physicalcpu", "0"))},
        memory=int(found.get("hw.memsize", "0")),
        apple_silicon=found.get("hw.optional.arm64") == "1",
        architecture=platform.machine(),
        wired_limit=limit * 2**20 or None,
        nvidia=False,
    )


def _linux() -> Machine:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(errors="replace").splitlines() if cpu.exists() else []
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    return Machine(
        system=f"{system}, kernel {platform.release()}",
        macos=None,
        chip=next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        cores={"logical": os.cpu_count() or 0},
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        apple_silicon=False,
        architecture=platform.machine(),
        wired_limit=None,
        nvidia=Path("/proc/driver/nvidia/version").exists(),
    )
