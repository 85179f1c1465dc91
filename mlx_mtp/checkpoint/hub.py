"""Finds a checkpoint's folder: the user's own, or the local copy of a hub repository.

A repository is downloaded in two steps, so that the caller can check the model in between: first the files that
describe it, then those safetensors files that have a tensor of the text model. The download itself is in download.py.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from . import download
from .progress import ProgressCallback
from .safetensors_files import INDEX, weight_files


@dataclass(frozen=True)
class Place:
    """The place of a checkpoint.

    Attributes:
        folder: Its folder; for a repository the local copy, which has at least the files that describe the model.
        repository: The repository; None for the user's own folder.
    """

    folder: Path
    repository: str | None = None

    def fetch_weights(self, progress: ProgressCallback | None = None) -> Path:
        """Downloads a repository's weights, if they aren't there already, and returns the folder.

        Args:
            progress: Receives reports of a download.

        Raises:
            CheckpointError: The download failed.
        """
        if self.repository is None:
            return self.folder
        if (self.folder / INDEX).is_file():
            names = [path.name for path in weight_files(self.folder)]
            download.weights(self.repository, self.folder, names, progress)
            return self.folder
        download.weights(self.repository, self.folder, ["model*.safetensors"], progress)
        # If there are model*.safetensors, other safetensors files are copies in another layout.
        if not any(self.folder.glob("model*.safetensors")):
            download.weights(self.repository, self.folder, ["*.safetensors"], progress)
        return self.folder


def find(name: str | Path) -> Place:
    """Finds a checkpoint. If it is in a hub repository, everything but its weights is downloaded.

    Args:
        name: A folder, or a repository OWNER/NAME.

    Raises:
        CheckpointError: There is no such folder, and no such repository or no access to it.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~USER with an unknown user
        raise CheckpointError(f"there is no folder {name}: {error}") from None
    # Both are False too without the permission to look, or if it can't be a path.
    if os.path.isdir(path) and str(name):
        return Place(path)
    if os.path.exists(path) and str(name):
        raise CheckpointError(f"{path} is a file: give the folder that contains it")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise CheckpointError(f"there is no folder {str(name)!r}")
    return Place(download.description(str(name)), str(name))
