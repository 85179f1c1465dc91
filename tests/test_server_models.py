"""Several models by name: loaded when asked for, unloaded when idle or when another needs their memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import mlx_mtp
from mlx_mtp.checkpoint.sizes import row_bytes
from mlx_mtp.errors import CheckpointError
from mlx_mtp.server.app import make_app
from mlx_mtp.server.registry import Entry, Models
from mlx_mtp.server.settings import ServerOptions
from tests.support.server import entry, running, wait_until
from tests.support.tiny_checkpoints import make_pair

GB = 10**9


@contextmanager
def serving(*entries: Entry, memory: int = GB * 3 // 2, **options: float) -> Iterator[httpx.Client]:
    """A server of these models, in whose memory one with a gigabyte of weights fits at a time, and a client of it."""
    app = make_app(Models(entries, memory), ServerOptions(**options))  # type: ignore[arg-type]
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, model: str | None) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "What is a drafter?"}], "max_tokens": 10, "temperature": 0}
    return client.post("/v1/chat/completions", json=body | ({"model": model} if model else {}))


def test_models_replace_each_other_where_only_one_fits():
    a, b = entry("a", weights=GB), entry("b", weights=GB)
    with serving(a, b) as client:
        assert (a.lm, b.lm) == (None, None)
        texts = []
        for model, loaded, unloaded in (("a", a, b), ("b", b, a), (None, a, b)):
            answer = ask(client, model).json()
            assert answer["model"] == loaded.name
            texts.append(answer["choices"][0]["message"]["content"])
            assert loaded.lm
            assert unloaded.lm is None
        assert len(set(texts)) == 1


def test_models_that_fit_together_stay():
    a, b = entry("a", weights=GB), entry("b", weights=GB)
    with serving(a, b, memory=3 * GB) as client:
        for model in "aba":
            assert ask(client, model).status_code == 200
        assert a.lm
        assert b.lm


def test_a_model_that_is_answering_is_not_unloaded():
    a, b = entry("a", weights=GB), entry("b", weights=GB)
    body = {"prompt": "One", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with serving(a, b) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # dropping it would end the answer
            next(lines)
            refused = ask(client, "b")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert "leave no room for 'b'" in refused.json()["error"]["message"]
        wait_until(lambda: ask(client, "b").status_code == 200)


def test_requests_wait_for_a_load_that_is_under_way():
    loads = []

    def load() -> mlx_mtp.MTPModel:
        loads.append(time.monotonic())
        time.sleep(0.3)
        return mlx_mtp.load()

    with serving(Entry("slow", load, 1)) as client, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: ask(client, "slow"), range(4)))
    assert [it.status_code for it in answers] == [200] * 4
    assert len(loads) == 1


def test_an_idle_model_is_unloaded_and_comes_back():
    a = entry("a")
    with serving(a, idle_unload=0.5) as client:
        assert ask(client, "a").status_code == 200
        wait_until(lambda: a.lm is None)
        assert ask(client, "a").status_code == 200


def test_a_load_that_fails_is_told_without_its_reason(caplog: pytest.LogCaptureFixture):
    def load() -> mlx_mtp.MTPModel:
        raise CheckpointError("/secret/folder is damaged")

    with serving(Entry("bad", load, 1), entry("good")) as client:
        for _ in range(2):
            answer = ask(client, "bad")
            assert answer.status_code == 503
            assert "can't be loaded" in answer.json()["error"]["message"]
            assert "secret" not in answer.text
        assert ask(client, "good").status_code == 200
    assert "/secret/folder is damaged" in caplog.text


def test_a_model_without_a_tokenizer_is_refused_without_its_path(tmp_path: Path):
    make_pair("31b", tmp_path)
    lm = mlx_mtp.load(tmp_path / "target", drafter=False)
    with serving(entry("bare", lm)) as client:
        answer = client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 2})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("bare has no tokenizer")
        assert 'mlx_mtp_answers{model="bare"} 0.0' in client.get("/metrics").text


def kv_limits(*entries: Entry) -> int:
    """Bytes that rows and prompt caches of loaded models may take together."""
    schedulers = [it.lm._session.call(lambda it: it.scheduler) for it in entries if it.lm]
    return sum(it.capacity.kv_budget + it.cache.limit for it in schedulers)


def test_the_kv_of_models_that_are_loaded_together_fits_in_memory():
    a, b = entry("a", weights=GB), entry("b", weights=GB)
    with serving(a, b, memory=3 * GB, idle_unload=1.0) as client:
        assert ask(client, "a").status_code == 200
        assert kv_limits(a) == 2 * GB * 7 // 8
        assert ask(client, "b").status_code == 200
        assert kv_limits(a, b) == GB * 7 // 8
        assert kv_limits(a) == kv_limits(b)
        assert a.lm
        assert a.lm.kv_budget == a.lm._session.call(lambda it: it.scheduler).capacity.kv_budget
        wait_until(lambda: b.lm is None and ask(client, "a").status_code == 200)
        assert a.lm
        assert kv_limits(a) == 2 * GB * 7 // 8


def test_a_model_that_is_not_used_goes_if_its_share_of_the_kv_would_be_too_small():
    a, b = entry("a", weights=GB), entry("b", weights=GB)
    a.kv = b.kv = GB // 2
    with serving(a, b, memory=3 * GB) as client:
        for model, other in ((a, b), (b, a)):
            assert ask(client, model.name).status_code == 200
            assert model.lm
            assert other.lm is None


def test_running_answers_keep_their_kv_when_another_model_is_asked_for():
    a, b = entry("a", weights=0), entry("b", weights=0)
    body = {"prompt": "One", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with mlx_mtp.load() as lm:
        row = row_bytes(lm.config.text, 4100, lm.description.dtype_bytes)
    # Enough for one row and the prompt cache's quarter, but not for half of the memory to be another model's.
    with serving(a, b, memory=2 * row) as client:
        with client.stream("POST", "/v1/completions", json=body | {"model": "a"}) as answer:
            lines = answer.iter_lines()
            next(lines)
            before = kv_limits(a)
            assert ask(client, "b").status_code == 503
            assert b.lm is None
            assert kv_limits(a) == before
        wait_until(lambda: ask(client, "b").status_code == 200)
        assert kv_limits(a, b) <= 2 * row


def test_a_client_that_leaves_during_a_load_gives_its_place_back():
    may_load = threading.Event()

    def load() -> mlx_mtp.MTPModel:
        may_load.wait(20)
        return mlx_mtp.load()

    slow = Entry("slow", load, 1)
    with serving(slow) as client:
        body = {"prompt": "One", "max_tokens": 5}
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.3)
        with pytest.raises(httpx.ReadTimeout):
            counted = {"model": "slow", "messages": [{"role": "user", "content": "One"}]}
            client.post("/v1/messages/count_tokens", json=counted, timeout=0.3)
        wait_until(lambda: slow.answers == 0)
        assert slow.lm is None
        may_load.set()
        assert client.post("/v1/completions", json=body).status_code == 200
        assert slow.lm
