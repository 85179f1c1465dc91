"""What a report says of the machine and the models: no personal paths or names."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.pair import DEMO
from ..checkpoint.quantization import Format
from ..checkpoint.sizes import memory_for_models
from ..files import published_name
from ..profile import device
from ..system.version import VERSION

if TYPE_CHECKING:
    from ..api import MTPModel


def machine_facts() -> dict[str, Any]:
    """The machine and the versions of what runs on it, as JSON values."""
    return {
        "device": device(),
        "memory_bytes": memory_for_models(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_mtp": VERSION,
    }


def machine_line() -> str:
    """The same in one line."""
    facts = machine_facts()
    return (
        f"{facts['device']}, {facts['memory_bytes'] / 1e9:.0f} GB, {facts['system']}, Python {facts['python']}, "
        f"mlx {facts['mlx']}, mlx-mtp {facts['mlx_mtp']}"
    )


def model_facts(lm: MTPModel) -> dict[str, Any]:
    """A loaded pair as JSON values: names as published, and how the weights are held."""
    target, drafter = lm.description, lm.drafter_description
    return {
        "target": _name(lm.folder),
        "drafter": _name(drafter.folder) if drafter else None,
        "target_weights": _weights(target.format),
        "drafter_weights": _weights(drafter.format) if drafter else None,
        "activation_bits": 8 * target.dtype_bytes,
        "adapter": lm.adapter is not None,
    }


def model_line(lm: MTPModel) -> str:
    """The same in one line."""
    facts = model_facts(lm)
    drafter = f"drafter {facts['drafter']} ({facts['drafter_weights']})" if facts["drafter"] else "no drafter"
    return f"{facts['target']} ({facts['target_weights']}), {drafter}, {facts['activation_bits']}-bit activations" + (
        ", with an adapter" if facts["adapter"] else ""
    )


def _weights(how: Format | None) -> str:
    return str(how) if how else "unquantised"


def _name(folder: Path) -> str:
    """A folder's repository or own name: its path may hold a person's name."""
    if folder.is_relative_to(DEMO):
        return f"the embedded {folder.name}"
    return published_name(folder) if folder.parent.name == "snapshots" else folder.absolute().name
