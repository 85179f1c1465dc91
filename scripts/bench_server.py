"""What the server costs: total tokens per second of clients, as ratios to `generate_batch` in the same process.

    whole      N clients that ask at once and read whole answers / a batch of the same N prompts
    streaming  the same with server-sent events

All texts have the same length, stop tokens ignored, greedy. Clients run in a process of their own, as they would.
Turns alternate; medians of ratios, with their spread. Then the time to the first token of requests that arrive at
random (exponential gaps) at 0.7 times the rate that 8 clients reached.

With --peers, instead: this server beside mlx-lm's and mlx-vlm's, on the same weights in float32, as total tokens per
second and as ratios. mlx-vlm's runs with the drafter and without; peer_servers.py says how they are set up. Each of N
clients sends its next prompt when the last one is answered.

    embedded   texts end where the model ends them; so small that a step's cost is mostly the host's
    dense      240 tokens a text; a step's cost is that of reading the weights, as in the models that people use
               (medium_pair.py)

    python scripts/bench_server.py [--turns 5] [--part embedded] [--part dense] [--requests 40] [--peers PYTHON]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import platform
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import httpx
import mlx.core as mx
import typer

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.server.app import make_app
from mlx_mtp.server.connections import Server
from mlx_mtp.server.registry import Entry, Models
from scripts.bench_batch import PROMPTS
from scripts.medium_pair import VOCAB, add_tokenizer, make_medium_pair

CLIENTS = (1, 4, 8)
PEER_DRAFT = 4
"""mlx-vlm's draft length, which is fixed; ours is chosen for each row."""
TOKENS = 240
LOAD = 0.7
"""Share of the highest rate at which requests arrive at random: above it queues grow without end now and then."""


async def _ask(client: httpx.AsyncClient, prompt: list[int], stream: bool) -> tuple[float, float]:
    """Seconds to the first token and to the end; without streaming they are the same."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": stream}
    begun, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line and not first:
                first = time.perf_counter() - begun
        answer.raise_for_status()
    return first, time.perf_counter() - begun


def ask_at_once(url: str, prompts: Sequence[list[int]], stream: bool) -> float:
    """Sends all prompts at once; returns seconds until all are answered."""

    async def run() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            begun = time.perf_counter()
            await asyncio.gather(*(_ask(client, prompt, stream) for prompt in prompts))
            return time.perf_counter() - begun

    return asyncio.run(run())


def ask_at_random(url: str, prompts: Sequence[list[int]], rate: float, count: int) -> list[float]:
    """Sends `count` prompts at `rate` a second on average; returns seconds to each one's first token."""
    dice = random.Random(0)

    async def later(client: httpx.AsyncClient, seconds: float, prompt: list[int]) -> float:
        await asyncio.sleep(seconds)
        return (await _ask(client, prompt, stream=True))[0]

    async def run() -> list[float]:
        at, waits = 0.0, []
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            for i in range(count):
                waits.append(later(client, at, prompts[i % len(prompts)]))
                at += dice.expovariate(rate)
            return list(await asyncio.gather(*waits))

    return asyncio.run(run())


@contextmanager
def serving(lm: mlx_mtp.MTPModel) -> Iterator[str]:
    """Serves a model from a thread of this process; gives the address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    app = make_app(Models([Entry("model", lambda: lm, 0)]))
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def in_batch(lm: mlx_mtp.MTPModel, prompts: Sequence[list[int]]) -> float:
    """Seconds that a batch of these prompts takes in Python."""
    begun = time.perf_counter()
    lm.generate_batch(prompts, len(prompts), max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return time.perf_counter() - begun


def measure(
    lm: mlx_mtp.MTPModel, prompts: Sequence[list[int]], clients: Executor, turns: int, requests: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Ratios by name, and seconds to first tokens under random load."""
    ratios: dict[str, list[float]] = {}
    fastest = float("inf")
    with serving(lm) as url:
        for turn in range(turns + 1):
            for count in CLIENTS:
                asked = prompts[:count]
                alone = in_batch(lm, asked)
                for name, stream in (("whole", False), ("streaming", True)):
                    seconds = clients.submit(ask_at_once, url, asked, stream).result()
                    if turn:  # the first time warms up
                        ratios.setdefault(f"{count} clients, {name}", []).append(alone / seconds)
                    if count == max(CLIENTS):
                        fastest = min(fastest, seconds)
        rate = LOAD * max(CLIENTS) / fastest
        return ratios, clients.submit(ask_at_random, url, prompts, rate, requests).result()


def make_pair(part: str, folder: Path) -> tuple[Path, Path, list[list[str]]]:
    """Writes the pair of a part in float32; gives what each of eight clients asks one after another, too."""
    dice = random.Random(0)
    if part == "embedded":
        pair = folder / "target", folder / "drafter"
        for source, copy in zip((DEMO / "target", DEMO / "drafter"), pair, strict=True):
            shutil.copytree(source, copy)
            weights = {name: it.astype(mx.float32) for name, it in mx.load(str(copy / "model.safetensors")).items()}
            mx.save_safetensors(str(copy / "model.safetensors"), weights, {"format": "pt"})
        asked = [dice.sample(PROMPTS, 4) for _ in range(8)]
    else:
        pair = make_medium_pair("31b", folder)
        add_tokenizer(pair[0])
        _never_stop(pair[0])
        asked = [["".join(f"[{dice.randrange(VOCAB // 2, VOCAB)}]" for _ in range(10 + 7 * i))] for i in range(8)]
    for file in (path / "config.json" for path in pair):
        config = json.loads(file.read_text("utf-8"))
        for section in (config, config["text_config"]):
            section["dtype"] = "float32"
        file.write_text(json.dumps(config), "utf-8")
    return *pair, asked


def _never_stop(target: Path) -> None:
    """Makes the token 0 the only one that stops a text, with a logit that is never the highest."""
    file = str(target / "model.safetensors")
    weights = dict(mx.load(file))
    (embedding,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights[embedding][0] = 0
    mx.save_safetensors(file, weights)
    for path in (target / "config.json", target / "generation_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token_id": [0]}), "utf-8")


def ask_in_turn(url: str, body: dict[str, Any], asked: Sequence[Sequence[str]]) -> float:
    """Runs clients that each ask their prompts one after another; returns total tokens per second."""

    async def ask(client: httpx.AsyncClient, prompts: Sequence[str]) -> int:
        tokens = 0
        for prompt in prompts:
            message = {"role": "user", "content": prompt}
            fields = {"messages": [message], "max_tokens": TOKENS, "temperature": 0, **body}
            answer = await client.post("/v1/chat/completions", json=fields)
            if answer.is_error:
                raise RuntimeError(f"{url} answered {answer.text}")
            tokens += answer.json()["usage"]["completion_tokens"]
        return tokens

    async def run() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            begun = time.perf_counter()
            tokens = await asyncio.gather(*(ask(client, prompts) for prompts in asked))
            return sum(tokens) / (time.perf_counter() - begun)

    return asyncio.run(run())


@contextmanager
def peer(python: Path, name: str, pair: tuple[Path, Path], draft_length: int) -> Iterator[str]:
    """Runs a peer's server; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, url = Path(__file__).with_name("peer_servers.py"), f"http://127.0.0.1:{port}"
    command = [python, script, name, *pair, str(draft_length), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                try:
                    httpx.get(f"{url}/health", timeout=60)
                    break
                except httpx.ConnectError:
                    time.sleep(0.2)
            else:
                raise RuntimeError(f"{name}'s server ended at once: run {script} by hand")
            yield url
        finally:
            process.terminate()


def beside_peers(part: str, python: Path, folder: Path, clients: Executor, turns: int) -> dict[str, list[float]]:
    """Tokens per second of every server, and how many times a peer's ours has."""
    target, drafter, asked = make_pair(part, folder)
    results: dict[str, list[float]] = {}
    with ExitStack() as stack:
        lm = stack.enter_context(mlx_mtp.load(target, drafter, profile=None))
        servers = {"ours": (stack.enter_context(serving(lm)), {})}
        for label, name, draft_length in (
            ("mlx-lm", "mlx-lm", 0), ("mlx-vlm", "mlx-vlm", 0), ("mlx-vlm, drafter", "mlx-vlm", PEER_DRAFT),
        ):  # fmt: skip
            url = stack.enter_context(peer(python, name, (target, drafter), draft_length))
            servers[label] = url, {"model": str(target) if name == "mlx-vlm" else "default_model"}
        for turn in range(turns + 1):
            for count in CLIENTS:
                ours = 0.0
                for label, (url, body) in servers.items():
                    rate = clients.submit(ask_in_turn, url, body, asked[:count]).result()
                    ours = ours or rate
                    if turn:  # the first time warms up
                        results.setdefault(f"{part}, {count} clients, {label}: tokens/s", []).append(rate)
                        if label != "ours":
                            results.setdefault(f"{part}, {count} clients, ours / {label}", []).append(ours / rate)
    return dict(sorted(results.items()))


def main(
    turns: Annotated[int, typer.Option(help="Repetitions of every variant.")] = 5,
    part: Annotated[list[str] | None, typer.Option(help="embedded, dense (medium size), or both.")] = None,
    requests: Annotated[int, typer.Option(help="Requests that arrive at random.", min=2)] = 40,
    peers: Annotated[Path | None, typer.Option(help="Python of an environment with mlx-lm and mlx-vlm.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its table."""
    if unknown := set(part or ()) - {"embedded", "dense"}:
        raise typer.BadParameter(f"unknown part {', '.join(unknown)}: expected embedded or dense", param_hint="--part")
    print(f"{platform.machine()} {platform.system()}, mlx {mx.__version__} on {mx.default_device()}, BLAS {BLAS}")
    results: dict[str, Any] = {}
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=spawned) as clients:
        for name in part or ["embedded"]:
            if peers:
                results |= beside_peers(name, peers, Path(folder) / name, clients, turns)
                continue
            pair: tuple[Path, Path] | tuple[()] = ()
            if name == "dense":
                pair = make_medium_pair("31b", Path(folder))
                add_tokenizer(pair[0])  # a server writes text
            with mlx_mtp.load(*pair, dtype="float32", profile=None, cache_bytes=0) as lm:
                if name == "dense":
                    prompts = [
                        mx.random.randint(0, VOCAB, (10 + 7 * i,), key=mx.random.key(i)).tolist() for i in range(8)
                    ]
                else:
                    prompts = [lm.encode(text) for text in PROMPTS]
                ratios, first = measure(lm, prompts, clients, turns, requests)
            results |= {f"{name}, {label}": values for label, values in ratios.items()}
            cuts = quantiles(first, n=20, method="inclusive")
            results[f"{name}, seconds to the first token, p50"] = [median(first)]
            results[f"{name}, seconds to the first token, p95"] = [cuts[-1]]
    if as_json:
        print(json.dumps({label: median(values) for label, values in results.items()}))
        return
    for label, values in results.items():
        spread = f"   {min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
        print(f"{label:<50} {median(values):8.3f}{spread}")


if __name__ == "__main__":
    typer.run(main)
