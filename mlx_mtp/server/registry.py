"""The models that a server offers, by name: loaded when first asked for, unloaded when idle or when another needs room.

Everything here runs in the event loop; loading and closing take place in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..api import MTPModel
from ..checkpoint import sizes
from ..decode.scheduler import MAX_ROWS
from ..errors import MemoryBudgetError, MTPError
from .errors import RequestError

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """A model by name, loaded or not.

    Attributes:
        name: What requests call it.
        load: Loads it.
        weights: Bytes of its weights, target and drafter.
        kv: Bytes for the KV of rows without which it isn't loaded beside others.
        lm: The model; None while it isn't loaded.
        answers: Answers that run or wait; a model that has any isn't unloaded.
        last_used: When the latest of them ended, by `time.monotonic`.
        loading: The task that loads it, while one does.
    """

    name: str
    load: Callable[[], MTPModel]
    weights: int
    kv: int = 0
    lm: MTPModel | None = None
    answers: int = 0
    last_used: float = field(default_factory=time.monotonic)
    loading: asyncio.Task[MTPModel] | None = None

    @property
    def rows(self) -> int:
        """Rows of its batch: what the tuner chose, or 8."""
        profile = self.lm.profile if self.lm else None
        return profile.rows if profile else MAX_ROWS

    def take(self, count: int, max_queue: int) -> None:
        """Takes places for answers.

        Raises:
            RequestError: Status 429, the queue is full; or 400, these answers alone are too many for it.
        """
        if count > self.rows + max_queue:
            raise RequestError(400, f"{count} answers are too many: at most {self.rows + max_queue} may run or wait")
        if self.answers + count > self.rows + max_queue:
            raise RequestError(429, "too many requests are waiting: try again in a moment", "queue_full")
        self.answers += count

    def give(self, count: int) -> None:
        """Gives places back."""
        self.answers -= count
        self.last_used = time.monotonic()


class Models:
    """The models of a server.

    Loaded models share the memory that all their weights leave: the KV of each may take an equal part.
    """

    def __init__(self, entries: Sequence[Entry], memory: int | None = None) -> None:
        """Takes the models; the first one answers requests that name none.

        Args:
            entries: At least one.
            memory: Bytes for weights and KV of all loaded models; None for `sizes.memory_for_models()`.
        """
        self.entries = {entry.name: entry for entry in entries}
        self._memory = memory
        self._changing = asyncio.Lock()
        self._closed = False

    def find(self, name: str | None) -> Entry:
        """The model of that name; the first one for None.

        Raises:
            RequestError: Status 404, there is none.
        """
        entry = next(iter(self.entries.values())) if name is None else self.entries.get(name)
        if entry is None:
            known = ", ".join(self.entries)
            raise RequestError(404, f"there is no model {name!r}, only {known}", "model_not_found", "model")
        return entry

    async def loaded(self, entry: Entry) -> MTPModel:
        """The model of an entry; loads it if need be. One model is loaded at a time; the others' loads wait.

        A caller that is cancelled stops waiting; the load goes on, for others that wait or come later.

        Args:
            entry: One on which the caller holds a place, so that it isn't unloaded meanwhile.

        Raises:
            RequestError: Status 503: it can't be loaded, or models that are answering leave no room for it.
        """
        if entry.lm is not None:
            return entry.lm
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(entry))
            entry.loading.add_done_callback(_retrieve)
        return await asyncio.shield(entry.loading)

    async def unload_idle(self, seconds: float) -> None:
        """Unloads models that haven't been used for that time, again and again, until the task is cancelled."""
        while True:
            await asyncio.sleep(min(seconds, 1.0))
            async with self._changing:
                while unused := [it for it in self._unused() if time.monotonic() - it.last_used >= seconds]:
                    await self._unload(unused[0])
                    await self._divide(self._loaded())

    async def close(self) -> None:
        """Unloads all models; running answers fail."""
        self._closed = True
        async with self._changing:
            for entry in self.entries.values():
                await self._unload(entry)

    async def _load(self, entry: Entry) -> MTPModel:
        try:
            async with self._changing:
                try:
                    await self._make_room(entry)
                    log.info("loading %s", entry.name)
                    entry.lm = lm = await asyncio.to_thread(entry.load)
                    entry.last_used = time.monotonic()
                    return lm
                finally:
                    await self._divide(self._loaded())
        except MTPError as error:
            log.error("%s can't be loaded: %s", entry.name, error)
            raise RequestError(503, f"the model {entry.name!r} can't be loaded: the server's log says why") from error
        finally:
            entry.loading = None

    async def _make_room(self, entry: Entry) -> None:
        """Unloads models, the longest unused ones first, until another has room beside the rest."""
        if self._closed:
            raise RequestError(503, "the server is ending")
        while loaded := self._loaded():
            share = self._share([*loaded, entry])
            rows = sizes.divide_kv(max(0, share))[0]
            enough = share >= 0 and rows >= max(it.kv for it in (*loaded, entry))
            if enough and await self._divide(loaded, share):
                return
            unused = self._unused()
            if not unused:
                raise RequestError(503, f"models that are answering leave no room for {entry.name!r}: try again later")
            await self._unload(unused[0])

    def _share(self, entries: Sequence[Entry]) -> int:
        """Bytes of KV for each of these models if they are loaded together; negative if the weights don't fit."""
        memory = sizes.memory_for_models() if self._memory is None else self._memory
        weights = sum(it.weights for it in entries)
        return sizes.spare_bytes(weights, memory) // len(entries) if weights <= memory else -1

    async def _divide(self, loaded: Sequence[Entry], share: int | None = None) -> bool:
        """Limits the KV of loaded models.

        Args:
            loaded: The models.
            share: Bytes for each; None for an equal part of what there is.

        Returns:
            Whether all could be limited; False if the running requests of one need more.
        """
        for it in loaded:
            if it.lm:
                try:
                    await asyncio.to_thread(it.lm.limit_kv, max(0, self._share(loaded) if share is None else share))
                except MemoryBudgetError:
                    return False
        return True

    def _loaded(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.lm]

    def _unused(self) -> list[Entry]:
        """Loaded models without answers, the longest unused one first."""
        unused = [entry for entry in self._loaded() if not entry.answers]
        return sorted(unused, key=lambda entry: entry.last_used)

    async def _unload(self, entry: Entry) -> None:
        lm, entry.lm = entry.lm, None
        if lm:
            log.info("unloading %s", entry.name)
            await asyncio.to_thread(lm.close)


def _retrieve(load: asyncio.Task[MTPModel]) -> None:
    """Takes note of a load's error, which asyncio reports if all who waited for it have left."""
    if not load.cancelled():
        load.exception()
