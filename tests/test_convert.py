"""Conversions load here and in mlx-lm, and compute what their sources compute (weights_convert)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest

import mlx_mtp
import weights_convert.plan
from mlx_mtp.errors import CheckpointError, MemoryBudgetError, MTPError
from tests.support.command_line import run
from tests.support.tiny_checkpoints import ARCHITECTURES, KINDS, VOCAB, make_pair
from weights_convert import Format, Scheme, compare, convert, prepare, verify_sums

TOKENS = list(range(7, 47))
LARGEST_ERROR = {
    None: 0.0,
    Format(4): 0.93,
    Format(8, 32): 0.15,
    Format(4, 32, "mxfp4"): 0.95,
    Format(8, 32, "mxfp8"): 0.5,
    Format(4, 16, "nvfp4"): 0.87,
}
"""By format, the norm of what it may change in the logits as a share of theirs. Logits that are all zero have 1, those
of another model 1.4; random weights forgive less than trained ones."""


def scheme(bits: int, *overrides: tuple[str, int | None]) -> Scheme:
    return Scheme(Format(bits), overrides)


def theirs(folder: Path) -> mx.array:
    """What mlx-lm computes for a conversion, loaded as its users do."""
    model, _ = mlx_lm.utils.load_model(folder)
    return model(mx.array([TOKENS]))[0]


def logits(folder: Path, **options: Any) -> mx.array:
    return mlx_mtp.load(folder, drafter=False, **options).logits(TOKENS)


def stored(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= mx.load(str(path))
    return tensors


def in_bfloat16(folder: Path) -> None:
    """Makes a float32 checkpoint one like the published ones."""
    path = folder / "model.safetensors"
    tensors = {name: t.astype(mx.bfloat16) if t.dtype == mx.float32 else t for name, t in stored(folder).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)


@pytest.mark.parametrize("how", LARGEST_ERROR, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_loads_here_and_in_mlx_lm(kind: str, how: Format | None, tmp_path: Path):
    source, _ = make_pair(kind, tmp_path)
    folder = convert(source, tmp_path / "new", Scheme(how) if how else None)
    ours = logits(folder, dtype="float32")
    difference = mx.abs(ours - theirs(folder))
    if how is None or how.mode == "affine":
        assert difference.max() <= 1e-3
    else:
        # Embeddings in these modes come out of MLX in bfloat16, in which mlx-lm then goes on; that can
        # send tokens to other experts.
        assert difference.mean() <= 0.3
    original = logits(source)
    error = mx.linalg.norm(ours - original) / mx.linalg.norm(original)
    assert error <= LARGEST_ERROR[how]
    if how:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert size < sum(path.stat().st_size for path in source.glob("*.safetensors")) * (how.bits + 3) / 32


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_other_bits(bits: int, tmp_path: Path):
    source, _ = make_pair("12b", tmp_path)
    folder = convert(source, tmp_path / "new", scheme(bits))
    assert mx.abs(logits(folder, dtype="float32") - theirs(folder)).max() <= 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("how", [Format(4), Format(8, 32), Format(4, 32, "mxfp4")], ids=str)
def test_a_drafter(kind: str, how: Format, tmp_path: Path):
    """Clustered heads are stored in cluster order, which changes nothing; quantised, it is as if while loading."""
    target, drafter = make_pair(kind, tmp_path)
    same = convert(drafter, tmp_path / "same")
    small = convert(drafter, tmp_path / "small", Scheme(how))
    again = convert(same, tmp_path / "again", Scheme(how))
    proposals = [mlx_mtp.load(target, drafter=folder).propose(TOKENS, 6) for folder in (drafter, same, small, again)]
    assert proposals[0] == proposals[1]
    assert proposals[2] == proposals[3] and proposals[2][0] == proposals[0][0]
    if how == Format(4):
        lm = mlx_mtp.load(convert(target, tmp_path / "target4", scheme(4)), drafter=small)
        assert proposals[2][1:] != [] and lm.propose(TOKENS, 6) == mlx_mtp.load(target, drafter, quantize=4).propose(
            TOKENS, 6
        )
    ordered = json.loads((same / "config.json").read_text())["mlx_mtp"].get("cluster_order", False)
    assert ordered == (kind == "e2b")
    if ordered:
        before, after = stored(drafter), stored(same)
        ordering, name = before["masked_embedding.token_ordering"], "model.embed_tokens.weight"
        assert mx.array_equal(after[name], before[name][ordering]) and not mx.array_equal(after[name], before[name])


@pytest.mark.parametrize("kind", ["26b", "e2b"])
def test_quantised_on_disk_or_while_loading_is_the_same(kind: str, tmp_path: Path):
    source, _ = make_pair(kind, tmp_path)
    in_bfloat16(source)
    folder = convert(source, tmp_path / "new", scheme(4))
    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == 4
    assert mx.array_equal(logits(folder, dtype="float32"), logits(source, dtype="float32", quantize=4))


def test_a_drafter_that_is_quantised_already_stays_as_it_is(tmp_path: Path):
    """Beside a target that is quantised while loading; a target can't be quantised twice."""
    target, drafter = make_pair("e2b", tmp_path)
    small = convert(drafter, tmp_path / "small", scheme(8))
    proposed = mlx_mtp.load(target, small, quantize=4).propose(TOKENS, 6)
    folder = convert(target, tmp_path / "target4", scheme(4))
    assert proposed == mlx_mtp.load(folder, small).propose(TOKENS, 6)
    done = run("info", target, "--drafter", small, "--quantize", 4, "--json")
    facts = json.loads(done.stdout)
    assert facts["target"]["stored_as"] == "float32, quantised to 4 bits in groups of 64 while loading"
    assert facts["drafter"]["stored_as"] == "8 bits, affine"
    assert [choice["quantize"] for choice in facts["machine"]["choices"]] == [None, 8, 6, 4]
    assert facts["machine"]["needed"] == facts["target"]["bytes_in_memory"] + facts["drafter"]["bytes_in_memory"]
    with pytest.raises(CheckpointError, match="target4 is quantised already"):
        mlx_mtp.load(folder, small, quantize=4)


def test_router_and_overrides(tmp_path: Path):
    """The router has 8 bits unless it is named; the last pattern that matches counts; mlx-lm reads all of it."""
    source, _ = make_pair("26b", tmp_path)
    overrides = (("*.mlp.down_proj", 8), ("layers.[01].mlp.down_proj", 6), ("*.o_proj", None), ("embed_tokens*", 8))
    folder = convert(source, tmp_path / "new", scheme(4, *overrides))
    tensors, layer = stored(folder), "language_model.model.layers"

    def bits(module: str, width: int) -> float:
        return tensors[f"{module}.weight"].shape[-1] * 32 / width

    assert bits(f"{layer}.2.router.proj", 128) == 8
    assert [bits(f"{layer}.{i}.mlp.down_proj", 128) for i in range(3)] == [6, 6, 8]
    assert bits(f"{layer}.0.experts.switch_glu.down_proj", 64) == 4
    assert bits("language_model.model.embed_tokens", 128) == 8
    assert f"{layer}.0.self_attn.o_proj.scales" not in tensors
    described = json.loads(run("info", folder, "--no-draft", "--json").stdout)["target"]
    assert described["bytes_in_memory"] == sum(tensor.nbytes for tensor in tensors.values()), "config.json says it all"
    assert mx.abs(logits(folder, dtype="float32") - theirs(folder)).max() <= 1e-3
    folder = convert(source, tmp_path / "no router", scheme(4, ("*.router.proj", None)))
    assert f"{layer}.0.router.proj.scales" not in stored(folder)


def test_the_type_of_what_is_not_quantised(tmp_path: Path):
    source, _ = make_pair("e2b", tmp_path)
    folder = convert(source, tmp_path / "new", scheme(4), dtype="bfloat16")
    assert {t.dtype for t in stored(folder).values()} == {mx.bfloat16, mx.uint32}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    in_bfloat16(source)
    expected, found = stored(convert(source, tmp_path / "expected", scheme(4))), stored(folder)
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_several_files(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same tensors, however many files they come from or go to, and however few rows are read at a time."""
    source, _ = make_pair("26b", tmp_path, shards=shards)
    one = convert(source, tmp_path / "one", scheme(8))
    monkeypatch.setattr(weights_convert.plan, "FILE_BYTES", 200_000)
    monkeypatch.setattr(weights_convert.plan, "CHUNK_BYTES", 9_000)
    steps: list[tuple[str, int, int]] = []
    folder = prepare(source, tmp_path / "new", scheme(8)).run(lambda *step: steps.append(step))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    expected, found = stored(one), stored(folder)
    assert set(index["weight_map"]) == set(found) == set(expected)
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    assert all(name in mx.load(str(folder / file)) for name, file in index["weight_map"].items())
    total = sum(tensor.nbytes for tensor in found.values())
    assert index["metadata"]["total_size"] == total == steps[-1][1] == steps[-1][2]
    assert [written for _, written, _ in steps] == sorted(written for _, written, _ in steps)


def test_memory_holds_some_rows_whatever_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Scales and biases included, which are half of what groups of 32 with 2 bits take in float32."""
    source, _ = make_pair("e2b", tmp_path)
    monkeypatch.setattr(weights_convert.plan, "CHUNK_BYTES", 3_000)
    before, most = mx.get_active_memory(), [0]
    prepare(source, tmp_path / "new", Scheme(Format(2, 32))).run(
        lambda name, written, total: most.append(mx.get_active_memory() - before)
    )
    assert max(most) < 2 * 3_000


def test_a_plain_text_model_with_a_head_of_its_own(tmp_path: Path):
    source, _ = make_pair("31b", tmp_path, text_only=True)
    tensors = stored(source)
    mx.eval(tensors)
    tensors["lm_head.weight"] = mx.random.normal((VOCAB, 64), key=mx.random.key(1)) / 8
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    folder = convert(source, tmp_path / "new", scheme(4))
    assert {"lm_head.scales", "model.layers.0.mlp.down_proj.scales"} <= stored(folder).keys()
    model, _ = mlx_lm.utils.load_model(folder, strict=True)
    assert mx.abs(logits(folder, dtype="float32") - model(mx.array([TOKENS]))[0]).max() <= 1e-3


def test_experts_one_by_one(tmp_path: Path):
    """Stored as a tensor each, spread over files, they load and convert as the stacked ones do."""
    stacked, _ = make_pair("26b", tmp_path / "stacked")
    split, _ = make_pair("26b", tmp_path / "split")
    files: list[dict[str, mx.array]] = [{}, {}]
    for i, (name, tensor) in enumerate(stored(stacked).items()):
        bank, _, kind = name.rpartition(".")
        if not bank.endswith(".experts"):
            files[i % 2][name] = tensor
            continue
        for expert in range(len(tensor)):
            parts = {"down_proj": tensor[expert]}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), mx.split(tensor[expert], 2), strict=True))
            for part, weight in parts.items():
                files[expert % 2][f"{bank}.{expert}.{part}.weight"] = mx.contiguous(weight)
    (split / "model.safetensors").unlink()
    for i, tensors in enumerate(files):
        mx.save_safetensors(str(split / f"model-{i}.safetensors"), tensors)
    assert mx.array_equal(logits(split), logits(stacked))
    expected, found = (stored(convert(it, it / "../new", scheme(4))) for it in (stacked, split))
    assert found.keys() == expected.keys() and all(mx.array_equal(found[name], expected[name]) for name in found)


def test_checksums(tmp_path: Path):
    """`sha256sum` understands them, and every file has one."""
    source, _ = make_pair("e2b", tmp_path)
    folder = convert(source, tmp_path / "new", scheme(4))
    assert verify_sums(folder) == len(list(folder.iterdir())) - 1
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "model.safetensors: OK" in done.stdout
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        verify_sums(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        verify_sums(folder)
    with pytest.raises(CheckpointError, match="no SHA256SUMS"):
        verify_sums(source)


def test_what_cannot_be_converted(tmp_path: Path):
    source, _ = make_pair("e2b", tmp_path)
    converted = convert(source, tmp_path / "new", scheme(4))
    unusual, _ = make_pair("e2b", tmp_path / "unusual")
    tensors = stored(unusual)
    mx.save_safetensors(str(unusual / "model.safetensors"), {n: t.astype(mx.complex64) for n, t in tensors.items()})
    (tmp_path / "file").touch()
    for wrong, culprit in (
        (lambda: convert(converted, tmp_path / "again", scheme(4)), "quantised already"),
        (lambda: convert(source, tmp_path / "new"), "isn't the result of this conversion"),
        (lambda: convert(source, tmp_path / "new", scheme(8)), "isn't the result of this conversion"),
        (lambda: convert(source, tmp_path / "file"), "isn't the result of this conversion"),
        (lambda: convert(source, source), "isn't the result of this conversion"),
        (lambda: convert(source, source / "inside"), "lies in the folder"),
        (lambda: convert(source, tmp_path / "file" / "x"), f"{tmp_path / 'file' / 'x'} can't be read or written"),
        (lambda: convert(source, "/proc/nowhere/x"), "can't be read or written"),
        (lambda: convert(tmp_path / "nothing", tmp_path / "x"), "no folder"),
        (lambda: convert(source, tmp_path / "x", dtype="int3"), "int3"),
        (lambda: convert(unusual, tmp_path / "x"), "of type C64"),
        (lambda: scheme(7), "7 bits"),
        (lambda: scheme(4, ("*", 7)), "7 bits"),
        (lambda: Format(4, 48), "48"),
        (lambda: Format(4, 32, "q4_k"), "q4_k"),
        (lambda: Format(8, 32, "mxfp4"), "mxfp4"),
    ):
        with pytest.raises(MTPError, match=culprit) as caught:
            wrong()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("**/*.partial"))


@pytest.mark.parametrize("damage", ["shorter", "a tensor is missing", "shape"])
def test_a_damaged_source(damage: str, tmp_path: Path):
    source, _ = make_pair("e2b", tmp_path)
    path = source / "model.safetensors"
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        tensors, name = stored(source), "model.language_model.layers.3.self_attn.q_proj.weight"
        mx.eval(tensors)
        tensors[name] = tensors[name][:-1]
        if damage == "a tensor is missing":
            del tensors[name]
        mx.save_safetensors(str(path), tensors)
    with pytest.raises(CheckpointError, match=r"damaged|layers\.3\.self_attn\.q_proj") as caught:
        convert(source, tmp_path / "new")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("new*"))


def test_the_command(tmp_path: Path):
    source, _ = make_pair("e4b", tmp_path)
    for i, program in enumerate((["mlx_mtp", "convert"], ["weights_convert"])):
        done = subprocess.run(
            [sys.executable, "-m", *program, str(source), str(tmp_path / f"new{i}"), "--bits", "6"],
            capture_output=True,
            text=True,
        )
        made = f"{tmp_path / f'new{i}'}\n{tmp_path / f'new{i}'}-assistant\n"
        assert done.returncode == 0 and done.stdout == made and done.stderr == "", done.stderr
    lm = mlx_mtp.load(tmp_path / "new0")  # finds its drafter
    assert lm.logits(TOKENS).shape == (len(TOKENS), VOCAB) and len(lm.propose(TOKENS, 2)) == 3
    assert json.loads((tmp_path / "new0-assistant" / "config.json").read_text())["quantization"]["bits"] == 4


def test_the_command_checks(tmp_path: Path):
    """On the embedded pair; what exists is checked and not made again, and damage to it is found."""
    pair = Path(mlx_mtp.__file__).parent / "demo"
    command = ["convert", pair / "target", tmp_path / "new", "--bits", "8", "--embeddings-bits", "6"]
    command += ["--drafter", pair / "drafter", "--check"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    target, drafter = done.stdout.splitlines()[2:]
    assert "6 files as they were written; KL divergence 0.0" in target and "top-1 agreement 9" in target
    assert "3 files as they were written" in drafter and "of 4 drafts accepted a round" in drafter
    weights = tmp_path / "new" / "model.safetensors"
    times = weights.stat().st_mtime_ns
    again = run(*command)
    assert again.stdout == done.stdout and weights.stat().st_mtime_ns == times
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 255
    weights.write_bytes(content)
    broken = run(*command)
    assert broken.returncode == 1 and broken.stderr.splitlines()[-1].startswith("error: ")
    assert "checksum is wrong" in broken.stderr and "Traceback" not in broken.stderr
    assert f"delete the folder {tmp_path / 'new'} and convert again" in broken.stderr
    shutil.rmtree(tmp_path / "new")
    assert run(*command[:-1]).stdout.splitlines() == done.stdout.splitlines()[:2]


def test_models_are_compared_on_texts_that_begin_as_texts_do(tmp_path: Path):
    pair = Path(mlx_mtp.__file__).parent / "demo"
    folder = convert(pair / "target", tmp_path / "new", scheme(6))
    found = compare(pair / "target", folder, ("A fox ran away.", "2 + 2 = 4"))
    lm = mlx_mtp.load(pair / "target")
    assert lm.tokenizer is not None
    texts = [lm.tokenizer.encode(f"<bos>{text}") for text in ("A fox ran away.", "2 + 2 = 4")]
    assert found.tokens == sum(map(len, texts))
    with mlx_mtp.load(folder, drafter=False) as other:
        same = sum(int((lm.logits(t).argmax(-1) == other.logits(t).argmax(-1)).sum()) for t in texts)
    assert found.top1 == same / found.tokens


def test_an_original_too_large_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, _ = make_pair("e2b", tmp_path)
    folder = convert(source, tmp_path / "new", scheme(4))
    monkeypatch.setattr("mlx_mtp.checkpoint.sizes.memory_for_models", lambda: 10**6)
    with pytest.raises(MemoryBudgetError, match="target doesn't fit in memory here, so nothing can be compared"):
        compare(source, folder)


@pytest.mark.parametrize(
    "options, code, culprit",
    [
        (["--mode", "q4_k"], 2, "--mode: unknown quantisation mode 'q4_k'"),
        (["--bits", "7"], 2, "--bits: can't quantise to 7 bits"),
        (["--bits", "4", "--group-size", "33"], 2, "--group-size: can't"),
        (["--mode", "mxfp4", "--group-size", "64"], 2, "--group-size: mxfp4 has"),
        (["--bits", "4", "--embeddings-bits", "7"], 2, "--embeddings-bits: can't"),
        (["--drafter-bits", "4"], 2, "--drafter-bits: --no-draft"),
        (["--dtype", "int3"], 2, "--dtype: expected float32"),
        (["--group-size", "32"], 2, "need --bits"),
        (["--bits", "4", "--override", "router"], 2, "PATTERN=BITS"),
        (["--bits", "4", "--override", "*=9"], 2, "--override: can't quantise * to 9 bits"),
        (["--bits", "4", "--override", "*.router=8"], 2, "--override: no matrix has a name like '*.router'; there are"),
        (["--bits", "8", "--mode", "mxfp4"], 2, "--bits: mxfp4 has 4 bits"),
        (["--check"], 1, "no tokenizer.json"),
    ],
)
def test_wrong_options(options: list[str], code: int, culprit: str, tmp_path: Path):
    source, _ = make_pair("31b", tmp_path)
    done = run("convert", source, tmp_path / "new", "--no-draft", *options)
    assert done.returncode == code and culprit in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_target_without_a_drafter(tmp_path: Path):
    source, drafter = make_pair("31b", tmp_path / "pair")
    drafter.rename(tmp_path / "other")
    done = run("convert", source, tmp_path / "new", "--bits", "4", "--drafter-bits", "8")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'new'}\n"
    assert "no drafter found" in done.stderr and done.stderr.count("\n") == 1
    assert run("convert", source, tmp_path / "alone", "--no-draft").stderr == ""
    drafter_bits = run("convert", tmp_path / "other", tmp_path / "small", "--drafter-bits", "4")
    assert drafter_bits.returncode == 2 and "is a drafter itself" in drafter_bits.stderr


def test_wrong_bits_for_the_drafter(tmp_path: Path):
    source, _ = make_pair("31b", tmp_path)
    done = run("convert", source, tmp_path / "new", "--drafter-bits", "7")
    assert done.returncode == 2 and "--drafter-bits: can't quantise to 7 bits" in done.stderr
