"""Which weights are quantised, and how: the same rules for loading, converting and estimating sizes.

A `Scheme` says how weights are to be quantised; `Stored` says how a checkpoint's weights are quantised, according to
its config.json. Both give a format for a module's path (the parameter's name without ".weight") and the width of its
weight's last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError
from .tensor_names import RenameTable

MODES: Mapping[str, tuple[int, int] | None] = {"affine": None, "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""MLX's quantisation modes, with bits and group size where the mode fixes them."""

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)
"""Bits and group sizes of the affine mode."""

Rule = Callable[[str, nn.Module], "bool | dict[str, Any]"]
"""The argument `class_predicate` of `mlx.nn.quantize`: gives False, or bits, group_size and mode of a module."""


@dataclass(frozen=True)
class Format:
    """A format of quantised matrices.

    Attributes:
        bits: Bits per weight.
        group_size: Number of neighbouring weights that share a scale.
        mode: One of MODES.

    Raises:
        CheckpointError: MLX has no such format.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise CheckpointError(f"unknown quantisation mode {self.mode!r}: use one of {', '.join(MODES)}")
        fixed = MODES[self.mode]
        if fixed and (self.bits, self.group_size) != fixed:
            raise CheckpointError(f"{self.mode} has {fixed[0]} bits in groups of {fixed[1]}, and nothing else")
        # The types are checked because 4.0 == 4.
        whole = isinstance(self.bits, int) and isinstance(self.group_size, int)
        if not fixed and not (whole and self.bits in BITS and self.group_size in GROUPS):
            raise CheckpointError(
                f"can't quantise to {self.bits!r} bits in groups of {self.group_size!r}: use 2, 3, 4, 5, 6 or 8 bits "
                "and groups of 32, 64 or 128"
            )

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}" if self.mode == "affine" else self.mode

    @classmethod
    def make(cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None) -> Format:
        """A format with the mode's defaults for what isn't given: for affine 4 bits in groups of 64.

        Args:
            mode: One of MODES.
            bits: Bits per weight; None for the default.
            group_size: Weights per group; None for the default.

        Raises:
            CheckpointError: MLX has no such format.
        """
        default = MODES.get(mode) or (4, 64)
        return cls(default[0] if bits is None else bits, default[1] if group_size is None else group_size, mode)

    def fitting(self, width: int) -> Format | None:
        """This format for rows of `width` weights, with smaller groups if necessary; None if no group size fits."""
        if width % self.group_size == 0:
            return self
        smaller = (g for g in GROUPS if g < self.group_size and width % g == 0)
        group = next(smaller, None) if self.mode == "affine" else None
        return Format(self.bits, group) if group else None


ROUTER = ("*.router.proj", 8)
"""Pattern and bits of routers, which are small and decide which experts are used."""


@dataclass(frozen=True)
class Scheme:
    """How weights are to be quantised: all matrices in one format, except the router's and the overrides.

    Attributes:
        common: The format of all other matrices.
        overrides: Patterns of module paths (`*` matches anything), each with the bits of the affine mode, or None to
            leave the matrix unquantised. The last pattern that matches counts.

    Raises:
        CheckpointError: MLX has no such bits.
    """

    common: Format = field(default_factory=Format)
    overrides: tuple[tuple[str, int | None], ...] = ()

    def __post_init__(self) -> None:
        for pattern, bits in self.overrides:
            if bits is not None and bits not in BITS:
                raise CheckpointError(f"can't quantise {pattern} to {bits!r} bits: use 2, 3, 4, 5, 6, 8 or none")

    def format(self, path: str, width: int) -> Format | None:
        """The format of a module's weight.

        Args:
            path: The module's path.
            width: Size of the weight's last axis.

        Returns:
            The format; None to leave it unquantised.
        """
        chosen: Format | None = self.common
        for pattern, bits in (ROUTER, *self.overrides):
            if fnmatchcase(path, pattern):
                group = self.common.group_size if self.common.mode == "affine" else 64
                chosen = None if bits is None else Format(bits, group)
        return chosen.fitting(width) if chosen else None

    def rule(self) -> Rule:
        """The scheme for `mlx.nn.quantize`."""
        return _rule(self.format)


@dataclass(frozen=True)
class Stored:
    """How the weights of a checkpoint are quantised, according to its config.json.

    Attributes:
        common: The format of all modules that aren't in `special`.
        special: Formats by module path; None for modules that aren't quantised.
    """

    common: Format
    special: Mapping[str, Format | None]

    def format(self, path: str, width: int) -> Format | None:
        """See `Scheme.format`."""
        return self.special.get(path, self.common if width % self.common.group_size == 0 else None)

    def rule(self, tensors: Mapping[str, mx.array] | None = None) -> Rule:
        """The formats for `mlx.nn.quantize`.

        Args:
            tensors: The stored tensors by parameter name; None if they aren't known. With them the rule is more
                precise: modules without scales aren't quantised, and the format of modules that config.json doesn't
                name follows from their shapes.
        """
        if tensors is None:
            return _rule(self.format)

        def from_tensors(path: str, width: int) -> Format | None:
            scales = tensors.get(f"{path}.scales")
            if scales is None:
                return None
            return self.special.get(path) or _format_of(width, tensors[f"{path}.weight"], scales) or self.common

        return _rule(from_tensors)


def stored(config: Mapping[str, Any], table: RenameTable) -> Stored | None:
    """Reads the quantisation section of a config.json.

    Args:
        config: The parsed file.
        table: The names of this kind of model; the section names modules like the stored tensors.

    Returns:
        The formats; None if there is no such section.

    Raises:
        CheckpointError: The section has a format that MLX doesn't have.
    """
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, Mapping) else [config]
    section = next((p[key] for p in parts for key in ("quantization", "quantization_config") if p.get(key)), None)
    if section is None:
        return None
    if isinstance(section, Mapping) and "bits" not in section and "quant_method" in section:
        raise CheckpointError(
            f"the weights are quantised by {section['quant_method']}, which MLX can't run: use the original model, or "
            "an MLX conversion of it"
        )
    try:
        common = _parse(section)
        special = {
            module: common if value is True else _parse(value) if value else None
            for name, value in section.items()
            if isinstance(value, (dict, bool))
            for module in table.modules(name)
        }
    except (AttributeError, KeyError, TypeError, CheckpointError) as error:
        raise CheckpointError(f"the quantization in config.json can't be used: {error}") from error
    return Stored(common, special)


def _parse(entry: Mapping[str, Any]) -> Format:
    """Parses an entry of the section. As in MLX, an entry without a mode is affine, even if the common mode isn't."""
    if not isinstance(entry["bits"], int):
        raise TypeError(f"bits is {entry['bits']!r}")
    return Format.make(entry.get("mode") or "affine", entry["bits"], entry.get("group_size"))


def _format_of(width: int, weight: mx.array, scales: mx.array) -> Format | None:
    """The format of a quantised weight, from the shapes of weight and scales; None if they fit no format."""
    bits, group = weight.shape[-1] * 32 // width, width // max(scales.shape[-1], 1)
    modes = (
        [mode for mode, fixed in MODES.items() if fixed == (bits, group)] if scales.dtype == mx.uint8 else ["affine"]
    )
    try:
        return Format(bits, group, modes[0])
    except (IndexError, CheckpointError):
        return None


def _rule(choose: Callable[[str, int], Format | None]) -> Rule:
    def rule(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen = choose(path, module.weight.shape[-1]) if hasattr(module, "to_quantized") else None
        return asdict(chosen) if chosen else False

    return rule
