"""Files that are damaged or hostile: whatever is in them, only the package's own errors come out, of one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp import profile as profiles
from mlx_mtp.checkpoint.description import read_target
from mlx_mtp.checkpoint.load import load_target
from mlx_mtp.checkpoint.safetensors_files import INDEX, read_header
from mlx_mtp.errors import CheckpointError, MTPError, ProfileError
from mlx_mtp.files import replacing, sample
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.tiny_checkpoints import make_pair
from tests.support.tiny_tokenizer import write_tokenizer
from weights_convert import convert, verify_sums

Json = dict[str, Any]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair("e2b", tmp_path_factory.mktemp("sound"))[0]


@pytest.fixture(scope="module")
def lm(target: Path) -> Iterator[mlx_mtp.MTPModel]:
    with mlx_mtp.load(target, drafter=False, profile=None) as model:
        yield model


@pytest.fixture
def copy(target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(target, tmp_path / "copy"))


def load(folder: Path) -> None:
    mlx_mtp.load(folder, drafter=False, profile=None).close()


def check_error(error: pytest.ExceptionInfo[MTPError]) -> None:
    assert "\n" not in str(error.value) and str(error.value)


def parts_of(file: Path) -> tuple[Json, bytes]:
    """A safetensors file's header and data."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def with_header(file: Path, header: object, data: bytes) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + data)


@pytest.mark.parametrize("name", [
    "config.json", "generation_config.json", INDEX,
])  # fmt: skip
@pytest.mark.parametrize("content", [
    "", "[]", "5", "{", '{"a":' * 100_000, "\ud800", '{"eos_token_id": Infinity, "top_k": Infinity, "do_sample": true}',
    '{"eos_token_id": [1e400]}', '{"weight_map": {"a": 5}}', '{"weight_map": []}',
])  # fmt: skip
def test_json_that_is_none_or_says_nonsense(copy: Path, name: str, content: str):
    (copy / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    if name != INDEX and "weight_map" in content and name != "config.json":
        load(copy)  # fields that nobody knows
        return
    if name == INDEX and "eos" in content:
        content = "no weight_map"
    with pytest.raises(CheckpointError) as error:
        load(copy)
    check_error(error)


@pytest.mark.parametrize("file", [
    "", ".", "..", "../copy/model.safetensors", "/dev/zero", "/proc/self/mem", "x" * 5000, "é" * 200, "a\nb", "\0",
    "sub/model.safetensors", "..\\model.safetensors", "\ud800", 5, None, ["model.safetensors"],
])  # fmt: skip
def test_an_index_names_files_of_its_folder(copy: Path, file: Any):
    header, _ = parts_of(copy / "model.safetensors")
    names = [name for name in header if name != "__metadata__"]
    (copy / INDEX).write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "model.safetensors"), names[0]: file}}))
    with pytest.raises(CheckpointError, match="which isn't a file name in its folder|has no weight_map") as error:
        load(copy)
    check_error(error)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_an_index_names_plain_files(copy: Path, make: Callable[[Path], None]):
    header, _ = parts_of(copy / "model.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(header, "other.safetensors")}))
    make(copy / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors is missing") as error:
        load(copy)
    check_error(error)


def test_files_may_be_links_as_in_the_hub_s_cache(copy: Path, tmp_path: Path):
    (copy / "model.safetensors").rename(tmp_path / "blob")
    (copy / "model.safetensors").symlink_to(tmp_path / "blob")
    load(copy)


def first(header: Json) -> Json:
    return header[min(name for name in header if name != "__metadata__")]


def edits() -> dict[str, Callable[[Json], object]]:
    def edit(**fields: Any) -> Callable[[Json], object]:
        return lambda header: first(header).update(fields)

    return {
        "offsets are texts": edit(data_offsets=["0", "9"]),
        "offsets are true": edit(data_offsets=[False, True]),
        "offsets are one": edit(data_offsets=[0]),
        "offsets go back": edit(data_offsets=[9, 0]),
        "offsets are negative": edit(data_offsets=[-4, 0]),
        "offsets lie outside": edit(data_offsets=[0, 2**60]),
        "no offsets": lambda header: first(header).pop("data_offsets"),
        "no type": lambda header: first(header).pop("dtype"),
        "an unknown type": edit(dtype="X9"),
        "a type that is too wide": edit(dtype="U64"),
        "a type that is a number": edit(dtype=5),
        "another shape": edit(shape=[1]),
        "a shape that is too large": edit(shape=[2**62, 2**62]),
        "a shape that is negative": edit(shape=[-1, -1]),
        "a shape that is a text": edit(shape="11"),
        "a shape of halves": edit(shape=[0.5]),
        "an entry that is none": lambda header: header.update({min(header): 5}),
        "metadata that is none": lambda header: header.update(__metadata__=5),
        "metadata that is no text": lambda header: header.update(__metadata__={"a": 5}),
        "two tensors in one place": lambda header: header.update(another=dict(first(header))),
    }


@pytest.mark.parametrize("edit", edits().values(), ids=edits())
def test_headers_are_checked_against_the_file(lm: mlx_mtp.MTPModel, copy: Path, edit: Callable[[Json], object]):
    for file, read in ((copy / "model.safetensors", load), (copy / "prompt.safetensors", lm.load_prompt)):
        if file.name.startswith("prompt"):
            lm.save_prompt([5, 6, 7], file)
        header, data = parts_of(file)
        edit(header)
        with_header(file, header, data)
        with pytest.raises(CheckpointError) as error:
            read(file if read == lm.load_prompt else copy)
        check_error(error)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"5", b"\xff\xfe{}", b'{"a":' * 100_000, b'{"a":NaN}', b'{"__metadata__":{},"__metadata__":{}}',
])  # fmt: skip
def test_headers_that_are_none(tmp_path: Path, content: bytes):
    file = tmp_path / "a.safetensors"
    with_header(file, content, b"")
    with pytest.raises(CheckpointError) as error:
        read_header(file)
    check_error(error)


def test_the_length_of_a_header_has_a_bound(tmp_path: Path):
    """That of the format: not all of a large file is read because its first bytes say so."""
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(file)


def test_a_gap_between_tensors_is_no_part_of_the_format(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    mx.save_safetensors(str(file), {"a": mx.zeros((4,)), "b": mx.ones((4,))})
    header, data = parts_of(file)
    assert set(read_header(file).tensors) == {"a", "b"}
    last = max((name for name in "ab"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [at + 4 for at in header[last]["data_offsets"]]
    with_header(file, header, data + b"1234")
    with pytest.raises(CheckpointError, match="is said to have the bytes"):
        read_header(file)


def damaged(file: bytes, rng: random.Random, times: int) -> bytes:
    """A safetensors file in whose header bytes have changed, are lost, or come twice."""
    content, length = bytearray(file), 8 + int.from_bytes(file[:8], "little")
    for _ in range(times):
        at, kind = rng.randrange(length), rng.randrange(4)
        if kind == 0:
            content[at] = rng.randrange(256)
        elif kind == 1:
            content[at] = rng.choice(b'0129"[]{},:-e.')
        elif kind == 2:
            del content[at : at + rng.randrange(1, 40)]
        else:
            content[at:at] = content[at : at + rng.randrange(1, 40)]
    return bytes(content)


def refusals(file: Path, sound: bytes, rng: random.Random, read: Callable[[], object]) -> int:
    """How many of 300 damaged versions of a file are refused, each in one line."""
    refused = 0
    for _ in range(300):
        file.write_bytes(damaged(sound, rng, rng.randrange(1, 4)))
        try:
            read()
        except MTPError as error:
            refused += 1
            assert "\n" not in str(error)
    return refused


def test_random_damage_to_a_prompt_file(lm: mlx_mtp.MTPModel, tmp_path: Path):
    """Bytes that change, are lost or come twice, in the header or where the file ends."""
    file, rng = tmp_path / "prompt.safetensors", random.Random(0)
    lm.save_prompt([5, 6, 7, 8], file)
    assert lm.load_prompt(file) == 4
    sound = file.read_bytes()
    assert refusals(file, sound, rng, lambda: lm.load_prompt(file)) > 250


@pytest.mark.parametrize("tokens", ["[" * 100_000, "5", "[1.5]", "[-1]", '["a"]', "[true]", "[]"])
def test_tokens_of_a_prompt_file(lm: mlx_mtp.MTPModel, tmp_path: Path, tokens: str):
    file = tmp_path / "prompt.safetensors"
    lm.save_prompt([5, 6], file)
    header, data = parts_of(file)
    header["__metadata__"]["tokens"] = tokens
    with_header(file, header, data)
    with pytest.raises(CheckpointError, match="is damaged") as error:
        lm.load_prompt(file)
    check_error(error)


@pytest.mark.parametrize("path", ["", "a\0b", None, 5, b"a"])
def test_paths_that_are_none(lm: mlx_mtp.MTPModel, path: Any):
    for use in (lambda: lm.save_prompt([5, 6], path), lambda: lm.load_prompt(path)):
        with pytest.raises(MTPError, match="isn't a path"):
            use()


def test_places_that_cannot_be_written(lm: mlx_mtp.MTPModel, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path, tmp_path / "fifo", tmp_path / "no folder" / "a.safetensors"):
        with pytest.raises(OSError) as error:
            lm.save_prompt([5, 6], place)
        assert error.value.filename == str(place)
    assert os.listdir(tmp_path) == ["fifo"]


@pytest.mark.parametrize("fields", [{"files": ["x"]}, {}, {"files": None}, {"files": {"../config.json": "x", "a": 5}}])
def test_a_damaged_journal_is_no_reason_to_stop(target: Path, tmp_path: Path, fields: Json):
    done = convert(target, tmp_path / "new")
    fingerprint = json.loads((done / "config.json").read_text())["mlx_mtp"]["conversion"]
    aside = tmp_path / "again.partial"
    aside.mkdir()
    (aside / "conversion.json").write_text(json.dumps({"fingerprint": fingerprint, **fields}))
    again = convert(target, tmp_path / "again")
    assert (again / "SHA256SUMS").read_text() == (done / "SHA256SUMS").read_text()


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path):
    """Also if two write it at a time; permissions stay, and links stay links."""
    file, link = tmp_path / "real", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    with replacing(link) as one, replacing(link) as other:
        one.write_text("one")
        other.write_text("other")
        assert file.read_text() == "old"
    assert file.read_text() == "one" and file.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    with pytest.raises(KeyboardInterrupt), replacing(file) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "one" and sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("size", [0, 1, 100, 10**5, 10**6])
def test_a_sample_tells_files_apart(size: int, tmp_path: Path):
    """By any byte of a small file, by what was drawn elsewhere of a large one."""
    file, rng = tmp_path / "file", random.Random(size)
    content = rng.randbytes(size)
    file.write_bytes(content)
    told = sample(file)
    assert told == sample(file) and len(told) <= 64 * 4096
    for place in (0, size // 2, size - 1) if 0 < size <= 10**5 else ():
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert sample(file) != told
    file.write_bytes(rng.randbytes(size))
    assert (sample(file) != told) == (size > 0)
    with pytest.raises(OSError):
        sample(tmp_path / "missing")


def test_random_damage_to_the_header_of_a_model(target: Path, copy: Path):
    """As above; what can still be loaded is what was there before, under a header that says the same."""
    file, rng = copy / "model.safetensors", random.Random(1)
    sound = file.read_bytes()
    load_target(read_target(copy))
    assert refusals(file, sound, rng, lambda: load_target(read_target(copy))) > 250


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, "tokenizer.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_nothing_but_plain_files_is_opened(copy: Path, name: str, make: Callable[[Path], None]):
    """Whoever opens a pipe waits for ever, and a device has no end."""
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    if name in (INDEX, "tokenizer.json"):  # files that needn't be there
        mlx_mtp.load(copy, drafter=False).close()
        return
    with pytest.raises(CheckpointError, match=f"has no {name}|is missing|no safetensors files") as error:
        mlx_mtp.load(copy, drafter=False)  # with profile="auto", for which files are looked into, too
    check_error(error)


def test_the_same_of_profiles_and_checksums(target: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "SHA256SUMS")
    with pytest.raises(ProfileError, match="fifo can't be read: not a plain file"):
        mlx_mtp.load(target, drafter=False, profile=tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="not a plain file"):
        verify_sums(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "\0", "x" * 5000])
def test_checksums_are_of_files_in_the_folder(tmp_path: Path, name: str):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS is damaged") as error:
        verify_sums(tmp_path)
    check_error(error)


def test_json_that_is_nested_too_deeply_for_whoever_copies_it(target: Path, copy: Path, tmp_path: Path):
    config = (target / "config.json").read_text().rstrip()
    for depth, fine in ((90, True), (500, False)):
        (copy / "config.json").write_text(config[:-1] + ',"more":' + "[" * depth + "]" * depth + "}")
        if fine:
            convert(copy, tmp_path / "new")
            continue
        for use in (load, lambda folder: convert(folder, tmp_path / "never")):
            with pytest.raises(CheckpointError, match="nested more than 100 deep") as error:
                use(copy)
            check_error(error)


@pytest.mark.parametrize("field, value", [
    ("head_dim", 2**20 // 2), ("head_dim", 2**31 - 1), ("global_head_dim", 2**31 - 1), ("num_attention_heads", 2**20),
    ("intermediate_size", 2**31 - 1), ("hidden_size_per_layer_input", 2**20), ("rms_norm_eps", 10**400),
    ("final_logit_softcapping", 10**400), ("layer_types", []), ("layer_types", ["full_attention"] * 100_000),
])  # fmt: skip
def test_sizes_that_no_model_has(copy: Path, field: str, value: Any):
    """Refused from config.json alone: MLX counts to 2**31, and a model of 100,000 layers takes minutes to make."""
    config = json.loads((copy / "config.json").read_text())
    config["text_config"][field] = value
    if field == "layer_types":
        config["text_config"].update(num_hidden_layers=len(value), num_kv_shared_layers=len(value) // 2)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json.* expected ") as error:
        load(copy)
    check_error(error)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "top_k"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3, 10**400])
def test_defaults_that_no_request_may_have(copy: Path, field: str, value: float):
    """The model's file is named, and not the options of whoever asks."""
    if field == "top_k" and value == 10**400:
        value = -(10**400)
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True, field: value}))
    with pytest.raises(CheckpointError, match="generation_config.json can't be understood") as error:
        load(copy)
    check_error(error)


@pytest.mark.parametrize("change", [
    {"version": "a\nb"}, {"model": {}}, {"model": None},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
               "continuing_subword_prefix": "long"}},
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, change: Json):
    """The last one makes the library panic."""
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match="tokenizer.json can't be read") as error:
        Tokenizer.from_folder(tmp_path)
    check_error(error)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_special_token_whose_name_no_token_can_have(tmp_path: Path, name: str):
    write_tokenizer(tmp_path)
    sound = Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: "\ud800"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.stop_tokens == sound.stop_tokens and tokenizer.bos == (None if name == "bos_token" else sound.bos)


@pytest.mark.parametrize(
    "part, value", [("key", {"model": 5}), ("costs", {"1": {"verify": {"1": 10**400}, "draft": 0, "packing": 0}})]
)
def test_a_profile_among_others_that_says_nonsense(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: Json
):
    """One that nobody asked for is no reason to stop; one that was asked for is an error."""
    key = asdict(profiles.key_of(read_target(target), None)) | {"device": "another"}
    content: Json = {
        "schema": profiles.SCHEMA,
        "key": key,
        "costs": {"1": {"verify": {"1": 1.0}, "draft": 0.0, "packing": 0.0}},
        "acceptance": {},
        "rows": 1,
    }
    content |= {"drafts": 1, "objective": "latency", "drafter_position": None, "measured": ""}
    content[part] = content[part] | value
    (tmp_path / "another.json").write_text(json.dumps(content))
    monkeypatch.setenv("MLX_MTP_PROFILES", str(tmp_path))
    mlx_mtp.load(target, drafter=False).close()
    with pytest.raises(ProfileError, match="isn't a valid profile") as error:
        mlx_mtp.load(target, drafter=False, profile=tmp_path / "another.json")
    check_error(error)


def test_what_files_say_is_quoted_in_one_line_that_can_be_read(copy: Path):
    header, data = parts_of(copy / "model.safetensors")
    header["a\nb\x1b[2J" + "c" * 10_000] = header.pop("model.language_model.norm.weight")
    with_header(copy / "model.safetensors", header, data)
    for field in ("model_type", "text_config"):
        config = json.loads((copy / "config.json").read_text())
        with pytest.raises(CheckpointError) as error:
            load(copy)
        assert str(error.value).isprintable() and len(str(error.value)) < 2_100
        assert "a\\nb\\x1b[2Jccc" in str(error.value) or "x\\nx\\nx" in str(error.value)
        (copy / "config.json").write_text(json.dumps(config | {field: "x\n" * 10_000}))


@pytest.mark.parametrize("name", ["p.safetensors", "p", "p.npz", "p.gguf", "\N{SNOWMAN}" * 80])
def test_a_saved_prompt_may_have_any_name(lm: mlx_mtp.MTPModel, tmp_path: Path, name: str):
    lm.save_prompt([5, 6, 7], tmp_path / name)
    assert lm.load_prompt(tmp_path / name) == 3


def test_paths_that_lead_nowhere(lm: mlx_mtp.MTPModel, tmp_path: Path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in ("x" * 5000, loop):
        for read in (lm.load_prompt, load):
            with pytest.raises(CheckpointError, match="there is no") as error:
                read(path)
            check_error(error)
        with pytest.raises(OSError) as refused:
            lm.save_prompt([5, 6], path)
        assert refused.value.filename.endswith(str(path)[-200:])
    with pytest.raises(MTPError, match="isn't a path"):
        lm.save_prompt([5, 6], "\ud800")


def test_a_trace_is_refused_before_the_work_where_it_cannot_be_written(lm: mlx_mtp.MTPModel, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    begun = []
    for place in (tmp_path / "fifo", tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="not a plain file"), lm.trace(place):
            begun.append(place)
    assert not begun


@pytest.mark.parametrize("shape", [[2**31 - 1] * 200_000, [1] * 200_000])
def test_a_shape_of_endlessly_many_axes(tmp_path: Path, shape: list[int]):
    file = tmp_path / "a.safetensors"
    with_header(file, {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(CheckpointError, match="its header can't be read"):
        read_header(file)


@pytest.mark.parametrize("number", ["999999", "9" * 20, "9" * 5_000])
def test_an_expert_of_any_number(copy: Path, number: str):
    header, data = parts_of(copy / "model.safetensors")
    name = f"model.language_model.layers.0.experts.{number}.down_proj.weight"
    header[name] = header.pop("model.language_model.norm.weight")
    with_header(copy / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match="expert 0 is missing|1 tensors unknown") as error:
        load(copy)
    check_error(error)


@pytest.mark.parametrize("section", [None, 5, "x", [], {"cluster_order": 5}])
def test_our_own_section_of_a_config_that_says_nonsense(copy: Path, tmp_path: Path, section: Any):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"mlx_mtp": section}))
    load(copy)
    load(convert(copy, tmp_path / "new"))


@pytest.mark.parametrize("name", ["loop", "loop/new", "x" * 400, "nowhere"])
def test_a_model_cannot_be_converted_to_odd_places(target: Path, tmp_path: Path, name: str):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="exists and isn't the result|can't be read or written") as error:
        convert(target, tmp_path / name)
    check_error(error)
    assert sorted(os.listdir(tmp_path)) == ["loop", "nowhere"]
