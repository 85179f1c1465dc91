"""A short version of scripts/soak.py, and that it notices what it looks for."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp
from scripts.soak import GROWTH, Soak, soak
from tests.support.held import Held, listening
from tests.support.soak_calls import Callers, Text, drawn_call


def test_nothing_is_wrong_and_nothing_is_left():
    assert soak(seconds=1.5, minute=1.5, seed=1, calls=5, most=5, max_tokens=6) == []


class Mistaken:
    """Says of every call that it gives another text than it does."""

    calls = 3

    def call(self, number: int) -> dict[str, Any]:
        return drawn_call(0, number, 4)

    def text(self, number: int, answer: int = 0) -> Text:
        return Text([0], "?")


@pytest.mark.parametrize("job", ["_one", "_batch", "_each", "_async", "_client"])
def test_texts_that_differ_are_noticed(lm: mlx_mtp.MTPModel, address: str, tmp_path: Path, job: str):
    callers = Callers(lm, Mistaken(), [address], tmp_path)  # type: ignore[arg-type]
    for seed in range(2):
        getattr(callers, job)(Random(seed))
    assert len(callers.wrong) == callers.counts["texts"] > 0


def test_what_fails_is_noticed(lm: mlx_mtp.MTPModel, tmp_path: Path):
    callers = Callers(lm, Mistaken(), ["http://127.0.0.1:1"], tmp_path)  # type: ignore[arg-type]
    callers._kinds = {callers._client: 1}
    callers.work(Random(0), float("inf"))
    assert "ConnectError" in callers.wrong[0]


def test_what_is_left_is_noticed(lm: mlx_mtp.MTPModel, tmp_path: Path):
    run = Soak(Callers(lm, Mistaken(), [], tmp_path), 1, Held.now(tmp_path))  # type: ignore[arg-type]
    run.look_for(Held.now(tmp_path))
    assert not run.wrong
    end, loop = threading.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    task = loop.create_task(asyncio.sleep(0))
    array = mx.zeros(2**20)
    mx.eval(array)
    with (tmp_path / "half a file").open("w"):
        run.look_for(Held.now(tmp_path))
    end.set()
    thread.join()
    loop.run_until_complete(task)
    loop.close()
    left = "\n".join(run.wrong)
    for name in (
        "thread forgotten",
        "task <coroutine object sleep",
        "descriptor",
        "file half a file",
        "bytes of arrays",
    ):
        assert name in left


def test_errors_that_nobody_is_told_are_noticed():
    with listening() as heard:
        logging.getLogger("mlx_mtp").error("it failed")
        thread = threading.Thread(target=lambda: 1 // 0, name="failing")
        thread.start()
        thread.join()
    assert "it failed" in heard[0]
    assert "ZeroDivisionError" in heard[1]


def test_growth_is_noticed_beside_noise(lm: mlx_mtp.MTPModel, tmp_path: Path):
    run = Soak(Callers(lm, Mistaken(), [], tmp_path), 1, Held.now(tmp_path))  # type: ignore[arg-type]
    noisy = [50, 80, 100, 100, 130, 100, 100, 90, 101]
    for last, grown in ((100, False), (102, False), (104, True)):
        run.resident = [*noisy, last, 170, last, last]
        assert (run.growth() > GROWTH) == grown
