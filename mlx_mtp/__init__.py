"""Gemma 4 with its multi-token-prediction drafters, on MLX.

    import mlx_mtp
    lm = mlx_mtp.load()                       # the embedded demo pair; or a folder, or a repository's name
    print(lm.generate("What is a drafter?").text)

Names are imported on first use, so that `import mlx_mtp` costs nothing.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from .system.metal import set_defaults
from .system.version import VERSION

if TYPE_CHECKING:
    from .api import MTPModel, load
    from .chat import Chat
    from .checkpoint.progress import Progress
    from .errors import CheckpointError, MemoryBudgetError, MTPError, PairingError, ProfileError, PromptError
    from .session.answer import Chunk, Generation
    from .session.options import GenerationOptions

__version__ = VERSION

set_defaults(os.environ)  # here, because MLX reads them once
logging.getLogger(__name__).addHandler(logging.NullHandler())  # what is shown, and where, is the app's choice

_HOMES = {
    **dict.fromkeys(("load", "MTPModel"), "api"),
    **dict.fromkeys(("Generation", "Chunk"), "session.answer"),
    "Chat": "chat",
    "Progress": "checkpoint.progress",
    "GenerationOptions": "session.options",
    **dict.fromkeys(
        ("MTPError", "CheckpointError", "PairingError", "ProfileError", "PromptError", "MemoryBudgetError"), "errors"
    ),
}

__all__ = [
    "Chat",
    "CheckpointError",
    "Chunk",
    "Generation",
    "GenerationOptions",
    "MTPError",
    "MTPModel",
    "MemoryBudgetError",
    "PairingError",
    "ProfileError",
    "Progress",
    "PromptError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlx_mtp' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
