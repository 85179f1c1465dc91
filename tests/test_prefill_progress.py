"""Callers are told how far the prefill of their prompt is (the option `prefill_progress`)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest

import mlx_mtp
from mlx_mtp import PromptError
from mlx_mtp.decode import scheduler as scheduler_module

PROMPT = [2] + [30 + i % 900 for i in range(299)]
CHUNK = 128
STEPS = [(0, 300), (128, 300), (256, 300), (300, 300)]
OPTIONS = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


class Report:
    """A callback that keeps what it was told, and in which thread."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.threads: set[threading.Thread] = set()

    def __call__(self, done: int, total: int) -> None:
        self.steps.append((done, total))
        self.threads.add(threading.current_thread())


@pytest.fixture(scope="module")
def lm() -> Iterator[mlx_mtp.MTPModel]:
    with mlx_mtp.load(cache_bytes=0) as model:
        yield model


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "CHUNK", CHUNK)
    monkeypatch.setattr(scheduler_module, "CHUNK_BESIDE", CHUNK)


def test_every_call_reports_each_chunk(lm: mlx_mtp.MTPModel):
    def generate(report: Report) -> None:
        lm.generate(PROMPT, prefill_progress=report, **OPTIONS)

    def stream(report: Report) -> None:
        list(lm.stream(PROMPT, options=mlx_mtp.GenerationOptions(prefill_progress=report, **OPTIONS)))

    def astream(report: Report) -> None:
        async def read() -> None:
            async for _ in lm.astream(PROMPT, prefill_progress=report, **OPTIONS):
                pass

        asyncio.run(read())

    def batch(report: Report) -> None:
        lm.generate_batch([PROMPT], prefill_progress=report, **OPTIONS)

    def each(report: Report) -> None:
        list(lm.generate_each([{"prompt": PROMPT, "prefill_progress": report}], **OPTIONS))

    for call in (generate, stream, astream, batch, each):
        report = Report()
        call(report)
        assert report.steps == STEPS, call
        assert len(report.threads) == 1 and threading.current_thread() not in report.threads


def test_short_prompts_of_one_block_report_their_own_lengths(lm: mlx_mtp.MTPModel):
    short, long = Report(), Report()
    prompts = [{"prompt": PROMPT[:20], "prefill_progress": short}, {"prompt": PROMPT[:50], "prefill_progress": long}]
    lm.generate_batch(prompts, **OPTIONS)
    assert short.steps == [(0, 20), (20, 20)] and long.steps == [(0, 50), (50, 50)]


def test_answers_that_share_a_prefill_report_it_once(lm: mlx_mtp.MTPModel):
    report = Report()
    assert len(lm.generate(PROMPT, n=3, prefill_progress=report, **OPTIONS)) == 3
    assert report.steps == STEPS


def test_cached_tokens_are_done_when_the_prefill_begins():
    with mlx_mtp.load() as lm:
        lm.generate(PROMPT, **OPTIONS)
        report = Report()
        again = lm.generate([*PROMPT, 50, 51], prefill_progress=report, **OPTIONS)
    assert report.steps[0] == (again.stats.cached_tokens, 302) and again.stats.cached_tokens > 0
    assert report.steps[-1] == (302, 302)
    assert all(a < b for (a, _), (b, _) in pairwise(report.steps))


@pytest.mark.parametrize("at", [0, 128, 300])
def test_a_callback_that_fails_ends_its_own_text_only(lm: mlx_mtp.MTPModel, at: int):
    def fail(done: int, total: int) -> None:
        if done == at:
            raise ValueError(f"no window at {done} of {total}")

    expected = lm.generate("Hello!", **OPTIONS).tokens
    prompts = [{"prompt": PROMPT, "prefill_progress": fail}, {"prompt": "Hello!"}]
    found = dict(lm.generate_each(prompts, **OPTIONS))
    assert isinstance(found[0], PromptError) and isinstance(found[0].__cause__, ValueError)
    assert str(found[0]) == f"prefill_progress failed: ValueError('no window at {at} of 300')"
    assert isinstance(found[1], mlx_mtp.Generation) and found[1].tokens == expected
    with pytest.raises(PromptError, match="no window"):
        list(lm.stream(PROMPT, prefill_progress=fail, **OPTIONS))


def test_a_callback_can_end_the_text(lm: mlx_mtp.MTPModel):
    event = threading.Event()
    result = lm.generate(PROMPT, cancel=event, prefill_progress=lambda done, _: done == 128 and event.set(), **OPTIONS)
    assert result.finish_reason == "cancelled" and not result.tokens


def test_a_callback_that_uses_the_model_is_told_that_it_cannot(lm: mlx_mtp.MTPModel):
    """It would wait for itself."""
    with pytest.raises(PromptError, match="another thread"):
        lm.generate(PROMPT, prefill_progress=lambda *_: lm.generate("Hello!"), **OPTIONS)
    assert lm.generate("Hello!", **OPTIONS).tokens


def test_only_functions_are_taken(lm: mlx_mtp.MTPModel):
    with pytest.raises(PromptError, match="prefill_progress"):
        lm.generate(PROMPT, prefill_progress=True)  # type: ignore[call-overload]
