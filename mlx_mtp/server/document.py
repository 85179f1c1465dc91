"""The server's OpenAPI document: which responses each interface has besides the answer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from .errors import ANTHROPIC, ErrorForm

_MEANINGS = {
    400: "The request can't be used",
    401: "The API key is missing or wrong",
    403: "This name of the server, or this web page, isn't allowed",
    404: "There is no such model",
    413: "The body is too large",
    429: "Too many requests wait",
    500: "The request has failed",
    503: "The model can't be loaded now",
}

_STRING = {"type": "string"}
_MAYBE_STRING = {"type": ["string", "null"]}

ANSWERS: dict[str, Any] = {
    "description": "The answer, or its server-sent events",
    "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
}


def responses(form: ErrorForm, answers: bool = True) -> dict[int | str, dict[str, Any]]:
    """The responses of an interface's paths, by HTTP status.

    Args:
        form: How it writes errors.
        answers: Whether the path answers prompts, so that its answer may be streamed.
    """
    if form is ANTHROPIC:
        error = {"type": {"const": "error"}, "error": _object({"type": _STRING, "message": _STRING})}
    else:
        named = {"message": _STRING, "type": _STRING, "param": _MAYBE_STRING, "code": _MAYBE_STRING}
        error = {"error": _object(named)}
    content = {"application/json": {"schema": _object(error)}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": meaning, "content": content} for status, meaning in _MEANINGS.items()
    }
    return {200: ANSWERS, **errors} if answers else errors


def describe(app: FastAPI) -> None:
    """Takes FastAPI's own error 422 out of an application's document: here an invalid body has status 400."""
    described: Callable[[], dict[str, Any]] = app.openapi

    def document() -> dict[str, Any]:
        made = described()
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return made

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation does it


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
