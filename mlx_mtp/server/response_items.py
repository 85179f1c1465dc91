"""The output of `/v1/responses`: items, and the events that tell of them while they grow."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any


class Items:
    """The output items of an answer: reasoning, messages and function calls, in the order in which they begin.

    Attributes:
        output: The items; the last one may be growing.
    """

    def __init__(self) -> None:
        """Begins without items."""
        self.output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def add(self, reasoning: str, text: str, calls: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Takes what a chunk brings, and yields its events; calls are in the form of chat completions."""
        if reasoning:
            yield from self._grow("reasoning", reasoning)
        if text:
            yield from self._grow("message", text)
        for call in calls:
            yield from self.close()
            yield from self._call(call)

    def close(self) -> Iterator[dict[str, Any]]:
        """Ends the item that is growing, if there is one, and yields the events that say so."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = "completed"
        part = item["content"][0]
        here = self._place(item) | {"content_index": 0}
        yield {"type": f"response.{part['type']}.done", **here, "text": part["text"], **_logprobs(item)}
        yield {"type": "response.content_part.done", **here, "part": part}
        yield self._item_event("done", item)

    def _grow(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Adds text to the item of a kind, which begins if another one, or none, is growing."""
        if self._open is None or self._open["type"] != kind:
            yield from self.close()
            yield from self._begin(kind)
        item = self._open
        assert item is not None
        part = item["content"][0]
        part["text"] += text
        here = self._place(item) | {"content_index": 0}
        yield {"type": f"response.{part['type']}.delta", **here, "delta": text, **_logprobs(item)}

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        part: dict[str, Any] = {"text": ""}
        if kind == "reasoning":
            item |= {"id": _id("rs"), "summary": []}
            part |= {"type": "reasoning_text"}
        else:
            item |= {"id": _id("msg"), "role": "assistant"}
            part |= {"type": "output_text", "annotations": []}
        self.output.append(item)
        yield self._item_event("added", {**item, "content": []})
        item["content"] = [part]
        self._open = item
        yield {"type": "response.content_part.added", **self._place(item), "content_index": 0, "part": dict(part)}

    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A function call, which arrives whole."""
        function = call["function"]
        item = {"id": _id("fc"), "type": "function_call", "call_id": call["id"], "name": function["name"]}
        item |= {"arguments": function["arguments"], "status": "completed"}
        self.output.append(item)
        here, kind = self._place(item), "response.function_call_arguments"
        yield self._item_event("added", {**item, "arguments": "", "status": "in_progress"})
        yield {"type": f"{kind}.delta", **here, "delta": item["arguments"]}
        yield {"type": f"{kind}.done", **here, "arguments": item["arguments"], "name": item["name"]}
        yield self._item_event("done", item)

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.output) - 1}

    def _item_event(self, what: str, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": f"response.output_item.{what}", "output_index": len(self.output) - 1, "item": dict(item)}


def _logprobs(item: dict[str, Any]) -> dict[str, list[Any]]:
    """A field that the events of messages must have; there are no log-probabilities in it."""
    return {"logprobs": []} if item["type"] == "message" else {}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
