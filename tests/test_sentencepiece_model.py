"""Folders with sentencepiece's tokenizer.model: the same ids and texts as sentencepiece's own."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from mlx_mtp.errors import CheckpointError
from mlx_mtp.text.stream_decoder import StreamDecoder
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import SPECIAL

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on",
    "aaa aaaa aaaaa banana bananas ananas, papa's papaya",
    "def f(x):\n    return x + 1\n", "1 22 333 4444 12345", "naïve café, déjà vu", "日本語のテキスト 日本語",
] * 5  # fmt: skip
CONTROL = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>")
DEFINED = ("\n", "\n\n", "▁▁", "▁▁▁▁", "<div>", "<mask>")


def train(folder: Path, **options: Any) -> SentencePieceProcessor:
    """Writes a small model that is built as Gemma's is."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model,
        **{
            "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity",
            "add_dummy_prefix": False, "remove_extra_whitespaces": False, "pad_id": 0, "eos_id": 1, "bos_id": 2,
            "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "split_digits": True,
            "user_defined_symbols": [*CONTROL, *DEFINED], "character_coverage": 0.98, "minloglevel": 5,
            "hard_vocab_limit": False, "allow_whitespace_only_pieces": True,
        } | options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sentencepiece")


@pytest.fixture(scope="module")
def original(folder: Path) -> SentencePieceProcessor:
    return train(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, original: SentencePieceProcessor) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def random_text(rng: random.Random) -> str:
    """Words, parts and joins of them, symbols of the model's, and characters that it hasn't."""
    words = " ".join(CORPUS).split(" ")
    parts = (
        lambda: rng.choice(words), lambda: " " * rng.randrange(6), lambda: rng.choice(DEFINED).replace("▁", " "),
        lambda: rng.choice(words)[rng.randrange(3) :], lambda: "".join(rng.choices("anp \n<>|0x1div▁", k=6)),
        lambda: chr(rng.choice((rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)))), lambda: "<0x41>",
    )  # fmt: skip
    return "".join(rng.choice(parts)() for _ in range(rng.randrange(12)))


def test_ids_and_texts_are_sentencepieces_own(tokenizer: Tokenizer, original: SentencePieceProcessor):
    rng = random.Random(0)
    used: set[int] = set()
    for _ in range(2000):
        text = random_text(rng)
        tokens = tokenizer.encode(text)
        assert tokens == original.encode(text), repr(text)
        assert tokenizer.decode(tokens) == original.decode(tokens) == text.replace("▁", " ")
        used.update(tokens)
    normal = set(range(len(original))) - {i for i in range(len(original)) if original.is_byte(i)}
    assert len(used & normal) > 100, "and that with most of the pieces"


def test_a_stream_of_any_ids_is_what_sentencepiece_decodes(tokenizer: Tokenizer, original: SentencePieceProcessor):
    rng = random.Random(1)
    plain = [i for i in range(len(original)) if i not in tokenizer.special and not original.is_byte(i)]
    for _ in range(300):
        tokens = [rng.choice(plain) for _ in range(20)]
        decoder = StreamDecoder(tokenizer)
        assert "".join(decoder.push([t])[0] for t in tokens) + decoder.finish() == original.decode(tokens)


def test_control_tokens_are_special(tokenizer: Tokenizer, original: SentencePieceProcessor):
    names = {"<pad>", "<eos>", "<bos>", "<unk>", *CONTROL}
    assert {original.id_to_piece(i) for i in tokenizer.special} == names == set(tokenizer.special.values())
    assert tokenizer.bos == original.bos_id()
    assert tokenizer.stop_tokens == {original.eos_id(), original.piece_to_id("<turn|>")}
    assert tokenizer.encode("<bos>a<turn|>") == [2, *original.encode("a"), original.piece_to_id("<turn|>")]


def test_chats_and_thoughts_work_as_with_other_tokenizers(tokenizer: Tokenizer):
    tokens = tokenizer.chat([{"role": "user", "content": "the fox <turn|>"}])
    assert tokens.count(tokenizer.token_id("<turn|>")) == 1, "what a user spells out is text"
    answer = tokenizer.encode("<|channel>thought\nwell €\n<channel|>the dog")
    assert StreamDecoder(tokenizer).push(answer) == ("the dog", "well €\n")


def test_the_config_may_add_tokens(folder: Path, tmp_path: Path, original: SentencePieceProcessor):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    size = len(original)
    added: dict[str, Any] = {
        str(size + 1): {"content": "<image>", "special": True},
        str(size): {"content": "<plain>", "special": False},
        str(original.piece_to_id("<mask>")): {"content": "<mask>", "special": True},
    }
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<plain><image>") == [*original.encode("a"), size, size + 1]
    assert {"<image>", "<mask>"} <= set(tokenizer.special.values())
    assert tokenizer.decode([size, size + 1]) == "<plain>"
    for wrong, culprit in (
        ({"7": {"content": "<other>"}}, "'<other>' the id"), ({"x": {"content": "a"}}, "'x'"), ({"9": 5}, "'9'"),
        ({"9": {"content": "\ud800"}}, "'9'"), ({"9" * 5000: {"content": "a"}}, "added token '999"),
    ):  # fmt: skip
        config.write_text(json.dumps({"added_tokens_decoder": wrong}))
        with pytest.raises(CheckpointError, match=culprit):
            Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_json_comes_first(folder: Path, tmp_path: Path):
    from tests.support.tiny_tokenizer import write_tokenizer

    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    write_tokenizer(tmp_path)
    assert Tokenizer.from_folder(tmp_path).token_id(SPECIAL[-1]) is not None


@pytest.mark.parametrize("options, culprit", [
    ({"model_type": "unigram", "vocab_size": 330}, "a BPE model"), ({"byte_fallback": False}, "byte fallback"),
    ({"add_dummy_prefix": True}, "space before"), ({"remove_extra_whitespaces": True}, "removes spaces"),
    ({"normalization_rule_name": "nfkc"}, "normalizes characters"),
])  # fmt: skip
def test_others_than_gemmas_are_refused(tmp_path: Path, options: dict[str, Any], culprit: str):
    train(tmp_path, **options)
    with pytest.raises(CheckpointError, match=f"isn't built as Gemma's, it .*{culprit}.*transformers"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x7f"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_a_piece_that_is_no_text_is_damage(folder: Path, original: SentencePieceProcessor, tmp_path: Path):
    content = (folder / "tokenizer.model").read_bytes()
    broken = content.replace("\n\x05▁".encode(), b"\n\x05\xff\x96\x81", 1)  # a piece of five bytes
    assert broken != content
    (tmp_path / "tokenizer.model").write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"is damaged: its piece \d+ isn't text"):
        Tokenizer.from_folder(tmp_path)


def test_sentencepiece_is_imported_only_when_used():
    code = "import sys, mlx_mtp.text.tokenizer, mlx_mtp.text.sentencepiece_model; print('sentencepiece' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
