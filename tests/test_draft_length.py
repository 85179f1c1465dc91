"""The automatic draft length, on a simulated clock: no machine's speed has a say here (decode/draft_length.py)."""

from __future__ import annotations

import random

import numpy as np
import pytest
from simulated_clock import (
    BATCH_COSTS,
    COSTS,
    ROWS,
    TEXTS,
    FixedLength,
    against_fixed,
    batch_against_fixed,
    curve,
    mean_speed,
    speed,
)

from mlx_mtp.decode.batch_length import BatchLength
from mlx_mtp.decode.draft_length import AutoLength, Ends
from mlx_mtp.decode.limits import MAX_DRAFT_LENGTH
from mlx_mtp.decode.request import Request, Row, Stats


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cost", COSTS)
def test_close_to_the_best_fixed_length_and_to_plain_decoding(cost: str, text: str):
    of_plain, of_best, best = against_fixed(AutoLength, COSTS[cost], [TEXTS[text]])
    assert of_plain >= 0.97
    if text == "right":
        assert of_best >= 0.97
    # Following a text that changes is worth more than any fixed length, unless none ever pays.
    elif text == "switching":
        assert of_best >= (0.985 if best == 0 else 1.0)
    else:
        assert of_best >= 0.92


@pytest.mark.parametrize("rows", [2, 4, 8])
@pytest.mark.parametrize("cost", COSTS)
def test_batches_of_mixed_rows(cost: str, rows: int):
    chances = [list(TEXTS.values())[i % len(TEXTS)] for i in range(rows)]
    of_plain, of_best, _ = against_fixed(AutoLength, COSTS[cost], chances, seeds=12, tokens=1000)
    assert of_plain >= 0.97 and of_best >= 0.96


@pytest.mark.parametrize("text", ["wrong", "0.66", "published"])
@pytest.mark.parametrize("cost", COSTS)
def test_batches_of_equal_rows(cost: str, text: str):
    of_plain, of_best, _ = against_fixed(AutoLength, COSTS[cost], [TEXTS[text]] * 8, seeds=4, tokens=1000)
    assert of_plain >= 0.965 and of_best >= 0.95


@pytest.mark.parametrize("kind", ["limits", "stops", "queue"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cost", BATCH_COSTS)
def test_batches_whose_rows_end(cost: str, rows: str, kind: str):
    """Rows leave and the batch shrinks, or others take their places: what is won early may be lost late."""
    few = {"tokens": 200, "seeds": 2} if kind == "queue" else {}
    of_plain, of_best, _ = batch_against_fixed(BATCH_COSTS[cost], ROWS[rows], kind, **few)
    assert of_plain >= 0.95 and of_best >= 0.94


@pytest.mark.parametrize("text", ["wrong", "right", "published", "switching"])
@pytest.mark.parametrize("cost", COSTS)
def test_a_context_that_makes_rounds_dearer_changes_no_mind(cost: str, text: str):
    """A length long not tried keeps its place among the others: neither tried anew for what was, nor preferred."""
    of_plain, of_best, _ = against_fixed(AutoLength, COSTS[cost], [TEXTS[text]], seeds=6, growth=1.0)
    assert of_plain >= 0.97 and of_best >= 0.93


@pytest.mark.parametrize("text", ["wrong", "right", "published"])
@pytest.mark.parametrize("cost", ["flat", "linear", "mlxcel 31B"])
def test_a_restless_machine(cost: str, text: str):
    """With 15 % noise and pauses in every thirtieth round, what was once measured badly doesn't stay believed."""
    of_plain, of_best, _ = against_fixed(AutoLength, COSTS[cost], [TEXTS[text]], noise=0.15)
    assert of_plain >= 0.955 and of_best >= 0.92


@pytest.mark.parametrize("text", ["right", "published", "0.66", "wrong"])
def test_measured_costs_are_a_good_beginning(text: str):
    """With a profile even a short text is close to the best fixed length."""
    cost = COSTS["mlxcel 31B"]
    known = {k: cost(k) for k in range(8)}
    _, with_profile, _ = against_fixed(lambda: AutoLength(known), cost, [TEXTS[text]], seeds=40, tokens=100)
    _, without, _ = against_fixed(AutoLength, cost, [TEXTS[text]], seeds=40, tokens=100)
    assert with_profile >= 0.88 and with_profile >= without - 0.02


@pytest.mark.parametrize("cost", ["flat", "mlxcel 31B"])
def test_no_pause_stops_drafting_for_good(cost: str):
    """A slow round may make drafting look too dear; later trials find out."""
    chances = [TEXTS["published"]]
    fixed = mean_speed(lambda: FixedLength(3), COSTS[cost], chances)
    assert min(speed(AutoLength, COSTS[cost], chances, seed) for seed in range(16)) >= 0.88 * fixed


def test_curves():
    cost = curve({1: 1.0, 2: 2.0, 4: 3.0}, 0.5)
    assert [cost(k) for k in range(6)] == [1.0, 2.5, 3.5, 4.5, 5.5, 6.5]


def test_a_batch_of_another_size_begins_where_the_one_before_was():
    """Costs of a new size are unknown, but how they compare isn't."""
    dear = COSTS["4-bit product"]
    before = AutoLength()
    for _ in range(200):
        length = before.next()
        before.observe(length, {0: 0}, dear(length))
    assert before.next() == 0
    after = AutoLength()
    assert after.next() > 0, "without anything known it would draft"
    after = AutoLength()
    after.begin([0], before)
    assert after.next() == 0


def test_a_text_that_ends_takes_its_luck_with_it():
    """The rows that go on are judged by what was seen of them."""
    cost, kept = COSTS["mlxcel 31B"], {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0}
    policy = AutoLength()
    policy.begin(kept)
    for _ in range(60):
        length = policy.next()
        policy.observe(length, {row: int(share * length) for row, share in kept.items()}, cost(length))
    assert policy.next() > 0, "three of four rows are worth drafting for"
    smaller = AutoLength()
    smaller.begin([3], policy)
    assert smaller.next() == 0
    smaller = AutoLength()
    smaller.begin([0], policy)
    assert smaller.next() == 7


def test_rows_that_become_hard_are_noticed_at_once():
    """Not only where nothing at all is kept any more."""
    cost, policy = BATCH_COSTS["arithmetic"], AutoLength()
    policy.begin(range(4))
    for _ in range(40):
        length = policy.next()
        policy.observe(length, dict.fromkeys(range(4), length), cost(4, length))
    assert policy.next() >= 5
    lengths = []
    for _ in range(7):
        lengths.append(policy.next())
        policy.observe(lengths[-1], dict.fromkeys(range(4), min(1, lengths[-1])), cost(4, lengths[-1]))
    assert lengths[0] >= 5 and max(lengths[-2:]) <= 2, lengths


def test_a_row_that_becomes_hard_is_noticed_beside_easy_ones():
    """Rows of a batch change one after the other; where nobody waits, the slowest of them is what matters."""
    batch, cost = BatchLength(), BATCH_COSTS["bandwidth"]
    rows = [Row(Request([0], 4000), Stats(), 4000) for _ in range(8)]

    def rounds(count: int, hard: int) -> list[int]:
        lengths = []
        for _ in range(count):
            length, policy = batch.next(rows, 8)
            policy.observe(
                length, {row.number: 0 if i < hard else length for i, row in enumerate(rows)}, cost(8, length)
            )
            lengths.append(length)
        return lengths

    assert rounds(40, hard=0)[-1] == 7
    assert rounds(10, hard=1)[-1] <= 2


def test_a_row_that_joins_while_nothing_is_drafted():
    """A trial in flight, of which it has no part, may show that the others became easy."""
    dear, policy = COSTS["4-bit product"], AutoLength()
    policy.begin([0])
    for _ in range(200):
        length = policy.next()
        policy.observe(length, {0: 0}, dear(length))
    policy.begin([0, 1])
    assert policy.next() == 0
    policy.observe(2, {0: 2}, dear(2))
    assert policy.next(lambda: Ends({0: 90, 1: 100}, 1.0, np.array([1.0, 1.1]))) in range(8)


def test_the_last_row_decides_when_nobody_waits():
    """Seven easy rows and a hard one, where a round's price depends little on how many rows share it."""

    def next_length(waiting: bool, stops: bool) -> int:
        batch, stop = BatchLength(), frozenset({1} if stops else ())
        rows = [Row(Request([0], 4000, stop_tokens=stop), Stats(), 4000) for _ in range(8)]
        for _ in range(40):
            length, policy = batch.next(rows, 8, waiting)
            kept = {row.number: length for row in rows[:7]} | {rows[7].number: 0}
            policy.observe(length, kept, BATCH_COSTS["bandwidth"](8, length))
        return batch.next(rows, 8, waiting)[0]

    assert next_length(waiting=True, stops=False) == 7, "whoever is done makes room"
    assert next_length(waiting=False, stops=False) == 0, "the hard row ends last, and drafts only hold it up"
    assert next_length(waiting=False, stops=True) > 0, "it may as well end first"


def test_stop_tokens_that_never_come_are_counted_on_less():
    batch = BatchLength()
    rows = [Row(Request([0], 400, stop_tokens=frozenset({1})), Stats(), 400) for _ in range(8)]

    def next_length() -> int:
        for _ in range(40):
            length, policy = batch.next(rows, 8)
            kept = {row.number: length for row in rows[:7]} | {rows[7].number: 0}
            policy.observe(length, kept, BATCH_COSTS["bandwidth"](8, length))
        return batch.next(rows, 8)[0]

    assert next_length() > 0
    for _ in range(100):
        done = Row(Request([0], 400, stop_tokens=frozenset({1})), Stats(), 400)
        done.receive([0] * 400, 399, 399)
        batch.done(done)
    assert next_length() == 0


def test_a_batch_with_a_longer_draft_of_its_own():
    """A row that asks for more than is ever chosen has all rows draft as much."""
    policy = AutoLength()
    policy.begin([0, 1])
    for _ in range(20):
        policy.next()
        policy.observe(MAX_DRAFT_LENGTH, {0: MAX_DRAFT_LENGTH, 1: 9}, 3.0)
    assert max(policy.next() for _ in range(4)) == 7


def test_answers_of_a_chat():
    """Short texts, nearly all of which can be foreseen, but for a few tokens in a row now and then."""

    def tokens_per_second(policy: AutoLength | FixedLength, seed: int) -> float:
        rng, cost = random.Random(seed), COSTS["mlxcel 31B"]
        seconds = tokens = 0.0
        for text in range(30):
            if isinstance(policy, AutoLength):
                policy.begin([text])
            position, following = 0, policy.next()
            while position < 80:
                length, following = following, policy.next()
                foreseen = ((position + j) % 30 >= 4 and rng.random() < 0.97 for j in range(length))
                kept = next((j for j, good in enumerate(foreseen) if not good), length)
                taken = cost(length) * (1 + 0.05 * rng.gauss(0, 1))
                policy.observe(length, {text: kept}, taken if length == following else None)
                seconds, position = seconds + taken, position + kept + 1
            tokens += position
        return tokens / seconds

    fixed = max(sum(tokens_per_second(FixedLength(k), seed) for seed in range(8)) for k in range(8))
    assert sum(tokens_per_second(AutoLength(), seed) for seed in range(8)) >= 0.97 * fixed


def test_many_short_texts_cost_no_more_than_a_long_one():
    """What was learnt of costs, and the budget for trials, outlive a text."""
    policy, cost = AutoLength(), COSTS["linear"]
    plain = taken = 0.0
    for text in range(40):
        policy.begin([text])
        for _ in range(50):
            length = policy.next()
            policy.observe(length, {text: 0}, cost(length))
            taken, plain = taken + cost(length), plain + cost(0)
    assert plain / taken >= 0.95


def test_unmeasured_rounds_are_no_reason_to_stop():
    policy = AutoLength()
    for _ in range(100):
        length = policy.next()
        policy.observe(length, {0: length}, None)
    assert policy.next() > 0
