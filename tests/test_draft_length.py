"""The automatic draft length, on a simulated clock: no machine's speed has a say here (decode/draft_length.py)."""

from __future__ import annotations

import random

import numpy as np
import pytest
from simulated_cases import BATCH_COSTS, COSTS, HELD_OUT, ROWS, TEXTS, BatchCost, curve, measured_costs, mixed_rows
from simulated_clock import FixedLength, against_fixed, batch_against_fixed, mean_speed, speed, texts_against_fixed

from mlx_mtp.decode.batch_length import BatchLength
from mlx_mtp.decode.beliefs import Acceptance
from mlx_mtp.decode.draft_length import AutoLength, Ends
from mlx_mtp.decode.limits import MAX_DRAFT_LENGTH
from mlx_mtp.decode.request import Request, Row, Stats

NEW = ("CPU bfloat16", "template", "steep", "packing")
SEEN = {
    kind: [name for name in cases if name not in (*HELD_OUT[kind], *NEW) and not name.startswith("H200")]
    for kind, cases in (("costs", COSTS), ("texts", TEXTS), ("batch_costs", BATCH_COSTS), ("rows", ROWS))
}


def one_row() -> AutoLength:
    policy = AutoLength()
    policy.begin([0])
    return policy


def run_round(batch: BatchLength, rows: list[Row], hard: int, cost: BatchCost, waiting: bool = False) -> None:
    """A round in which the first few rows keep nothing and the others everything."""
    lengths, policy = batch.next(rows, waiting=waiting)
    kept = {row.number: 0 if i < hard else lengths[row.number] for i, row in enumerate(rows)}
    policy.observe(lengths, kept, cost(len(rows), max(lengths.values()), len(rows) + sum(lengths.values())))


@pytest.mark.parametrize("text", SEEN["texts"])
@pytest.mark.parametrize("cost", SEEN["costs"])
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
@pytest.mark.parametrize("cost", SEEN["costs"])
def test_batches_of_mixed_rows(cost: str, rows: int):
    chances = mixed_rows(SEEN["texts"], rows)
    of_plain, of_best, _ = against_fixed(AutoLength, COSTS[cost], chances, seeds=12, tokens=1000)
    assert of_plain >= 0.97 and of_best >= 0.96


@pytest.mark.parametrize("text", ["wrong", "0.66", "published"])
@pytest.mark.parametrize("cost", SEEN["costs"])
def test_batches_of_equal_rows(cost: str, text: str):
    of_plain, of_best, _ = against_fixed(AutoLength, COSTS[cost], [TEXTS[text]] * 8, seeds=4, tokens=1000)
    assert of_plain >= 0.965 and of_best >= 0.95


@pytest.mark.parametrize("kind", ["limits", "stops", "queue"])
@pytest.mark.parametrize("rows", SEEN["rows"])
@pytest.mark.parametrize("cost", SEEN["batch_costs"])
def test_batches_whose_rows_end(cost: str, rows: str, kind: str):
    """Rows leave and the batch shrinks, or others take their places: what is won early may be lost late."""
    few = {"tokens": 200, "seeds": 2} if kind == "queue" else {}
    of_plain, of_best, _ = batch_against_fixed(BATCH_COSTS[cost], ROWS[rows], kind, **few)
    assert of_plain >= 0.95 and of_best >= 0.94


@pytest.mark.parametrize("text", ["wrong", "right", "published", "switching"])
@pytest.mark.parametrize("cost", SEEN["costs"])
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
    known = {k: cost(k, k) for k in range(8)}
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
    assert [cost(k, k) for k in range(6)] == [1.0, 2.5, 3.5, 4.5, 5.5, 6.5]
    assert cost(4, 1) == 4.0 and cost(4, 1.5) == 4.25, "four drafts, of which one or every other second is verified"


def test_a_batch_of_another_size_begins_where_the_one_before_was():
    """Costs of a new size are unknown, but how they compare isn't."""
    dear = COSTS["4-bit product"]
    before = one_row()
    for _ in range(200):
        lengths = before.next([0])
        before.observe(lengths, {0: 0}, dear(lengths[0], lengths[0]))
    assert before.next([0]) == {0: 0}
    assert one_row().next([0])[0] > 0, "without anything known it would draft"
    after = AutoLength()
    after.begin([0], before)
    assert after.next([0]) == {0: 0}


def test_a_text_that_ends_takes_its_luck_with_it():
    """The rows that go on are judged by what was seen of them."""
    cost, kept = COSTS["mlxcel 31B"], {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0}
    policy = AutoLength()
    policy.begin(kept)
    for _ in range(60):
        lengths = policy.next([*kept])
        taken = cost(max(lengths.values()), sum(lengths.values()) / 4)
        policy.observe(lengths, {row: int(share * lengths[row]) for row, share in kept.items()}, taken)
    lengths = policy.next([*kept])
    assert lengths[0] == 7 and lengths[3] <= 1, "three of four rows are worth drafting for"
    smaller = AutoLength()
    smaller.begin([3], policy)
    assert smaller.next([3]) == {3: 0}
    smaller = AutoLength()
    smaller.begin([0], policy)
    assert smaller.next([0]) == {0: 7}


def test_rows_that_become_hard_are_noticed_at_once():
    """Not only where nothing at all is kept any more."""
    cost, policy = BATCH_COSTS["arithmetic"], AutoLength()
    policy.begin(range(4))
    longest = []
    for most in [7] * 40 + [1] * 7:
        lengths = policy.next(range(4))
        longest.append(max(lengths.values()))
        taken = cost(4, longest[-1], 4 + sum(lengths.values()))
        policy.observe(lengths, {row: min(most, length) for row, length in lengths.items()}, taken)
    assert longest[40] >= 5 and max(longest[-2:]) <= 2, longest


@pytest.mark.parametrize("kind", ["switching", "different", "queue"])
@pytest.mark.parametrize("model", ["26B-A4B, 4 bits", "31B, 4 bits", "31B, bfloat16"])
def test_batches_at_the_prices_of_real_sizes(model: str, kind: str):
    """As measured on a GPU."""
    of_plain, of_best, _ = texts_against_fixed(measured_costs()[model], kind, rows=4, seeds=2)
    assert of_plain >= 0.97 and of_best >= 0.97


def test_trials_avoid_lengths_that_are_dearer_than_longer_ones():
    """Two rows of these weights verify 6 tokens at twice the price of 8, where another kernel takes over."""
    _, of_best, _ = texts_against_fixed(measured_costs()["31B, 4 bits"], "switching", rows=2)
    assert of_best >= 0.96


def test_a_row_that_becomes_hard_is_noticed_beside_easy_ones():
    """Rows of a batch change one after the other; where nobody waits, the slowest of them is what matters."""
    batch, cost = BatchLength(), BATCH_COSTS["bandwidth"]
    rows = [Row(Request([0], 4000), Stats(), 4000) for _ in range(8)]

    def longest(count: int, hard: int) -> int:
        for _ in range(count):
            run_round(batch, rows, hard, cost)
        return max(batch.next(rows)[0].values())

    assert longest(40, hard=0) == 7
    assert longest(10, hard=1) <= 2


def test_a_text_that_has_changed_will_change_again():
    """Nobody waits, and the first row would be the last to end if it went on as it is."""
    left, plain = [800, 600, 600], np.array([1.0, 1.02, 1.04])
    gains = np.array([[1.0, 1.0], [1.0, 6.0], [1.0, 6.0]])  # nothing drafted, or for the others

    def saved(changes: list[int], had: int = 400) -> float:
        none, some = Ends(left, [had] * 3, 1.0, plain).saved(gains, np.array(changes))
        assert none == pytest.approx(plain[-1])
        return some / none

    assert saved([0, 0, 0]) < 1.5, "their drafts only make place"
    assert saved([0, 3, 3]) == saved([0, 0, 0]), "the last one decides"
    assert saved([1, 0, 0]) == saved([0, 0, 0]), "it may stay as it has become"
    assert saved([3, 0, 0]) > 2 * saved([0, 0, 0])
    assert saved([3, 0, 0]) > saved([2, 0, 0]) > saved([2, 0, 0], had=4000) > saved([0, 0, 0])


def test_rows_that_differ_by_luck_alone_are_not_told_apart():
    """Of eight alike ones some have been lucky; one that keeps nothing is another matter."""
    off, apart = list[np.ndarray](), list[np.ndarray]()
    for seed in range(20):
        rng, alike_ones, one_hard = random.Random(seed), Acceptance(range(8)), Acceptance(range(8))
        for _ in range(12):
            kept = {row: next((i for i in range(4) if rng.random() > 0.7), 4) for row in range(8)}
            for acceptance, own in ((alike_ones, kept), (one_hard, kept | {0: 0})):
                acceptance.observe(dict.fromkeys(range(8), 4), own)
        true = sum(0.7**i for i in range(5))
        off.append(alike_ones.tokens(range(8))[:, 4] - true)
        apart.append(alike_ones.told_apart(range(8))[:, 4] - true)
        seen, hard = one_hard.tokens(range(8))[:, 4], one_hard.told_apart(range(8))[:, 4]
        assert hard.argmin() == 0 and hard[0] < seen[0] + 0.3 * (seen.mean() - seen[0])
    assert np.square(apart).mean() < 0.5 * np.square(off).mean()
    assert np.mean(apart) == pytest.approx(np.mean(off), abs=0.05)


def test_a_row_that_joins_while_nothing_is_drafted():
    """A trial in flight, of which it has no part, may show that the others became easy."""
    dear, policy = COSTS["4-bit product"], AutoLength()
    policy.begin([0])
    for _ in range(200):
        lengths = policy.next([0])
        policy.observe(lengths, {0: 0}, dear(lengths[0], lengths[0]))
    policy.begin([0, 1])
    assert policy.next([0, 1]) == {0: 0, 1: 0}
    policy.observe({0: 2}, {0: 2}, dear(2, 2))
    assert policy.next([0, 1], ends=lambda: Ends([90, 100], [10, 0], 1.0, np.array([1.0, 1.1]))).keys() == {0, 1}


def test_an_easy_row_that_joins_hard_ones_is_tried_soon():
    """Nothing is drafted for the others, nor will be."""
    batch, cost = BatchLength(), BATCH_COSTS["experts"]
    rows = [Row(Request([0], 4000), Stats(), 4000) for _ in range(4)]
    for _ in range(100):
        run_round(batch, rows, 4, cost, waiting=True)
    assert max(batch.next(rows, waiting=True)[0].values()) == 0
    rows = [*rows[1:], Row(Request([0], 4000), Stats(), 4000)]
    for _ in range(20):
        run_round(batch, rows, 3, cost, waiting=True)
    lengths = batch.next(rows, waiting=True)[0]
    assert lengths[rows[-1].number] >= 4 and max(lengths[row.number] for row in rows[:-1]) <= 1


def test_the_last_row_decides_when_nobody_waits():
    """Seven easy rows and a hard one, where a round's price depends little on how many rows share it."""

    def longest(waiting: bool, stops: bool) -> int:
        batch, stop = BatchLength(), frozenset({1} if stops else ())
        rows = [Row(Request([0], 4000, stop_tokens=stop), Stats(), 4000) for _ in range(8)]
        for _ in range(40):
            run_round(batch, rows, 1, BATCH_COSTS["bandwidth"], waiting)
        return max(batch.next(rows, waiting=waiting)[0].values())

    assert longest(waiting=True, stops=False) == 7, "whoever is done makes room"
    assert longest(waiting=False, stops=False) == 0, "the hard row ends last, and drafts only hold it up"
    assert longest(waiting=False, stops=True) > 0, "it may as well end first"


def test_stop_tokens_that_never_come_are_counted_on_less():
    batch = BatchLength()
    rows = [Row(Request([0], 400, stop_tokens=frozenset({1})), Stats(), 400) for _ in range(8)]

    def longest() -> int:
        for _ in range(40):
            run_round(batch, rows, 1, BATCH_COSTS["bandwidth"])
        return max(batch.next(rows)[0].values())

    assert longest() > 0
    for _ in range(100):
        done = Row(Request([0], 400, stop_tokens=frozenset({1})), Stats(), 400)
        done.receive([0] * 400, 399, 399)
        batch.done(done)
    assert longest() == 0


@pytest.mark.parametrize("waiting", [True, False])
def test_only_rows_whose_drafts_are_kept_pay_for_them(waiting: bool):
    """Where verifying costs by the token; if nobody waits, as long as the hard rows aren't the last."""
    batch = BatchLength()
    rows = [Row(Request([0], limit), Stats(), limit) for limit in [4000] * 4 + [400] * 4]
    for _ in range(60):
        run_round(batch, rows[::-1], 4, BATCH_COSTS["experts"], waiting)
    lengths, _ = batch.next(rows[::-1], waiting=waiting)
    assert min(lengths[row.number] for row in rows[:4]) >= 5
    assert sum(lengths[row.number] for row in rows[4:]) <= 4


def test_a_hard_row_that_becomes_easy_is_noticed():
    """Nothing is seen of a row for which nothing is drafted, so it must be tried again."""
    batch = BatchLength()
    rows = [Row(Request([0], 4000), Stats(), 4000) for _ in range(8)]
    for _ in range(60):
        run_round(batch, rows, 4, BATCH_COSTS["experts"], waiting=True)
    for _ in range(80):
        run_round(batch, rows, 0, BATCH_COSTS["experts"], waiting=True)
    assert min(batch.next(rows, waiting=True)[0].values()) >= 5


@pytest.mark.parametrize("drafts", [0, 4, MAX_DRAFT_LENGTH])
def test_beside_rows_with_a_length_of_their_own(drafts: int):
    """They have their drafts whatever is chosen for the others, who pay for what comes on top."""
    policy, cost = AutoLength(), BATCH_COSTS["experts"]
    policy.begin([0, 1])
    for _ in range(40):
        lengths = policy.next([0, 1], [drafts, drafts])
        both = lengths | {2: drafts, 3: drafts}
        policy.observe(both, {0: lengths[0], 1: 0}, cost(4, max(both.values()), 4 + sum(both.values())))
    lengths = policy.next([0, 1], [drafts, drafts])
    assert lengths[0] == 7
    if drafts < MAX_DRAFT_LENGTH:  # where prices were never measured, those of the longest lengths are a guess
        assert lengths[1] <= 2


def test_answers_of_a_chat():
    """Short texts, nearly all of which can be foreseen, but for a few tokens in a row now and then."""

    def tokens_per_second(policy: AutoLength | FixedLength, seed: int) -> float:
        rng, cost = random.Random(seed), COSTS["mlxcel 31B"]
        seconds = tokens = 0.0
        for text in range(30):
            policy.begin([text])
            position, following = 0, policy.next([text])[text]
            while position < 80:
                length, following = following, policy.next([text])[text]
                foreseen = ((position + j) % 30 >= 4 and rng.random() < 0.97 for j in range(length))
                kept = next((j for j, good in enumerate(foreseen) if not good), length)
                taken = cost(length, length) * (1 + 0.05 * rng.gauss(0, 1))
                policy.observe({text: length}, {text: kept}, taken if length == following else None)
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
            length = policy.next([text])[text]
            policy.observe({text: length}, {text: 0}, cost(length, length))
            taken, plain = taken + cost(length, length), plain + cost(0, 0)
    assert plain / taken >= 0.95


def test_unmeasured_rounds_are_no_reason_to_stop():
    policy = one_row()
    for _ in range(100):
        lengths = policy.next([0])
        policy.observe(lengths, lengths, None)
    assert policy.next([0])[0] > 0


def test_rounds_of_different_lengths_make_no_others_seem_dearer():
    """Sorting out which tokens are whose takes time; plain decoding does without."""
    policy = AutoLength({k: 1 + 0.1 * k for k in range(8)})
    policy.begin(range(4))
    for _ in range(100):
        policy.observe({0: 4, 1: 4, 2: 0, 3: 0}, {0: 4, 1: 4, 2: 0, 3: 0}, 1.8)
    assert policy.seconds(0) == pytest.approx(1.0, abs=0.03)
