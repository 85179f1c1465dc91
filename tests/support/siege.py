"""Interrupts calls, and says what is wrong afterwards: for the test and the proof of interruptions."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from random import Random

import mlx.core as mx

import mlx_mtp
from mlx_mtp import MTPError
from mlx_mtp.decode import scheduler
from mlx_mtp.session.loading import Loaded
from mlx_mtp.session.threads import ModelThread
from tests.support.interruptions import (
    CALLS,
    KINDS,
    Caller,
    Line,
    Strike,
    Texts,
    recorder,
    strike_thread,
    striker,
    trace_here,
)

LIMIT = 300.0
"""Seconds after which a call hangs: far more than any takes on a busy machine."""

SLACK = 2**20
"""Bytes by which memory may differ from one time to another: caches of constants grow to their bounds."""

RAW = {"other", "unload"}
"""Calls whose work in the model's thread passes on whatever it raises, as their documentation says."""


class Wrong(Exception):  # noqa: N818 - a finding, and no failure of this module
    """Something isn't as it should be after an interruption."""


class Siege:
    """Interrupts the calls of one model, again and again; a context manager that closes it.

    Attributes:
        lm: The model.
        lines: By call and side ("caller" or "model"), the lines of the package that it runs.
        struck: The lines at which an exception was raised.
        ends: How calls ended, by side of the strike: "right", "failed" (the package's error) or "struck".
    """

    def __init__(self, seed: int, names: list[str] | None = None) -> None:
        """Loads a model, and runs every call alone: to know its texts, and its lines."""
        self._before = threading.excepthook, scheduler.CHUNK, scheduler.CHUNK_BESIDE
        # Short prompts are prefilled in several chunks.
        threading.excepthook, scheduler.CHUNK, scheduler.CHUNK_BESIDE = _ignore_strikes, 64, 32
        self._rng, self._names = Random(seed), names or list(CALLS)
        self.lines: dict[tuple[str, str], set[Line]] = {}
        self.struck, self.ends = set[Line](), Counter[tuple[str, str]]()
        self._expected: dict[str, Texts] = {}
        self._seconds: dict[str, float] = {}
        self._without = mx.get_active_memory()
        self.lm = mlx_mtp.load()
        for name in self._names:
            self._learn(name)
        self._threads = _others()
        self._models = _models()
        self._held = self._memory()

    def __enter__(self) -> Siege:
        return self

    def __exit__(self, *_: object) -> None:
        self.lm.close()
        threading.excepthook, scheduler.CHUNK, scheduler.CHUNK_BESIDE = self._before

    def interrupt(self, how: str) -> bool:
        """Runs one to three calls at a time, and interrupts the first, or the model; False if that came too late.

        Args:
            how: "line" (at a line of the package), "async" (wherever a thread is), or "signal" (as Ctrl-C, in the main
                thread, in which this must be called then).

        Raises:
            Wrong: Something isn't as it should be.
        """
        rng = self._rng
        side = "caller" if how == "signal" else rng.choice(["caller", "model"])
        twice = [name for name in self._names if name != "other"]  # two traces at a time exclude each other
        callers = [Caller(name) for name in rng.sample([*self._names, *twice], rng.randint(1, 3))]
        strike = {"line": self._at_a_line, "async": self._anywhere, "signal": self._by_signal}[how]
        reached = strike(callers, side)
        try:
            self._judge(callers, side)
            self._check_afterwards()
        except Wrong as wrong:
            raise Wrong(f"{how}, {side}, {[it.name for it in callers]}, {sorted(self.struck)[-1:]}: {wrong}") from None
        return reached

    def renew(self) -> None:
        """Checks that no memory has leaked; then closes the model, which must free it, and loads another."""
        grown = self._memory() - self._held
        _in_time(self.lm.close)
        gc.collect()
        left = mx.get_active_memory() - self._without
        self.lm = mlx_mtp.load()
        if grown > SLACK:
            raise Wrong(f"{grown} bytes more are held than before")
        if left > 4 * SLACK:
            raise Wrong(f"{left} bytes are held by a model that was closed")
        self._held = self._memory()

    def _learn(self, name: str) -> None:
        """Runs a call alone, and then notes its lines."""
        begun, caller = time.monotonic(), Caller(name)
        caller.run(self.lm)
        self._seconds[name] = time.monotonic() - begun
        if caller.error:
            raise caller.error
        self._expected[name] = caller.texts
        mine, model = set[Line](), set[Line]()
        self.lm._session.call(lambda _: trace_here(recorder(model)))
        again = Caller(name)
        again.run(self.lm, recorder(mine))
        self.lm._session.call(lambda _: trace_here(None))
        if again.texts != caller.texts:
            raise Wrong(f"{name} doesn't give the same twice")
        self.lines[name, "caller"], self.lines[name, "model"] = mine, model

    def _at_a_line(self, callers: list[Caller], side: str) -> bool:
        known, done = self.lines[callers[0].name, side], list[Line]()
        line = self._rng.choice(sorted(known - self.struck) or sorted(known))
        tracer = striker(line, self._rng.choice(KINDS), done)
        if side == "model":
            self._trace_model(tracer)
        callers[0].start(self.lm, tracer if side == "caller" else None)
        for caller in callers[1:]:
            caller.start(self.lm)
        _join(callers)
        if side == "model":
            self._trace_model(None)
        self.struck.update(done)
        return bool(done)

    def _trace_model(self, tracer: object) -> None:
        try:
            _in_time(lambda: self.lm._session.call(lambda _: trace_here(tracer)))  # type: ignore[arg-type]
        except (Strike, MTPError):  # it struck this very call
            trace_here(None)

    def _anywhere(self, callers: list[Caller], side: str) -> bool:
        for caller in callers:
            caller.start(self.lm)
        time.sleep(self._moment(callers))
        thread = self.lm._session._thread if side == "model" else callers[0].thread
        assert thread and thread.ident
        struck = thread.is_alive() and strike_thread(thread.ident, self._rng.choice(KINDS))
        _join(callers)
        return struck

    def _moment(self, callers: list[Caller]) -> float:
        """Seconds after which to strike: the first call is probably running."""
        return self._rng.uniform(0, self._seconds[callers[0].name])

    def _by_signal(self, callers: list[Caller], _: str) -> bool:
        main = threading.main_thread().ident
        assert main == threading.get_ident()
        timer = threading.Timer(self._moment(callers), signal.pthread_kill, (main, signal.SIGINT))
        for caller in callers[1:]:
            caller.start(self.lm)
        running = True
        try:
            timer.start()
            callers[0].run(self.lm)
            running = False
            timer.join()
        except KeyboardInterrupt:
            running = running and not callers[0].finished
        _join(callers[1:])
        return running or callers[0].error is not None

    def _judge(self, callers: list[Caller], side: str) -> None:
        """Checks what the calls gave: the right texts, or one of the errors that they may end with."""
        for i, caller in enumerate(callers):
            error, victim = caller.error, side == "caller" and i == 0
            expected = self._expected[caller.name]
            if caller.finished:
                end = "right"
                if caller.texts != expected:
                    raise Wrong(f"{caller.name} gave {caller.texts} and not {expected}")
            elif isinstance(error, MTPError) and (victim or side == "model"):
                end = "failed"
            elif victim or (caller.name in RAW and isinstance(error, Strike)):
                end = "struck"
            else:
                raise Wrong(f"{caller.name} ended with {error!r}: {''.join(traceback.format_exception(error))}")
            for have, whole in zip(caller.texts, expected, strict=False):
                if have != whole[: len(have)]:
                    raise Wrong(f"{caller.name} gave {have}, which isn't how {whole} begins")
            self.ends[side, end] += 1
            caller.error = None

    def _check_afterwards(self) -> None:
        """Checks that a new call gives the right text, and that nothing of the old ones is left."""
        gc.collect()
        caller = Caller("greedy")
        _in_time(lambda: caller.run(self.lm))
        if caller.error or caller.texts != self._expected["greedy"]:
            raise Wrong(f"a call afterwards gave {caller.texts}, {caller.error!r}")
        end = time.monotonic() + LIMIT
        while left := self._left():
            if time.monotonic() > end:
                raise Wrong(f"there are still {left}")
            time.sleep(0.01)

    def _left(self) -> list[str]:
        """What there is of calls."""

        def rows(owned: Loaded) -> list[str]:
            it = owned.scheduler
            found = {
                "rows": it.kv_bytes, "KV": it.engine.kv, "steps": it.busy, "queued": it._waiting,
                "readers": self.lm._session._readers,
                "threads": _others() > self._threads + 1,  # the one that asks
                "models": _models() > self._models,
            }  # fmt: skip
            return [name for name, there in found.items() if there]

        found: list[str] = _in_time(lambda: self.lm._session.call(rows))
        return found

    def _memory(self) -> int:
        """Bytes in use when nothing is kept of earlier texts."""
        _in_time(lambda: self.lm._session.call(lambda it: it.scheduler.cache.clear()))
        gc.collect()
        return int(mx.get_active_memory())


def _others() -> int:
    """Threads that aren't of models."""
    return sum(thread.name != "mlx_mtp" for thread in threading.enumerate())


def _models() -> int:
    """Threads that serve a model."""
    return sum(thread.name == "mlx_mtp" for thread in threading.enumerate()) - len(ModelThread.idle)


def _in_time(call: Callable[[], object]) -> object:
    """Makes a call in a thread, and doesn't wait for ever; raises what it raises."""
    results: list[object] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _wait(thread)
    if errors:
        raise errors[0]
    return results[0]


def _join(callers: list[Caller]) -> None:
    for caller in callers:
        assert caller.thread
        _wait(caller.thread)


def _wait(thread: threading.Thread) -> None:
    thread.join(LIMIT)
    if thread.is_alive():
        stacks = [line for frame in sys._current_frames().values() for line in traceback.format_stack(frame)]
        raise Wrong(f"a call hangs: {''.join(stacks)}")


def _ignore_strikes(args: threading.ExceptHookArgs) -> None:
    """A strike may come when its thread has caught everything that it could."""
    if not isinstance(args.exc_value, Strike):
        threading.__excepthook__(args)
