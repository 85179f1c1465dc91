"""Where a checkpoint lies: a folder, or the local copy of a hub repository.

Of a repository only what is used is downloaded: what describes the model first, then those safetensors files that hold
a tensor of the text model. How: download.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from . import download
from .errors import CheckpointError
from .safetensors_files import INDEX, weight_files

log = logging.getLogger(__name__)

_FORMAT = re.compile(r"(.+?)-((?:OptiQ-)?\d+bit|bf16|fp16|mxfp4|mxfp8|nvfp4)")
_SIZES = {size.lower(): size for size in ("E2B", "E4B", "12B", "26B-A4B", "31B")}
_SIZE = re.compile(rf"/gemma-4-({'|'.join(_SIZES)})-it(?![a-z])", re.IGNORECASE)


Check = Callable[[Path], object]
"""Told the folder that has what describes a model; raises what speaks against downloading its weights."""


def find(name: str | Path, weights: bool = True, check: Check = lambda folder: None) -> Path:
    """The folder of a checkpoint: `name` itself, or the local copy of the hub repository of that name.

    Args:
        name: Folder or repository.
        weights: Whether a repository's weights are wanted, or only what describes them.
        check: Called before a repository's weights are downloaded.

    Raises:
        CheckpointError: No such folder, or a repository that can't be had.
        MTPError: What `check` raises.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # "~somebody" whom this machine doesn't know
        raise CheckpointError(f"there is no folder {name}: {error}") from None
    if path.is_dir() and str(name):
        return path
    if path.exists() and str(name):
        raise CheckpointError(f"{path} is a file: give the folder it lies in")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise CheckpointError(f"there is no folder {str(name)!r}")
    folder = download.description(str(name))
    if not weights:
        return folder
    check(folder)
    if (folder / INDEX).is_file():
        download.weights(str(name), folder, [path.name for path in weight_files(folder)])
        return folder
    download.weights(str(name), folder, ["model*.safetensors"])
    if not any(folder.glob("model*.safetensors")):  # else others are copies in another layout
        download.weights(str(name), folder, ["*.safetensors"])
    return folder


def find_drafter(target: str | Path, weights: bool = True, check: Check = lambda folder: None) -> Path | None:
    """The drafter that belongs to a target, by its name; None, with a warning for repositories, if there is none.

    Args:
        target: Folder or repository. Folders are looked for beside it.
        weights, check: As for `find`.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        path = path.resolve()
        if not path.name:  # the root folder
            return None
        siblings = (path.with_name(name) for name in drafter_names(path.name))
        return next((folder for folder in siblings if folder.is_dir()), None)
    why: dict[str, str] = {}
    for name in drafter_names(str(target)):
        try:
            folder = find(name, weights=False)
        except CheckpointError as error:
            why[name] = str(error)
        else:
            return find(name, check=check) if weights else folder
    log.warning("no drafter, so plain decoding: tried %s; %s", ", ".join(why), next(iter(why.values())))
    return None


def drafter_names(target: str) -> list[str]:
    """Names under which the drafter of a target is published, the likeliest first.

    Google appends "-assistant"; mlx-community puts it before the suffix that tells the format, and has some drafters
    in bfloat16 only. A copy of a published size under any other name goes with Google's drafter.
    """
    names = [f"{target}-assistant"]
    if stored := _FORMAT.fullmatch(target):
        model, form = stored.groups()
        names += [f"{base}-assistant-{f}" for base in (model, model.removesuffix("-qat")) for f in (form, "bf16")]
        names.append(f"{model}-assistant")
    if size := _SIZE.search(target):
        names.append(f"google/gemma-4-{_SIZES[size[1].lower()]}-it-assistant")
    return list(dict.fromkeys(names))
