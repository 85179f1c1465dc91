"""The example app's worker: what a window hears from it (scripts/example_worker.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_mtp
from mlx_mtp.decode.request import Stats
from scripts import example_worker
from scripts.example_worker import Ended, Event, Failed, Status, Text, Worker, describe

QUESTION = "Who are you?"


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def until_end(worker: Worker) -> list[Event]:
    """The events up to the end of a command."""
    events = [worker.events.get(timeout=60)]
    while not isinstance(events[-1], Ended | Failed):
        events.append(worker.events.get(timeout=60))
    return events


def text_of(events: list[Event]) -> str:
    return "".join(span.text for event in events if isinstance(event, Text) for span in event.spans)


def test_a_conversation(worker: Worker):
    worker.load(None)
    assert until_end(worker)[-2:] == [Status("the embedded pair, with its drafter"), Ended()]
    worker.ask(QUESTION)
    events = until_end(worker)
    assert len(text_of(events)) > 20 and events[-1] == Ended()
    assert {span.drafted for event in events if isinstance(event, Text) for span in event.spans} == {False, True}
    lines = [event.text for event in events if isinstance(event, Status)]
    assert lines[0] == "thinking ..." and lines[1].startswith("reading") and "drafts accepted" in lines[-1]
    worker.reset()
    assert until_end(worker) == [Ended()]
    worker.ask(QUESTION)
    assert text_of(until_end(worker)) == text_of(events), "nothing is left of the first conversation"


def test_it_stops_when_told(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    """At once, though the answer would be long; the next one isn't affected."""
    monkeypatch.setattr(example_worker, "MAX_TOKENS", 10**6)
    worker.load(None)
    worker.ask("Tell me a short story about a fox.")
    until_end(worker)
    while not isinstance(worker.events.get(timeout=60), Text):
        pass
    worker.stop()
    worker.stop()
    assert until_end(worker)[-1] in (Ended("stopped"), Ended())  # it may have come to its end meanwhile
    worker.ask(QUESTION)
    assert until_end(worker)[-1] == Ended()


def test_an_answer_that_is_cut_off_says_so(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(example_worker, "MAX_TOKENS", 3)
    worker.load(None)
    until_end(worker)
    worker.ask(QUESTION)
    assert until_end(worker)[-1] == Ended("cut off")


def test_what_goes_wrong_is_told_and_the_worker_goes_on(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker.ask(QUESTION)
    assert until_end(worker) == [Failed("no model is loaded: choose one first")]
    worker.load(str(tmp_path))
    failed = until_end(worker)[-1]
    assert isinstance(failed, Failed) and str(tmp_path) in failed.message
    monkeypatch.setattr(example_worker.mlx_mtp, "load", lambda *_, **__: 1 / 0)
    worker.load(None)
    assert isinstance(until_end(worker)[-1], Failed)
    monkeypatch.undo()
    worker.load(None)
    assert until_end(worker)[-1] == Ended()


def test_a_model_makes_room_for_the_next_and_is_freed_in_the_end(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    models: list[mlx_mtp.MTPModel] = []
    load = mlx_mtp.load

    def loaded(*args: object, **options: object) -> mlx_mtp.MTPModel:
        assert not any(model.loaded for model in models)
        models.append(load(*args, **options))  # type: ignore[arg-type]
        return models[-1]

    monkeypatch.setattr(example_worker.mlx_mtp, "load", loaded)
    monkeypatch.setattr(example_worker, "MAX_TOKENS", 3)
    for _ in range(2):
        worker.load(None)
        until_end(worker)
    models[1].unload()
    worker.ask(QUESTION)
    assert until_end(worker)[0] == Status("loading the model again ...")
    worker.close()
    threads = [it for it in threading.enumerate() if it.name == "worker"]
    for thread in threads:
        thread.join(60)
    assert len(models) == 2 and not any(model.loaded for model in models)


def test_the_status_line():
    assert describe(Stats(generated_tokens=5)) == "5 tokens, 0.0 tokens/s"
    stats = Stats(generated_tokens=21, generation_seconds=2.0, drafted=40, accepted=10)
    assert describe(stats) == "21 tokens, 10.0 tokens/s, 10 of 40 drafts accepted (25%)"
