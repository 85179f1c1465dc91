"""One request after the other on one engine: what is kept, what is forgotten, what is never read back (decode/)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.checkpoint.description import read_target
from mlx_mtp.checkpoint.load import load_target
from mlx_mtp.checkpoint.sizes import ABOVE
from mlx_mtp.decode import in_flight
from mlx_mtp.decode.draft_length import DraftLengthPolicy
from mlx_mtp.decode.prefill import prefill
from mlx_mtp.decode.request import INVARIANT_WIDTH, ROOM, Request, Row, Stats
from mlx_mtp.decode.round import accept, decode_round, first_state
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.errors import PromptError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.deep_pair import deep_pair
from tests.support.random_requests import first_wrong
from tests.support.scripted_drafter import ScriptedDrafter
from tests.support.tiny_checkpoints import VOCAB, load_pair, make_pair

Pair = tuple[Target, Drafter]
SAMPLED = SamplingOptions(temperature=1.0, top_k=50, seed=11)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, drafter_folder = make_pair("e2b", tmp_path_factory.mktemp("e2b"))
    return load_pair(folder, drafter_folder)


def prompt(length: int = 40, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def run(scheduler: Scheduler, tokens: Sequence[int], count: int = 40, **options: object) -> tuple[list[int], Stats]:
    stats = Stats()
    request = Request(tokens, count, **options)  # type: ignore[arg-type]
    return [t for new in scheduler.stream(request, stats) for t in new], stats


def test_drafts_are_kept_up_to_the_first_wrong_one():
    drafts = mx.array([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    choices = mx.array([[1, 2, 3, 4]] * 4)
    assert accept(drafts, choices).tolist() == [3, 1, 0, 2]


def test_a_round_never_reads_back(pair: Pair):
    """Tracing fails on any evaluation: draft, verify and accept must be one graph, also with sampling."""
    target, drafter = pair
    sampler = Sampler([SAMPLED], target.config.logit_softcap)
    kv, hidden = prefill(target, prompt())
    state = first_state(target, sampler, hidden, mx.array([40]))
    kv.reserve(60)
    reports = []

    def traced(tokens: mx.array) -> mx.array:
        before = type(state)(state.lengths, tokens, state.hidden)
        after, report, _ = decode_round(target, drafter, kv, sampler, before, 3)
        reports.append(decode_round(target, drafter, kv, sampler, after, 2)[1])
        return report

    snapshot = kv.snapshot()
    with pytest.raises(ValueError, match="eval"):
        mx.vmap(lambda tokens: mx.array(tokens.tolist()))(mx.zeros((2, 1), mx.int32))
    mx.vmap(traced)(state.tokens[None])
    kv.restore(snapshot)
    assert len(reports) == 1


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED], ids=["greedy", "sampled"])
def test_what_an_engine_did_before_does_not_matter(pair: Pair, sampling: SamplingOptions):
    """Prompts that share a beginning with what the buffers hold: the text is plain decoding's all the same."""
    used = Scheduler(*pair)
    first, _ = run(used, prompt(), sampling=sampling, draft_length=3)
    follow_up = prompt() + first + prompt(5, seed=2)
    elsewhere = prompt()[:20] + prompt(20, seed=3)
    for tokens, cached in ((follow_up, 78), (follow_up, None), (elsewhere, None), (prompt(3, seed=4), None)):
        text, stats = run(used, tokens, sampling=sampling, draft_length=3)
        assert len(text) == 40 and first_wrong(pair[0], Request(tokens, 40, sampling), text) is None
        if cached:
            assert cached <= stats.cached_tokens < len(tokens)


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_is_kept_through_a_long_answer_that_is_dropped(pair: Pair, sampling: SamplingOptions):
    """As in a chat whose thoughts leave the history: the next prompt goes on where this one ended."""
    used, tokens = Scheduler(*pair), prompt(70)
    for turn in range(2):
        answer, _ = run(used, tokens, 45, sampling=sampling, draft_length=3)
        tokens = tokens + answer[-7:] + prompt(9, seed=turn)
        text, stats = run(used, tokens, 45, sampling=sampling, draft_length=2)
        assert stats.cached_tokens == len(tokens) - 16
        assert len(text) == 45 and first_wrong(pair[0], Request(tokens, 45, sampling), text) is None
    again, stats = run(used, tokens, 45, sampling=sampling, draft_length=3)
    assert again == text and stats.cached_tokens == len(tokens) - 1


def test_a_text_goes_on_as_if_it_had_not_been_cut(pair: Pair):
    """Noise depends on the absolute position alone, so that prompt and answer may be split anywhere."""
    text, _ = run(Scheduler(*pair), prompt(20), 20, sampling=SAMPLED, draft_length=3)
    for cut in (1, 2, 7):
        rest, _ = run(Scheduler(*pair), prompt(20) + text[:cut], 20 - cut, sampling=SAMPLED, draft_length=3)
        assert rest == text[cut:]


def test_logits_are_softcapped_before_tokens_are_chosen(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    caps, init = set[float](), Sampler.__init__

    def noted(self: Sampler, rows: object, cap: float, *others: object) -> None:
        caps.add(cap)
        init(self, rows, cap, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "__init__", noted)
    run(Scheduler(*pair), prompt(10), 3)
    assert caps == {30.0}


@pytest.mark.parametrize("exactness, widths", [
    ("fast", {1, 2, 3, 4}), ("invariant", {INVARIANT_WIDTH}), ("stepwise", {1}),
])  # fmt: skip
def test_the_widths_of_verify_blocks(pair: Pair, exactness: str, widths: set[int], monkeypatch: pytest.MonkeyPatch):
    """On a CPU the text is the same with any of them."""
    found, call, scheduler = set[int](), Target.__call__, Scheduler(*pair)
    row = scheduler.submit(Request(prompt(30), 30, exactness=exactness, draft_length=3))
    while not row.tokens:
        scheduler.step()

    def noted(self: Target, tokens: mx.array, *others: object) -> mx.array:
        found.add(tokens.shape[1])
        return call(self, tokens, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Target, "__call__", noted)
    while not row.done:
        scheduler.step()
    assert found <= widths and max(widths) in found


def test_exact_modes_reuse_nothing(pair: Pair):
    used = Scheduler(*pair)
    run(used, prompt(), 5)
    assert run(used, prompt(), 5, exactness="stepwise")[1].cached_tokens == 0


def test_a_long_text_does_not_keep_later_ones_from_being_reused(pair: Pair):
    used = Scheduler(*pair)
    run(used, prompt(200, seed=1))
    run(used, prompt(), 3)
    _, stats = run(used, prompt(), 3)
    assert stats.cached_tokens == len(prompt()) - 1


def test_a_cancelled_request_leaves_the_engine_usable(pair: Pair):
    used = Scheduler(*pair)
    rounds = used.stream(Request(prompt(), 100, draft_length=4), Stats())
    begun = next(rounds) + next(rounds)
    rounds.close()
    follow_up = prompt() + begun + prompt(5, seed=2)
    text, stats = run(used, follow_up)
    assert text == run(Scheduler(*pair), follow_up, draft_length=0)[0]
    assert stats.cached_tokens >= len(prompt())


def test_large_buffers_are_written_in_place_and_give_the_same_text(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    early, _ = run(Scheduler(*pair), prompt(), draft_length=3)
    monkeypatch.setattr(in_flight, "COPY_LIMIT", 0)
    late, _ = run(Scheduler(*pair), prompt(), draft_length=3)
    assert late == early
    # A text that ends leaves a round behind that was built and must be forgotten.
    used = Scheduler(*pair)
    follow_up = prompt() + run(used, prompt(), stop_tokens=frozenset(early[20:21]), draft_length=3)[0]
    assert run(used, follow_up)[0] == run(Scheduler(*pair), follow_up)[0]


def test_stop_tokens_and_limits(pair: Pair):
    text, _ = run(Scheduler(*pair), prompt(), draft_length=0)
    stop = text[10]
    for draft_length in (0, 5, "auto"):
        stopped, _ = run(Scheduler(*pair), prompt(), stop_tokens=frozenset({stop}), draft_length=draft_length)
        assert stopped == text[: text.index(stop) + 1]
        for count in (1, 2, 7):
            assert run(Scheduler(*pair), prompt(), count, draft_length=draft_length)[0] == text[:count]


def test_suppressed_tokens_are_neither_chosen_nor_missed(pair: Pair):
    text, _ = run(Scheduler(*pair), prompt(), draft_length=0)
    banned = (text[5],)
    plain, _ = run(Scheduler(*pair, banned), prompt(), draft_length=0)
    assert plain[:5] == text[:5] and banned[0] not in plain
    assert run(Scheduler(*pair, banned), prompt(), draft_length=4)[0] == plain


def test_the_context_is_filled_to_its_end_and_not_further(tmp_path: Path):
    folder, _ = make_pair("12b", tmp_path)
    described = json.loads((folder / "config.json").read_text())
    described["text_config"]["max_position_embeddings"] = 300
    (folder / "config.json").write_text(json.dumps(described))
    config, target = read_target(folder).config, load_target(read_target(folder))
    room = 5
    tokens = prompt(config.text.max_positions - room, seed=1)
    text, _ = run(Scheduler(target, None), tokens, 100)
    assert len(text) == room + 1, "the last token needs no place"
    with pytest.raises(PromptError, match="context"):
        run(Scheduler(target, None), tokens * 2)


def test_statistics_add_up(pair: Pair):
    target, _ = pair
    text, _ = run(Scheduler(target, None), prompt(), 81)
    script = prompt() + text
    _, right = run(Scheduler(target, ScriptedDrafter(script)), prompt(), 81, draft_length=4)  # type: ignore[arg-type]
    # One token from the prefill, then 5 a round.
    assert (right.rounds, right.drafted, right.draft_lengths) == (16, 64, {4: 16})
    assert right.accepted == right.drafted and right.accepted_by_position == [16, 16, 16, 16]
    assert right.prompt_tokens == 40 and right.generated_tokens == 81
    wrong_script = [(t + 1) % VOCAB for t in script]
    _, wrong = run(Scheduler(target, ScriptedDrafter(wrong_script)), prompt(), 81, draft_length=4)  # type: ignore[arg-type]
    assert (wrong.rounds, wrong.accepted, wrong.mean_accepted) == (80, 0, 0.0)
    assert right.peak_memory_bytes > 0 and right.prompt_tps > 0 and right.generation_tps > 0


def test_statistics_of_rounds_of_all_kinds():
    stats = Stats(prompt_tokens=12, cached_tokens=2, prompt_seconds=2.0, generated_tokens=21, generation_seconds=4.0)
    assert stats.rates() == {"mean_accepted": 0.0, "prompt_tps": 5.0, "generation_tps": 5.0}
    for drafted, accepted, source in ((0, 0, "drafter"), (4, 3, "drafter"), (2, 1, "prompt")):
        stats.count(drafted, accepted, source)
    before = stats.snapshot()
    stats.count(4, 4)
    assert (before.rounds, before.drafted, before.accepted, before.mean_accepted) == (3, 6, 4, 2.0)
    assert before.accepted_by_position == [2, 1, 1] and before.draft_lengths == {0: 1, 4: 1, 2: 1}
    assert before.drafted_by_source == {"drafter": 4, "prompt": 2}
    assert before.accepted_by_source == {"drafter": 3, "prompt": 1}


def test_seconds_count_from_the_submission_and_from_the_first_token(monkeypatch: pytest.MonkeyPatch):
    now = iter((10.0, 13.0, 18.0))
    monkeypatch.setattr("mlx_mtp.decode.request.time", SimpleNamespace(perf_counter=lambda: next(now)))
    row = Row(Request([1, 2], 5), Stats(), 5)
    row.receive([7], 0, None)
    assert (row.stats.prompt_seconds, row.stats.generation_seconds) == (3.0, 0.0)
    row.receive([8, 9, 9], 1, 2)
    assert (row.stats.prompt_seconds, row.stats.generation_seconds) == (3.0, 5.0)


def test_buffers_have_room_for_a_short_text_and_grow_in_steps_with_a_long_one():
    """Rows may write `ABOVE` positions past their end."""
    short, long = (Row(Request(prompt(20), limit), Stats(), limit) for limit in (60, 10**6))
    assert (short.room, long.room) == (20 + 60 + ABOVE, 20 + ROOM)
    for count in (1, 2, 8 * ROOM):
        long.tokens = [5] * count
        assert long.committed == len(long.committed_tokens) == 19 + count
    assert long.room == long.committed + long.committed // 4
    assert long.committed_tokens == [*prompt(20), *[5] * (count - 1)]


@pytest.mark.parametrize("mode", ["early", "late"])
def test_rounds_copy_no_buffers(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whenever they are handed over; what holds a buffer on purpose shows that copies would be seen."""
    monkeypatch.setenv(in_flight.SWITCH, mode)
    scheduler = Scheduler(*deep_pair(tmp_path))
    row = scheduler.submit(Request(prompt(), 100, draft_length=2))
    while not row.unread:
        scheduler.step()
    kv = scheduler.engine.kv
    assert kv is not None
    kv.reserve([8000])
    assert kv.nbytes > 20 * 2**20

    def most_memory(hold: bool) -> int:
        mx.synchronize()
        mx.clear_cache()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(3):
            held = kv.snapshot() if hold else None
            scheduler.step()
            del held
        return mx.get_peak_memory() - active

    most_memory(hold=False)
    assert most_memory(hold=False) < 2 * 2**20
    assert most_memory(hold=True) > 20 * 2**20


@pytest.mark.parametrize("wrong, culprit", [
    ({"max_tokens": 0}, "max_tokens"), ({"draft_length": 99}, "draft_length"), ({"draft_length": -1}, "draft_length"),
    ({"draft_length": "many"}, "draft_length"), ({"exactness": "very"}, "exactness"),
    ({"draft_length": 8, "exactness": "invariant"}, "draft_length"),
])  # fmt: skip
def test_requests_out_of_range(wrong: dict[str, object], culprit: str):
    with pytest.raises(PromptError, match=culprit):
        Request(**{"prompt": [1], "max_tokens": 1, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_automatic_length_is_told_what_rounds_take(pair: Pair, late: bool, monkeypatch: pytest.MonkeyPatch):
    """Also where a round is handed over late, which on a CPU is when it runs."""
    monkeypatch.setattr(in_flight, "COPY_LIMIT", 0 if late else 2**40)
    told, observe = [], DraftLengthPolicy.observe
    monkeypatch.setattr(
        DraftLengthPolicy, "observe", lambda self, *args: (told.append(args[2]), observe(self, *args))[1]
    )
    run(Scheduler(*pair), prompt(), 150)
    assert sum(seconds is not None for seconds in told) > len(told) / 2
