"""The server under attack: floods, slow clients, requests that two programs may read differently."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

import mlx_mtp
from mlx_mtp.server.app import make_app
from mlx_mtp.server.connections import MOST_HEAD_BYTES
from mlx_mtp.server.registry import Models
from mlx_mtp.server.settings import ServerOptions
from tests.support.bodies import nearly_right
from tests.support.raw_http import connected, head, post, rest, statuses
from tests.support.server import entry, running, wait_until

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0}
LONG = HELLO | {"max_tokens": 4000, "ignore_eos": True}

SHORT = make_app(Models([entry()]), ServerOptions(max_tokens=4, time_limit=0.1, max_queue=0))
"""For requests that are drawn: whatever they ask for, they are answered soon."""

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]

documented = schemathesis.openapi.from_dict(SHORT.openapi())


@pytest.fixture(scope="module")
def short() -> Iterator[str]:
    """The address of a server that runs `SHORT`."""
    with running(SHORT) as url:
        yield url


@contextmanager
def besieged(send_buffer: int | None = None, **options: Any) -> Iterator[tuple[str, mlx_mtp.MTPModel]]:
    """The address of a server with these options, and its model; at the end it must still answer, and hold nothing."""
    with mlx_mtp.load() as lm:
        served = entry("demo", lm)
        with running(make_app(Models([served]), ServerOptions(**options)), send_buffer) as url:
            yield url, lm
            wait_until(lambda: served.answers == 0)
            assert httpx.get(f"{url}/health").status_code == 200
            assert httpx.post(f"{url}{CHAT}", json=HELLO, timeout=60).status_code == 200
            wait_until(lambda: not lm._session.call(lambda it: it.scheduler).busy)


def tells_of_the_machine(text: str) -> bool:
    """Whether a response has a trace of Python's stack, or a path."""
    return any(it in text for it in ("Traceback", 'File "', "site-packages", str(Path(mlx_mtp.__file__).parents[1])))


@documented.parametrize()
@settings(derandomize=True, max_examples=4, deadline=None, database=None, suppress_health_check=[*HealthCheck])
def test_every_response_is_one_that_the_document_has(case: schemathesis.Case, short: str):
    answer = case.call(base_url=short)
    case.validate_response(answer, checks=CHECKS)
    assert not tells_of_the_machine(answer.text)


def test_requests_that_are_nearly_right_are_answered_or_refused(short: str):
    with httpx.Client(base_url=short, timeout=60) as client:
        for seed in range(100):
            path, body = nearly_right(Random(seed))
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 404), (seed, answer.text)
            assert not tells_of_the_machine(answer.text)
            assert "the request has failed" not in answer.text, seed  # in a stream, whose status is 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000 + b"]" * 200_000,
        b'{"messages": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"messages": [], "temperature": NaN}',
        b'{"messages": [], "tools": [1e999]}',
        b'{"\\ud800": 1}',
        b'{"' + b"x" * 100_000 + b'": 1}',
        b"\xff\xfe{}",
        b"",
    ],
    ids=[
        "deep list",
        "deep dict",
        "long number",
        "NaN",
        "infinite",
        "half a character",
        "long name",
        "no text",
        "empty",
    ],
)
def test_bodies_that_hurt_parsers_are_refused_in_one_line(short: str, body: bytes):
    answer = httpx.post(f"{short}{CHAT}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 2100
    assert not tells_of_the_machine(answer.text)


@pytest.mark.parametrize(
    "request_bytes",
    [
        head(CHAT, "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head(CHAT, "Content-Length: 5", "Content-Length: 6") + b"hello",
        head(CHAT, "Content-Length: 5, 6") + b"hello",
        head(CHAT, "Content-Length: -1"),
        head(CHAT, "Content-Length: +5") + b"hello",
        head(CHAT, "Content-Length : 5") + b"hello",
        head(CHAT, "Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
        head(CHAT, "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
        head(CHAT, "Transfer-Encoding: chunked") + b"-1\r\n\r\n",
        head("/health", "A: b\r\n c: d", method="GET"),
        head("/health", "A: b\nHost: evil", method="GET"),
        head("/health", "A: \0", method="GET"),
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health\r\n\r\n",
    ],
)
def test_requests_that_two_programs_may_read_differently_are_refused(short: str, request_bytes: bytes):
    """A proxy in front could take the rest of such a request for another one, and pair answers wrongly."""
    with connected(short) as connection:
        connection.sendall(request_bytes + head("/health", method="GET"))
        received = rest(connection)
    assert statuses(received) in ([400], [403])
    assert not tells_of_the_machine(received.decode())


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "localhost.evil.example", "localhost\r\nHost: evil.example", "[::1"]
)
def test_requests_under_another_name_or_several_are_refused(short: str, host: str | None):
    with connected(short) as connection:
        connection.sendall(head("/v1/models", "Connection: close", method="GET", host=host))
        assert statuses(rest(connection)) in ([403], [400])


def test_requests_in_one_packet_are_answered_in_their_order(short: str):
    paths = ["/v1/models/none", "/health", "/v1/models/demo", "/nowhere"]
    requests = b"".join(head(path, method="GET") for path in paths)
    last = head("/health", "Connection: close", method="GET")
    with connected(short) as connection:
        connection.sendall(requests + last)
        assert statuses(rest(connection)) == [404, 200, 200, 404, 200]


def test_a_flood_is_refused_and_every_answer_is_its_own():
    prompts = [f"Tell me a story about the number {i}." for i in range(8)]
    with besieged(max_queue=12) as (url, lm):
        expected = {prompt: lm.generate(prompt, 8, temperature=0).text for prompt in prompts}
        asked = [prompts[i % len(prompts)] for i in range(80)]

        async def flood() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
                posts = [
                    client.post(CHAT, json={"messages": [{"role": "user", "content": it}], "max_tokens": 8,
                                            "temperature": 0})
                    for it in asked
                ]  # fmt: skip
                health = client.get("/health")
                *answers, healthy = await asyncio.gather(*posts, health)
                assert healthy.status_code == 200
                return answers

        answers = asyncio.run(flood())
        served = 0
        for prompt, answer in zip(asked, answers, strict=True):
            if answer.status_code == 200:
                served += 1
                assert answer.json()["choices"][0]["message"]["content"] == expected[prompt]
            else:
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) > 0
        assert 0 < served < len(asked)


def test_a_thousand_connections_that_say_nothing_keep_no_one_out():
    with besieged() as (url, _), ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connected(url))
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.post(f"{url}{CHAT}", json=HELLO, timeout=60).status_code == 200


def test_connections_beyond_the_limit_are_refused_until_others_end():
    with besieged(max_connections=3) as (url, _):
        with ExitStack() as stack:
            for _ in range(3):
                idle = stack.enter_context(connected(url))
                idle.sendall(head("/health", method="GET"))
                assert idle.recv(100)  # it is there
            with connected(url) as further:
                assert statuses(rest(further)) == [503]
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)


@pytest.mark.parametrize(
    "begun, status",
    [
        (b"", []),
        (b"GET /health HT", [408]),
        (head("/health", method="GET")[:-2] + b"X-Slow: ", [408]),
        (post(CHAT, json.dumps(HELLO).encode())[:-1], [408]),
        (head(CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n", [408]),
        (head("/health", method="GET") + b"GET /health HT", [200, 408]),
    ],
    ids=["nothing", "first line", "header", "body", "chunks", "second request"],
)
def test_a_client_that_sends_slowly_is_cut_off(begun: bytes, status: list[int]):
    with running(make_app(Models([entry()]), ServerOptions(stall_limit=0.3))) as url, connected(url) as connection:
        connection.sendall(begun)
        assert statuses(rest(connection)) == status


def test_heads_and_framing_without_an_end_are_cut_off():
    most_bytes = 2**20
    endless = head("/health", method="GET")[:-2] + b"X: "
    framed = head(CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked") + b"0\r\n"
    with running(make_app(Models([entry()]), ServerOptions(max_body_bytes=most_bytes))) as url:
        for begun, most in ((endless, MOST_HEAD_BYTES), (framed + b"X: ", MOST_HEAD_BYTES + 2 * most_bytes)):
            with connected(url) as connection:
                connection.sendall(begun + b"y" * (most - len(begun)))
                with pytest.raises(ConnectionError):
                    while True:  # up to what the system had taken already
                        connection.sendall(b"y" * 65536)


def test_large_bodies_that_come_together_are_limited_in_all():
    with running(make_app(Models([entry()]), ServerOptions(max_body_bytes=200_000))) as url, ExitStack() as stack:
        begun = head(CHAT, "Content-Type: application/json", "Content-Length: 200000") + b" " * 150_000
        waiting = [stack.enter_context(connected(url)) for _ in range(24)]
        for connection in waiting:
            connection.sendall(begun)
        assert httpx.get(f"{url}/health").status_code == 200
        # Which of them is one too many depends on which the server has read by then.
        answered, _, _ = select.select(waiting, [], [], 30)
        refused = answered[0].recv(65536)
        assert statuses(refused) == [429]
        assert b"retry-after" in refused


def test_a_stream_that_nobody_reads_ends_and_stalls_no_other():
    body = json.dumps(LONG | {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}).encode()
    with besieged(send_buffer=4096, stall_limit=0.5, max_queue=0) as (url, lm), ExitStack() as stack:
        rows = lm._session.call(lambda it: it.scheduler).max_rows
        for _ in range(rows // 4):  # all places of the model
            silent = stack.enter_context(connected(url, receive_buffer=4096))
            silent.sendall(post(CHAT, body))
        assert httpx.get(f"{url}/health").status_code == 200
        wait_until(lambda: httpx.post(f"{url}{CHAT}", json=HELLO, timeout=60).status_code == 200)


def test_a_client_that_closes_its_half_of_the_connection_has_left():
    body = json.dumps(LONG | {"stream": True}).encode()
    with besieged() as (url, lm), connected(url) as connection:
        connection.sendall(post(CHAT, body))
        assert b"data:" in connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)
        rest(connection)
        wait_until(lambda: not lm._session.call(lambda it: it.scheduler).busy)


def test_clients_that_ask_and_leave_at_once_leave_nothing_behind():
    body = json.dumps(LONG).encode()
    with besieged(max_queue=200) as (url, _):
        for i in range(100):
            with connected(url) as connection:
                connection.sendall(post(CHAT, body)[: -(i % 3) or None])


def test_answers_that_are_too_long_when_the_server_ends_have_a_proper_end():
    lines: list[str] = []
    begun = threading.Event()

    def read(url: str) -> None:
        with httpx.stream("POST", f"{url}{CHAT}", json=LONG | {"stream": True}, timeout=60) as answer:
            for line in answer.iter_lines():
                begun.set()
                lines.append(line)

    with running(make_app(Models([entry()]), ServerOptions(shutdown_limit=3))) as url:
        reader = threading.Thread(target=read, args=(url,))
        reader.start()
        assert begun.wait(30)
    reader.join(30)
    events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
