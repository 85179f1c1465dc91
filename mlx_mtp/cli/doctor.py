"""`mlx-mtp doctor`: the machine, what is installed, what is wrong and what to do; a block for a report."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import options as o
from . import render

if TYPE_CHECKING:
    from ..doctor.facts import Facts
    from ..doctor.problems import Problem


def doctor(
    as_json: o.Json = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Shows the machine and what is installed, what is wrong with it, and what to do."""
    from ..doctor import facts, privacy, problems

    found = facts.gather()
    shown = privacy.Scrubber(found.folders).everything(_values(found, problems.find(found)))
    if as_json:
        print(json.dumps(shown))
        return
    render.show([render.pairs(_lines(shown))])
    print("For a report, copy all of this; it has no names or paths of yours.", file=sys.stderr)


def _values(found: Facts, wrong: list[Problem]) -> dict[str, Any]:
    """The facts as JSON values."""
    models = [
        {"repository": it.repository, "kind": it.kind, "bytes": it.bytes, "state": it.state} for it in found.cache
    ]
    profiles = [
        {"model": it.profile.key.model if it.profile else None, "usable": it.why_not is None} for it in found.profiles
    ]
    return {
        "machine": asdict(found.machine),
        "software": asdict(found.software),
        "mlx_error": found.mlx_error,
        "gpu": asdict(found.gpu) if found.gpu else None,
        "cache": {"folder": str(found.cache_folder), "free": found.cache_free, "models": models},
        "profiles": profiles,
        "problems": [asdict(it) for it in wrong],
    }


def _lines(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts as names and descriptions."""
    machine, software, gpu, cache = (shown[part] for part in ("machine", "software", "gpu", "cache"))
    cores = ", ".join(f"{count} {kind}" for kind, count in machine["cores"].items())
    missing = [name for name, there in software["extras"].items() if not there]
    extras = ", ".join(name for name, there in software["extras"].items() if there) or "none"
    lines = [
        ("mlx-mtp", software["version"]),
        ("machine", f"{machine['chip']}, cores: {cores}; memory {machine['memory'] / 2**30:.0f} GiB"),
        ("system", machine["system"]),
        ("python", f"{software['python']}, {machine['architecture']}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in software["packages"].items())),
        ("extras", extras + (f"; not installed: {', '.join(missing)}" if missing else "")),
    ]
    if gpu:
        blas = ", OpenBLAS" if gpu["openblas"] else ""
        lines.append(("device", f"{gpu['device']}{', Metal' if gpu['metal'] else blas}"))
        lines += [(f"  {name}", _limit(value)) for name, value in gpu["limits"].items()]
        own = f"; set by iogpu.wired_limit_mb: {_size(machine['wired_limit'])}" if machine["wired_limit"] else ""
        lines.append(
            ("  wired", (f"at most {_size(gpu['wired_at_most'])}" if gpu["wired_at_most"] else "nothing") + own)
        )
    lines.append(("cache", f"{cache['folder']}, {_size(cache['free'])} free"))
    for it in cache["models"]:
        lines.append((f"  {it['kind'] or 'model'}", f"{it['repository']}, {_size(it['bytes'])}, {it['state']}"))
    usable = sum(it["usable"] for it in shown["profiles"])
    lines.append(("profiles", f"{len(shown['profiles'])}, of which {usable} can be used"))
    if not shown["problems"]:
        lines.append(("problems", "none found"))
    for number, it in enumerate(shown["problems"], 1):
        lines += [(f"problem {number}", it["what"]), ("  to do", it["todo"])]
    return lines


def _limit(value: str | int) -> str:
    """A value of MLX's description of the device; large numbers are bytes."""
    return _size(value) if isinstance(value, int) and value > 10**6 else str(value)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
