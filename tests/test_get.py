"""What there is to download, and downloading it: `mlx-mtp models` and `mlx-mtp get`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.checkpoint import fit, sizes
from mlx_mtp.checkpoint.pair import find_pair
from tests.support.command_line import Done, arguments, run
from tests.support.tiny_checkpoints import make_pair
from tests.support.tiny_hub import Hub, serve

E4B = "google/gemma-4-E4B-it"
NAMES = ["E2B", "E4B", "12B", "26B-A4B", "31B"]

Command = Callable[..., Done]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A tiny pair under the names of E4B's repositories, and a target without a drafter."""
    root = tmp_path_factory.mktemp("hub")
    target, drafter = make_pair("e4b", tmp_path_factory.mktemp("made"), shards=2)
    shutil.copytree(target, root / "org" / "alone")
    (root / "google").mkdir()
    target.rename(root / E4B)
    drafter.rename(root / f"{E4B}-assistant")
    with serve(root) as running:
        yield running


@pytest.fixture
def command(hub: Hub, tmp_path: Path) -> Command:
    """`mlx-mtp` with an empty cache; a process of its own, since huggingface_hub reads these variables once."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def start(*args: object) -> Done:
        environment = {**os.environ, **own}
        return subprocess.run(arguments(*args), capture_output=True, text=True, timeout=120, env=environment)

    return start


def cached(command: Command) -> dict[str, Any]:
    """What `models` says of the cache, by repository."""
    done = command("models", "--json")
    assert done.returncode == 0, done.stderr
    return {it["repository"]: it for it in json.loads(done.stdout)["cache"]}


def test_get_by_size_and_what_models_says_then(hub: Hub, command: Command, tmp_path: Path):
    done = command("get", "e4b")
    assert done.returncode == 0, done.stderr
    assert f"downloading {E4B}\n" in done.stderr and f"downloading {E4B}-assistant\n" in done.stderr
    assert f"mlx-mtp chat {E4B}\n" in done.stdout
    repositories = tmp_path / "hub"
    target, drafter = (repositories / f"models--google--gemma-4-E4B-it{end}" for end in ("", "-assistant"))
    assert str(target) in done.stdout and str(drafter) in done.stdout
    # Copies of the target in all states that a cache can have.
    names = ("gemma-4-E2B-it", "cut", "described", "gemma-4-31B-it")
    copies = [repositories / f"models--org--{name}" for name in names]
    for copy in copies:
        shutil.copytree(target, copy, symlinks=True)
    broken_off, cut, described, no_config = (next(copy.glob("snapshots/*")) for copy in copies)
    (broken_off / "model-00002-of-00002.safetensors").resolve().unlink()
    weights = (cut / "model-00001-of-00002.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-100])
    for path in described.glob("*.safetensors"):
        path.unlink()
    (no_config / "config.json").unlink()
    found = cached(command)
    states = {name: (it["kind"], it["size"], it["state"]) for name, it in found.items()}
    assert states == {
        E4B: ("target", "E4B", "complete"),
        f"{E4B}-assistant": ("drafter", "E4B", "complete"),
        "org/gemma-4-E2B-it": ("target", "E2B", "incomplete"),
        "org/cut": ("target", None, "damaged"),
        "org/described": ("target", None, "no weights"),
        "org/gemma-4-31B-it": (None, "31B", "damaged"),
    }
    assert "model-00002-of-00002.safetensors is missing" in found["org/gemma-4-E2B-it"]["problem"]
    assert "truncated" in found["org/cut"]["problem"]
    assert found[E4B]["bytes"] >= sum(path.stat().st_size for path in (hub.root / E4B).glob("*.safetensors"))


def test_a_model_without_a_drafter_is_asked_about(command: Command):
    done = command("get", "org/alone")
    assert done.returncode == 1 and "--no-draft says that it needs none" in done.stderr.splitlines()[-1]
    done = command("get", "org/alone", "--no-draft")
    assert done.returncode == 0 and "drafter " not in done.stdout
    assert "mlx-mtp chat org/alone --no-draft\n" in done.stdout


def test_models_for_a_chip():
    facts = json.loads(run("models", "--chip", "m4 max", "--memory", 36, "--json").stdout)
    assert facts["machine"] == {"chip": "M4 Max", "memory_for_models": 27_000_000_000}
    assert [it["name"] for it in facts["models"]] == NAMES
    for it in facts["models"]:
        assert [fit["quantize"] for fit in it["fits"]] == [None, 8, 6, 4]
        for more, less in pairwise(it["fits"]):
            assert more["needed"] > less["needed"] and more["longest_context"] <= less["longest_context"]
        assert it["expected"]["drafting_tps"] > it["expected"]["plain_tps"]
    small, *_, large = facts["models"]
    assert small["repository"] == "google/gemma-4-E2B-it" and small["fits"][0]["longest_context"] == small["context"]
    assert large["fits"][0]["longest_context"] == 0 < large["fits"][-1]["longest_context"] < large["context"]


def test_models_says_no_speed_where_it_knows_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.simulate.chips.this_chip", lambda: None)
    shown = run("models").stdout
    assert all(name in shown for name in NAMES) and "PREDICTED" not in shown and "drafting" not in shown
    tiny = run("models", "--chip", "M1").stdout
    assert "PREDICTED, not measured" in tiny and "no gain" not in tiny
    assert [cell for cell in tiny.split("31B")[1].splitlines()[0].split() if cell != "-"] == []


def test_as_many_bits_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, drafter = make_pair("31b", tmp_path)
    pair = find_pair(target, drafter, quantize_drafter="auto")
    longest = pair[0].text.max_positions
    # Of what the weights leave, an eighth is for temporary arrays and a quarter of the rest for the prompt cache.
    room = 8 / 7 * 4 / 3 * sizes.row_bytes(pair[0].text, longest + 1, pair[0].dtype_bytes) + 10

    def best(memory: float) -> fit.Fit | None:
        monkeypatch.setattr(sizes, "memory_for_models", lambda: int(memory))
        return fit.best(*pair)

    for bits in (None, 8, 6, 4):
        found = best(fit.fit(*pair, bits).needed + room)
        assert found and found.quantize == bits and found.longest_context == longest
    assert best(fit.fit(*pair, 4).needed) is None


@pytest.mark.parametrize("args, culprit", [
    (("models", "--chip", "Z80"), "M4 Max"), (("models", "--memory", 8), "only with --chip"),
    (("models", "--chip", "M1", "--memory", 0), "--memory"), (("get",), "NAME"), (("get", "."), "is a folder"),
])  # fmt: skip
def test_wrong_use(args: tuple[object, ...], culprit: str):
    done = run(*args)
    assert done.returncode == 2 and culprit in done.stderr and done.stdout == ""


def test_a_name_that_is_none():
    done = run("get", "E5B")
    assert done.returncode == 1 and "there is no folder 'E5B'" in done.stderr
