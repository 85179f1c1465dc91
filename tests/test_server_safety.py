"""Who may use the server and how much of it: keys, names, pages, limits; and the command that starts it."""

from __future__ import annotations

import plistlib
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

import mlx_mtp
from mlx_mtp.server.app import make_app
from mlx_mtp.server.registry import Models
from mlx_mtp.server.settings import ServerOptions
from tests.support.command_line import arguments, run
from tests.support.server import entry, running, wait_until

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
LONG = HELLO | {"max_tokens": 4000, "ignore_eos": True}


@contextmanager
def serving(**options: Any) -> Iterator[tuple[httpx.Client, mlx_mtp.MTPModel]]:
    """A server with these options: a client of it, and its model."""
    with (
        mlx_mtp.load() as lm,
        running(make_app(Models([entry("demo", lm)]), ServerOptions(**options))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client, lm


def test_a_key_opens_everything_but_the_health_check():
    with serving(api_key="open sesame") as (client, _):
        assert client.get("/health").status_code == 200
        wrong = [{"Authorization": "Bearer open"}, {"Authorization": "Basic open sesame"}, {"x-api-key": ""}]
        for headers in [{}, *wrong]:
            refused = client.post("/v1/chat/completions", json=HELLO, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/v1/models", headers=headers).status_code == 401
            assert client.get("/openapi.json", headers=headers).status_code == 401
        for headers in ({"Authorization": "Bearer open sesame"}, {"x-api-key": "open sesame"}):
            assert client.post("/v1/chat/completions", json=HELLO, headers=headers).status_code == 200


def test_other_names_and_other_pages_are_refused():
    with serving(allowed_hosts=("mac.local",), cors_origins=("http://friend.example",)) as (client, _):
        for host, status in (("localhost:1", 200), ("[::1]:1", 200), ("192.168.1.2", 200), ("mac.local:80", 200),
                             ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("[", 403)):  # fmt: skip
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host
        friend, evil = ({"Origin": f"http://{name}.example"} for name in ("friend", "evil"))
        assert client.post("/v1/chat/completions", json=HELLO, headers=evil).status_code == 403
        served = client.post("/v1/chat/completions", json=HELLO, headers=friend)
        assert served.headers["access-control-allow-origin"] == "http://friend.example"
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "Authorization"}
        assert client.options("/v1/models", headers=friend | asked).status_code == 200
        assert client.options("/v1/models", headers=evil | asked).status_code == 400
        own = {"Origin": str(client.base_url).rstrip("/")}
        assert client.get("/v1/models", headers=own).status_code == 200


def test_without_cors_no_page_may_read_answers():
    with serving() as (client, _):
        answer = client.get("/v1/models", headers={"Origin": "http://any.example"})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_loads_nothing_from_elsewhere():
    with serving(api_key="secret") as (client, _):
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'; connect-src 'self'" in page.headers["content-security-policy"]
        assert not re.findall(r"https?://|\bsrc=|\bhref=|innerHTML", page.text)
        assert set(re.findall(r'fetch\("([^"]+)"', page.text)) == {"/v1/models", "/v1/chat/completions"}


def test_large_bodies_and_long_prompts_are_refused():
    with serving(max_body_bytes=2000, max_prompt_tokens=50) as (client, _):
        large = b'{"messages": [' + b" " * 3000 + b"]}"
        kind = {"Content-Type": "application/json"}
        assert client.post("/v1/chat/completions", content=large, headers=kind).status_code == 413
        assert client.post("/v1/chat/completions", content=iter([large]), headers=kind).status_code == 413
        long = client.post("/v1/completions", json={"prompt": "one two three " * 30, "max_tokens": 1})
        assert long.status_code == 400
        assert "this server takes at most 50" in long.json()["error"]["message"]


def test_a_full_queue_is_said_and_empties_again():
    with serving(max_queue=1) as (client, lm):
        scheduler = lm._session.call(lambda it: it.scheduler)
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"n": 9, "stream": True}) as running_ones:
            assert running_ones.status_code == 200
            refused = client.post("/v1/chat/completions", json=HELLO)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.post("/v1/chat/completions", json=HELLO | {"n": 10}).status_code == 400
        wait_until(lambda: not scheduler.busy)
        wait_until(lambda: client.post("/v1/chat/completions", json=HELLO).status_code == 200)


def test_an_answer_that_takes_too_long_ends_with_what_it_has():
    with serving(time_limit=2.0) as (client, _):
        choice = client.post("/v1/chat/completions", json=LONG).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--host", "0.0.0.0"], "needs --api-key"),
        (["--quantize", "7"], "--quantize"),
        (["--port", "70000"], "--port"),
    ],
)
def test_wrong_use_is_exit_code_2(given: list[str], message: str):
    done = run("serve", *given)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_model_that_is_not_there_is_an_error_at_once():
    done = run("serve", "./no-such-folder")
    assert done.returncode == 1
    assert "no-such-folder" in done.stderr


def test_the_command_serves_until_it_is_told_to_end():
    command = arguments("serve", "--port", 0)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "demo"
            body = HELLO | {"stream": True, "max_tokens": 60, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
                pieces = answer.iter_lines()
                next(pieces)
                process.send_signal(signal.SIGTERM)
                assert [line for line in pieces if line][-1] == "data: [DONE]"
            process.wait(timeout=30)
            assert process.stdout.read() == ""
        finally:
            process.kill()


def test_the_property_list_runs_the_same_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("MLX_MTP_API_KEY", "secret")
    printed = run("serve", "model", "--host", "0.0.0.0", "--launchd").stdout
    agent = plistlib.loads(printed.encode())
    assert agent["ProgramArguments"][3:] == ["serve", str(tmp_path / "model"), "--host", "0.0.0.0"]
    assert agent["EnvironmentVariables"] == {"MLX_MTP_API_KEY": "secret"}
