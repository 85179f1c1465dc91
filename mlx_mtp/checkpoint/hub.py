"""Where a checkpoint lies: a folder, or the local copy of a hub repository.

Of a repository only what is used is downloaded, in two steps: what describes the model, then, if the caller finds
nothing to say against it, those safetensors files that hold a tensor of the text model. How: download.py.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from . import download
from .safetensors_files import INDEX, weight_files


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies.

    Attributes:
        folder: Its folder; of a repository the local copy, which has at least what describes the model.
        repository: The repository; None for a folder of the user's own, whose files are what they are.
    """

    folder: Path
    repository: str | None = None

    def fetch_weights(self) -> Path:
        """Downloads a repository's weights, as far as they aren't here, and returns the folder.

        Raises:
            CheckpointError: They can't be had.
        """
        if self.repository is None:
            return self.folder
        if (self.folder / INDEX).is_file():
            names = [path.name for path in weight_files(self.folder)]
            download.weights(self.repository, self.folder, names)
            return self.folder
        download.weights(self.repository, self.folder, ["model*.safetensors"])
        if not any(self.folder.glob("model*.safetensors")):  # else others are copies in another layout
            download.weights(self.repository, self.folder, ["*.safetensors"])
        return self.folder


def find(name: str | Path) -> Place:
    """Where a checkpoint lies: `name` itself, or the local copy of the hub repository of that name.

    Args:
        name: Folder or repository. Of a repository everything but the weights is downloaded.

    Raises:
        CheckpointError: No such folder, or a repository that can't be had.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # "~somebody" whom this machine doesn't know
        raise CheckpointError(f"there is no folder {name}: {error}") from None
    # Both are False too for what mustn't be looked at, or can't be a path.
    if os.path.isdir(path) and str(name):
        return Place(path)
    if os.path.exists(path) and str(name):
        raise CheckpointError(f"{path} is a file: give the folder it lies in")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise CheckpointError(f"there is no folder {str(name)!r}")
    return Place(download.description(str(name)), str(name))
