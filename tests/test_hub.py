"""What is downloaded from a hub, and what is not (hub.py)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_mtp.checkpoint.candidates import drafter_names
from tests.support.tiny_checkpoints import make_pair
from tests.support.tiny_hub import Hub, serve

Run = Callable[..., "subprocess.CompletedProcess[str]"]

TOWERS = "model-00009-of-00009.safetensors"
DESCRIBING = {"config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"}
DESCRIBING |= {"tool_use.jinja"}  # of the folder additional_chat_templates
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Repositories with all that lies beside a model out there."""
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("hub")
    target, drafter = make_pair("e2b", made, shards=2)
    (root / "org").mkdir()
    target.rename(root / "org" / "model")
    drafter.rename(root / "org" / "model-assistant")
    model = root / "org" / "model"
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.vision_tower.patch.weight"] = TOWERS
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-8bit", "copies-4bit"):  # under the same rule as mlx-community's conversions
        (root / "org" / name).mkdir()
        shutil.copy(model / "config.json", root / "org" / name)
    config = json.loads((model / "config.json").read_text())
    quantised = {"quantization": {"bits": 4, "group_size": 64}}
    for repository, description in (
        ("copies", config), ("llama", {"model_type": "llama"}), ("quantised", config | quantised)
    ):  # fmt: skip
        (root / "org" / repository).mkdir()
        (root / "org" / repository / "config.json").write_text(json.dumps(description))
        for name in ("model.safetensors", "consolidated.safetensors"):
            (root / "org" / repository / name).write_bytes(b"x")
    (root / "org" / "copies" / "tokenizer.model").write_bytes(b"y")
    for junk in (TOWERS, "pytorch_model.bin", "model.gguf", "README.md", "onnx/config.json", "copy/model.safetensors"):
        (model / junk).parent.mkdir(exist_ok=True)
        (model / junk).write_bytes(b"not to be read")
    with serve(root) as running:
        yield running


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """The command line with an empty cache; a process of its own, since huggingface_hub reads these variables once."""

    def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        }
        return subprocess.run(
            [sys.executable, *args], capture_output=True, text=True, encoding="utf-8", timeout=120, env=environment
        )

    hub.names()
    hub.cut, hub.gated = None, False
    return run


FIND = "import sys; from mlx_mtp.checkpoint import hub; print(hub.find(*sys.argv[1:]).fetch_weights())"
SMALL_CHUNKS = "import huggingface_hub.constants as hub; hub.DOWNLOAD_CHUNK_SIZE = 4096;"
"""What comes is written in pieces; those of huggingface_hub are larger than the files here."""


def test_info_needs_no_weights(hub: Hub, run: Run):
    done = run("-m", "mlx_mtp", "info", "org/model", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["target"]["bytes_on_disk"] is None and facts["target"]["parameters"] > 0
    assert facts["drafter"]["pairing"] == "fits the target"
    assert hub.names() == DESCRIBING
    offline = run("-m", "mlx_mtp", "info", "org/model", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout) == facts and not hub.names()


def test_weights_come_without_what_is_not_used(hub: Hub, run: Run):
    done = run("-c", FIND, "org/model")
    assert done.returncode == 0, done.stderr
    assert hub.names() == DESCRIBING | SHARDS
    assert "%" in done.stderr, "no progress is shown"
    code = "import sys, mlx_mtp; print(len(mlx_mtp.load(sys.argv[1]).generate([5], max_tokens=3).tokens))"
    loaded = run("-c", code, "org/model")
    assert loaded.stdout.strip() == "3", loaded.stderr
    assert hub.names() == {"config.json", "generation_config.json", "model.safetensors"}, "the drafter's"


def test_one_copy_of_the_weights_is_enough(hub: Hub, run: Run):
    assert run("-c", FIND, "org/copies").returncode == 0
    assert hub.names() == {"config.json", "tokenizer.model", "model.safetensors"}


SMALL = (
    "import mlx_mtp; from mlx_mtp.checkpoint import sizes; sizes.memory_for_models = lambda: 10**5; "
    "mlx_mtp.load('org/model')"
)


@pytest.mark.parametrize("command, culprit", [
    (["-m", "mlx_mtp", "generate", "x", "--model", "org/llama"], "model_type 'llama' isn't supported"),
    (["-m", "mlx_mtp", "generate", "x", "--model", "org/quantised", "--quantize", "4"], "is quantised already"),
    (["-m", "mlx_mtp", "generate", "x", "--drafter", "org/llama"], "model_type 'llama' isn't a drafter"),
    (["-m", "mlx_mtp", "generate", "x", "--model", "org/model-assistant"], "is a drafter, not a target"),
    (["-m", "mlx_mtp", "convert", "org/llama", "new"], "model_type 'llama' isn't supported"),
    (["-m", "mlx_mtp", "convert", "org/quantised", "new"], "is quantised already"),
    (["-m", "mlx_mtp", "convert", "org/model", "/"], "/ exists and isn't the result"),
    (["-c", SMALL], "for its weights, and models can have 100.00 kB here"),
])  # fmt: skip
def test_what_cannot_be_used_is_not_downloaded(hub: Hub, run: Run, command: list[str], culprit: str):
    done = run(*command)
    assert done.returncode == 1 and culprit in done.stderr.splitlines()[-1], done.stderr
    assert not [name for name in hub.names() if name.endswith(".safetensors")]


@pytest.mark.parametrize("target, drafter", [
    ("google/gemma-4-E4B-it", ["google/gemma-4-E4B-it-assistant"]),
    ("mlx-community/gemma-4-12B-it-4bit", [
        "mlx-community/gemma-4-12B-it-4bit-assistant",
        "mlx-community/gemma-4-12B-it-assistant-4bit",
        "mlx-community/gemma-4-12B-it-assistant-bf16",
        "mlx-community/gemma-4-12B-it-assistant",
        "google/gemma-4-12B-it-assistant",
    ]),
    ("mlx-community/gemma-4-26b-a4b-it-qat-OptiQ-4bit", [
        "mlx-community/gemma-4-26b-a4b-it-qat-OptiQ-4bit-assistant",
        "mlx-community/gemma-4-26b-a4b-it-qat-assistant-OptiQ-4bit",
        "mlx-community/gemma-4-26b-a4b-it-qat-assistant-bf16",
        "mlx-community/gemma-4-26b-a4b-it-assistant-OptiQ-4bit",
        "mlx-community/gemma-4-26b-a4b-it-assistant-bf16",
        "mlx-community/gemma-4-26b-a4b-it-qat-assistant",
        "google/gemma-4-26B-A4B-it-assistant",
    ]),
    ("org/gemma-4-31b-it", ["org/gemma-4-31b-it-assistant", "google/gemma-4-31B-it-assistant"]),
    ("gemma-4-31b-it", ["gemma-4-31b-it-assistant", "google/gemma-4-31B-it-assistant"]),
    ("org/gemma-4-31b-italian", ["org/gemma-4-31b-italian-assistant"]),
])  # fmt: skip
def test_names_of_drafters(target: str, drafter: list[str]):
    assert drafter_names(target) == drafter


def test_a_drafter_in_another_format_is_found(hub: Hub, run: Run):
    done = run("-m", "mlx_mtp", "info", "org/model-8bit", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["drafter"]["pairing"] == "fits the target"


def test_no_drafter_is_one_line(hub: Hub, run: Run):
    done = run("-m", "mlx_mtp", "info", "org/copies-4bit")
    assert done.returncode == 0 and re.search(r"^drafter +none$", done.stdout, re.MULTILINE), done.stderr
    warnings = [line for line in done.stderr.splitlines() if "no drafter" in line]
    assert len(warnings) == 1 and "org/copies-assistant-4bit" in warnings[0]


LOAD = (
    "import logging, sys, mlx_mtp; logging.basicConfig(); lm = mlx_mtp.load(sys.argv[1]); "
    "print(lm.drafter_folder, lm.generate([5]).tokens)"
)


def test_a_drafter_that_cannot_be_used_stands_in_nobodys_way(hub: Hub, run: Run):
    for repository, source in (("plain", "model"), ("plain-assistant", "llama")):
        shutil.copytree(hub.root / "org" / source, hub.root / "org" / repository, dirs_exist_ok=True)
    done = run("-c", LOAD, "org/plain")
    assert done.returncode == 0 and done.stdout.startswith("None ["), done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if "no drafter" in line)
    assert "org/plain-assistant" in warning and "'llama' isn't a drafter" in warning
    assert hub.names() == DESCRIBING | SHARDS, "the drafter's weights aren't downloaded"


def test_an_interrupted_download_goes_on(hub: Hub, run: Run):
    other, hub.cut = sorted(SHARDS)
    broken = run("-m", "mlx_mtp", "generate", "x", "--model", "org/model")
    assert broken.returncode == 1
    assert "can't be downloaded" in broken.stderr and "Traceback" not in broken.stderr
    assert other in hub.names()
    run("-c", SMALL_CHUNKS + FIND, "org/model")
    broken_off, hub.cut = hub.cut, None
    hub.names()
    done = run("-c", FIND.replace("weights()", "weights(print)"), "org/model")
    assert done.returncode == 0, done.stderr
    assert hub.names() == {broken_off}
    report, *_, path = done.stdout.splitlines()
    assert f"done={hub.begun[broken_off]}," in report, "progress begins with what was there"
    served = hub.root / "org" / "model" / broken_off
    assert served.stat().st_size // 4 < hub.begun[broken_off], "it goes on where it was broken off"
    assert (Path(path) / broken_off).read_bytes() == served.read_bytes()


def test_a_library_without_the_parts_used_here_downloads_by_itself(hub: Hub, run: Run):
    hub.cut = min(SHARDS)
    assert run("-c", FIND, "org/model").returncode == 1
    hub.cut = None
    hub.names()
    other = "import huggingface_hub.file_download as f; real = f.http_get; f.http_get = lambda *a, **k: real(*a, **k);"
    done = run("-c", other + FIND, "org/model")
    assert done.returncode == 0, done.stderr
    assert min(SHARDS) in hub.names()
    assert {path.name for path in Path(done.stdout.strip()).iterdir()} >= SHARDS


def test_a_first_attempt_is_the_librarys_own(hub: Hub, run: Run, tmp_path: Path):
    """It has ways that plain HTTP hasn't. What it needs is there then, and nothing of ours."""
    without = "import huggingface_hub.file_download as f, mlx_mtp.checkpoint.download as d; d._fetch = None;"
    done = run("-c", without + FIND, "org/model")
    assert done.returncode == 0, done.stderr
    assert hub.names() >= SHARDS and not list(tmp_path.rglob("*mlx-mtp*"))


def test_what_came_damaged_is_not_used(hub: Hub, run: Run, tmp_path: Path):
    """As when the machine lost its power: the beginning that is there isn't the file's."""
    hub.cut, _ = sorted(SHARDS)
    for _ in range(2):  # the library's own attempt, and one that can go on
        run("-c", SMALL_CHUNKS + FIND, "org/model")
    (partial,) = (path for path in tmp_path.rglob("*.incomplete") if path.stat().st_size)
    partial.write_bytes(bytes(partial.stat().st_size))
    hub.cut = None
    damaged = run("-c", FIND, "org/model")
    assert damaged.returncode == 1 and "its checksum is wrong" in damaged.stderr
    done = run("-c", FIND, "org/model")
    assert done.returncode == 0, done.stderr
    for name in SHARDS:
        assert (Path(done.stdout.strip()) / name).read_bytes() == (hub.root / "org" / "model" / name).read_bytes()


@pytest.mark.parametrize("repository, gated, culprit", [
    ("org/nothing", False, "neither a folder nor a repository"), ("org/model", True, "terms"),
    ("org/a--b", False, "no repository can have this name"),
])  # fmt: skip
def test_errors_are_one_line(hub: Hub, run: Run, repository: str, gated: bool, culprit: str):
    hub.gated = gated
    done = run("-m", "mlx_mtp", "info", repository)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert culprit in done.stderr


def test_an_etag_that_is_no_checksum_names_no_file_of_ours(hub: Hub, run: Run, tmp_path: Path):
    """Mirrors may send anything; the library then downloads by itself."""
    hub.etag_begins = "no-"
    hub.cut = min(SHARDS)
    assert run("-c", FIND, "org/model").returncode == 1
    assert not list(tmp_path.rglob("*.mlx-mtp.incomplete"))
    hub.cut = None
    done = run("-c", FIND, "org/model")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(done.stdout.strip()).iterdir()} >= SHARDS


REPORTING = (
    "import mlx_mtp; mlx_mtp.load('org/model', progress=lambda it: print(it.stage, it.model, it.done, it.total))"
)


def test_progress_of_a_download_and_of_loading(hub: Hub, run: Run):
    done = run("-c", REPORTING)
    assert done.returncode == 0, done.stderr
    assert "%" not in done.stderr, "the library's bars are shown too"
    reports = [line.split() for line in done.stdout.splitlines()]
    stages = list(dict.fromkeys((stage, model) for stage, model, _, _ in reports))
    pair = ("org/model", "org/model-assistant")
    assert stages == [(stage, model) for stage in ("download", "load") for model in pair]
    bytes_done = [(int(n), int(total)) for *what, n, total in reports if what == ["download", "org/model"]]
    served = sum((hub.root / "org" / "model" / name).stat().st_size for name in SHARDS)
    assert bytes_done[0] == (0, served) and bytes_done[-1] == (served, served)
    assert bytes_done == sorted(bytes_done)
    again = run("-c", REPORTING)
    assert "download" not in again.stdout and "load" in again.stdout


def test_a_disk_without_room_is_an_error_before_the_download(hub: Hub, run: Run):
    full = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10, 10, 0);"
    done = run("-c", full + "import sys, mlx_mtp.cli; mlx_mtp.cli.main()", "generate", "x", "--model", "org/model")
    assert done.returncode == 1 and "make room, or set HF_HOME" in done.stderr.splitlines()[-1], done.stderr
    assert not hub.names() & SHARDS
