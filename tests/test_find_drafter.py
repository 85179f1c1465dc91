"""Which drafter goes with a target that none was named for: found by name or by what fits, or merged into its files."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp import profile
from mlx_mtp.checkpoint import download, sizes
from mlx_mtp.checkpoint.description import read_drafter, read_target
from mlx_mtp.errors import MTPError
from tests.support.command_line import run
from tests.support.tiny_checkpoints import VOCAB, make_pair

SIZE = "gemma-4-E2B-it"
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A target, its drafter, and a drafter of another size; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    return *make_pair("e2b", folder / "e2b"), make_pair("31b", folder / "31b")[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache. Nothing is downloaded for a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "description", lambda name: pytest.fail(f"{name} was asked for"))
    return tmp_path / "cache"


def put(source: Path, place: Path) -> Path:
    shutil.copytree(source, place, dirs_exist_ok=True)
    return place


def in_cache(source: Path, cache: Path, repository: str) -> Path:
    """A copy as huggingface_hub keeps them."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0a1b2c")
    return put(source, folder / "snapshots" / "0a1b2c")


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder: Path) -> dict[str, mx.array]:
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict)
    mx.eval(stored)
    return stored


def found(target: Path) -> Path | None:
    """Where the drafter of a target is that is loaded without naming one."""
    return mlx_mtp.load(target).drafter_folder


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


# By name


@pytest.mark.parametrize("beside", ["the link", "where it leads"])
def test_a_drafter_beside_a_link_or_beside_where_it_leads(beside: str, made: tuple[Path, ...], tmp_path: Path):
    places = {"the link": tmp_path / "links" / SIZE, "where it leads": tmp_path / "elsewhere" / "blob"}
    put(made[0], places["where it leads"])
    (tmp_path / "links").mkdir()
    places["the link"].symlink_to(places["where it leads"])
    drafter = places[beside].with_name(places[beside].name + "-assistant")
    put(made[1], tmp_path / "drafters" / "blob")
    drafter.symlink_to(tmp_path / "drafters" / "blob")
    assert found(places["the link"]) == drafter


def test_the_current_folder_has_a_name_too(made: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(put(made[0], tmp_path / SIZE))
    drafter = put(made[1], tmp_path / f"{SIZE}-assistant")
    assert found(Path(".")) == drafter


def test_names_in_upper_and_lower_case_are_the_same(made: tuple[Path, ...], tmp_path: Path):
    target = put(made[0], tmp_path / "models" / "gemma-4-e2b-it-4bit")
    drafter = put(made[1], tmp_path / "models" / "GEMMA-4-E2B-IT-assistant-BF16")
    put(made[1], tmp_path / "models" / "a-drafter-of-no-such-name")
    assert found(target) == drafter


def test_what_is_written_exactly_alike_comes_first(made: tuple[Path, ...], tmp_path: Path):
    """Where case makes no difference there is but one folder."""
    target = put(made[0], tmp_path / "model")
    put(made[1], tmp_path / "MODEL-assistant")
    drafter = put(made[1], tmp_path / "model-assistant")
    where = found(target)
    assert where and os.path.samefile(where, drafter)


@pytest.mark.parametrize("repository", [f"google/{SIZE}", "org/gemma-4-e2b-it-4bit", "org/gemma-4-e2b-it-MLX-4bit"])
@pytest.mark.parametrize("where", ["the cache", "another cache"])
def test_a_snapshot_of_the_hubs_cache_has_its_drafter_there(
    where: str, repository: str, made: tuple[Path, ...], cache: Path, tmp_path: Path
):
    place = cache if where == "the cache" else tmp_path / "volume" / "hub"
    target = in_cache(made[0], place, repository)
    drafter = in_cache(made[1], place, f"google/{SIZE}-assistant")
    assert found(target) == drafter


@pytest.mark.parametrize(
    "publisher, name", [("mlx-community", "gemma-4-E2B-it-assistant-bf16"), ("google", f"{SIZE}-assistant")]
)
@pytest.mark.parametrize("where", ["the same folder", "the cache"])
def test_a_folder_of_lm_studio_has_its_publishers_drafter_or_googles(
    where: str, publisher: str, name: str, made: tuple[Path, ...], cache: Path, tmp_path: Path
):
    models = tmp_path / ".lmstudio" / "models"
    target = put(made[0], models / "mlx-community" / "gemma-4-e2b-it-4bit")
    if where == "the cache":
        drafter = in_cache(made[1], cache, f"{publisher}/{name}")
    else:
        drafter = put(made[1], models / publisher / name)
    assert found(target) == drafter


# By what fits


def test_any_drafter_beside_a_target_that_fits_is_found(made: tuple[Path, ...], tmp_path: Path):
    target = put(made[0], tmp_path / "my-tune")
    put(made[0], tmp_path / "another-target")
    put(made[2], tmp_path / "big-drafter")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{")
    drafter = put(made[1], tmp_path / "small-drafter")
    assert found(target) == drafter


def test_of_several_that_fit_the_most_like_named_is_taken_and_named(
    made: tuple[Path, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    target = put(made[0], tmp_path / "gemma-4-E2B-it-mine")
    for name in ("a-drafter", "Gemma-4-E2B-draft", "z-drafter"):
        put(made[1], tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert found(target) == tmp_path / "Gemma-4-E2B-draft"
    (line,) = (record.getMessage() for record in caplog.records if "drafters next to" in record.getMessage())
    assert line.startswith("3 drafters") and line.endswith("taking Gemma-4-E2B-draft")


def test_a_name_counts_more_than_a_place_in_the_order(made: tuple[Path, ...], tmp_path: Path):
    target = put(made[0], tmp_path / "model")
    put(made[1], tmp_path / "model-a")
    assert found(target) == tmp_path / "model-a"
    drafter = put(made[1], tmp_path / "model-assistant")
    assert found(target) == drafter


# Drafters that can't be used


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda it: (it / "config.json").write_text("{"), "can't be read as JSON"),
    "no config": (lambda it: (it / "config.json").unlink(), "has no config.json"),
    "an unknown model": (lambda it: edit(it, lambda c: c.update(model_type="llama")), "isn't a drafter"),
    "another size": (lambda it: edit(it, lambda c: c.update(backbone_hidden_size=99)), "hidden size 99"),
    "more tokens": (lambda it: edit(it, lambda c: c["text_config"].update(vocab_size=2 * VOCAB)), "vocabulary 1024"),
    "no weights": (lambda it: (it / "model.safetensors").unlink(), "no safetensors"),
    "cut weights": (lambda it: os.truncate(it / "model.safetensors", 5000), "truncated"),
    "other weights": (lambda it: edit(it, lambda c: c.update(num_centroids=8)), "of the wrong shape"),
    "other quantisation": (
        lambda it: edit(it, lambda c: c.update(quantization_config={"quant_method": "gptq"})), "quantised by gptq"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_drafter_that_was_only_found_never_stands_in_the_way(
    damage: str, made: tuple[Path, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    target, drafter = put(made[0], tmp_path / "target"), put(made[1], tmp_path / "target-assistant")
    break_it, reason = DAMAGE[damage]
    break_it(drafter)
    with mlx_mtp.load(target) as lm:
        assert lm.drafter_config is None and len(lm.generate(PROMPT, max_tokens=3, ignore_eos=True).tokens) == 3
    (warning,) = warnings(caplog)
    assert "no drafter" in warning and str(drafter) in warning and reason in warning and "\n" not in warning
    with pytest.raises(MTPError) as asked:
        mlx_mtp.load(target, drafter=drafter)
    assert reason in str(asked.value) and "--no-draft (drafter=False)" in str(asked.value)


def test_a_drafter_without_room_never_stands_in_the_way(
    made: tuple[Path, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sizes, "drafter_sizes", lambda *_: sizes.Sizes(1, 10**18, 1))
    assert found(made[0]) is None
    assert "for its weights" in "".join(warnings(caplog))


def test_a_worse_one_that_can_be_used_is_better_than_none(made: tuple[Path, ...], tmp_path: Path):
    target = put(made[0], tmp_path / SIZE)
    put(made[2], tmp_path / f"{SIZE}-assistant")
    drafter = put(made[1], tmp_path / "spare")
    assert found(target) == drafter


def test_one_line_says_what_was_looked_for(made: tuple[Path, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert found(put(made[0], tmp_path / "models" / f"{SIZE}-8bit")) is None
    (warning,) = warnings(caplog)
    for name in (f"{SIZE}-8bit-assistant", f"{SIZE}-assistant-8bit", f"{SIZE}-assistant"):
        assert name in warning
    assert "no drafter found" in warning and "--drafter" in warning and "\n" not in warning


def test_options_that_are_wrong_are_not_said_of_the_drafter(made: tuple[Path, ...], caplog: pytest.LogCaptureFixture):
    for options in ({"dtype": "float8"}, {"quantize": 7}):
        with pytest.raises(MTPError, match="float8|7 bits"):
            mlx_mtp.load(made[0], **options)  # type: ignore[arg-type]
    assert not warnings(caplog)


# Drafters that are merged into their target's files


def merge(target: Path, drafter: Path, place: Path, prefix: str = "language_model.mtp.", config: bool = True) -> Path:
    """A target that holds its drafter in a second file, with an index, as oMLX writes them."""
    put(target, place)
    added = {prefix + name: tensor for name, tensor in tensors(drafter).items()}
    mx.save_safetensors(str(place / "model-mtp.safetensors"), added)
    weight_map = dict.fromkeys(tensors(target), "model.safetensors") | dict.fromkeys(added, "model-mtp.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config:
        own = json.loads((drafter / "config.json").read_text())
        edit(place, lambda c: c["text_config"].update(mtp_assistant_config=own, mtp_num_hidden_layers=4))
    return place


@pytest.fixture(scope="module")
def merged(made: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged target, alone in its folder; not to be changed."""
    return merge(*made[:2], tmp_path_factory.mktemp("merged") / SIZE)


def test_a_merged_drafter_is_the_one_that_is_used(
    merged: Path, made: tuple[Path, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    proposed = mlx_mtp.load(*made[:2]).propose(PROMPT, 5)
    with caplog.at_level(logging.INFO):
        lm = mlx_mtp.load(merged)
    assert lm.drafter_folder == lm.folder == merged and lm.propose(PROMPT, 5) == proposed
    assert not caplog.records, "nothing is lost, nothing is amiss"
    assert mlx_mtp.load(merged, quantize=4).drafter_config == lm.drafter_config
    beside = put(merged, tmp_path / "model")
    put(made[1], tmp_path / "model-assistant")
    assert found(beside) == beside


def test_a_merged_drafter_can_be_left_out_or_replaced_or_lent(merged: Path, made: tuple[Path, ...]):
    assert mlx_mtp.load(merged, drafter=False).drafter_config is None
    assert mlx_mtp.load(merged, drafter=made[1]).drafter_folder == made[1]
    lent = mlx_mtp.load(made[0], drafter=merged)
    assert lent.propose(PROMPT, 5) == mlx_mtp.load(merged).propose(PROMPT, 5)


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp.", "language_model.mtp.", "model.language_model.mtp."])
def test_a_merged_drafter_without_its_config_is_left_out_and_said_so(
    prefix: str, made: tuple[Path, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    target = merge(*made[:2], tmp_path / "model", prefix, config=False)
    with caplog.at_level(logging.INFO):
        assert mlx_mtp.load(target, drafter=False).drafter_config is None
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"left out: {len(tensors(made[1]))} tensors belong to a drafter" in line


@pytest.mark.parametrize("damage", ["no tensors", "no object", "another size"])
def test_a_merged_drafter_that_cannot_be_used_is_done_without(
    damage: str, merged: Path, made: tuple[Path, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    target = put(merged, tmp_path / "model")
    if damage == "no tensors":
        (target / "model-mtp.safetensors").unlink()
        (target / "model.safetensors.index.json").unlink()
    else:
        wrong = 3 if damage == "no object" else json.loads((made[2] / "config.json").read_text())
        edit(target, lambda c: c["text_config"].update(mtp_assistant_config=wrong))
    assert found(target) is None
    (warning,) = warnings(caplog)
    assert "no drafter" in warning and str(target) in warning
    drafter = put(made[1], tmp_path / "model-assistant")
    assert found(target) == drafter


def test_a_profile_of_a_merged_pair_is_not_that_of_the_target_alone(merged: Path, made: tuple[Path, ...]):
    drafters = read_drafter(merged), None, read_drafter(made[1])
    keys = [profile.key_of(read_target(merged), drafter) for drafter in drafters]
    assert len({key.files for key in keys}) == 3


def test_info_shows_a_merged_drafter(merged: Path, made: tuple[Path, ...]):
    done = run("info", merged, "--json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    facts = json.loads(done.stdout)["drafter"]
    assert facts["merged"] and facts["pairing"] == "fits the target"
    assert facts["bytes_on_disk"] == sum(tensor.nbytes for tensor in tensors(made[1]).values())


def test_a_repository_with_a_merged_drafter_is_enough(merged: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    folder = in_cache(merged, cache, f"org/{SIZE}")
    monkeypatch.setattr(download, "description", {f"org/{SIZE}": folder}.__getitem__)
    monkeypatch.setattr(download, "weights", lambda *_: None)
    lm = mlx_mtp.load(f"org/{SIZE}")
    assert lm.folder == lm.drafter_folder == folder and lm.drafter_config


def test_convert_makes_two_folders_of_a_merged_checkpoint(merged: Path, made: tuple[Path, ...], tmp_path: Path):
    done = run("convert", merged, tmp_path / "new")
    new, drafter = tmp_path / "new", tmp_path / "new-assistant"
    assert done.returncode == 0 and done.stdout == f"{new}\n{drafter}\n", done.stderr
    assert "mtp_assistant" not in (new / "config.json").read_text()
    lm = mlx_mtp.load(new)
    assert lm.drafter_folder == drafter and lm.propose(PROMPT, 5) == mlx_mtp.load(*made[:2]).propose(PROMPT, 5)


# All commands follow the same rule


def test_commands_do_without_a_drafter_that_cannot_be_used(made: tuple[Path, ...], tmp_path: Path):
    target = put(made[0], tmp_path / "target")
    drafter = put(made[1], tmp_path / "target-assistant")
    os.truncate(drafter / "model.safetensors", 5000)
    shown = run("info", target, "--json")
    assert shown.returncode == 0 and json.loads(shown.stdout)["drafter"] is None
    simulated = run("tune", target, "--simulate", "M4", "--json")
    assert simulated.returncode == 0, simulated.stderr
    converted = run("convert", target, tmp_path / "new")
    assert converted.returncode == 0 and converted.stdout == f"{tmp_path / 'new'}\n", converted.stderr
    for done in (shown, simulated, converted):
        assert done.stderr.count("\n") == 1 and "no drafter" in done.stderr


def test_convert_leaves_out_a_quantised_drafter_that_it_only_found(made: tuple[Path, ...], tmp_path: Path):
    target = put(made[0], tmp_path / "target")
    assert run("convert", made[1], tmp_path / "target-assistant", "--bits", 4).returncode == 0
    done = run("convert", target, tmp_path / "new")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'new'}\n", done.stderr
    assert "quantised already" in done.stderr and done.stderr.count("\n") == 1
    asked = run("convert", target, tmp_path / "other", "--drafter", tmp_path / "target-assistant")
    assert asked.returncode == 1 and "quantised already" in asked.stderr and "--no-draft" in asked.stderr
