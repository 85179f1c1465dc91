"""Texts and logits beside a naive decoder without any cache: a small version of scripts/prove_model.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_mtp.decode.noise import row_seed as own_row_seed
from tests.support import reference
from tests.support.oracle import Oracle
from tests.support.oracle_calls import loaded, run_model
from tests.support.oracle_choice import row_seed
from tests.support.oracle_judge import Call, Given, Judge, wrong_logits
from tests.support.oracle_pairs import write_pair
from tests.support.tiny_checkpoints import make_pair

EVERY_FLAG = (380, 390)
"""Seeds of two random pairs that together have all flags of the architecture, see `test_two_pairs_have_every_flag`."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    return {seed: write_pair(tmp_path_factory.mktemp("pairs") / str(seed), seed) for seed in EVERY_FLAG}


def test_two_pairs_have_every_flag(pairs: dict[int, tuple[Path, Path]]):
    configs = [[json.loads((folder / "config.json").read_text()) for folder in pair] for pair in pairs.values()]
    texts = [target["text_config"] for target, _ in configs]
    for flag in ("attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input",
                 "enable_moe_block", "final_logit_softcapping", "per_layer_config"):  # fmt: skip
        assert any(text.get(flag) for text in texts), flag
    assert not all(text["tie_word_embeddings"] for text in texts)
    assert any(drafter["use_ordered_embeddings"] for _, drafter in configs)
    assert any((target / "tokenizer.json").exists() for target, _ in pairs.values())


@pytest.mark.parametrize("kind", ["e4b", "26b"])
def test_the_oracle_is_what_transformers_computes(kind: str, tmp_path: Path):
    target, _ = make_pair(kind, tmp_path)
    tokens = np.random.default_rng(1).integers(3, 500, 40).tolist()
    oracle = Oracle(target)
    own = oracle.cap * np.tanh(oracle.see(tokens).logits / oracle.cap)
    np.testing.assert_allclose(reference.logits(reference.load(target), tokens), own, atol=1e-4)


def test_one_pass_of_the_oracle_says_what_a_pass_for_each_token_says(pairs: dict[int, tuple[Path, Path]]):
    """So that a text can be checked at once: later tokens change nothing of what is seen of earlier ones."""
    oracle = Oracle(pairs[EVERY_FLAG[0]][0])
    tokens = [token % oracle.vocab for token in range(5, 200, 7)]
    whole = oracle.see(tokens).logits
    for count in range(1, len(tokens) + 1):
        np.testing.assert_allclose(oracle.see(tokens[:count]).logits[-1], whole[count - 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", EVERY_FLAG)
def test_texts_are_the_oracle_s(pairs: dict[int, tuple[Path, Path]], seed: int):
    verdicts, accepted = [], 0
    for given, verdict in run_model(pairs[seed], seed, waves=1, rows=14):
        assert not verdict.differences, (verdict.differences, given.call)
        accepted += given.accepted
        verdicts.append(verdict)
    tokens = sum(verdict.tokens for verdict in verdicts)
    assert len(verdicts) >= 14 and tokens > 100 and accepted > 0, (tokens, accepted)
    assert sum(verdict.near + verdict.unjudged for verdict in verdicts) <= tokens // 50


@pytest.mark.parametrize("seed", EVERY_FLAG)
def test_logits_are_the_oracle_s(pairs: dict[int, tuple[Path, Path]], seed: int):
    judge = Judge(pairs[seed][0])
    with loaded(pairs[seed], chunk=24) as lm:
        assert wrong_logits(lm, judge, [token % judge.oracle.vocab for token in range(3, 130)]) == ""


def test_a_wrong_text_is_noticed(pairs: dict[int, tuple[Path, Path]]):
    """Whatever is wrong: a token, the end, the seed, an option, the logits' own formula."""
    seed = EVERY_FLAG[0]
    judge = Judge(pairs[seed][0])
    call = Call([5, 6, 7], {"seed": 3, "max_tokens": 12, "temperature": 1.0, "ignore_eos": True, "logprobs": 1})
    with loaded(pairs[seed]) as lm:
        found = lm.generate(call.prompt, **call.options)
    right = Given(call, found.tokens, None, True, found.logprobs, 0)
    assert judge.judge(right).differences == [] and judge.judge(right).tokens == 12

    def wrong(tokens: list[int] = found.tokens, **options: object) -> list[str]:
        other = Call(call.prompt, call.options | options)
        return judge.judge(Given(other, tokens, None, True, found.logprobs, 0)).differences

    other = (found.tokens[4] + 1) % judge.oracle.vocab
    assert "token 4 is" in wrong([*found.tokens[:4], other, *found.tokens[5:]])[0]
    assert "for no reason" in wrong(found.tokens[:-1])[0]
    assert "but it ends after 11" in wrong(max_tokens=11)[0]
    assert wrong(seed=4) and wrong(temperature=0.1) and wrong(presence_penalty=9.0)
    judge.oracle.config["sliding_window"] += 1
    judge.oracle.config["rope_parameters"]["full_attention"]["rope_theta"] *= 2
    assert judge.judge(right).differences


def test_seeds_of_rows_are_the_oracle_s():
    for seed in (0, 1, -1, 2**31, -(2**64), 7**40):
        assert [own_row_seed(seed, row) for row in range(4)] == [row_seed(seed, row) for row in range(4)]
