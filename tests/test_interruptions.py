"""Exceptions in every kind of step, and wherever a thread may be: which texts end, and that the others are right."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp import MemoryBudgetError, MTPError, PromptError
from mlx_mtp.control.grammar import Matcher
from mlx_mtp.decode import engine, prefill
from mlx_mtp.decode.draft_length import DraftLengthPolicy
from mlx_mtp.decode.host_drafts import HostDrafts
from mlx_mtp.decode.prompt_cache import PromptCache
from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.sampling import Sampler
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.kv import BatchKV
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from mlx_mtp.session.inbox import Inbox
from mlx_mtp.session.readers import Readers
from mlx_mtp.text.stream_decoder import StreamDecoder
from tests.support.random_requests import is_plain_text
from tests.support.siege import Siege
from tests.support.tiny_checkpoints import load_pair, make_pair

Pair = tuple[Target, Drafter]
QUESTION = "What is a drafter?"
GREEDY = {"max_tokens": 12, "temperature": 0.0}
LONG = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folders = make_pair("e2b", tmp_path_factory.mktemp("e2b"))
    return load_pair(*folders, "float32")


@pytest.fixture(scope="module")
def texts(lm: mlx_mtp.MTPModel) -> dict[str, list[int]]:
    """What the calls here give when nothing fails."""
    return {"short": lm.generate(QUESTION, **GREEDY).tokens, "long": lm.generate(QUESTION, **LONG).tokens}


def failing_once(call: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """A function that fails the first time."""
    errors = [error]

    def run(*args: object, **more: object) -> object:
        if errors:
            raise errors.pop()
        return call(*args, **more)

    return run


def run(scheduler: Scheduler, *rows: Row) -> None:
    while not all(row.done for row in rows):
        scheduler.step()


NONE, COMING, BATCH, ALL = set[str](), {"coming"}, {"running", "coming"}, {"running", "coming", "resumed"}


@pytest.mark.parametrize("where, name, ended", [
    (prefill, "prefill_block", COMING),
    (mx, "eval", COMING),  # the first one is the prefill's
    (mx.fast, "rms_norm", COMING),
    (PromptCache, "find", NONE),
    (PromptCache, "put", NONE),
    (HostDrafts, "advance", NONE),
    (HostDrafts, "offer", NONE),
    (BatchKV, "arrange", ALL),
    (BatchKV, "reserve", ALL),
    (Sampler, "target", ALL),
    (mx, "async_eval", ALL),
    (engine, "draft_block", ALL),
    (engine, "forward", ALL),
    (engine, "commit", ALL),
    (engine, "_host", ALL),
    (DraftLengthPolicy, "next", ALL),
    (DraftLengthPolicy, "observe", ALL),
    (np, "append", ALL),  # in the middle of what the policy remembers
])  # fmt: skip
def test_what_fails_ends_what_it_concerns(
    pair: Pair, where: object, name: str, ended: set[str], monkeypatch: pytest.MonkeyPatch
):
    """Beside a row that runs, one is being prefilled, one rejoins the batch, one stays parked, and one waits."""
    scheduler, error = Scheduler(*pair, max_rows=4), RuntimeError("[malloc] Unable to allocate")
    requests = [Request([3 + i, 5, 7, 9], 10) for i in range(5)]
    running, resumed, parked = (scheduler.submit(request) for request in requests[:3])
    for _ in range(2):
        scheduler.step()
    resumed.paused = parked.paused = True
    scheduler.step()
    resumed.paused = False
    coming, waiting = (scheduler.submit(request) for request in requests[3:])
    waiting.request.__dict__["exactness"] = "stepwise"  # so that it waits for an empty batch
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing_once(getattr(where, name), error))
        run(scheduler, running, resumed, coming)
    parked.paused = False
    run(scheduler, parked, waiting)
    rows = {"running": running, "resumed": resumed, "coming": coming, "parked": parked, "waiting": waiting}
    assert {what for what, row in rows.items() if row.error} == ended
    assert all(row.error is error if what in ended else is_plain_text(pair[0], row) for what, row in rows.items())
    after = scheduler.submit(requests[0])
    run(scheduler, after)
    scheduler.step()
    assert is_plain_text(pair[0], after) and not scheduler.kv_bytes and scheduler.engine.kv is None


def test_drafts_of_the_host_that_fail_are_left_out(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HostDrafts, "offer", failing_once(HostDrafts.offer, ValueError()))
    scheduler = Scheduler(*pair)
    row = scheduler.submit(Request([3, 5], 10, prediction=[7, 9]))
    run(scheduler, row)
    assert row.host_drafts is None and is_plain_text(pair[0], row)


def stop(*_: object) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("options", [
    {"prefill_progress": stop},
    {"logits_processors": [stop]},
], ids=["progress", "processor"])  # fmt: skip
def test_a_callback_that_would_end_the_program_ends_its_text(
    lm: mlx_mtp.MTPModel, texts: dict[str, list[int]], options: dict[str, Any]
):
    stream = lm.stream(QUESTION, **LONG)
    tokens = list(next(stream).tokens)
    with pytest.raises(PromptError, match="SystemExit") as caught:
        lm.generate(QUESTION, **GREEDY, **options)
    assert "in stop" in str(caught.value.__cause__.__cause__), "it says where"  # type: ignore[union-attr]
    assert tokens + [token for chunk in stream for token in chunk.tokens] == texts["long"]


def test_a_mask_that_fails_ends_its_text(
    lm: mlx_mtp.MTPModel, texts: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
):
    regex = {"type": "regex", "pattern": "[a-z]+"}
    stream = lm.stream(QUESTION, **LONG)
    tokens = list(next(stream).tokens)
    with monkeypatch.context() as patch:
        patch.setattr(Matcher, "allowed", failing_once(Matcher.allowed, MemoryError()))
        with pytest.raises(PromptError, match="MemoryError"):
            lm.generate(QUESTION, response_format=regex, **GREEDY)
    assert tokens + [token for chunk in stream for token in chunk.tokens] == texts["long"]


def test_a_reader_that_fails_ends_its_text(
    lm: mlx_mtp.MTPModel, texts: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
):
    """Whether the text can't be made from tokens, or what is done with it fails."""
    stream = lm.stream(QUESTION, **LONG)
    tokens = list(next(stream).tokens)
    with monkeypatch.context() as patch:
        patch.setattr(StreamDecoder, "push", failing_once(StreamDecoder.push, MemoryError()))
        with pytest.raises(MemoryError):
            lm.generate(QUESTION, **GREEDY)
    with pytest.raises(ZeroDivisionError), lm.stream(QUESTION, **LONG) as other:
        1 / (next(other).tokens == [])
    assert tokens + [token for chunk in stream for token in chunk.tokens] == texts["long"]


def test_a_budget_that_shrinks_beside_a_text(lm: mlx_mtp.MTPModel, texts: dict[str, list[int]]):
    before = lm.kv_budget
    stream = lm.stream(QUESTION, **LONG)
    tokens = list(next(stream).tokens)
    with pytest.raises(MemoryBudgetError, match="run or wait"):
        lm.limit_kv(1000)
    assert tokens + [token for chunk in stream for token in chunk.tokens] == texts["long"]
    lm.limit_kv(1000)
    with pytest.raises(MemoryBudgetError, match="need"):
        lm.generate(QUESTION, **GREEDY)
    lm.limit_kv(2 * before)
    assert lm.generate(QUESTION, **GREEDY).tokens == texts["short"]


@pytest.mark.parametrize("name", ["check", "deliver"])
def test_a_failure_between_two_steps(
    lm: mlx_mtp.MTPModel, texts: dict[str, list[int]], name: str, monkeypatch: pytest.MonkeyPatch
):
    """Tokens on their way to a reader may be lost: it gets an error, and not a text that lacks them."""
    stream = lm.stream(QUESTION, **LONG)
    tokens = list(next(stream).tokens)
    monkeypatch.setattr(Readers, name, failing_once(getattr(Readers, name), KeyboardInterrupt()))
    with pytest.raises(MTPError, match="KeyboardInterrupt"):
        for chunk in stream:
            tokens += chunk.tokens
    assert tokens == texts["long"][: len(tokens)]
    assert lm.generate(QUESTION, **GREEDY).tokens == texts["short"]


def test_work_that_is_interrupted(lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.api.logits_after", failing_once(lambda *_: None, KeyboardInterrupt()))
    with pytest.raises(MTPError, match="KeyboardInterrupt"):
        lm.logits([2])


def test_models_come_back_from_a_borrower_that_was_interrupted(
    lm: mlx_mtp.MTPModel, texts: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
):
    """Once before it has them, and once before it can give them back."""
    session = lm._session
    with monkeypatch.context() as patch:
        patch.setattr(session, "_wait_for", lambda work: (session._post(work), 1 / 0))
        with pytest.raises(ZeroDivisionError), lm.models():
            pass
    with monkeypatch.context() as patch:
        loan = lm.models()
        loan.__enter__()
        patch.setattr(session, "wake", failing_once(session.wake, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            loan.__exit__(None, None, None)
        del loan
    gc.collect()
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(lm.generate(QUESTION, **GREEDY).tokens), daemon=True)
    thread.start()
    thread.join(60)
    assert found == [texts["short"]]


def test_a_trace_whose_beginning_is_interrupted(lm: mlx_mtp.MTPModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It has begun in the model's thread, and the caller doesn't learn of it: another one may begin afterwards."""
    call = lm._session.call
    with monkeypatch.context() as patch:
        patch.setattr(lm._session, "call", lambda work: (patch.undo(), call(work), 1 / 0))
        with pytest.raises(ZeroDivisionError), lm.trace(tmp_path / "trace.json"):
            pass
    with lm.trace(tmp_path / "again.json"):
        lm.generate(QUESTION, **GREEDY)


def test_a_stream_whose_closing_is_interrupted(lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch):
    """Its row ends nevertheless, although the stream is kept."""
    stream = lm.stream(QUESTION, **{**LONG, "max_tokens": 3000})
    next(stream)
    monkeypatch.setattr(Inbox, "_put", failing_once(Inbox._put, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    lm.unload()  # which waits for rows
    assert not lm.loaded and next(stream, None) is None


def test_errors_that_are_kept_hold_no_model(monkeypatch: pytest.MonkeyPatch):
    """Neither that of a step, nor that of a caller's function, nor that of other work."""
    with mlx_mtp.load() as lm:
        with lm.models() as (target, _):
            alive = weakref.ref(target)
            del target
        kept: list[BaseException] = []
        calls: list[Callable[[], object]] = [
            lambda: lm.generate(QUESTION, **GREEDY),
            lambda: lm.generate(QUESTION, logits_processors=[stop]),
            lambda: lm.logits([2]),
        ]
        monkeypatch.setattr(engine, "commit", failing_once(engine.commit, RuntimeError()))
        monkeypatch.setattr("mlx_mtp.api.logits_after", failing_once(lambda *_: None, RuntimeError()))
        for call in calls:
            with pytest.raises((MTPError, RuntimeError)) as caught:
                call()
            kept.append(caught.value)
        lm.unload()
        gc.collect()
        assert len(kept) == 3 and alive() is None


@pytest.fixture(scope="module")
def siege() -> Iterator[Siege]:
    with Siege(5, ["greedy", "sampled", "left early"]) as siege:
        yield siege


def test_interruptions_anywhere(siege: Siege):
    """A few of those of scripts/prove_interruptions.py."""
    came = [siege.interrupt(how) for how in ("line", "async", "line", "signal", "line")]
    assert sum(came) > 2 and siege.struck
    siege.renew()
