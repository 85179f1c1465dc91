"""Attacks a server that this script starts, for as long as it is told; what the tests do for seconds.

    bodies      requests that are nearly right (tests/support/bodies.py): no status but 200, 400 and 404, no traceback
    document    requests that schemathesis draws from the OpenAPI document: only responses that the document has
    connections random clients at once: some ask, some leave, close one half, stop sending, or never read; whoever waits
                for an answer gets the text that it gets alone, and at the end the server holds nothing
    keys        time to refuse keys that have a longer and longer beginning in common with the right one, without a
                network: nanoseconds per character, with the standard error

Exits with 1 if one of them finds something. The same seed draws the same requests, though not the same moments.

    python scripts/attack_server.py [--seconds 60] [--seed 0] [--part bodies]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Annotated

import httpx
import schemathesis
import typer
from hypothesis import HealthCheck, given, seed, settings

import mlx_mtp
from mlx_mtp.server.app import make_app
from mlx_mtp.server.guard import Guard
from mlx_mtp.server.registry import Models
from mlx_mtp.server.settings import ServerOptions
from tests.support.bad_clients import CHAT, KINDS, misbehave
from tests.support.bodies import nearly_right
from tests.support.server import entry, running, wait_until
from tests.test_server_siege import CHECKS, tells_of_the_machine

CLIENTS = 40
KEY = "k" * 64


def bodies(seconds: float, first: int) -> list[str]:
    """Sends requests that are nearly right; returns what was wrong."""
    found, seen, end, i = [], Counter[int](), time.monotonic() + seconds, first * 10**9
    app = make_app(Models([entry()]), ServerOptions(max_tokens=4, time_limit=0.5))
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < end:
            path, body = nearly_right(Random(i))
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            seen[answer.status_code] += 1
            failed = answer.status_code not in (200, 400, 404) or "the request has failed" in answer.text
            if failed or tells_of_the_machine(answer.text):
                found.append(f"seed {i}: {path} {body[:300]} -> {answer.status_code} {answer.text[:300]}")
            i += 1
    print(f"bodies: {dict(seen)}")
    return found


def document(seconds: float, first: int) -> list[str]:
    """Sends what schemathesis draws; returns what was wrong."""
    found = []
    app = make_app(Models([entry()]), ServerOptions(max_tokens=4, time_limit=0.1))
    operations = [it.ok() for it in schemathesis.openapi.from_dict(app.openapi()).get_all_operations()]
    with running(app) as url:
        for operation in operations:
            end = time.monotonic() + seconds / len(operations)
            while time.monotonic() < end:

                @seed(first)
                @settings(max_examples=20, deadline=None, database=None, suppress_health_check=[*HealthCheck])
                @given(case=operation.as_strategy())
                def check(case: schemathesis.Case) -> None:
                    answer = case.call(base_url=url)
                    case.validate_response(answer, checks=CHECKS)
                    if tells_of_the_machine(answer.text):
                        raise AssertionError(answer.text)

                try:
                    check()
                except Exception as error:
                    found.append(f"{operation.method} {operation.path}: {error}")
                    break
                first += 1
    return found


def connections(seconds: float, first: int) -> list[str]:
    """Lets clients of all kinds at a server; returns what was wrong."""
    prompts = [f"Tell me a story about the number {i}." for i in range(20)]
    found: list[str] = []
    seen: Counter[str] = Counter()
    with mlx_mtp.load() as lm:
        texts = {prompt: lm.generate(prompt, 12, temperature=0).text for prompt in prompts}
        served = entry("demo", lm)
        with running(make_app(Models([served]), ServerOptions(stall_limit=1.0, max_queue=16))) as url:
            end = time.monotonic() + seconds

            async def client(number: int, http: httpx.AsyncClient) -> None:
                dice = Random(first * CLIENTS + number)
                while time.monotonic() < end:
                    prompt = dice.choice(prompts)
                    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "temperature": 0}
                    kind = dice.choice(("ask", "ask", *KINDS))
                    seen[kind] += 1
                    if kind == "ask":
                        answer = await http.post(CHAT, json=body)
                        text = answer.json()["choices"][0]["message"]["content"] if answer.is_success else ""
                        if answer.status_code not in (200, 429) or (answer.is_success and text != texts[prompt]):
                            found.append(f"{prompt}: {answer.status_code} {answer.text[:200]}")
                    else:
                        with suppress(ConnectionError):
                            await misbehave(url, kind, body, dice)

            async def all_clients() -> None:
                async with httpx.AsyncClient(base_url=url, timeout=120) as http:
                    await asyncio.gather(*(client(number, http) for number in range(CLIENTS)))

            asyncio.run(all_clients())
            wait_until(lambda: served.answers == 0 and not lm._session.call(lambda it: it.scheduler).busy)
            if httpx.get(f"{url}/health").status_code != 200:
                found.append("the server isn't well")
    print(f"connections: {dict(seen)}")
    return found


def keys(seconds: float, first: int) -> list[str]:
    """Measures how long wrong keys take; returns a finding if more right characters take longer."""
    dice, lengths = Random(first), range(0, len(KEY), 7)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    end = time.monotonic() + seconds

    async def nothing(*_: object) -> None:
        pass

    async def measure() -> None:
        guard = Guard(nothing, ServerOptions(api_key=KEY))  # without a network, which is ten thousand times noisier
        while time.monotonic() < end:
            for length in dice.sample(lengths, len(lengths)):  # in another order each time
                wrong = (KEY[:length] + "x" * len(KEY))[: len(KEY)]
                headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {wrong}".encode())]
                scope = {"type": "http", "path": "/v1/models", "headers": headers}
                begun = time.perf_counter_ns()
                await guard(scope, nothing, nothing)
                times[length].append(time.perf_counter_ns() - begun)

    asyncio.run(measure())
    # Each turn has a slope of its own, so that slow and fast moments of the machine cancel out.
    slopes = [statistics.linear_regression([*lengths], list(turn)).slope for turn in zip(*times.values(), strict=False)]
    slopes.sort()
    slopes = slopes[len(slopes) // 10 : -len(slopes) // 10]  # without the turns in which something else ran
    slope, error = statistics.mean(slopes), statistics.stdev(slopes) / len(slopes) ** 0.5
    print(f"keys: {slope:.2f} ns per right character, standard error {error:.2f}, {len(slopes)} turns")
    return [f"right characters take {slope:.2f} ns each"] if slope > 4 * error else []


PARTS: dict[str, Callable[[float, int], list[str]]] = {
    "bodies": bodies,
    "document": document,
    "connections": connections,
    "keys": keys,
}


def main(
    seconds: Annotated[float, typer.Option(help="Seconds for each part.", min=1)] = 60,
    first: Annotated[int, typer.Option("--seed", help="Draws other requests.", min=0)] = 0,
    part: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(PARTS)}. Default: all.")] = None,
) -> None:
    """Attacks, and prints what was found."""
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"unknown part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    found = [f"{name}: {it}" for name in part or PARTS for it in PARTS[name](seconds, first)]
    for it in found:
        print(it, file=sys.stderr)
    print(f"{len(found)} findings")
    raise typer.Exit(bool(found))


if __name__ == "__main__":
    typer.run(main)
