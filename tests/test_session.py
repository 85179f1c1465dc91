"""The owner of a model and those who read from it: slow ones, ones that vanish, and what happens at the end."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp import GenerationOptions, MTPError, PromptError
from mlx_mtp.session import owner as session_module

QUESTION = "What is a drafter?"
LONG = {"max_tokens": 3000, "temperature": 0.0, "ignore_eos": True, "draft_length": 2}
PROMPT = [2] + [30 + i % 900 for i in range(2990)]


@pytest.fixture(scope="module")
def lm() -> Iterator[mlx_mtp.MTPModel]:
    with mlx_mtp.load(cache_bytes=0) as model:
        yield model


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


def idle(lm: mlx_mtp.MTPModel) -> bool:
    return not lm._session.call(lambda it: it.scheduler.busy)


def test_a_slow_reader_finds_its_text_and_slows_nobody(lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch):
    """Its row goes on up to a bound, then makes room; a second reader, and a third one, don't notice."""
    monkeypatch.setattr(session_module, "AHEAD", 40)
    options = {**LONG, "max_tokens": 100}
    expected = lm.generate(QUESTION, **options).tokens
    slow = lm.stream(QUESTION, **options)
    tokens = list(next(slow).tokens)
    other = lm.generate("Who are you?", **options)
    assert len(other.tokens) == 100
    until(lambda: idle(lm))
    (parked,) = lm._session.call(lambda it: it.scheduler._parked)
    assert 40 <= len(parked.rows[0].tokens) - len(tokens) <= 40 + 2 * 16
    assert lm.generate("Who are you?", **options).tokens == other.tokens
    for chunk in slow:
        tokens += chunk.tokens
    assert tokens == expected and chunk.stats.generated_tokens == 100


def test_slow_readers_give_up_their_places(lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session_module, "AHEAD", 20)
    expected = lm.generate(QUESTION, **{**LONG, "max_tokens": 40}).tokens
    streams = [lm.stream(QUESTION, **{**LONG, "max_tokens": 40}) for _ in range(11)]
    found = [[*next(stream).tokens] for stream in streams]  # more than a batch has places for
    for stream, tokens in zip(streams, found, strict=True):
        tokens += [token for chunk in stream for token in chunk.tokens]
    assert found == [expected] * 11


def test_a_slow_reader_keeps_nobody_waiting(lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch):
    """Not even one that needs a batch of its own; and the owner rests meanwhile."""
    monkeypatch.setattr(session_module, "AHEAD", 20)
    options = {**LONG, "max_tokens": 100}
    slow = lm.stream(QUESTION, **options)
    tokens = list(next(slow).tokens)
    until(lambda: idle(lm))
    exact = lm.stream(QUESTION, exactness="invariant", **options)
    other = list(next(exact).tokens)
    until(lambda: idle(lm))
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.2
    for stream, own in ((exact, other), (slow, tokens)):
        own += [token for chunk in stream for token in chunk.tokens]
    assert tokens == other == lm.generate(QUESTION, **options).tokens


def test_a_stream_that_is_dropped_ends(lm: mlx_mtp.MTPModel):
    stream = lm.stream(QUESTION, **LONG)
    next(stream)
    del stream
    gc.collect()
    until(lambda: idle(lm), 10)


def test_closing_from_another_thread_ends_a_reader_that_waits(lm: mlx_mtp.MTPModel):
    """Here for the end of a long prompt."""
    stream, chunks = lm.stream(PROMPT, max_tokens=5), []
    reader = threading.Thread(target=lambda: chunks.extend(stream))
    reader.start()
    until(lambda: not idle(lm))
    stream.close()
    reader.join(10)
    assert not reader.is_alive() and not chunks
    stream.close()
    assert next(stream, None) is None


def test_a_cancelled_task_comes_back_at_once(lm: mlx_mtp.MTPModel):
    async def cancel() -> float:
        async def read() -> None:
            async for _ in lm.astream(PROMPT, max_tokens=5):
                pass

        task = asyncio.create_task(read())
        while idle(lm):
            await asyncio.sleep(0.01)
        begun = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begun

    assert asyncio.run(cancel()) < 2  # the whole prompt takes many times as long
    until(lambda: idle(lm), 30)


def test_an_event_loop_that_has_ended_reads_no_more(lm: mlx_mtp.MTPModel):
    loop = asyncio.new_event_loop()
    chunks = lm.astream(QUESTION, **LONG)
    loop.run_until_complete(chunks.__anext__())
    loop.close()
    until(lambda: idle(lm), 30)
    del chunks


def test_an_event_ends_calls_that_block(lm: mlx_mtp.MTPModel):
    event = threading.Event()
    threading.Timer(0.3, event.set).start()
    result = lm.generate(QUESTION, cancel=event, **LONG)
    assert result.finish_reason == "cancelled" and 0 < len(result.tokens) < 3000
    assert result.stats.generated_tokens == len(result.tokens)
    assert result.tokens == lm.generate(QUESTION, **{**LONG, "max_tokens": len(result.tokens)}).tokens
    results = lm.generate_batch([QUESTION, PROMPT, QUESTION], batch_size=2, cancel=event, **LONG)
    assert [it.finish_reason for it in results] == ["cancelled"] * 3
    assert lm.generate(QUESTION, cancel=threading.Event(), max_tokens=3, temperature=0).finish_reason == "length"
    with pytest.raises(PromptError, match="cancel"):
        lm.generate(QUESTION, cancel=True)  # type: ignore[call-overload]


def test_closing_the_model_ends_those_who_wait():
    """Those whose texts run or whose prompts are read, and those whose work the thread hasn't begun."""
    lm = mlx_mtp.load(cache_bytes=0)
    errors: list[str] = []

    def read(call: Callable[[], object]) -> None:
        try:
            call()
        except MTPError as error:
            errors.append(str(error))

    def begun(call: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=read, args=(call,))
        thread.start()
        return thread

    prompt = PROMPT[:1000]
    running = [begun(lambda: lm.generate(QUESTION, **LONG)), begun(lambda: list(lm.stream(prompt, **LONG)))]
    until(lambda: not idle(lm))
    reached, gate = threading.Event(), threading.Event()
    holding = begun(lambda: lm._session.call(lambda _: (reached.set(), gate.wait(60))))
    reached.wait(60)
    waiting = [begun(lambda: list(lm.stream(prompt))), begun(lambda: lm.logits(prompt))]
    until(lambda: len(lm._session._work) >= 3)
    closing = threading.Thread(target=lm.close)
    closing.start()
    until(lambda: lm._session._closing)
    gate.set()
    for thread in (*running, holding, *waiting, closing):
        thread.join(60)
    assert len(errors) == 4 and all("closed" in error for error in errors)


def test_a_model_that_is_dropped_gives_its_memory_back():
    lm = mlx_mtp.load()
    lm.generate(QUESTION, max_tokens=5)
    gc.collect()
    before = mx.get_active_memory() + mx.get_cache_memory()
    del lm
    gc.collect()
    assert mx.get_active_memory() + mx.get_cache_memory() < before - 10 * 2**20


def test_a_row_that_nobody_reads_gives_its_memory_back():
    with mlx_mtp.load(cache_bytes=0) as lm:
        lm.generate(QUESTION, max_tokens=2)
        before = mx.get_active_memory()
        stream = lm.stream([2, 40] * 200, **LONG)
        next(stream)
        assert mx.get_active_memory() > before + 2**19
        stream.close()
        until(lambda: mx.get_active_memory() < before + 2**18)


def test_models_leave_no_threads_behind():
    def threads() -> int:
        return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()

    counts = []
    for _ in range(3):
        with mlx_mtp.load() as lm:
            lm.generate(QUESTION, max_tokens=2)
        counts.append(threads())
    assert counts[-1] <= counts[0] + 1


def test_work_of_other_kinds_goes_on_beside_rows(lm: mlx_mtp.MTPModel, tmp_path: Path):
    stream = lm.stream(QUESTION, **LONG)
    tokens = list(next(stream).tokens)
    lm.save_prompt(PROMPT[:1300], tmp_path / "p.safetensors")
    assert lm.logits(PROMPT[:1200]).shape[0] == 1200
    tokens += next(stream).tokens
    stream.close()
    assert tokens == lm.generate(QUESTION, **{**LONG, "max_tokens": len(tokens)}).tokens


def test_borrowed_models(lm: mlx_mtp.MTPModel):
    with lm.models() as (target, _), lm.models() as (same, _):
        assert same is target
        with pytest.raises(MTPError, match="borrowed"):
            lm.generate(QUESTION)
    assert lm.generate(QUESTION, max_tokens=2).tokens


def test_options_are_one_object(lm: mlx_mtp.MTPModel):
    options = GenerationOptions(max_tokens=12, temperature=0)
    expected = lm.generate(QUESTION, max_tokens=12, temperature=0).tokens
    assert lm.generate(QUESTION, options=options).tokens == expected
    assert lm.generate(QUESTION, 5, options=options).tokens == expected[:5]
    assert [t for chunk in lm.stream(QUESTION, options=options, max_tokens=4) for t in chunk.tokens] == expected[:4]
    assert lm.generate_batch([QUESTION], options=options)[0].tokens == expected
    ((_, one),) = lm.generate_each([{"prompt": QUESTION, "max_tokens": 3}], options=options)
    assert isinstance(one, mlx_mtp.Generation) and one.tokens == expected[:3]
    assert [t for chunk in lm.chat().send(QUESTION, options=options) for t in chunk.tokens] == expected
    with pytest.raises(PromptError, match="options"):
        lm.generate(QUESTION, options={"max_tokens": 3})  # type: ignore[call-overload]
    for call in (lm.generate, lm.generate_batch, lm.generate_each, lm.stream, lm.chat().send):
        with pytest.raises(PromptError, match="temprature"):
            call([QUESTION], temprature=1)  # type: ignore[operator]
    for wrong in ({"temperature": -1}, {"max_tokens": 0}, {"stop": 5}, {"draft_length": 99}, {"sanitize": 1}):
        with pytest.raises(PromptError, match=next(iter(wrong))):
            GenerationOptions(**wrong)  # type: ignore[arg-type]


def test_more_answers_than_one_call_gives(lm: mlx_mtp.MTPModel):
    with pytest.raises(PromptError, match="256"):
        lm.generate(QUESTION, n=10**12)


def test_a_forked_child_is_told(lm: mlx_mtp.MTPModel):
    lm.generate(QUESTION, max_tokens=2)
    here, there = multiprocessing.Pipe()

    def child() -> None:
        try:
            lm.generate(QUESTION, max_tokens=2)
        except MTPError as error:
            there.send(str(error))
        lm.close()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert here.poll(30) and "fork" in here.recv()
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("program", [
    # A model that was used in a thread that has ended.
    "def work():\n    lm = mlx_mtp.load(); lm.generate([2, 40], max_tokens=5); lm.close()\n"
    "for _ in range(2):\n    t = threading.Thread(target=work); t.start(); t.join()",
    # The end of the program in the middle of a text, with nobody closing anything.
    "lm = mlx_mtp.load(); s = lm.stream([2, 40], max_tokens=3000, ignore_eos=True); next(s)",
    # The same while another thread waits for a text.
    "lm = mlx_mtp.load()\n"
    "threading.Thread(target=lambda: lm.generate([2, 40], max_tokens=3000, ignore_eos=True), daemon=True).start()\n"
    "time.sleep(0.3)",
])  # fmt: skip
def test_programs_end_by_themselves(program: str):
    code = f"import mlx_mtp, threading, time\n{program}\nprint('end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
