"""Random calls of a random pair, in whatever company, each checked by the oracle (oracle_judge.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

import mlx_mtp
from mlx_mtp.decode import prefill as prefill_module
from mlx_mtp.decode import scheduler as scheduler_module
from mlx_mtp.kv.buffers import CAPACITY_STEP, ring_slots

from .oracle import Array
from .oracle_choice import row_seed
from .oracle_constraints import random_form
from .oracle_judge import Call, Given, Judge, Options, Verdict
from .oracle_pairs import SILENT, Pair
from .random_controls import even_tokens_first


class Caller:
    """Draws calls of one model, runs them in random company, and keeps what they gave."""

    def __init__(self, lm: mlx_mtp.MTPModel, judge: Judge, rng: Random, folder: Path, chunk: int) -> None:
        """Takes the model; `folder` is for saved prompts, `chunk` the length of the prefill's chunks."""
        self._lm, self._judge, self._rng, self._folder = lm, judge, rng, folder
        config = judge.oracle.config
        window, self._most = config["sliding_window"], config["max_position_embeddings"]
        edges = [window, ring_slots(window), CAPACITY_STEP, chunk, 2 * chunk, self._most]
        self._lengths = [1, 2, 3, *(edge + d for edge in edges for d in (-1, 0, 1) if 0 < edge + d <= 300)]
        self._known: list[Given] = []

    def wave(self, rows: int, crowd: int) -> list[Given]:
        """Runs calls of about `rows` rows, from one thread or several at a time, beside a crowd of so many rows."""
        jobs, count = [self._crowd(crowd)] if crowd else [], 0
        while count < rows:
            job, size = self._job()
            jobs.append(job)
            count += size
        if self._known and self._rng.random() < 0.3:
            jobs.insert(0, self._saved(self._rng.choice(self._known)))
        with ThreadPoolExecutor(self._rng.choice([1, 3, 6, 6])) as pool:
            found = [given for future in [pool.submit(job) for job in jobs] for given in future.result()]
        self._known = [*self._known, *found][-60:]
        return found

    def _job(self) -> tuple[Callable[[], list[Given]], int]:
        """A call, or several at once, and how many rows it has."""
        rng, lm = self._rng, self._lm
        kind, call = rng.choice(["one", "n", "batch", "batch", "stream", "left", "cancelled"]), self.call()
        if kind == "n":
            n = rng.randint(2, 4)
            return lambda: self._several(call, lm.generate(call.prompt, n=n, **call.options)), n
        if kind == "batch":
            calls, size = [call, *(self.call() for _ in range(rng.randint(1, 6)))], rng.randint(1, 8)
            return lambda: self._batch(calls, size), len(calls)
        if kind in ("left", "stream"):
            chunks = rng.randint(1, 6) if kind == "left" else 10**9
            return lambda: [self._streamed(call, chunks)], 1
        if kind == "cancelled":
            return lambda: [self._cancelled(call, rng.randint(0, 3))], 1
        return lambda: [_given(call, lm.generate(call.prompt, **call.options))], 1

    def _crowd(self, rows: int) -> Callable[[], list[Given]]:
        """Long texts with the same options in one wide batch: most tokens for the time."""
        rng = self._rng
        options = self.call().options | {"exactness": "fast", "prediction": None}
        options["ignore_eos"] = "response_format" not in options
        options |= {"max_tokens": rng.choice([40, 100, 250]), "draft_length": rng.choice(["auto", 0, 0, 1, 2, 3])}
        calls = [Call(self._prompt(), options | {"seed": rng.getrandbits(40)}) for _ in range(rows)]
        return lambda: self._batch(calls, min(rows, 64))

    def _several(self, call: Call, found: Any) -> list[Given]:
        seeds = [row_seed(call.options["seed"], i) for i in range(len(found))]
        calls = [Call(call.prompt, call.options | {"seed": seed}) for seed in seeds]
        return [_given(one, it) for one, it in zip(calls, found, strict=True)]

    def _batch(self, calls: list[Call], size: int) -> list[Given]:
        prompts: list[Any] = [{"prompt": call.prompt, **call.options} for call in calls]
        found = self._lm.generate_batch(prompts, batch_size=size)
        return [_given(call, it) for call, it in zip(calls, found, strict=True)]

    def _streamed(self, call: Call, most: int) -> Given:
        """A stream whose reader leaves after so many chunks."""
        chunks = []
        with closing(self._lm.stream(call.prompt, **call.options)) as stream:
            for chunk in stream:
                chunks.append(chunk)
                if len(chunks) >= most:
                    break
        return _given(call, mlx_mtp.Generation.joined(chunks), chunks[-1].finish_reason is not None)

    def _cancelled(self, call: Call, after: int) -> Given:
        """A stream that is cancelled by its event after so many chunks."""
        event, chunks = threading.Event(), []
        for chunk in self._lm.stream(call.prompt, **call.options, cancel=event):
            chunks.append(chunk)
            if len(chunks) > after:
                event.set()
        return _given(call, mlx_mtp.Generation.joined(chunks), chunks[-1].finish_reason != "cancelled")

    def _saved(self, known: Given) -> Callable[[], list[Given]]:
        """Saves and loads a known text as a prompt, for later calls to begin with."""
        tokens, path = [*known.call.prompt, *known.tokens][: self._most], self._folder / f"{id(known)}.safetensors"

        def job() -> list[Given]:
            self._lm.save_prompt(tokens, path)
            with suppress(mlx_mtp.MemoryBudgetError):  # the cache may be smaller than that
                assert self._lm.load_prompt(path) == len(tokens)
            path.unlink()
            return []

        return job

    def call(self) -> Call:
        """A call with everything about it drawn at random; now and then an earlier one with other ways to draft."""
        rng = self._rng
        if self._known and rng.random() < 0.15:
            known = rng.choice(self._known)
            predicted = [token if rng.random() < 0.95 else 3 for token in known.tokens]
            drafting = {"draft_length": "auto", "exactness": "fast", "prediction": predicted}
            return Call(known.call.prompt, known.call.options | drafting)
        options: Options = {
            "seed": rng.choice([rng.randrange(4), rng.getrandbits(32), -rng.getrandbits(70)]),
            "max_tokens": rng.choice([1, rng.randint(2, 40), rng.randint(40, 110)]),
            "temperature": rng.choice([0.0, 0.0, 0.5, 1.0, 1.0, 1.7]),
            "top_k": rng.choice([0, 0, 1, 5, 40]),
            "top_p": rng.choice([1.0, 1.0, 0.9, 0.5]),
            "min_p": rng.choice([0.0, 0.0, 0.05, 0.3]),
            "ignore_eos": rng.random() < 0.8,
            "exactness": rng.choice([*["fast"] * 10, "invariant", "stepwise"]),
        }
        options["draft_length"] = self._draft_length(7 if options["exactness"] == "invariant" else 15)
        return Call(self._prompt(), options | self._rules())

    def _draft_length(self, longest: int) -> int | str:
        return self._rng.choice(["auto", "auto", 0, 0, 1, 1, 2, 2, 3, 4, self._rng.randint(5, longest)])

    def _rules(self) -> Options:
        """Options that steer the text, each now and then."""
        rng, vocab, rules = self._rng, self._judge.oracle.vocab, Options()
        if rng.random() < 0.2:
            rules["repetition_penalty"] = rng.choice([1.1, 1.6, 0.8])
        if rng.random() < 0.2:
            rules |= {"presence_penalty": rng.uniform(-1, 2), "frequency_penalty": rng.uniform(-0.2, 1)}
        if rng.random() < 0.15:
            values = [-float("inf"), rng.uniform(-9, 9), rng.uniform(-1, 1)]
            rules["logit_bias"] = {
                rng.randrange(3, vocab): rng.choice(values) for _ in range(rng.randint(1, vocab // 2))
            }
        if rng.random() < 0.1:
            rules["logits_processors"] = [even_tokens_first]
        if rng.random() < 0.15:
            rules["logprobs"] = rng.choice([0, 1, 5])
        if rng.random() < 0.15:
            rules["stop_token_ids"] = rng.sample(range(vocab), rng.randint(1, 3))
        if self._judge.writes and rng.random() < 0.25:
            rules["stop"] = [rng.choice(["a", "he", "ll", " w", "ab", "qu", "x"]) for _ in range(rng.randint(1, 3))]
        if self._judge.writes and rng.random() < 0.25:
            rules |= {"response_format": random_form(rng), "ignore_eos": False}
            rules.pop("logit_bias", None)  # it might leave no token
        return rules

    def _prompt(self) -> list[int]:
        """A prompt: new, or the beginning of an earlier text with something else after it."""
        rng = self._rng
        length = min(rng.choice([rng.choice(self._lengths), rng.randint(1, 24)]), self._most)
        tokens = [self._token() for _ in range(length)]
        if self._known and rng.random() < 0.4:
            known = rng.choice(self._known)
            shared = [*known.call.prompt, *known.tokens]
            tokens = [*shared[: rng.randint(1, len(shared))], *tokens[: rng.choice([0, 1, 5])]][: self._most]
        return tokens

    def _token(self) -> int:
        """A token of a prompt: with a tokenizer, none that begins thoughts or calls."""
        token = self._rng.randrange(self._judge.oracle.vocab)
        return token if not self._judge.writes or token not in SILENT else 1


def _given(call: Call, found: mlx_mtp.Generation, ended: bool | None = None) -> Given:
    ended = found.finish_reason != "cancelled" if ended is None else ended
    return Given(call, found.tokens, found.text, ended, found.logprobs, found.stats.accepted)


def run_model(pair: Pair, seed: int, waves: int, rows: int, crowd: int) -> Iterator[tuple[Given, Verdict]]:
    """Loads a pair, with or without its drafter, and checks waves of calls; see `Caller.wave`."""
    rng = Random(seed)
    chunk = rng.choice([8, 24, 48, 2048])
    options = {
        "drafter": pair.drafter if rng.random() < 0.9 else False,
        "cache_bytes": rng.choice([None, None, 0, 100_000]),
        "drafter_position": rng.choice(["committed", "bonus"]),
        "quantize_drafter": rng.choice(["auto", None, 4]),
    }
    with loaded(pair, chunk, **options) as lm:
        judge = judge_of(pair, lm)
        caller = Caller(lm, judge, rng, pair.target.parent, chunk)
        for _ in range(waves):
            for given in caller.wave(rows, crowd):
                yield given, judge.judge(given)
            if rng.random() < 0.2:
                lm.unload()  # the next call loads it again


def judge_of(pair: Pair, lm: mlx_mtp.MTPModel) -> Judge:
    """The judge of a loaded pair."""

    def own(tokens: list[int]) -> Array:
        return np.array(lm.logits(tokens).astype(mx.float32)).astype(np.float64)

    return Judge(pair, None if pair.dtype == "float32" else own)


@contextmanager
def loaded(pair: Pair, chunk: int = 2048, **options: Any) -> Iterator[mlx_mtp.MTPModel]:
    """A pair, with prompts prefilled in chunks of that length: of half of it, beside other rows."""
    options = {"drafter": pair.drafter, "adapter": pair.adapter, "dtype": pair.dtype, "profile": None} | options
    with ExitStack() as stack:
        for module in (prefill_module, scheduler_module):
            stack.enter_context(mock.patch.object(module, "CHUNK", chunk))
        stack.enter_context(mock.patch.object(scheduler_module, "CHUNK_BESIDE", max(8, chunk // 2)))
        yield stack.enter_context(mlx_mtp.load(pair.target, **options))


def alone(pair: Pair, call: Call) -> list[str]:
    """What is wrong with a call that nothing else runs beside or has run before."""
    with loaded(pair) as lm:
        return judge_of(pair, lm).judge(_given(call, lm.generate(call.prompt, **call.options))).differences


def shrunk(pair: Pair, call: Call) -> Call:
    """The smallest call found that is still wrong alone; the call itself if it is right alone."""
    smaller: Call | None = call if alone(pair, call) else None
    while smaller:
        call = smaller
        size, options = len(call.prompt), call.options
        fewer = [{k: v for k, v in options.items() if k != name} for name in options if name not in _NEEDED]
        shorter = [call.prompt[size // 2 :], call.prompt[1:]] if size > 1 else []
        less = [options | {"max_tokens": options["max_tokens"] // 2}] if options["max_tokens"] > 1 else []
        candidates = [*(Call(call.prompt, it) for it in (*fewer, *less)), *(Call(it, options) for it in shorter)]
        smaller = next((it for it in candidates if alone(pair, it)), None)
    return call


_NEEDED = ("seed", "max_tokens")
"""Options that a call can't do without here."""
