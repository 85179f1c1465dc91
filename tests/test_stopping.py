"""What ends an answer, whatever files of a fine-tune say and leave out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.errors import PromptError
from tests.support.tiny_checkpoints import make_pair
from tests.support.tiny_tokenizer import write_tokenizer

QUESTION = "What is the capital of France?"
GREEDY: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
ANSWER = "The capital of France is Paris."

Edit = Callable[..., Path]


@pytest.fixture(scope="module")
def lm() -> Iterator[mlx_mtp.MTPModel]:
    with mlx_mtp.load() as model:
        yield model


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """Makes a copy of the embedded target with other fields in some of its files; no fields for no such file."""

    def edit(**files: dict[str, Any] | None) -> Path:
        folder = tmp_path / "target"
        shutil.copytree(DEMO / "target", folder)
        for name, fields in files.items():
            path = folder / f"{name}.json"
            if fields is None:
                path.unlink()
            else:
                path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return edit


def answer(folder: Path, **options: Any) -> mlx_mtp.Generation:
    with mlx_mtp.load(folder, drafter=False) as model:
        return model.generate(QUESTION, **{**GREEDY, **options})


@pytest.mark.parametrize("eos", [1, [1], None, []])
def test_the_end_of_a_turn_ends_an_answer_whatever_the_files_say(edited: Edit, eos: object):
    result = answer(edited(config={"eos_token_id": eos}, generation_config={"eos_token_id": eos}))
    assert (result.text, result.finish_reason) == (ANSWER, "stop")


def test_a_null_in_generation_config_hides_nothing(edited: Edit, lm: mlx_mtp.MTPModel):
    third = lm.generate(QUESTION, **GREEDY).tokens[2]
    result = answer(edited(config={"eos_token_id": third}, generation_config={"eos_token_id": None}))
    assert len(result.tokens) == 3 and result.finish_reason == "stop"


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_tokenizer_s_eos_token_counts(edited: Edit, wrapped: bool):
    token: Any = {"content": "<|channel>"} if wrapped else "<|channel>"
    folder = edited(generation_config=None, tokenizer_config={"eos_token": token})
    result = answer(folder, thinking=True)
    assert len(result.tokens) == 1 and result.finish_reason == "stop", "it begins with a thought"


def test_a_tool_s_turn_ends_an_answer_without_any_generation_config(tmp_path: Path):
    """Whatever id the vocabulary has <|tool_response> at."""
    folder, _ = make_pair("e2b", tmp_path)
    (folder / "generation_config.json").unlink()
    with mlx_mtp.load(folder, drafter=False) as model:
        tokens = model.generate([5, 6, 7], **GREEDY).tokens
    sixth = next(token for i, token in enumerate(tokens) if i >= 5 and token not in tokens[:i])
    write_tokenizer(folder, (*(f"<unused{i}>" for i in range(sixth)), "<|tool_response>", "<unk>"))
    with mlx_mtp.load(folder, drafter=False) as model:
        ended = model.generate([5, 6, 7], **GREEDY)
        assert ended.tokens == tokens[: tokens.index(sixth) + 1] and ended.finish_reason == "stop"
        assert model.generate([5, 6, 7], **GREEDY, ignore_eos=True).tokens == tokens


def test_a_stop_string_that_names_a_special_token(lm: mlx_mtp.MTPModel):
    whole = lm.generate(QUESTION, **GREEDY, ignore_eos=True)
    assert len(whole.tokens) == 40
    result = lm.generate(QUESTION, **GREEDY, ignore_eos=True, stop=["never said", "<turn|>"])
    assert (result.text, result.finish_reason) == (ANSWER, "stop")
    assert result.tokens == whole.tokens[: len(result.tokens)]
    both = lm.generate(QUESTION, **GREEDY, ignore_eos=True, stop=["<turn|>", "France"])
    assert both.text == "The capital of "


def test_stop_token_ids(lm: mlx_mtp.MTPModel):
    tokens = lm.generate(QUESTION, **GREEDY).tokens
    result = lm.generate(QUESTION, **GREEDY, stop_token_ids=[tokens[3], 7])
    assert result.tokens == tokens[:4] and result.finish_reason == "stop"
    assert lm.generate(QUESTION, **GREEDY, stop_token_ids=[tokens[3]], ignore_eos=True).tokens == tokens[:4]
    assert "".join(chunk.text for chunk in lm.stream(QUESTION, **GREEDY, stop_token_ids=tokens[3:4])) == result.text
    prompts = [{"prompt": QUESTION, "stop_token_ids": tokens[1:2]}, QUESTION]
    assert [r.tokens for r in lm.generate_batch(prompts, **GREEDY)] == [tokens[:2], tokens]


@pytest.mark.parametrize("wrong", [5, "5", [-1], [2**20], [True], [1.0], [None]])
def test_stop_token_ids_that_are_none(lm: mlx_mtp.MTPModel, wrong: Any):
    with pytest.raises(PromptError, match="stop_token_ids must be a list of token ids below 2048"):
        lm.generate(QUESTION, stop_token_ids=wrong)


def test_a_stop_string_that_no_text_can_have_stops_nothing():
    with mlx_mtp.load() as lm:
        free = lm.generate("Who are you?", 8, temperature=0)
        assert lm.generate("Who are you?", 8, temperature=0, stop="\ud800").tokens == free.tokens


@pytest.mark.parametrize("stop", [["a"] * 1_001, ["a" * 50_001] * 2, "a" * 100_001])
def test_so_many_stop_strings_that_each_token_would_be_slow(lm: mlx_mtp.MTPModel, stop: str | list[str]):
    with pytest.raises(PromptError, match="stop has more than 1000 strings, or 100,000 characters"):
        lm.generate(QUESTION, stop=stop)
    assert lm.generate(QUESTION, stop=[f"q{i}" for i in range(1_000)], **GREEDY).text == ANSWER
