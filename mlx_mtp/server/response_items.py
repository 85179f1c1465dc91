"""The output of `/v1/responses`: items, and the events that tell of them while they grow."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from ..session.answer import Chunk, Generation
from ..text.tokenizer import Tokenizer
from .openai_chat import written_call
from .openai_logprobs import TextLogprobs


class Items:
    """The output items of an answer: reasoning, messages and function calls, in the order in which they begin.

    Attributes:
        output: The items; the last one may be growing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begins without items; the tokenizer names the tokens of log-probabilities."""
        self.output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._logprobs = TextLogprobs(tokenizer)

    def add(self, new: Chunk | Generation) -> Iterator[dict[str, Any]]:
        """Takes what has been generated since the last time, and yields the events that tell of it."""
        self._logprobs.push(new.logprobs or ())
        if new.reasoning:
            yield from self._grow("reasoning", new.reasoning)
        if new.text:
            yield from self._grow("message", new.text)
        for call in new.tool_calls:
            yield from self.close()
            yield from self._call(written_call(call))

    def close(self) -> Iterator[dict[str, Any]]:
        """Ends the item that is growing, if there is one, and yields the events that say so."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = "completed"
        part = item["content"][0]
        here = self._place(item) | {"content_index": 0}
        scores = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield {"type": f"response.{part['type']}.done", **here, "text": part["text"], **scores}
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
        scores = {}
        if kind == "message":
            scores["logprobs"] = self._logprobs.pop()
            part["logprobs"] += scores["logprobs"]
        here = self._place(item) | {"content_index": 0}
        yield {"type": f"response.{part['type']}.delta", **here, "delta": text, **scores}

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        part: dict[str, Any] = {"text": ""}
        if kind == "reasoning":
            item |= {"id": _id("rs"), "summary": []}
            part |= {"type": "reasoning_text"}
        else:
            item |= {"id": _id("msg"), "role": "assistant"}
            part |= {"type": "output_text", "annotations": [], "logprobs": []}
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


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
