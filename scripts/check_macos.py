"""Checks on any machine that the project's wheel can be installed on macOS arm64 from binaries, for every Python.

pip can choose files for another platform, but it evaluates environment markers (`sys_platform == "darwin"`) for the
machine it runs on. So pip is asked, without dependencies, only which file it would choose for each requirement. This
script evaluates that file's requirements for macOS, and repeats until there are no new ones. Nothing is installed.

Not checked: whether the files work, which needs a Mac; the CI workflow has one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORM = "macosx_14_0_arm64"


class UnresolvedError(Exception):
    """pip found no binary for a requirement; the message is pip's last error line."""


def pip(*arguments: str) -> str:
    """Runs pip and returns its standard output.

    Raises:
        UnresolvedError: pip failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UnresolvedError(errors[-1] if errors else done.stderr.strip()[-300:])
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Builds the project's wheel in `folder` and returns its path."""
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def mac_markers(python: str) -> dict[str, str]:
    """The marker values of CPython `python` (like "3.10") on a Mac with Apple silicon."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "arm64",
        "platform_python_implementation": "CPython",
        "platform_release": "23.0.0",
        "platform_system": "Darwin",
        "platform_version": "Darwin Kernel Version 23.0.0",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "darwin",
    }


def needs(metadata: dict, extras: set[str], python: str) -> list[Requirement]:
    """Requirements of a distribution with `extras` on a Mac."""
    markers = mac_markers(python)
    return [
        requirement
        for requirement in map(Requirement, metadata.get("requires_dist", []))
        if requirement.marker is None
        or any(requirement.marker.evaluate({**markers, "extra": extra}) for extra in extras | {""})
    ]


def choose(requirements: list[str], python: str, scratch: str) -> list[dict]:
    """The files that pip would choose on macOS arm64 for that Python: the "install" entries of its report."""
    report = pip(
        "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--only-binary=:all:",
        "--platform", PLATFORM, "--python-version", python, "--implementation", "cp",
        "--target", scratch, "--report", "-", *requirements,
    )  # fmt: skip
    return json.loads(report)["install"]


def resolve(wheel: Path, python: str, scratch: str) -> dict[str, str]:
    """File names of everything that an installation of `wheel` needs, by distribution.

    Raises:
        UnresolvedError: A requirement has no binary.
    """
    asked: dict[str, Requirement] = {}
    while True:
        chosen = choose([str(wheel), *sorted(asked)], python, scratch)
        found: dict[str, Requirement] = {}
        for entry in chosen:
            name = canonicalize_name(entry["metadata"]["name"])
            extras = {extra for item in asked.values() if canonicalize_name(item.name) == name for extra in item.extras}
            for item in needs(entry["metadata"], extras, python):
                item.marker = None
                found[str(item)] = item
        if found.keys() <= asked.keys():
            return {entry["metadata"]["name"]: entry["download_info"]["url"].rsplit("/", 1)[-1] for entry in chosen}
        asked |= found


def main() -> int:
    """Prints a line for each Python and a table of the chosen versions; returns the exit code, 0 if all resolve."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        print(f"wheel: {wheel.name}")
        rows: dict[str, dict[str, str]] = {}
        for python in PYTHONS:
            try:
                files = resolve(wheel, python, str(Path(folder) / "target"))
            except UnresolvedError as error:
                failed = True
                print(f"Python {python}: FAILED: {error}")
                continue
            rows[python] = {name: str(parse_wheel_filename(file)[1]) for name, file in files.items()}
            print(f"Python {python}: ok, {len(files)} wheels for {PLATFORM}")
    names = sorted({name for versions in rows.values() for name in versions}, key=str.lower)
    print(f"\n{'package':<20}" + "".join(f"{python:>12}" for python in rows))
    for name in names:
        print(f"{name:<20}" + "".join(f"{versions.get(name, '-'):>12}" for versions in rows.values()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
