"""Texts that certainly have more tokens than there is room for are refused before they are encoded."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

import mlx_mtp
from mlx_mtp.errors import PromptError
from mlx_mtp.text.longest_token import longest_token
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import write_tokenizer


@pytest.fixture
def library(tmp_path: Path) -> tokenizers.Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path).library


@pytest.mark.parametrize("options", [{}, {"chat_template": False}])
def test_a_text_that_is_certainly_too_long_is_not_encoded(monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]):
    with mlx_mtp.load(drafter=False) as lm:
        assert lm.tokenizer
        room, longest = lm.config.text.max_positions, longest_token(lm.tokenizer.library)
        assert longest
        with pytest.raises(PromptError, match=f"has [0-9]+ tokens, the model's context only {room}"):
            lm.generate("hello " * room, 1, **options)

        def never(*_: object) -> list[int]:
            raise AssertionError("it is encoded")

        monkeypatch.setattr(Tokenizer, "_ids", never)
        with pytest.raises(PromptError, match=f"at least {room + 1} tokens, the model's context only {room}"):
            lm.generate("a" * (room * longest + 1), 1, chat_template=False)
        with pytest.raises(PromptError, match=f"at least [0-9]+ tokens, the model's context only {room}"):
            lm.generate("a" * (room * longest + 1), 1, **options)


def test_no_text_has_fewer_tokens(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer, rng = Tokenizer.from_folder(tmp_path), Random(1)
    pieces = [*tokenizer.library.get_vocab(), "é", "\U0001f600", " ", "  ", "\n"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.choice([1, 3, 30])))
        assert len(tokenizer.encode(text)) >= tokenizer.fewest_tokens(text) > 0


def test_tokenizers_whose_tokens_may_stand_for_any_number_of_characters(library: tokenizers.Tokenizer):
    assert longest_token(library)
    library.normalizer = normalizers.Strip()
    assert longest_token(library) is None
    library.normalizer = normalizers.Replace("aa", "b")
    assert longest_token(library) is None
    library.normalizer, library.pre_tokenizer = normalizers.Replace(" ", "_"), pre_tokenizers.Whitespace()
    assert longest_token(library) is None
    library.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    assert longest_token(library) is None
    library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    assert longest_token(library)
    library.enable_truncation(5)
    assert longest_token(library) is None
    library.no_truncation()
    library.add_tokens([AddedToken("x", lstrip=True)])
    assert longest_token(library) is None
    assert longest_token(tokenizers.Tokenizer(models.BPE({"a": 0}, [], unk_token="a", fuse_unk=True))) is None
