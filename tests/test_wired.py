"""What is wired while models run, on a Mac that isn't there (wired.py)."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp.session import owner
from mlx_mtp.system.wired import SPARE, Wired

MOST = 10**10


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is asked of MLX, on a machine with Metal that recommends MOST bytes."""
    asked: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": MOST})
    monkeypatch.setattr(mx, "set_wired_limit", asked.append)
    return asked


def test_all_models_of_a_process_share_a_limit(limits: list[int]):
    wired, first, second = Wired(), object(), object()
    wired.hold(first, 10**9)
    wired.hold(first, 10**9)
    wired.hold(second, 3 * 10**9)
    wired.hold(second, 10**10)
    wired.release(second)
    wired.release(second)
    wired.release(first)
    assert limits == [10**9 + SPARE, 4 * 10**9 + SPARE, MOST, 10**9 + SPARE, 0]


def test_nothing_is_asked_without_metal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("there is no such thing here"))
    wired = Wired()
    wired.hold(wired, 10**9)
    wired.release(wired)
    assert not wired.possible and not wired.most and not wired.bytes


def test_a_model_is_wired_while_it_has_rows(limits: list[int], monkeypatch: pytest.MonkeyPatch):
    """Weights, KV of its rows and a rest; nothing once it is idle, or closed."""
    monkeypatch.setenv("MLX_MTP_SELF_TEST", "0")
    wired = Wired()
    monkeypatch.setattr(owner, "WIRED", wired)
    with mlx_mtp.load(cache_bytes=0) as lm:
        assert limits == []
        lm.generate("Hello!", max_tokens=5)
        weights = lm._session.call(lambda it: it.weights)
        assert all(limit >= weights + SPARE for limit in limits if limit) and limits[-1] == 0
        assert max(limits) > weights + SPARE, "its KV counts"
        stream = lm.stream("Hello!", max_tokens=3000, ignore_eos=True)
        next(stream)
        assert wired.bytes > weights + SPARE
    assert wired.bytes == 0 and not any(it.name == "mlx_mtp" and wired.bytes for it in threading.enumerate())
