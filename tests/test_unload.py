"""Models that give their memory back and are loaded again by the next call (`unload`, `idle_unload`)."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp import CheckpointError, MTPError
from mlx_mtp.checkpoint import load as load_module
from mlx_mtp.session import loading
from mlx_mtp.session import owner as owner_module

QUESTION = "What is a drafter?"
OPTIONS = {"max_tokens": 12, "temperature": 0.0}
LONG = {"max_tokens": 3000, "temperature": 0.0, "ignore_eos": True, "draft_length": 2}
WEIGHTS = 10 * 2**20
"""Bytes that the embedded pair's weights exceed."""


class Gate:
    """Stands before the loading of a target: counts who passes, and can be shut."""

    def __init__(self) -> None:
        self.loads = 0
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, *args: object) -> object:
        self.loads += 1
        self.reached.set()
        assert self.open.wait(60)
        return load_module.load_target(*args)  # type: ignore[arg-type]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(loading, "load_target", gate)
    return gate


@pytest.fixture
def lm(gate: Gate) -> Iterator[mlx_mtp.MTPModel]:
    with mlx_mtp.load() as model:
        yield model


def until(true: Callable[[], bool]) -> None:
    """Waits until something is true."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


def held() -> int:
    gc.collect()
    return int(mx.get_active_memory() + mx.get_cache_memory())


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Starts a call in a thread; the list receives its result, or its error."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except MTPError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_the_memory_is_given_back_and_the_next_call_loads_again(lm: mlx_mtp.MTPModel, gate: Gate):
    expected = lm.generate(QUESTION, **OPTIONS)
    before = held()
    lm.unload()
    assert not lm.loaded and held() < before - WEIGHTS
    lm.unload()  # there is nothing left to unload
    assert gate.loads == 1 and lm.encode(QUESTION)
    again = lm.generate(QUESTION, **OPTIONS)
    assert lm.loaded and gate.loads == 2
    assert again.tokens == expected.tokens and not again.stats.cached_tokens
    before = held()
    lm.unload()
    assert held() < before - WEIGHTS, "and again"


def test_loading_leaves_no_graph_of_what_was_drawn(lm: mlx_mtp.MTPModel):
    """New layers draw weights that nobody reads; the generator's next state hangs on all of that until it is known."""

    def operations(_: object) -> int:
        graph = io.StringIO()
        mx.export_to_dot(graph, mx.random.state[0])
        return graph.getvalue().count("label")

    assert lm._session.call(operations) == 0


def test_every_kind_of_call_loads_again(lm: mlx_mtp.MTPModel, tmp_path: Path):
    expected, kept = lm.generate(QUESTION, **OPTIONS), tmp_path / "prompt.safetensors"

    async def read() -> list[int]:
        return [token async for chunk in lm.astream(QUESTION, **OPTIONS) for token in chunk.tokens]

    def borrow() -> bool:
        with lm.models() as (target, drafter):
            return target is not None and drafter is not None

    chat = lm.chat()
    calls: list[tuple[Callable[[], object], object]] = [
        (lambda: [t for chunk in lm.stream(QUESTION, **OPTIONS) for t in chunk.tokens], expected.tokens),
        (lambda: asyncio.run(read()), expected.tokens),
        (lambda: lm.generate_batch([QUESTION], **OPTIONS)[0].tokens, expected.tokens),
        (lambda: "".join(chunk.text for chunk in chat.send(QUESTION, **OPTIONS)), expected.text),
        (lambda: lm.logits([2, 5]).shape[0], 2),
        (lambda: lm.save_prompt(QUESTION, kept), None),
        (lambda: lm.load_prompt(kept), expected.stats.prompt_tokens),
        (borrow, True),
    ]
    for call, result in calls:
        lm.unload()
        assert call() == result
        assert lm.loaded


def test_unloading_waits_for_texts_and_lets_others_begin(lm: mlx_mtp.MTPModel):
    stream = lm.stream(QUESTION, **LONG)
    next(stream)
    thread, done = in_thread(lm.unload)
    other = lm.generate(QUESTION, **OPTIONS)  # doesn't wait behind it
    assert other.text and not done and lm.loaded
    stream.close()
    thread.join(60)
    assert done == [None] and not lm.loaded


def test_a_reader_that_stands_still_keeps_the_model(lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch):
    """While its row is parked; the owner rests meanwhile."""
    monkeypatch.setattr(owner_module, "AHEAD", 20)
    stream = lm.stream(QUESTION, **{**LONG, "max_tokens": 200})
    tokens = list(next(stream).tokens)
    until(lambda: not lm._session.call(lambda it: it.scheduler.busy))
    thread, done = in_thread(lm.unload)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    assert not done and lm.loaded
    tokens += [token for chunk in stream for token in chunk.tokens]
    assert len(tokens) == 200
    thread.join(60)
    assert done == [None]


def test_threads_that_unload_and_generate_hinder_each_other_in_nothing(lm: mlx_mtp.MTPModel):
    expected = lm.generate(QUESTION, **OPTIONS).tokens

    def work() -> bool:
        return all(lm.generate(QUESTION, **OPTIONS).tokens == expected for _ in range(4))

    def unload() -> None:
        for _ in range(4):
            lm.unload()

    threads = [in_thread(call) for call in (work, unload, work, unload)]
    for thread, _ in threads:
        thread.join(60)
    assert [results for _, results in threads] == [[True], [None], [True], [None]]


def test_calls_wait_while_it_loads_again(lm: mlx_mtp.MTPModel, gate: Gate):
    expected = lm.generate(QUESTION, **OPTIONS).tokens
    lm.unload()
    gate.open.clear()
    threads = [in_thread(lambda: lm.generate(QUESTION, **OPTIONS).tokens) for _ in range(3)]
    until(lambda: gate.loads == 2)
    cancel = threading.Event()
    threads.append(in_thread(lambda: lm.generate(QUESTION, cancel=cancel, **LONG).finish_reason))
    cancel.set()
    given_up = lm.stream(QUESTION, **OPTIONS)
    reader, chunks = in_thread(lambda: list(given_up))
    given_up.close()
    reader.join(60)
    assert chunks == [[]], "a stream that is closed ends at once"
    gate.open.set()
    for thread, _ in threads:
        thread.join(60)
    assert [results for _, results in threads] == [[expected]] * 3 + [["cancelled"]] and gate.loads == 2


def test_a_trace_ends_with_the_model(lm: mlx_mtp.MTPModel, tmp_path: Path):
    with lm.trace(tmp_path / "trace.json"):
        lm.generate(QUESTION, **OPTIONS)
        lm.unload()
    assert not lm.loaded, "nothing is loaded only to end it"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    with lm.trace(tmp_path / "again.json"):
        lm.generate(QUESTION, **OPTIONS)


def test_closing_while_it_loads_again_ends_all_calls(lm: mlx_mtp.MTPModel, gate: Gate):
    before = held()
    lm.unload()
    gate.open.clear()
    gate.reached.clear()
    calls: list[Callable[[], object]] = [
        lambda: lm.generate(QUESTION, **OPTIONS), lambda: list(lm.stream(QUESTION)), lambda: lm.logits([2]), lm.unload,
    ]  # fmt: skip
    threads = [in_thread(calls[0])]
    assert gate.reached.wait(60)
    threads += [in_thread(call) for call in calls[1:]]
    until(lambda: len(lm._session._work) == 4)
    closing, closed = in_thread(lm.close)
    until(lambda: lm._session._closing)
    gate.open.set()
    for thread, _ in [*threads, (closing, closed)]:
        thread.join(60)
    assert closed == [None] and not lm.loaded
    assert all("closed" in str(results[0]) for _, results in threads)
    assert held() < before - WEIGHTS
    with pytest.raises(MTPError, match="closed"):
        lm.unload()


def test_a_model_that_cannot_be_loaded_again_says_so_and_tries_again(tmp_path: Path):
    embedded = Path(mlx_mtp.__file__).parent / "demo"
    shutil.copytree(embedded, tmp_path / "pair")
    folder, aside = tmp_path / "pair" / "target", tmp_path / "aside"
    with mlx_mtp.load(folder, tmp_path / "pair" / "drafter") as lm:
        expected = lm.generate(QUESTION, **OPTIONS).tokens
        lm.unload()
        folder.rename(aside)
        for call in (lambda: lm.generate(QUESTION), lambda: next(lm.stream(QUESTION)), lambda: lm.logits([2])):
            with pytest.raises(CheckpointError, match="target"):
                call()
        with pytest.raises(CheckpointError), lm.models():
            pass
        assert not lm.loaded
        aside.rename(folder)
        assert lm.generate(QUESTION, **OPTIONS).tokens == expected


def test_idle_models_are_unloaded(caplog: pytest.LogCaptureFixture, gate: Gate):
    caplog.set_level(logging.INFO, "mlx_mtp")
    with mlx_mtp.load(idle_unload=0.2) as lm:
        until(lambda: not lm.loaded)
        assert gate.loads == 1
        stream = lm.stream(QUESTION, **LONG)
        until(lambda: next(stream).stats.generation_seconds > 0.4)  # longer than an idle model lives
        assert gate.loads == 2 and lm.loaded
        stream.close()
        until(lambda: not lm.loaded)
        lm.generate(QUESTION, **OPTIONS)
        assert gate.loads == 3
        until(lambda: not lm.loaded)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["unloaded"] * 3


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), True, "60"])
def test_idle_times_that_are_none(seconds: object):
    with pytest.raises(MTPError, match="idle_unload"):
        mlx_mtp.load(idle_unload=seconds)  # type: ignore[arg-type]


def test_the_longest_idle_time():
    with mlx_mtp.load(idle_unload=float("inf")) as lm:
        assert lm.generate(QUESTION, **OPTIONS).text and lm.loaded
