"""`mlx-mtp doctor`, on Macs as public documents describe them, and without a name of anybody (doctor/)."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_mtp import profile
from mlx_mtp.checkpoint.cache import CachedModel
from mlx_mtp.decode.round_cost import Prices
from mlx_mtp.doctor import facts, machine
from tests.support.command_line import run, start

M1_PRO = """\
machdep.cpu.brand_string: Apple M1 Pro
hw.memsize: 34359738368
hw.physicalcpu: 10
hw.optional.arm64: 1
kern.osproductversion: 15.5
iogpu.wired_limit_mb: 28672
hw.perflevel0.name: Performance
hw.perflevel0.physicalcpu: 8
hw.perflevel1.name: Efficiency
hw.perflevel1.physicalcpu: 2
"""

LIMITS: dict[str, str | int] = {
    "device_name": "Apple M1 Pro",
    "architecture": "applegpu_g13s",
    "memory_size": 34359738368,
    "max_buffer_length": 20132659200,
    "max_recommended_working_set_size": 26800603136,
    "resource_limit": 499000,
}

GPU = facts.Gpu("gpu", True, LIMITS, 26800603136, False)
CPU = facts.Gpu("cpu", False, {}, 0, False)

Mac = Callable[..., None]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mac:
    """Makes this machine a Mac, as far as the command asks, with nothing in its cache."""

    def become(sysctl: str = M1_PRO, architecture: str = "arm64", gpu: facts.Gpu = GPU) -> None:
        recorded, program = tmp_path / "recorded", tmp_path / "sysctl"
        recorded.write_text(sysctl)
        program.write_text(f"#!/bin/sh\ncat '{recorded}'\necho 'unknown oid' >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setattr("mlx_mtp.doctor.machine._SYSCTL", str(program))
        monkeypatch.setattr("mlx_mtp.doctor.machine.sys", SimpleNamespace(platform="darwin"))
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        monkeypatch.setattr("mlx_mtp.doctor.facts.read_gpu", lambda: gpu)

    cache = tmp_path / "hf" / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(cache.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    usage = shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    become()
    return become


def report() -> dict[str, Any]:
    """What the command says as JSON."""
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_mac_in_order(mac: Mac):
    found = report()
    assert found["problems"] == []
    machine = found["machine"]
    assert machine["chip"] == "Apple M1 Pro" and machine["cores"] == {"Performance": 8, "Efficiency": 2}
    assert machine["memory"] == 34359738368 and machine["wired_limit"] == 28672 * 2**20
    assert found["gpu"]["limits"] == LIMITS
    assert found["software"]["packages"]["mlx"] and found["software"]["extras"]["structured"] is True
    assert "fast-cpu" in found["software"]["extras"], "this Python is on Linux"
    shown = run("doctor")
    for words in (
        "Apple M1 Pro, cores: 8 Performance, 2 Efficiency; memory 32 GiB", "macOS 15.5", "applegpu_g13s", "20.13 GB",
        "at most 26.80 GB; set by iogpu.wired_limit_mb: 30.06 GB", "$HF_HOME/hub, 1000.00 GB free", "none found",
    ):  # fmt: skip
        assert words in shown.stdout
    assert "For a report" in shown.stderr


@pytest.mark.parametrize("change, problem, todo", [
    ({"sysctl": M1_PRO.replace("15.5", "13.6.1")}, "macOS 13.6.1 is too old", "update to macOS 14"),
    ({"sysctl": M1_PRO.replace("15.5", "14.4")}, "can't keep a model's memory resident", "update to macOS 15"),
    ({"architecture": "x86_64"}, "built for x86_64 and runs under Rosetta", "install Python for Apple silicon"),
    ({"sysctl": M1_PRO.replace("arm64: 1", "arm64: 0"), "architecture": "x86_64", "gpu": CPU}, "Intel", "an M chip"),
    ({"gpu": CPU}, "finds no GPU", "virtual machine"),
])  # fmt: skip
def test_what_is_wrong_with_a_mac(mac: Mac, change: dict[str, Any], problem: str, todo: str):
    mac(**change)
    (found,) = report()["problems"]
    assert problem in found["what"] and todo in found["todo"]
    shown = run("doctor").stdout
    assert found["what"] in shown and found["todo"] in shown


def test_a_sysctl_that_says_nothing(mac: Mac):
    mac(sysctl="")
    assert report()["machine"]["chip"] == "unknown"


def test_what_is_wrong_with_mlx(mac: Mac, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.doctor.software.installed", lambda name: "0.5.0" if name == "mlx" else None)
    found = report()
    assert "mlx 0.5.0 is older than" in found["problems"][0]["what"]
    assert not any(found["software"]["extras"].values())
    monkeypatch.undo()

    def fail() -> facts.Gpu:
        raise ImportError(f"{sys.prefix}/lib/core.so: no suitable image found")

    monkeypatch.setattr("mlx_mtp.doctor.facts.read_gpu", fail)
    found = report()
    assert "PYTHON/lib/core.so: no suitable image found" in found["problems"][0]["what"] and found["gpu"] is None
    assert "no suitable image found" in run("doctor").stdout


@pytest.mark.parametrize("nvidia, openblas, todo", [
    (True, False, ["pip install 'mlx-mtp[cuda]'"]), (False, False, ["pip install 'mlx-mtp[fast-cpu]'"]),
    (False, True, []),
])  # fmt: skip
def test_what_is_wrong_with_a_linux_machine(
    nvidia: bool, openblas: bool, todo: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlx_mtp.doctor.machine.read", lambda here=machine.read(): replace(here, nvidia=nvidia))
    monkeypatch.setattr("mlx_mtp.doctor.facts.read_gpu", lambda: replace(CPU, openblas=openblas))
    monkeypatch.setattr("mlx_mtp.checkpoint.cache.cached_models", list)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**12))
    assert [it["todo"] for it in report()["problems"]] == todo


def test_a_full_disk_broken_downloads_and_profiles_and_no_names(
    mac: Mac, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    home, disk = tmp_path / "Users" / "janedoe", tmp_path / "Volumes" / "Jane's disk"
    profiles = home / "Library" / "profiles"
    profiles.mkdir(parents=True)
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "janedoe")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLX_MTP_PROFILES", str(profiles))
    monkeypatch.setattr(platform, "node", lambda: "Janes-MacBook.local")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(disk))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(disk / "hub"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    folder = disk / "hub" / "models--janedoe--gemma-4-E4B-it" / "snapshots" / "0"

    def model(state: Any, problem: str | None) -> CachedModel:
        return CachedModel("janedoe/gemma-4-E4B-it", folder, "target", "E4B", 10**9, state, problem)

    cached = [
        model("damaged", f"{folder}/model.safetensors is truncated on Janes-MacBook"),
        model("incomplete", "model.safetensors is missing, 1 in all"),
        model("complete", None),
    ]
    monkeypatch.setattr("mlx_mtp.checkpoint.cache.cached_models", lambda: cached)
    key = profile.Key("janedoe/gemma-4-E4B-it", "0", 4, None, None, profile.device(), "0.1", "0.1.0")
    prices = Prices({1: 0.01}, 0.001, 0.0)
    stale = profile.Profile(key, {1: prices}, {}, 1, 0, "latency", None, "2026-01-01T00:00:00+00:00")
    profile.save_profile(stale)
    (profiles / "x.json").write_text("{")
    found, shown = report(), run("doctor")
    problems = [(it["what"], it["todo"]) for it in found["problems"]]
    damaged, incomplete, full, outdated, unreadable = problems
    assert "truncated" in damaged[0]
    assert damaged[1].startswith("delete $HF_HOME/hub/models--USER--gemma-4-E4B-it, then mlx-mtp get")
    assert "is missing" in incomplete[0] and incomplete[1] == "mlx-mtp get USER/gemma-4-E4B-it"
    assert "1.0 GB free" in full[0] and "HF_HOME" in full[1]
    assert "another version of mlx" in outdated[0] and "mlx-mtp tune USER/gemma-4-E4B-it" in outdated[1]
    assert "~/Library/profiles/x.json" in unreadable[0] and "delete the file" in unreadable[1]
    assert [it["usable"] for it in found["profiles"]] == [False, False]
    for text in (json.dumps(found), shown.stdout, shown.stderr):
        for name in ("janedoe", "Janes-MacBook", "Jane's", str(tmp_path)):
            assert name.lower() not in text.lower()


def test_this_machine_as_it_is():
    done = start("doctor")
    assert done.returncode == 0, done.stderr
    assert "mlx-mtp" in done.stdout and "problem" in done.stdout
    for name in (str(Path.home()), platform.node(), getpass.getuser()):
        assert name not in done.stdout
