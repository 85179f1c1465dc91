"""Errors as responses: their HTTP status, and their form in OpenAI's and in Anthropic's interface.

A response never holds a path or a traceback: what isn't the client's fault is logged, and the client reads a fixed
sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import MemoryBudgetError, MTPError, PromptError, printable

log = logging.getLogger(__name__)

RETRY_SECONDS = 2
"""What `Retry-After` says: short answers end in about that time, and each makes room for another."""


class RequestError(Exception):
    """A request that isn't served.

    Attributes:
        status: HTTP status.
        message: One line for the client; may quote what the client sent, of which it keeps a printable beginning.
        code: OpenAI's `code`, or None.
        param: The field at fault, or None.
        allow: The methods that the path has, if it lacks the request's.
    """

    allow: str | None = None

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        """Takes the attributes."""
        super().__init__(message)
        self.status, self.message, self.code = status, printable(message), code
        self.param = param and printable(param)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status == 500:  # after an exception uvicorn closes the connection, and a client should know
            return {"Connection": "close"}
        if self.allow:
            return {"Allow": self.allow}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}


@dataclass(frozen=True)
class ErrorForm:
    """How an interface writes errors.

    Attributes:
        kinds: Its names of errors, by HTTP status.
        body: Makes the response's JSON from an error and its name.
    """

    kinds: Mapping[int, str]
    body: Callable[[RequestError, str], dict[str, Any]]

    def of(self, error: RequestError) -> dict[str, Any]:
        """The JSON of an error."""
        return self.body(error, self.kinds.get(error.status, self.kinds[500 if error.status >= 500 else 400]))


OPENAI = ErrorForm(
    {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error", 500: "server_error"},
    lambda error, kind: {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code},
    },
)
ANTHROPIC = ErrorForm(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        500: "api_error",
        503: "overloaded_error",
    },
    lambda error, kind: {"type": "error", "error": {"type": kind, "message": error.message}},
)


def form_for(path: str) -> ErrorForm:
    """The form of errors for a path of the server."""
    return ANTHROPIC if path.startswith("/v1/messages") else OPENAI


def as_request_error(error: Exception) -> RequestError:
    """The error that a client is shown for an exception; logs what isn't the client's fault."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, PromptError | MemoryBudgetError):
        return RequestError(400, str(error))
    if isinstance(error, HTTPException):
        refused = RequestError(error.status_code, str(error.detail))
        refused.allow = (error.headers or {}).get("Allow")
        return refused
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    log.error("a request has failed", exc_info=error)
    return RequestError(500, "the request has failed: the server's log says why")


def response(path: str, error: RequestError) -> JSONResponse:
    """The response to a request for a path that ends in an error."""
    return JSONResponse(form_for(path).of(error), error.status, error.headers)


def add_handlers(app: FastAPI) -> None:
    """Has an app answer every exception in the form of the interface that was called."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return response(request.url.path, as_request_error(error))

    for kind in (RequestError, MTPError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle)


def _invalid(error: RequestValidationError) -> RequestError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "json_invalid":
        return RequestError(400, "the body isn't JSON")
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"unknown field: {param}", "unknown_parameter", param)
    where = f"{param}: " if param else ""
    return RequestError(400, f"{where}{first['msg']}", "invalid_value", param)
