"""Texts and logits beside a naive decoder without any cache: a small version of scripts/prove_model.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decode.noise import row_seed as own_row_seed
from tests.support import reference
from tests.support.oracle import Oracle
from tests.support.oracle_calls import judge_of, loaded, run_model
from tests.support.oracle_choice import Wish, chosen, possible, row_seed
from tests.support.oracle_files import dequantised
from tests.support.oracle_judge import Call, Given, Judge, wrong_logits
from tests.support.oracle_pairs import Pair, random_pair
from tests.support.oracle_storage import FORMATS
from tests.support.tiny_checkpoints import make_pair

EVERY_FLAG = (776, 470)
"""Seeds of two random pairs that together have all flags of the architecture, see `test_two_pairs_have_every_flag`."""

SHORT = 473
"""Seed of a pair that computes in 16 bits."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    return {seed: random_pair(folder / str(seed), seed) for seed in (*EVERY_FLAG, SHORT)}


def test_two_pairs_have_every_flag(pairs: dict[int, Pair]):
    known = [pairs[seed] for seed in EVERY_FLAG]
    configs = [[json.loads((it / "config.json").read_text()) for it in (pair.target, pair.drafter)] for pair in known]
    texts = [target["text_config"] for target, _ in configs]
    for flag in ("attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input",
                 "enable_moe_block", "final_logit_softcapping", "per_layer_config"):  # fmt: skip
        assert any(text.get(flag) for text in texts), flag
    assert not all(text["tie_word_embeddings"] for text in texts)
    assert any(drafter["use_ordered_embeddings"] for _, drafter in configs)
    assert any((pair.target / "tokenizer.json").exists() for pair in known)
    assert any("quantization" in target for target, _ in configs)
    assert any(pair.adapter for pair in known)
    assert pairs[SHORT].dtype != "float32"


def test_quantised_weights_are_what_mlx_makes_of_them():
    weights = mx.array(np.random.default_rng(3).standard_normal((2, 3, 64)), mx.float32)
    for bits, group, mode in set(FORMATS):
        parts = mx.quantize(weights, group_size=group, bits=bits, mode=mode)
        expected = np.array(mx.dequantize(*parts, group_size=group, bits=bits, mode=mode).astype(mx.float32))
        packed, scales, *biases = (np.array(part) for part in parts)
        entry = {"bits": bits, "group_size": group, "mode": mode}
        found = dequantised(packed, scales, biases[0] if biases else None, entry)
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=str(entry))


@pytest.mark.parametrize("kind", ["e4b", "26b"])
def test_the_oracle_is_what_transformers_computes(kind: str, tmp_path: Path):
    target, _ = make_pair(kind, tmp_path)
    tokens = np.random.default_rng(1).integers(3, 500, 40).tolist()
    oracle = Oracle(target)
    own = oracle.cap * np.tanh(oracle.see(tokens).logits / oracle.cap)
    np.testing.assert_allclose(reference.logits(reference.load(target), tokens), own, atol=1e-4)


def test_one_pass_of_the_oracle_says_what_a_pass_for_each_token_says(pairs: dict[int, Pair]):
    """So that a text can be checked at once: later tokens change nothing of what is seen of earlier ones."""
    oracle = Oracle(pairs[EVERY_FLAG[0]].target)
    tokens = [token % oracle.vocab for token in range(5, 200, 12)]
    whole = oracle.see(tokens).logits
    for count in range(1, len(tokens) + 1):
        np.testing.assert_allclose(oracle.see(tokens[:count]).logits[-1], whole[count - 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", [*EVERY_FLAG, SHORT])
def test_texts_are_the_oracle_s(pairs: dict[int, Pair], seed: int):
    verdicts, accepted = [], 0
    short = seed == SHORT  # where a CPU is slow
    for given, verdict in run_model(pairs[seed], seed, waves=1, rows=3 if short else 6, crowd=0 if short else 4):
        assert not verdict.differences, (verdict.differences, given.call)
        accepted += given.accepted
        verdicts.append(verdict)
    tokens = sum(verdict.tokens for verdict in verdicts)
    assert len(verdicts) >= 3 and tokens > 20 and (accepted or short), (tokens, accepted)
    assert sum(verdict.near + verdict.unjudged for verdict in verdicts) <= tokens // (4 if short else 50)


@pytest.mark.parametrize("seed", [*EVERY_FLAG, SHORT])
def test_logits_are_the_oracle_s(pairs: dict[int, Pair], seed: int):
    judge = Judge(pairs[seed])
    with loaded(pairs[seed], chunk=24) as lm:
        length = min(130, judge.oracle.config["max_position_embeddings"])
        assert wrong_logits(lm, judge, [token % judge.oracle.vocab for token in range(3, length)]) == ""


def test_a_wrong_text_is_noticed(pairs: dict[int, Pair]):
    """Whatever is wrong: a token, the end, the seed, an option, the logits' own formula."""
    seed = EVERY_FLAG[0]
    judge = Judge(pairs[seed])
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
    assert wrong(seed=4) and wrong(temperature=0.1) and wrong(presence_penalty=-9.0)
    judge.oracle.config["hidden_size"] += 1  # by whose root embeddings are multiplied
    assert judge.judge(right).differences


def test_an_adapter_that_is_forgotten_is_noticed(pairs: dict[int, Pair]):
    pair = next(it for it in pairs.values() if it.adapter and it.dtype == "float32")
    with loaded(pair, adapter=None) as lm:
        assert wrong_logits(lm, Judge(pair), [5, 6, 7, 3, 4])


def test_a_text_that_breaks_its_format_is_noticed(pairs: dict[int, Pair]):
    pair = next(it for it in pairs.values() if (it.target / "tokenizer.json").exists())
    own, other = ({"type": "regex", "pattern": pattern} for pattern in ("[a-c]{2,9}", "[a-c]{2,9}x"))
    with loaded(pair) as lm:
        judge = judge_of(pair, lm)
        options = {"seed": 3, "max_tokens": 12, "temperature": 1.0, "response_format": own}
        found = lm.generate([1, 2], **options)
    given = Given(Call([1, 2], options), found.tokens, found.text, True, None, 0)
    assert judge.judge(given).differences == []
    assert judge.judge(replace(given, call=Call([1, 2], options | {"response_format": other}))).differences
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "required": ["a"]}}}
    constraints = judge.constraints
    assert not constraints.wrong(schema, '{"a": 1}', True) and constraints.wrong(schema, '{"b": 1}', True)
    assert constraints.wrong(own, "abd", False) and not constraints.wrong(own, "a", False)


@pytest.mark.parametrize("rounding, sure", [(0.002, 0.9), (0.02, 0.8), (0.2, 0.4)])
def test_whatever_rounding_makes_of_the_logits_what_is_chosen_was_possible(rounding: float, sure: float):
    """Filters change what may be chosen by jumps: each must be foreseen, by a rule that doesn't allow everything."""
    rng, changed, certain = np.random.default_rng(0), 0, 0
    for seed in range(1000):
        logits = rng.normal(size=33) * rng.uniform(0.5, 3)
        wish = Wish(
            temperature=float(rng.choice([0, 0.5, 1, 1.6])), seed=seed, top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1, 0.9, 0.5])), min_p=float(rng.choice([0, 0, 0.1])),
            repetition=float(rng.choice([1, 1.5])),
        )  # fmt: skip
        first = chosen(None, logits, [3, 4], [5], wish)
        foreseen = possible(None, logits, [3, 4], [5], wish, rounding)
        assert first in foreseen
        certain += len(foreseen) == 1
        for _ in range(10):
            token = chosen(None, logits + rng.uniform(-rounding, rounding, size=33), [3, 4], [5], wish)
            assert token in foreseen, (seed, wish, first, token)
            changed += token != first
    assert changed, "nothing was near"
    assert certain > 1000 * sure


def test_seeds_of_rows_are_the_oracle_s():
    for seed in (0, 1, -1, 2**31, -(2**64), 7**40):
        assert [own_row_seed(seed, row) for row in range(4)] == [row_seed(seed, row) for row in range(4)]
