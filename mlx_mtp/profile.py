"""Profiles: what the tuner measured for a pair on this machine, kept in the user's data folder.

A profile holds for the same files, quantisation of both models and type on the same device, with the same versions of
MLX and of this package. Anything else that a file may hold is no profile: it is left alone, and measured again.
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
from .decode.draft_length import Prices
from .decode.objective import Objective
from .errors import ProfileError, one_line
from .files import expanded, listed, parse_json, published_name, read_bytes, replacing, sample
from .models.drafter import Position
from .system.blas import has_openblas
from .system.version import VERSION

log = logging.getLogger(__name__)

SCHEMA = 2
"""Version of the file's form. The first one had prices of whole rounds, and didn't say how precise the drafter was."""


@dataclass(frozen=True)
class Key:
    """What a profile holds for.

    Attributes:
        model: The target's repository, or the end of its path; for people.
        files: Fingerprint of both folders: their config.json, and names, sizes and a sample of their weights.
        quantize: Bits that `load` quantises to, or None.
        drafter: The format that it quantises the drafter to, for people; None for the drafter as stored.
        dtype: As `load` takes it.
        device: Name of the chip, and whether the CPU or the GPU computes.
        mlx: MLX's version.
        mlx_mtp: This package's.
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
        """Name of the profile's file. The versions aren't part of it: a newer profile replaces an older one."""
        text = json.dumps([self.files, self.quantize, self.drafter, self.dtype, self.device])
        return f"{self.model.replace('/', '--')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


@dataclass(frozen=True)
class Profile:
    """What load and the batch take from a measurement.

    Attributes:
        key: What it holds for.
        costs: By rows, what rounds take.
        acceptance: By kind of text and position, the chance that a draft is kept if those before it were.
        rows: Rows of a batch, as chosen for `objective`.
        drafts: Draft length chosen with it; the online control begins with the costs and may choose another.
        objective: One of `tuning.OBJECTIVES`.
        drafter_position: See `api.load`; None without a drafter.
        measured: When, as ISO 8601 in UTC.
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
        """What rounds of any number of rows take: between two that were measured, on the line."""
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
    """What a profile of a pair would hold for, now and here.

    Args:
        target, drafter: The pair as it is loaded.
        adapter: As for `api.load`.

    Raises:
        OSError: A file of theirs can't be read.
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
    """The chip's name, and what computes."""
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
    """Where profiles are: MLX_MTP_PROFILES, or the user's data folder."""
    if given := os.environ.get("MLX_MTP_PROFILES"):
        return expanded(given)
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/mlx_mtp/profiles"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "mlx_mtp/profiles"


def save_profile(profile: Profile) -> Path:
    """Writes a profile to its place, and returns that.

    Raises:
        OSError: It can't be written.
    """
    path = profile_folder() / profile.key.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(json.dumps({"schema": SCHEMA, **asdict(profile)}, indent=1) + "\n", encoding="utf-8")
    return path


def load_profile(path: Path) -> Profile:
    """Reads a profile from a file.

    Raises:
        ProfileError: There is none in it.
    """
    from pydantic import (  # takes a tenth of a second, and only pairs with a profile need it
        TypeAdapter,
        ValidationError,
    )

    try:
        content = parse_json(read_bytes(path).decode())
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise ValueError("another version of this package has written it, or something else")
        profile = TypeAdapter(Profile).validate_json(json.dumps(content), strict=True)
        if not all(1 in prices.verify for prices in profile.costs.values()):
            raise ValueError("costs of plain decoding are missing")
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        why = _first(error.errors()) if isinstance(error, ValidationError) else one_line(error)
        raise ProfileError(f"{path} is no profile: {why}; delete it, and run mlx-mtp tune") from error
    return profile


def _first(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first of pydantic's errors in a few words: which field, and what is wrong with it."""
    first = errors[0]
    name = ".".join(map(str, first["loc"])).replace(".[key]", "")
    return one_line(ValueError(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}"))


def saved_profile(key: Key) -> Profile | None:
    """The saved profile that holds for a key.

    None if there is none; with a warning, if there is one that doesn't hold any more, or holds for another device: on
    Linux the commands compute with OpenBLAS, and Python only does so if it was loaded first (see system/blas.py).
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


def chosen(
    wanted: str | Path | None,
    target: TargetDescription,
    drafter: DrafterDescription | None,
    adapter: Path | None = None,
) -> Profile | None:
    """The profile that `api.load` is to use for a pair; `wanted` is its argument `profile`.

    Raises:
        ProfileError: The one that was asked for is damaged, or was measured with something else.
    """
    if wanted is None:
        return None
    if not isinstance(wanted, str | Path):
        raise ProfileError(f"profile must be 'auto', a file or None, not {wanted!r}")
    try:
        key = key_of(target, drafter, adapter)
    except OSError:
        return None  # a file is missing: reading the checkpoint says which
    if wanted == "auto":
        return saved_profile(key)
    path = expanded(wanted)
    profile = load_profile(path)
    check_profile(profile, key, path)
    return profile


def check_profile(profile: Profile, key: Key, path: Path) -> None:
    """Checks that a profile holds for a key.

    Raises:
        ProfileError: It doesn't.
    """
    for what, name in (
        ("files", "other model files"), ("quantize", "another quantisation"),
        ("drafter", "another precision of the drafter"), ("dtype", "another dtype"),
        ("device", "another device"), ("mlx", "another version of mlx"), ("mlx_mtp", "another version of mlx_mtp"),
    ):  # fmt: skip
        if getattr(profile.key, what) != getattr(key, what):
            raise ProfileError(f"{path} was measured with {name}: run mlx-mtp tune again")
