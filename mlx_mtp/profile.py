"""Profiles: the tuner's measurements of a pair on this machine, stored in the user's data folder.

A profile is valid for the same model files, quantisation and dtype on the same device, with the same versions of MLX
and of this package. A saved profile that isn't valid is ignored, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import mlx.core as mx
from annotated_types import Ge, Interval, MinLen

from .checkpoint import adapters
from .checkpoint.description import DrafterDescription, TargetDescription
from .decode.objective import Objective
from .decode.round_cost import Prices
from .errors import ProfileError, one_line
from .files import data_folder, expanded, listed, parse_json, published_name, read_bytes, replacing, sample
from .models.drafter import Position
from .system.blas import has_openblas
from .system.version import VERSION

log = logging.getLogger(__name__)

SCHEMA = 2
"""Version of the file format. Version 1 had prices of whole rounds, and no precision of the drafter."""


@dataclass(frozen=True)
class Key:
    """What a profile is valid for.

    Attributes:
        model: The target's repository, or the end of its path.
        files: Fingerprint of both folders: their config.json, and names, sizes and a sample of their weights.
        quantize: Bits to which `api.load` quantises the target, or None.
        drafter: The format to which `api.load` quantises the drafter, in words; None for the drafter as stored.
        dtype: `api.load`'s argument.
        device: Name of the chip, and whether the CPU or the GPU computes.
        mlx: MLX's version.
        mlx_mtp: This package's version.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    model: str
    files: str
    quantize: int | None
    drafter: str | None
    dtype: str | None
    device: str
    mlx: str
    mlx_mtp: str

    @property
    def name(self) -> str:
        """Name of the profile's file. It doesn't depend on the versions, so that a new profile replaces an old one."""
        text = json.dumps([self.files, self.quantize, self.drafter, self.dtype, self.device])
        return f"{self.model.replace('/', '--')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


@dataclass(frozen=True)
class Profile:
    """Measured prices of rounds and acceptance, and the settings chosen from them.

    Attributes:
        key: What it is valid for.
        costs: Prices of rounds, by the number of rows.
        acceptance: By kind of text, for each position of a draft the probability that it is accepted if all drafts
            before it were.
        rows: Number of rows chosen for `objective`.
        drafts: Draft length chosen for `objective`; while decoding, the draft-length policy may choose another.
        objective: One of `decode.objective.OBJECTIVES`.
        drafter_position: See `api.load`; None without a drafter.
        measured: When it was measured, as ISO 8601 in UTC.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    key: Key
    costs: Annotated[Mapping[Annotated[int, Ge(1)], Prices], MinLen(1)]
    acceptance: Mapping[str, list[Annotated[float, Interval(ge=0, le=1)]]]
    rows: Annotated[int, Ge(1)]
    drafts: Annotated[int, Ge(0)]
    objective: Objective
    drafter_position: Position | None
    measured: str

    def prices(self, rows: int) -> Prices:
        """Prices for any number of rows, interpolated between the measured ones."""
        below = max((b for b in self.costs if b <= rows), default=min(self.costs))
        above = min((b for b in self.costs if b >= rows), default=max(self.costs))
        share = (rows - below) / (above - below) if above > below else 0.0
        low, high = self.costs[below], self.costs[above]

        def between(one: float, other: float) -> float:
            return one * (1 - share) + other * share

        return Prices(
            {width: between(low.verify[width], high.verify[width]) for width in low.verify if width in high.verify},
            between(low.draft, high.draft),
            between(low.packing, high.packing),
        )


def key_of(target: TargetDescription, drafter: DrafterDescription | None, adapter: Path | None = None) -> Key:
    """The key of a pair on this machine.

    Args:
        target: The target as it is loaded.
        drafter: The drafter as it is loaded; None without one.
        adapter: As for `api.load`.

    Raises:
        OSError: A file of the models can't be read.
    """
    digest = hashlib.sha256()
    parts = [(target.folder, "config.json"), (drafter.folder if drafter else None, "config.json")]
    for part, config in (*parts, (adapter, adapters.CONFIG)) if adapter else parts:
        if part is not None:
            digest.update(read_bytes(part / config))
            for path in listed(part, "*.safetensors"):
                if path.is_file():
                    digest.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
                    digest.update(sample(path))
        digest.update(b"\0")
    bits = target.quantize.bits if target.quantize else None
    drafter_format = str(drafter.quantize) if drafter and drafter.quantize else None
    name = published_name(target.folder.absolute())
    return Key(name, digest.hexdigest(), bits, drafter_format, target.dtype, **machine())


def machine() -> dict[str, Any]:
    """The fields of a key that don't depend on the model."""
    return {"device": device(), "mlx": version("mlx"), "mlx_mtp": VERSION}


def device() -> str:
    """Name of the chip, and whether the CPU or the GPU computes."""
    kind = "GPU" if mx.default_device() == mx.gpu else "CPU"
    name = platform.processor() or platform.machine()
    if kind == "GPU":
        name = str(mx.device_info().get("device_name", name))
    elif sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        name += f" x {os.cpu_count()}"
        kind += ", OpenBLAS" if has_openblas() else ""
    return f"{name} ({kind})"


def profile_folder() -> Path:
    """The folder of saved profiles: MLX_MTP_PROFILES if it is set, else in the user's data folder."""
    if given := os.environ.get("MLX_MTP_PROFILES"):
        return expanded(given)
    return data_folder() / "profiles"


def save_profile(profile: Profile) -> Path:
    """Writes a profile to the profile folder and returns the file's path.

    Raises:
        OSError: The file can't be written.
    """
    path = profile_folder() / profile.key.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(json.dumps({"schema": SCHEMA, **asdict(profile)}, indent=1) + "\n", encoding="utf-8")
    return path


def load_profile(path: Path) -> Profile:
    """Reads a profile from a file.

    Raises:
        ProfileError: The file can't be read, or isn't a profile of this version.
    """
    from pydantic import (  # takes a tenth of a second, and only pairs with a profile need it
        TypeAdapter,
        ValidationError,
    )

    try:
        content = parse_json(read_bytes(path).decode())
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise ValueError("it wasn't written by this version of the package")
        profile = TypeAdapter(Profile).validate_json(json.dumps(content), strict=True)
        if not all(1 in prices.verify for prices in profile.costs.values()):
            raise ValueError("costs of plain decoding are missing")
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        why = _first(error.errors()) if isinstance(error, ValidationError) else one_line(error)
        raise ProfileError(f"{path} isn't a valid profile: {why}; delete it, and run mlx-mtp tune") from error
    return profile


def _first(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first of pydantic's errors, in words: which field, and what is wrong with it."""
    first = errors[0]
    name = ".".join(map(str, first["loc"])).replace(".[key]", "")
    return one_line(ValueError(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}"))


def saved_profile(key: Key) -> Profile | None:
    """The saved profile for a key; None if there is no valid one.

    Logs a warning if there is one that is damaged or outdated, or one for another device. The latter can happen on a
    single machine: on Linux the commands compute with OpenBLAS, Python programs only if they load it first (see
    system/blas.py).
    """
    path = profile_folder() / key.name
    if not path.is_file():
        for other in listed(profile_folder(), "*.json"):
            with suppress(ProfileError):
                found = load_profile(other).key
                if replace(found, device=key.device).name == key.name:
                    log.warning("no profile for %s; there is one for %s", key.device, found.device)
        return None
    try:
        profile = load_profile(path)
        check_profile(profile, key, path)
    except ProfileError as error:
        log.warning("profile ignored: %s", error)
        return None
    return profile


@dataclass(frozen=True)
class SavedProfile:
    """A file in the profile folder.

    Attributes:
        path: The file.
        profile: The profile; None if the file isn't one.
        why_not: Why it isn't used on this machine, in one line; None if it is, as far as that can be said without the
            model's files.
    """

    path: Path
    profile: Profile | None
    why_not: str | None


def saved_profiles() -> list[SavedProfile]:
    """All saved profiles, by the names of their files."""
    return [_saved(path) for path in listed(profile_folder(), "*.json")]


def _saved(path: Path) -> SavedProfile:
    profile = None
    try:
        profile = load_profile(path)
        check_profile(profile, replace(profile.key, **machine()), path)
    except ProfileError as error:
        return SavedProfile(path, profile, str(error))
    return SavedProfile(path, profile, None)


def profile_for(
    wanted: str | Path | None,
    target: TargetDescription,
    drafter: DrafterDescription | None,
    adapter: Path | None = None,
) -> Profile | None:
    """The profile that `api.load` uses for a pair.

    Args:
        wanted: `api.load`'s argument `profile`.
        target: The target as it is loaded.
        drafter: The drafter as it is loaded; None without one.
        adapter: As for `api.load`.

    Returns:
        The profile; None if none is wanted or "auto" finds no valid one.

    Raises:
        ProfileError: `wanted` is a file that isn't a valid profile of this pair on this machine.
    """
    if wanted is None:
        return None
    if not isinstance(wanted, str | Path):
        raise ProfileError(f"profile must be 'auto', a file or None, not {wanted!r}")
    try:
        key = key_of(target, drafter, adapter)
    except OSError:
        return None  # a file is missing: loading the models raises an error that names it
    if wanted == "auto":
        return saved_profile(key)
    path = expanded(wanted)
    profile = load_profile(path)
    check_profile(profile, key, path)
    return profile


def check_profile(profile: Profile, key: Key, path: Path) -> None:
    """Checks that a profile is valid for a key.

    Args:
        profile: The profile.
        key: The key.
        path: The profile's file, for the message.

    Raises:
        ProfileError: It isn't.
    """
    for what, name in (
        ("files", "other model files"), ("quantize", "another quantisation"),
        ("drafter", "another precision of the drafter"), ("dtype", "another dtype"),
        ("device", "another device"), ("mlx", "another version of mlx"), ("mlx_mtp", "another version of mlx_mtp"),
    ):  # fmt: skip
        if getattr(profile.key, what) != getattr(key, what):
            raise ProfileError(f"{path} was measured with {name}: run mlx-mtp tune again")
