"""Calls of one model by every way there is, in threads that come and go, each compared with what it gives alone.

A call has a number, which with the seed says everything about it. So a call may come again and again, in other company,
and what it gives alone is worked out once (`Alone`).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
import mlx.core as mx

import mlx_mtp
from mlx_mtp.decode.noise import row_seed

from .bad_clients import CHAT, KINDS, misbehave
from .random_controls import PROMPTS, random_call

CACHE_BYTES = 8 * 2**20
"""KV that a soaked model keeps of finished texts: little, so that it is soon as full as it gets."""

MOST_ANSWERS = 3


def drawn_call(seed: int, number: int, max_tokens: int) -> dict[str, Any]:
    """A prompt with options, as `generate_batch` takes it."""
    dice = Random(f"{seed} {number}")
    call = random_call(dice, max_tokens)
    if dice.random() < 0.3:
        words = " ".join(PROMPTS).split()
        call["prompt"] += " " + " ".join(dice.choice(words) for _ in range(dice.randint(1, 200)))
    if dice.random() < 0.3:
        call["stop"] = dice.sample([".", "e", " the", "\n", "ing", "0", "<turn|>"], 2)
    if dice.random() < 0.1:
        call |= {"exactness": dice.choice(["invariant", "stepwise"]), "draft_length": dice.choice([0, 2, 7])}
    return call


class Text(NamedTuple):
    """What a call gives."""

    tokens: list[int]
    text: str


class Alone:
    """What calls and conversations give alone, on a model of their own, which is unloaded when nobody asks."""

    def __init__(self, seed: int, calls: int, max_tokens: int) -> None:
        """Takes how many different calls there are, and how long their texts may be; answers are found when needed."""
        self.seed, self.calls, self._max_tokens = seed, calls, max_tokens
        self.lm = mlx_mtp.load(cache_bytes=0, idle_unload=1)
        self._turn = threading.Lock()
        self._known: dict[tuple[int, int], Text] = {}
        self._talks: dict[int, list[Text]] = {}

    def call(self, number: int) -> dict[str, Any]:
        """The call of that number."""
        return drawn_call(self.seed, number, self._max_tokens)

    def text(self, number: int, answer: int = 0) -> Text:
        """What a call's answer of that number is, decoded plainly."""
        with self._turn:
            if (number, answer) not in self._known:
                call = self.call(number)
                plain = {"draft_length": 0, "prediction": None, "seed": row_seed(call["seed"], answer)}
                found = self.lm.generate(**call | plain)
                self._known[number, answer] = Text(found.tokens, found.text)
            return self._known[number, answer]

    def talk(self, number: int) -> tuple[list[str], dict[str, Any], list[Text]]:
        """The questions of a conversation, its options, and its answers."""
        dice = Random(f"{self.seed} talk {number}")
        questions = [dice.choice(PROMPTS) for _ in range(dice.randint(1, 3))]
        options = {"max_tokens": self._max_tokens, "temperature": dice.choice([0.0, 1.0]), "seed": number}
        with self._turn:
            if number not in self._talks:
                chat = self.lm.chat()
                self._talks[number] = [joined(list(chat.send(it, **options, draft_length=0))) for it in questions]
            return questions, options, self._talks[number]


def joined(chunks: Sequence[mlx_mtp.Chunk]) -> Text:
    """The text of a stream."""
    return Text([token for chunk in chunks for token in chunk.tokens], "".join(chunk.text for chunk in chunks))


def refuse(tokens: Any, logits: mx.array) -> mx.array:
    """A processor of logits that fails."""
    raise ValueError("not today")


class Callers:
    """What threads do with a model and with servers; every finished text is compared.

    Attributes:
        lm: The model.
        urls: Addresses of servers that offer it, or another of the same files.
        wrong: What wasn't right, in words.
        counts: How often things were done.
    """

    def __init__(self, lm: mlx_mtp.MTPModel, alone: Alone, urls: Sequence[str], folder: Path) -> None:
        """Takes what is called; `folder` is for saved prompts."""
        self.lm, self.urls = lm, urls
        self.wrong: list[str] = []
        self.counts = Counter[str]()
        self._alone, self._folder = alone, folder
        self._counting = threading.Lock()
        self._kinds: dict[Callable[[Random], object], int] = {
            self._one: 4, self._batch: 4, self._each: 3, self._stream: 6, self._cancelled: 3, self._async: 4,
            self._talk: 3, self._saved: 1, self._refused: 2, self._looked: 1, self._another: 1, self._unloaded: 1,
            self._client: 10, self._bad_client: 5,
        }  # fmt: skip

    def work(self, dice: Random, end: float) -> None:
        """What a thread does: some things at random, none of which begins after `end`, by `time.monotonic`."""
        for _ in range(dice.randint(1, 4)):
            (job,) = dice.choices([*self._kinds], [*self._kinds.values()])
            if time.monotonic() >= end:
                return
            try:
                job(dice)
            except Exception as error:
                self.wrong.append(f"{job.__name__}: {error!r}")
            self._count(job.__name__.strip("_"))

    def _count(self, what: str, by: int = 1) -> None:
        with self._counting:
            self.counts[what] += by

    def _check(self, how: str, number: int, found: Text, ended: bool = True, answer: int = 0) -> None:
        """Compares a text with the one that its call gets alone; of one that was cut off, the tokens' beginning."""
        self._compare(f"{how}, call {number}, answer {answer}", self._alone.text(number, answer), found, ended)

    def _compare(self, what: str, expected: Text, found: Text, ended: bool) -> None:
        same = expected == found if ended else expected.tokens[: len(found.tokens)] == found.tokens
        if not same:
            self.wrong.append(f"{what}: {found} instead of {expected}")
        self._count("texts" if ended else "cut off")
        self._count("tokens", len(found.tokens))

    def _some(self, dice: Random, most: int = 5) -> tuple[list[int], list[dict[str, Any]]]:
        numbers = [dice.randrange(self._alone.calls) for _ in range(dice.randint(1, most))]
        return numbers, [self._alone.call(number) for number in numbers]

    # Each of these is one thing that a thread does.

    def _one(self, dice: Random) -> None:
        """A call with one answer or several."""
        (number,), (call,) = self._some(dice, 1)
        n = dice.choice([1, 1, MOST_ANSWERS])
        found = self.lm.generate(**call, n=n)
        for i, it in enumerate(found if isinstance(found, list) else [found]):
            self._check("generate", number, Text(it.tokens, it.text), answer=i)

    def _batch(self, dice: Random) -> None:
        numbers, calls = self._some(dice)
        for number, it in zip(numbers, self.lm.generate_batch(calls, dice.randint(1, 6)), strict=True):
            self._check("generate_batch", number, Text(it.tokens, it.text))

    def _each(self, dice: Random) -> None:
        """A batch that is often left before its end, closed or dropped."""
        numbers, calls = self._some(dice)
        left = self.lm.generate_each(iter(calls), dice.randint(1, 3))
        for i, it in left:
            assert isinstance(it, mlx_mtp.Generation), it
            self._check("generate_each", numbers[i], Text(it.tokens, it.text))
            if dice.random() < 0.2:
                break
        if dice.random() < 0.5:
            left.close()

    def _stream(self, dice: Random) -> None:
        """A stream that is read to its end, slowly or not, or left."""
        (number,), (call,) = self._some(dice, 1)
        pause, leave = dice.choice([0, 0, 0.05]), dice.choice([0, 0, 0.1])
        chunks = []
        with closing(self.lm.stream(**call)) as stream:
            for chunk in stream:
                chunks.append(chunk)
                time.sleep(pause)
                if dice.random() < leave:
                    break
        self._check("stream", number, joined(chunks), ended=bool(chunks[-1].finish_reason))

    def _cancelled(self, dice: Random) -> None:
        """A call that another thread cancels, perhaps after its end."""
        (number,), (call,) = self._some(dice, 1)
        event = threading.Event()
        timer = threading.Timer(dice.random() * 0.5, event.set)
        timer.start()
        found = self.lm.generate(**call, cancel=event)
        timer.join()
        self._check("cancel", number, Text(found.tokens, found.text), ended=found.finish_reason != "cancelled")

    def _async(self, dice: Random) -> None:
        """Streams of an event loop, some of whose tasks are cancelled."""
        numbers, calls = self._some(dice, 4)

        async def read(call: dict[str, Any]) -> Text:
            return joined([chunk async for chunk in self.lm.astream(**call)])

        async def run() -> list[Text | BaseException]:
            tasks = [asyncio.create_task(read(call)) for call in calls]
            for task in tasks:
                if dice.random() < 0.3:
                    await asyncio.sleep(dice.random() * 0.2)
                    task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        for number, it in zip(numbers, asyncio.run(run()), strict=True):
            if isinstance(it, Text):
                self._check("astream", number, it)
            elif not isinstance(it, asyncio.CancelledError):
                raise it

    def _talk(self, dice: Random) -> None:
        """A conversation; its last answer comes alone or beside others, and may be left."""
        number = dice.randrange(self._alone.calls // 10 + 1)
        questions, options, expected = self._alone.talk(number)
        chat = self.lm.chat()
        for question, answer in zip(questions[:-1], expected[:-1], strict=True):
            self._compare(f"conversation {number}", answer, joined(list(chat.send(question, **options))), True)
        n, first = dice.randint(1, MOST_ANSWERS), list[mlx_mtp.Chunk]()
        with chat.send_several(questions[-1], n, **options) as chunks:
            for i, chunk in chunks:
                first += [] if i else [chunk]
                if dice.random() < 0.02:
                    break
        if first:
            ended = bool(first[-1].finish_reason)
            self._compare(f"conversation {number}, last", expected[-1], joined(first), ended)

    def _saved(self, dice: Random) -> None:
        """A prompt that is saved, and loaded again, for later calls to begin with."""
        _, (call,) = self._some(dice, 1)
        path = self._folder / f"{dice.getrandbits(64)}.safetensors"
        self.lm.save_prompt(call["prompt"], path)
        assert self.lm.load_prompt(path) == len(self.lm.encode(call["prompt"]))
        path.unlink()

    def _refused(self, dice: Random) -> None:
        """Calls that fail, before or while they run, which mustn't hurt others."""
        _, (call,) = self._some(dice, 1)
        bad = dice.choice([{"top_p": 7}, {"logits_processors": [refuse]}, {"response_format": {"type": "novel"}}])
        with suppress(mlx_mtp.MTPError):
            self.lm.generate(**call | bad)
            raise AssertionError(f"{bad} is taken")

    def _looked(self, dice: Random) -> None:
        tokens = [2, *(dice.randrange(300, 2000) for _ in range(dice.randint(1, 40)))]
        assert self.lm.logits(tokens).shape[0] == len(tokens)
        assert len(self.lm.propose(tokens, 3)) == 4

    def _another(self, dice: Random) -> None:
        """Another model, which is loaded, used, and closed or dropped."""
        (number,), (call,) = self._some(dice, 1)
        another = mlx_mtp.load(cache_bytes=CACHE_BYTES)
        found = another.generate(**call)
        self._check("another model", number, Text(found.tokens, found.text))
        if dice.random() < 0.5:
            another.close()

    def _unloaded(self, dice: Random) -> None:
        self.lm.unload()

    def _client(self, dice: Random) -> None:
        """A client of a server, which asks for some answers in a row."""
        with httpx.Client(base_url=dice.choice(self.urls), timeout=900, verify=False) as http:
            for number, call in zip(*self._some(dice, 3), strict=True):
                if (body := as_body(call)) is not None:
                    n = dice.choice([1, 1, MOST_ANSWERS])
                    ask = partial(self._asked_stream if dice.random() < 0.5 else self._asked, http)
                    for i, text in enumerate(ask(body | {"n": n})):
                        expected = self._alone.text(number, i)
                        self._compare(f"client, call {number}, answer {i}", expected, Text(expected.tokens, text), True)

    def _asked(self, http: httpx.Client, body: dict[str, Any]) -> list[str]:
        """The answers of a server; none if it has too much to do."""
        answer = http.post(CHAT, json=body)
        if answer.status_code == 429:
            return []
        assert answer.is_success, answer.text
        return [it["message"]["content"] or "" for it in answer.json()["choices"]]

    def _asked_stream(self, http: httpx.Client, body: dict[str, Any]) -> list[str]:
        texts, ended = [""] * body["n"], set[int]()
        with http.stream("POST", CHAT, json=body | {"stream": True}) as answer:
            if answer.status_code == 429:
                return []
            assert answer.is_success, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                    ended |= {choice["index"]} if choice["finish_reason"] else set()
        assert len(ended) == body["n"], "a stream has no end"
        return texts

    def _bad_client(self, dice: Random) -> None:
        body = {"messages": [{"role": "user", "content": dice.choice(PROMPTS)}], "n": dice.choice([1, 2])}
        with suppress(ConnectionError):
            asyncio.run(misbehave(dice.choice(self.urls), dice.choice(KINDS), body, dice))


def as_body(call: dict[str, Any]) -> dict[str, Any] | None:
    """A call as the body of a chat completion; None if it has what only Python can ask for."""
    if {"logits_processors", "exactness"} & call.keys():
        return None
    body = dict(call)
    body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    if "prediction" in body:
        body["prediction"] = {"type": "content", "content": body["prediction"]}
    if "thinking" in body:
        body["chat_template_kwargs"] = {"enable_thinking": body.pop("thinking")}
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): value for token, value in body["logit_bias"].items()}
    return body
