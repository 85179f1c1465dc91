"""Weights that mlx-lm learns from text: they load here and in mlx-lm, and are better than rounded ones (learned.py)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS

import mlx_mtp
from mlx_mtp.errors import CheckpointError, MemoryBudgetError
from tests.support.command_line import run
from tests.support.tiny_checkpoints import make_pair
from tests.support.tiny_tokenizer import write_tokenizer
from weights_convert import Format, Learning, Scheme, convert, prepare, verify_sums

LETTERS = "abcdefghijklmnopqrstuvwxyz€"


def make(kind: str, folder: Path) -> tuple[Path, Path, Path]:
    """A pair with a tokenizer, and a text. The pair's weights are random, and so is the text."""
    target, drafter = make_pair(kind, folder)
    write_tokenizer(target)
    rng = random.Random(0)
    text = folder / "text.txt"
    text.write_text("".join(rng.choices(LETTERS, k=700)))
    return target, drafter, text


def stored(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


def error(folder: Path, source: Path, tokens: list[int]) -> float:
    """What a conversion changes in the logits, as a share of them."""
    ours, original = (mlx_mtp.load(it, drafter=False, dtype="float32").logits(tokens) for it in (folder, source))
    return float(mx.linalg.norm(ours - original) / mx.linalg.norm(original))


@pytest.mark.parametrize("kind", ["e2b", "26b"])
def test_gptq_changes_the_logits_less(kind: str, tmp_path: Path):
    """With per-layer inputs and shared KV, and with experts; what has other bits is rounded as ever."""
    source, _, text = make(kind, tmp_path)
    scheme = Scheme(Format(4), (("embed_tokens*", 8), ("layers.1.mlp.down_proj", 6)))
    plain = convert(source, tmp_path / "plain", scheme)
    folder = prepare(source, tmp_path / "new", scheme, learning=Learning("gptq", text)).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "new",
        "plain",
        "target",
        "target-assistant",
        "text.txt",
    ]
    learning = Learning("gptq", text)
    tokens = [int(token) for token in learning.sequences(source).reshape(-1)[:300]]
    assert error(folder, source, tokens) < 0.97 * error(plain, source, tokens)
    before, after = stored(plain), stored(folder)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    same = {name for name in before if mx.array_equal(before[name], after[name])}
    learnt = {name.rpartition(".")[0] for name in before.keys() - same}
    assert not any("embed" in name or "norm" in name or "router" in name for name in learnt)
    assert {name.rpartition(".")[2] for name in learnt} >= {"q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"}
    assert not any("layers.1.mlp.down_proj" in name for name in learnt)
    model, _ = mlx_lm.utils.load_model(folder)
    ours = mlx_mtp.load(folder, drafter=False, dtype="float32").logits(tokens[:40])
    assert mx.abs(model(mx.array([tokens[:40]]))[0] - ours).max() <= 1e-3
    assert verify_sums(folder) and prepare(source, tmp_path / "new", scheme, learning=learning).done


def test_dwq_trains_scales_and_norms(tmp_path: Path):
    source, _, text = make("e2b", tmp_path)
    scheme = Scheme(Format(3, 32), (("layers.0.*", 8),))
    plain = convert(source, tmp_path / "plain", scheme)
    folder = prepare(source, tmp_path / "new", scheme, learning=Learning("dwq", text)).run()
    before, after = stored(plain), stored(folder)
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.endswith(("scales", "biases", "norm.weight", "layer_scalar")) for name in changed)
    assert not any("layers.0." in name and name.endswith("scales") for name in changed)
    assert all(mx.abs(before[name] - after[name]).max() < 1e-3 for name in changed), "it is a matter of small steps"
    tokens = list(range(20, 60))
    model, _ = mlx_lm.utils.load_model(folder)
    ours = mlx_mtp.load(folder, drafter=False, dtype="float32").logits(tokens)
    assert mx.abs(model(mx.array([tokens]))[0] - ours).max() <= 1e-3


def test_the_command_learns_a_target_and_rounds_its_drafter(tmp_path: Path):
    source, drafter, text = make("e2b", tmp_path)
    options = ["--bits", "4", "--method", "gptq", "--calibration", text, "--check"]
    done = run("convert", source, tmp_path / "new", *options)
    assert done.returncode == 0, done.stderr
    folder, assistant, *checks = done.stdout.splitlines()
    assert "files as they were written; KL divergence" in checks[0] and "drafts accepted a round" in checks[1]
    plain = convert(drafter, tmp_path / "drafter", Scheme(Format(4)))
    assert all(mx.array_equal(stored(Path(assistant))[name], tensor) for name, tensor in stored(plain).items())
    again = run("convert", source, folder, *options[:-1])
    assert again.returncode == 0 and "is there already" in again.stderr
    text.write_text(text.read_text() + "more")
    other = run("convert", source, folder, *options)
    assert other.returncode == 1 and "exists and isn't the result of this conversion" in other.stderr


@pytest.mark.parametrize("options, code, culprit", [
    (["--bits", "4", "--method", "awq"], 2, "--method: mlx-lm's AWQ doesn't support Gemma 4"),
    (["--bits", "4", "--method", "magic"], 2, "--method: there is no method 'magic': use gptq or dwq"),
    (["--method", "gptq"], 2, "--method: gptq quantises: give the number of bits"),
    (["--mode", "mxfp4", "--method", "dwq"], 2, "--method: dwq supports affine quantisation only, not mxfp4"),
    (["--bits", "3", "--method", "gptq"], 2, "--method: gptq quantises to 2, 4 or 8 bits, not to 3"),
    (["--bits", "8", "--method", "dwq"], 2, "--method: dwq learns nothing at 8 bits"),
    (["--bits", "4", "--method", "dwq"], 2, "--calibration: dwq learns from text"),
    (["--bits", "4", "--calibration", "text.txt"], 2, "--calibration: only --method learns"),
    (["--bits", "4", "--method", "gptq", "--calibration", "missing.txt"], 1, "missing.txt can't be read: No such file"),
    (["--bits", "4", "--method", "gptq", "--calibration", "binary.txt"], 1, "binary.txt isn't UTF-8 text"),
    (["--bits", "4", "--method", "gptq", "--calibration", "short.txt"], 1, "short.txt has 4 tokens of text"),
    (["--bits", "4", "--group-size", "128", "--method", "gptq", "--calibration", "text.txt"], 1, "use smaller groups"),
])  # fmt: skip
def test_wrong_options(options: list[str], code: int, culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, _, _ = make("31b", tmp_path)
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    done = run("convert", source, "new", "--no-draft", *options)
    assert done.returncode == code and culprit in done.stderr.splitlines()[-1], done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("new")], "nothing is left behind"


def test_wrong_sources(tmp_path: Path):
    source, drafter, text = make("12b", tmp_path)
    options = ["--bits", "4", "--method", "gptq", "--calibration", text]
    quantised = convert(source, tmp_path / "quantised", Scheme(Format(4)))
    for folder, code, culprit in (
        (quantised, 1, "is quantised already: convert the original"),
        (drafter, 2, "is a drafter, which can only be rounded"),
    ):  # fmt: skip
        done = run("convert", folder, tmp_path / "new", "--no-draft", *options)
        assert done.returncode == code and culprit in done.stderr, done.stderr
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json: gptq needs one"):
        prepare(source, tmp_path / "new", Scheme(), learning=Learning("gptq", text)).run()


def test_a_model_too_large_to_learn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, _, text = make("12b", tmp_path)
    conversion = prepare(source, tmp_path / "new", Scheme(), learning=Learning("gptq", text))
    monkeypatch.setattr(mlx_mtp.checkpoint.sizes, "memory_for_models", lambda: 10**6)
    with pytest.raises(MemoryBudgetError, match="needs the unquantised model in memory, .* convert without --method"):
        conversion.run()
    assert not list(tmp_path.glob("new*"))


def test_awq_has_no_gemma_4():
    """If this fails, mlx-lm has learnt it: `--method awq` can do more than say that it can't."""
    assert not [name for name in AWQ_MODEL_CONFIGS if name.startswith("gemma4")]


def test_mlx_lm_is_imported_only_when_used():
    code = "import sys, weights_convert; print(sorted({'mlx_lm', 'transformers', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_config_says_what_the_plain_one_says(tmp_path: Path):
    """But for the fingerprint, which other options have another of."""
    source, _, text = make("12b", tmp_path)
    plain = prepare(source, tmp_path / "a", Scheme()).plan.config
    learnt = prepare(source, tmp_path / "b", Scheme(), learning=Learning("dwq", text)).plan.config
    assert plain["mlx_mtp"] != learnt["mlx_mtp"]
    assert json.dumps(plain | {"mlx_mtp": 0}) == json.dumps(learnt | {"mlx_mtp": 0})
