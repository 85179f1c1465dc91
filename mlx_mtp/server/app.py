"""The server as a FastAPI application: its routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from ..session.answer import Generation
from . import document, errors
from .anthropic_messages import MessagesBody, MessagesReply
from .events import Events, event, unless_disconnected, whole
from .guard import Guard
from .limits import BodyLimit
from .metrics import CONTENT_TYPE
from .openai_chat import ChatBody, ChatReply
from .openai_completions import CompletionBody, CompletionReply
from .openai_responses import ResponsesBody, ResponsesReply
from .registry import Models
from .service import Answers, Job, Service
from .settings import ServerOptions

CREATED = 0
"""`created` of every model: OpenAI's clients want a time, and a model's files don't say when it was made."""


PAGE = Path(__file__).parent / "page" / "index.html"

PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing, talks to this server only, and can't be shown within another page."""


class Reply(Protocol):
    """A translation of answers into a response."""

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The response object."""

    def events(self) -> AsyncGenerator[str, None]:
        """The response as server-sent events."""


def make_app(models: Models, options: ServerOptions | None = None) -> FastAPI:
    """Makes the application.

    Args:
        models: What it offers; closed when the application ends.
        options: See `ServerOptions`.
    """
    options = options or ServerOptions()
    service = Service(models, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        idle = asyncio.create_task(models.unload_idle(options.idle_unload)) if options.idle_unload else None
        yield
        if idle:
            idle.cancel()
            with suppress(asyncio.CancelledError):
                await idle
        await models.close()

    # The pages of FastAPI's documentation load scripts from elsewhere.
    app = FastAPI(
        title="mlx-mtp",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=document.responses(errors.OPENAI, answers=False),
    )
    document.describe(app)
    app.state.options, app.state.service = options, service
    errors.add_handlers(app)
    app.add_middleware(BodyLimit, most_bytes=options.max_body_bytes)
    app.add_middleware(Guard, options=options)
    if options.cors_origins:  # outside the guard: a browser asks without the key whether it may send it
        app.add_middleware(CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
    _add_openai(app, service, options)
    _add_anthropic(app, service)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """A page to chat with the models."""
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return app


def _add_openai(app: FastAPI, service: Service, options: ServerOptions) -> None:
    """Adds the routes of OpenAI's interface."""
    answers = document.responses(errors.OPENAI)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that requests can name."""
        return {"object": "list", "data": [_model(name) for name in service.models.entries]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _model(service.models.find(name).name)

    @app.post("/v1/chat/completions", responses=answers)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answers a conversation."""
        job = body.job(options.max_tokens)
        return await respond(service, request, job, bool(body.stream), lambda answers: ChatReply(body, answers))

    @app.post("/v1/completions", responses=answers)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Completes a text."""
        job = body.job(options.max_tokens)
        return await respond(service, request, job, bool(body.stream), lambda answers: CompletionReply(body, answers))

    @app.post("/v1/responses", responses=answers)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answers a conversation."""
        job = body.job(options.max_tokens)
        return await respond(service, request, job, bool(body.stream), lambda answers: ResponsesReply(body, answers))


def _add_anthropic(app: FastAPI, service: Service) -> None:
    """Adds the routes of Anthropic's interface."""

    @app.post("/v1/messages", responses=document.responses(errors.ANTHROPIC))
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answers a conversation."""
        if body.max_tokens is None:
            raise errors.RequestError(400, "max_tokens: Field required")
        return await respond(
            service, request, body.job(), bool(body.stream), lambda answers: MessagesReply(body, answers)
        )

    @app.post("/v1/messages/count_tokens", responses=document.responses(errors.ANTHROPIC, answers=False))
    async def count_tokens(body: MessagesBody, request: Request) -> Response:
        """Counts the tokens of a conversation."""
        count = await unless_disconnected(request.receive, service.count_tokens(body.job()))
        return JSONResponse({"input_tokens": count})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "mlx-mtp"}


async def respond(
    service: Service, request: Request, job: Job, stream: bool, reply: Callable[[Answers], Reply]
) -> Response:
    """Runs a job and writes its response; a client that leaves ends it.

    Args:
        service: Runs the job.
        request: The request that asks for it.
        job: What to run.
        stream: Whether the response is written as server-sent events.
        reply: Makes the translation of the job's answers.
    """
    answers = await unless_disconnected(request.receive, service.start(job))
    if answers is None:
        return Response()
    written = reply(answers)
    if stream:
        form = errors.form_for(request.url.path)

        def failed(error: Exception) -> str:
            return event(form.of(errors.as_request_error(error)), "error")

        return Events(written.events(), failed, answers.close)
    try:
        generations = await unless_disconnected(request.receive, answers.all())
    finally:
        await answers.close()
    return Response() if generations is None else whole(written.whole(generations))
