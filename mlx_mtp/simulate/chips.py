"""Public figures of Apple's M chips, each in its largest configuration.

Bandwidth, GPU cores and memory are those that Apple announced (`Chip.source`). Apple publishes no GPU clock and hardly
any TFLOPS, so both are **estimates**: a core does 256 floating-point operations per cycle (128 lanes, multiply and
add), at the clock in `_CLOCK_GHZ`. There is no M4 Ultra or M5 Ultra in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..errors import MTPError

_OPERATIONS = 256
"""FP32 operations of a GPU core per cycle; source: philipturner/metal-benchmarks (GitHub)."""

_MATRIX_OPERATIONS = {1: 256, 2: 256, 3: 256, 4: 256, 5: 1024}
"""FP16 operations of a GPU core per cycle in matrix products, by generation. M5 has matrix units, measured on A19 in
tzakharko.github.io/apple-neural-accelerators-benchmark; before M5, matrix products run on the FP32 lanes."""

_CLOCK_GHZ = {
    # M1: philipturner/metal-benchmarks; M2 to M4: hmc-tech.com's GPU pages; M5: Zakharko's estimate (see above).
    "M1": 1.278, "M1 Pro": 1.278, "M1 Max": 1.278, "M1 Ultra": 1.278,
    "M2": 1.398, "M2 Pro": 1.398, "M2 Max": 1.398, "M2 Ultra": 1.398,
    "M3": 1.398, "M3 Pro": 1.398, "M3 Max": 1.398, "M3 Ultra": 1.398,
    "M4": 1.470, "M4 Pro": 1.470, "M4 Max": 1.678,
    "M5": 1.750, "M5 Pro": 1.750, "M5 Max": 1.750,
}  # fmt: skip

METAL_SHARE = 0.75
"""About the share of a Mac's memory that Metal recommends for the GPU."""


@dataclass(frozen=True)
class Chip:
    """A chip.

    Attributes:
        name: Apple's name without "Apple".
        generation: 1 to 5.
        bandwidth: Memory bandwidth, GB/s.
        gpu_cores: Cores of the GPU.
        memory: Largest memory, GB.
        source: Source of bandwidth, cores and memory: the date of Apple's announcement.
    """

    name: str
    generation: int
    bandwidth: float
    gpu_cores: int
    memory: int
    source: str

    @property
    def memory_for_models(self) -> int:
        """Bytes that models and KV may take."""
        return int(METAL_SHARE * self.memory * 1e9)

    @property
    def fp32_tflops(self) -> float:
        """Peak of FP32 arithmetic, estimated from cores and clock."""
        return self.gpu_cores * _OPERATIONS * _CLOCK_GHZ[self.name] / 1000

    @property
    def fp16_tflops(self) -> float:
        """Peak of FP16 matrix products, estimated from cores and clock."""
        return self.gpu_cores * _MATRIX_OPERATIONS[self.generation] * _CLOCK_GHZ[self.name] / 1000


CHIPS = {
    entry.name: entry
    for entry in (
        Chip("M1", 1, 68, 8, 16, "10 November 2020; its bandwidth from philipturner/metal-benchmarks"),
        Chip("M1 Pro", 1, 200, 16, 32, "18 October 2021"),
        Chip("M1 Max", 1, 400, 32, 64, "18 October 2021"),
        Chip("M1 Ultra", 1, 800, 64, 128, "8 March 2022"),
        Chip("M2", 2, 100, 10, 24, "6 June 2022"),
        Chip("M2 Pro", 2, 200, 19, 32, "17 January 2023"),
        Chip("M2 Max", 2, 400, 38, 96, "17 January 2023"),
        Chip("M2 Ultra", 2, 800, 76, 192, "5 June 2023"),
        Chip("M3", 3, 100, 10, 24, "30 October 2023"),
        Chip("M3 Pro", 3, 150, 18, 36, "30 October 2023"),
        Chip("M3 Max", 3, 400, 40, 128, "30 October 2023"),
        Chip("M3 Ultra", 3, 819, 80, 512, "5 March 2025"),
        Chip("M4", 4, 120, 10, 32, "28 October 2024"),
        Chip("M4 Pro", 4, 273, 20, 64, "30 October 2024"),
        Chip("M4 Max", 4, 546, 40, 128, "30 October 2024"),
        Chip("M5", 5, 153, 10, 32, "15 October 2025"),
        Chip("M5 Pro", 5, 307, 20, 64, "3 March 2026"),
        Chip("M5 Max", 5, 614, 40, 128, "3 March 2026"),
    )
}


def this_chip() -> Chip | None:
    """This machine's chip; None if the table doesn't have it."""
    name = str(mx.device_info().get("device_name", "")) if mx.metal.is_available() else ""
    return next((known for known in CHIPS.values() if f"Apple {known.name}" == name), None)


def chip(name: str) -> Chip:
    """The chip with a name; case, spaces, hyphens and a leading "Apple" don't matter.

    Raises:
        MTPError: The table has no such chip; the message lists its chips.
    """

    def plain(text: str) -> str:
        return "".join(text.lower().replace("apple", "").replace("-", "").split())

    for known in CHIPS.values():
        if plain(known.name) == plain(name):
            return known
    raise MTPError(f"no figures for the chip {name!r}: use one of {', '.join(CHIPS)}")
