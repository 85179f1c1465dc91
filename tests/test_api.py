"""The public interface on the embedded pair: prompts, streams, threads, asyncio, chats (api.py, chat.py)."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp import CheckpointError, MTPError, PromptError
from mlx_mtp.decode.prefill import CHUNK_BESIDE

QUESTION = "What is a drafter?"
GREEDY = {"max_tokens": 40, "temperature": 0.0}


def test_a_prompt_in_every_form(lm: mlx_mtp.MTPModel):
    text = lm.generate(QUESTION, **GREEDY)
    messages = lm.generate([{"role": "user", "content": QUESTION}], **GREEDY)
    tokens = lm.generate(lm.encode(QUESTION), **GREEDY)
    assert text.tokens == messages.tokens == tokens.tokens
    assert text.text == lm.tokenizer.decode(text.tokens)
    assert text.stats.prompt_tokens == len(lm.encode(QUESTION))


def test_a_stream_adds_up_to_the_generation(lm: mlx_mtp.MTPModel):
    whole = lm.generate(QUESTION, **GREEDY)
    chunks = list(lm.stream(QUESTION, **GREEDY))
    assert "".join(c.text for c in chunks) == whole.text
    assert [t for c in chunks for t in c.tokens] == whole.tokens
    assert [c.finish_reason for c in chunks][:-1] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason


def test_chunks_say_what_came_from_drafts(lm: mlx_mtp.MTPModel):
    chunks = list(lm.stream("What is a drafter?", max_tokens=60, temperature=0.0, draft_length=4, stop=["verif"]))
    for chunk in chunks:
        assert "".join(span.text for span in chunk.spans) == chunk.text
    spans = [span for chunk in chunks for span in chunk.spans]
    stats = chunks[-1].stats
    assert 0 < sum(span.drafted for span in spans) <= stats.accepted
    assert sum(not span.drafted for span in spans) >= 2  # the first token and at least one bonus token
    plain = list(lm.stream("What is a drafter?", max_tokens=60, temperature=0.0, draft_length=0))
    assert not any(span.drafted for chunk in plain for span in chunk.spans)


def test_it_ends_by_itself_or_where_told(lm: mlx_mtp.MTPModel):
    ended = lm.generate(QUESTION, max_tokens=400, temperature=0)
    assert ended.finish_reason == "stop" and ended.tokens[-1] in lm.defaults.stop_tokens
    short = lm.generate(QUESTION, max_tokens=5, temperature=0)
    assert short.finish_reason == "length" and short.tokens == ended.tokens[:5]
    longer = lm.generate(QUESTION, max_tokens=len(ended.tokens) + 5, temperature=0, ignore_eos=True)
    assert len(longer.tokens) == len(ended.tokens) + 5
    word = ended.text.split()[3]
    stopped = lm.generate(QUESTION, max_tokens=400, temperature=0, stop=word)
    assert stopped.finish_reason == "stop" and stopped.text == ended.text[: ended.text.index(word)]


def test_same_seed_same_text(lm: mlx_mtp.MTPModel):
    texts = [
        lm.generate(QUESTION, max_tokens=40, temperature=4.0, top_k=0, seed=7, draft_length=k).tokens
        for k in (0, 1, 4, "auto")
    ]
    assert all(text == texts[0] for text in texts)
    assert lm.generate(QUESTION, max_tokens=40, temperature=4.0, top_k=0, seed=8).tokens != texts[0]


def hold(lm: mlx_mtp.MTPModel, seconds: float = 0.5) -> None:
    """Keeps the model's thread busy for a moment, so that all rows of the next call wait together."""
    begun = threading.Event()

    def rest(_: object) -> None:
        begun.set()
        time.sleep(seconds)

    threading.Thread(target=lm._session.call, args=(rest,)).start()
    begun.wait()


def test_several_answers(lm: mlx_mtp.MTPModel):
    options = {"max_tokens": 30, "temperature": 4.0, "top_k": 0, "seed": 7}
    hold(lm)
    several = lm.generate(QUESTION, n=3, **options)
    assert several[0].tokens == lm.generate(QUESTION, **options).tokens
    assert len({tuple(r.tokens) for r in several}) == 3
    assert several[1].stats.cached_tokens == several[1].stats.prompt_tokens, "one prefill for all"
    # Long answers overwrite the window before the prompt's end.
    hold(lm)
    long = lm.generate([7] * 200, n=2, max_tokens=200, ignore_eos=True, seed=3)
    assert long[1].stats.cached_tokens == 200
    with mlx_mtp.load() as fresh:
        options = {"max_tokens": 200, "ignore_eos": True, "seed": mlx_mtp.api.row_seed(3, 1)}
        assert fresh.generate([7] * 200, **options).tokens == long[1].tokens


def test_a_closed_stream_is_cancelled(lm: mlx_mtp.MTPModel):
    stream = lm.stream(QUESTION, **GREEDY)
    first = next(stream)
    stream.close()
    assert lm.generate(QUESTION, **GREEDY).tokens[: len(first.tokens)] == first.tokens


def test_streams_may_be_interleaved(lm: mlx_mtp.MTPModel):
    prompts = [QUESTION, "Who are you?"]
    alone = [lm.generate(p, **GREEDY).tokens for p in prompts]
    streams = [lm.stream(p, **GREEDY) for p in prompts]
    together: list[list[int]] = [[], []]
    alive = {0, 1}
    while alive:
        for i in sorted(alive):
            chunk = next(streams[i], None)
            if chunk is None:
                alive.discard(i)
            else:
                together[i] += chunk.tokens
    assert together == alone


def test_a_batch_is_what_its_prompts_give_alone(lm: mlx_mtp.MTPModel):
    prompts = [
        QUESTION,
        [{"role": "user", "content": "Who are you?"}],
        lm.encode("Tell me a short story about a fox."),
        {"prompt": "What is the capital of France?", "temperature": 1.0, "top_k": 20},
        {"prompt": "How many minutes are 2 hours?", "max_tokens": 5, "draft_length": 0},
        {"prompt": QUESTION, "stop": "the", "seed": 99},
    ]
    alone = []
    for i, prompt in enumerate(prompts):
        own = dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt}
        alone.append(lm.generate(**{**GREEDY, "seed": mlx_mtp.api.row_seed(3, i), **own}))
    for size in (1, 3, "auto"):
        together = lm.generate_batch(prompts, batch_size=size, seed=3, **GREEDY)
        assert [r.tokens for r in together] == [r.tokens for r in alone]
        assert [(r.text, r.finish_reason) for r in together] == [(r.text, r.finish_reason) for r in alone]
    each = dict(lm.generate_each(iter(prompts), seed=3, **GREEDY))
    assert [each[i].text for i in range(len(prompts))] == [r.text for r in alone]


def test_bad_prompts_in_a_batch(lm: mlx_mtp.MTPModel):
    bad = ["Who are you?", "", {"max_tokens": 3}, {"prompt": "x", "temprature": 1}, {"prompt": [10**9]}, "Hello!"]
    with pytest.raises(PromptError):
        lm.generate_batch(bad, **GREEDY)
    each = dict(lm.generate_each(bad, **GREEDY))
    assert sorted(each) == list(range(6))
    assert [isinstance(each[i], PromptError) for i in range(6)] == [False, True, True, True, True, False]
    assert "temprature" in str(each[3])
    assert lm.generate_batch([]) == []
    for single in (QUESTION, {"prompt": QUESTION}, None):
        with pytest.raises(PromptError, match="a list of prompts"):
            lm.generate_batch(single)
        with pytest.raises(PromptError, match="a list of prompts"):
            next(lm.generate_each(single))
    for size in (0, -1, "many", 1.5):
        with pytest.raises(PromptError, match="batch_size"):
            lm.generate_batch(["x"], batch_size=size)


def test_a_batch_that_is_given_up_leaves_nothing_running(lm: mlx_mtp.MTPModel):
    each = lm.generate_each([QUESTION, "Tell me a short story about a fox.", "Hello!"], **GREEDY)
    next(each)
    each.close()
    assert lm.generate(QUESTION, **GREEDY).stats.generated_tokens == 40
    assert not lm._session.call(lambda it: it.scheduler.kv_bytes)


def test_threads(lm: mlx_mtp.MTPModel):
    prompts = [QUESTION, "Who are you?", "What is the capital of France?", "How many minutes are 2 hours?"]
    prompts += [QUESTION, "Tell me a short story about a fox.", "Who are you?", "Hello!"]
    alone = [lm.generate(p, **GREEDY).tokens for p in prompts]
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: lm.generate(prompts[i], **GREEDY).tokens}))
        for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == alone


def test_a_running_stream_goes_on_while_another_thread_prefills(lm: mlx_mtp.MTPModel):
    long = [5 + i % 400 for i in range(1600)]
    chunks, begun, enough = 0, threading.Event(), threading.Event()

    def read() -> None:
        nonlocal chunks
        for _ in lm.stream(QUESTION, max_tokens=2000, ignore_eos=True, temperature=0, draft_length=0):
            chunks += 1
            begun.set()
            if enough.is_set():
                return

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    before = chunks
    stream = lm.stream(long, max_tokens=1)
    next(stream)
    during = chunks - before
    enough.set()
    reader.join()
    assert during >= len(long) // CHUNK_BESIDE, "it had to wait for more than a chunk"


@pytest.mark.parametrize("name", ["update_batch", "round"])
def test_nothing_is_lost_when_a_step_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    """Whoever waits is told, no text that was cut off passes for a finished one, and the model goes on."""
    with mlx_mtp.load(cache_bytes=0) as lm:
        streams = [lm.stream(QUESTION, max_tokens=3000, seed=i, draft_length=0, ignore_eos=True) for i in range(3)]
        assert all(next(stream).tokens for stream in streams)

        def fail(*_: object, **__: object) -> None:
            raise MemoryError("no room")

        with monkeypatch.context() as broken:
            broken.setattr(f"mlx_mtp.decode.engine.Engine.{name}", fail)
            for stream in streams:
                with pytest.raises(mlx_mtp.MTPError, match="no room") as caught:
                    for chunk in stream:
                        assert chunk.finish_reason is None
                assert isinstance(caught.value.__cause__, MemoryError)
        assert lm.generate(QUESTION, max_tokens=5).tokens


def test_where_prompts_come_from(lm: mlx_mtp.MTPModel):
    taken = []

    def source() -> Iterator[str]:
        for prompt in ["", *[""] * 50]:
            taken.append(prompt)
            yield prompt
        yield lm.generate(QUESTION, max_tokens=5).text  # during the batch that it is for

    results = lm.generate_each(source(), 2, max_tokens=3)
    index, error = next(results)
    assert index == 0 and isinstance(error, PromptError) and len(taken) == 1, "errors wait for answers"
    assert [isinstance(result, PromptError) for _, result in results] == [True] * 50 + [False]


def test_a_large_call_leaves_the_batch_as_it_was(lm: mlx_mtp.MTPModel):
    lm.generate(QUESTION, n=20, max_tokens=2)
    streams = [lm.stream(QUESTION, max_tokens=3000, ignore_eos=True, draft_length=0) for _ in range(9)]
    for stream in streams[:8]:
        next(stream)
    ninth = threading.Thread(target=lambda: next(streams[8]))
    ninth.start()
    ninth.join(0.5)
    assert ninth.is_alive(), "more than eight rows without anybody's wish"
    streams[0].close()
    ninth.join(60)
    assert not ninth.is_alive()
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("prompts", [[QUESTION], [QUESTION, "Who are you?", "Hello!"]])
def test_a_trace_shows_host_and_device(lm: mlx_mtp.MTPModel, tmp_path: Path, prompts: list[str]):
    expected = [r.tokens for r in lm.generate_batch(prompts, draft_length=3, **GREEDY)]
    file = tmp_path / "trace.json"
    with lm.trace(file):
        traced = lm.generate_batch(prompts, draft_length=3, **GREEDY)
    assert [r.tokens for r in traced] == expected
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e["ph"] == "X"]
    names = Counter(e["name"] for e in events)
    assert names["build"] == names["wait and read"] == names["verify"] >= max(r.stats.rounds for r in traced)
    assert 0 < names["draft"] <= names["verify"] and names["prefill"] >= 1
    for row in {e["tid"] for e in events}:
        bars = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["tid"] == row)
        assert all(end <= begin + 1 for (_, end), (begin, _) in pairwise(bars))
    assert list(tmp_path.iterdir()) == [file]
    for nowhere in (tmp_path / "no" / "trace.json", tmp_path):
        with pytest.raises(OSError), lm.trace(nowhere):
            pytest.fail("what is to be traced has run in vain")
    with lm.trace(file):
        with pytest.raises(MTPError, match="only one"), lm.trace(tmp_path / "other.json"):
            pass
        lm.generate(QUESTION, max_tokens=5)
    assert any(e["name"] == "prefill" for e in json.loads(file.read_text())["traceEvents"])
    assert list(tmp_path.iterdir()) == [file]


def test_asyncio(lm: mlx_mtp.MTPModel):
    async def collect() -> list[int]:
        return [t async for chunk in lm.astream(QUESTION, **GREEDY) for t in chunk.tokens]

    async def both() -> list[list[int]]:
        return await asyncio.gather(collect(), collect())

    assert asyncio.run(both()) == [lm.generate(QUESTION, **GREEDY).tokens] * 2


def test_asyncio_cancelled(lm: mlx_mtp.MTPModel):
    async def endless() -> None:
        async for _ in lm.astream(QUESTION, max_tokens=3000, temperature=0, ignore_eos=True):
            pass

    async def cancel() -> None:
        for seconds in (0.0, 0.03, 0.3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(endless(), seconds)

    asyncio.run(cancel())
    assert lm.generate(QUESTION, **GREEDY).tokens


def test_logits_and_proposals(lm: mlx_mtp.MTPModel):
    tokens = lm.encode(QUESTION)
    logits = lm.logits(tokens)
    assert logits.shape == (len(tokens), lm.config.text.vocab_size) and logits.dtype == mx.float32
    first = lm.generate(tokens, max_tokens=1, temperature=0).tokens[0]
    assert int(np.array(logits[-1]).argmax()) == first
    proposed = lm.propose(tokens, 4)
    assert proposed[0] == first and len(proposed) == 5


def test_prompts_that_cannot_be_used(lm: mlx_mtp.MTPModel):
    vocabulary, context = lm.config.text.vocab_size, lm.config.text.max_positions
    for prompt, culprit in (
        ("", "empty"), ("  \n", "empty"), ([], "empty"), ([vocabulary], str(vocabulary)), ([-1], "-1"),
        ([5] * (context + 1), "context"), ([5, "x"], "list"), ([{"role": "user"}], "content"), ([True], "list"),
        (None, "list"), (5, "list"), (b"hi", "list"), (1.5, "list"),
        ([{"role": "user", "content": "x", "tool_calls": 5}], "tool_calls"),
        ([{"role": "user", "content": [5]}], "part"),
    ):  # fmt: skip
        # At once, not at the first chunk.
        with pytest.raises(PromptError, match=culprit) as caught:
            lm.stream(prompt)
        assert "\n" not in str(caught.value)
    for tokens in ([], [vocabulary], [5] * (context + 1)):
        with pytest.raises(PromptError):
            lm.logits(tokens)
    for options in (
        {"max_tokens": 0},
        {"temperature": -1},
        {"n": 0},
        {"draft_length": 99},
        {"stop": ""},
        {"max_tokens": 3.5},
        {"temperature": "1"},
        {"top_k": 2.5},
        {"seed": 1.5},
        {"draft_length": True},
        {"stop": 5},
        {"stop": ["x", 5]},
        {"n": 1.5},
        {"n": 2, "seed": "x"},
        {"tools": 5},
        {"tools": ["x"]},
    ):
        with pytest.raises(PromptError):
            lm.generate(QUESTION, **options)
        if "n" not in options:
            ((_, found),) = lm.generate_each([{"prompt": QUESTION, **options}])
            assert isinstance(found, PromptError), "one prompt that can't be used ends all of them"
    for tokens in ("abc", [1.5], None):
        with pytest.raises(PromptError):
            lm.logits(tokens)
        with pytest.raises(PromptError):
            lm.propose(tokens, 1)
    for k in (0, "x", context, 10**30):
        with pytest.raises(PromptError):
            lm.propose([5], k)
    with pytest.raises(PromptError):
        lm.chat().send(5)
    with pytest.raises(PromptError, match="tools"):
        lm.chat().send(QUESTION, tools=[])
    with pytest.raises(PromptError, match="empty"):
        lm.encode([])
    ((_, unknown),) = lm.generate_each([{1: 2, "prompt": QUESTION}])
    assert isinstance(unknown, PromptError) and "1" in str(unknown)
    with pytest.raises(CheckpointError, match=r"4\.0 bits"):
        mlx_mtp.load(quantize=4.0)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no folder"):
        mlx_mtp.load(drafter="")


def test_a_home_folder_that_this_machine_does_not_know(lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_MTP_PROFILES", "~no-such-user/x")
    for use in (
        lambda: lm.save_prompt(QUESTION, "~no-such-user/x"),
        lambda: lm.load_prompt("~no-such-user/x"),
        lambda: lm.trace("~no-such-user/x").__enter__(),
        lambda: mlx_mtp.load(profile="~no-such-user/x"),
        mlx_mtp.load,
    ):
        with pytest.raises(MTPError, match="~no-such-user"):
            use()


def test_without_a_drafter(lm: mlx_mtp.MTPModel):
    with mlx_mtp.load(drafter=False) as plain:
        assert plain.drafter_config is None
        result = plain.generate(QUESTION, **GREEDY)
        assert result.tokens == lm.generate(QUESTION, **GREEDY).tokens and result.stats.drafted == 0
        with pytest.raises(PromptError, match="drafter"):
            plain.propose([5], 1)


def test_a_closed_model_holds_no_memory():
    gc.collect()
    before = mx.get_active_memory()
    model = mlx_mtp.load()
    model.generate(QUESTION, max_tokens=5)
    model.close()
    assert mx.get_active_memory() - before < 1_000_000


def test_a_closed_model_says_so():
    model = mlx_mtp.load()
    stream = model.stream(QUESTION, max_tokens=3000, ignore_eos=True)
    next(stream)
    model.close()
    model.close()
    for call in (lambda: model.generate("x"), lambda: model.logits([1]), lambda: list(stream), lambda: model.chat()):
        with pytest.raises(MTPError, match="closed"):
            call()


def test_a_chat_remembers_and_does_not_prefill_again(lm: mlx_mtp.MTPModel):
    chat = lm.chat(system="Answer briefly.")
    list(chat.send("What is the capital of France?", **GREEDY))
    first = chat.messages[-1]["content"]
    list(chat.send("And of Spain?", **GREEDY))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    history = [{"role": "system", "content": "Answer briefly."}, *chat.messages[:3]]
    assert chat.messages[-1]["content"] == lm.generate(history, **GREEDY).text
    assert chat.stats.cached_tokens > len(lm.tokenizer.encode(first)) + 10
    chat.reset()
    assert chat.messages == []
    list(chat.send("What is the capital of France?", **GREEDY))
    assert chat.messages[-1]["content"] == first


def test_a_chat_keeps_what_was_said_before_it_was_stopped(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    answer = chat.send("Tell me a short story about a fox.", draft_length=0, **GREEDY)
    said = "".join(next(answer).text for _ in range(8))
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    with pytest.raises(PromptError):
        chat.send(" ")
    assert len(chat.messages) == 2


def test_a_chat_can_think(lm: mlx_mtp.MTPModel):
    chat = lm.chat(thinking=True)
    chunks = list(chat.send("What is 3 + 4?", max_tokens=120, temperature=0))
    assert chat.messages[-1]["content"] == "".join(c.text for c in chunks)
    assert "<|channel>" not in chat.messages[-1]["content"]
    list(chat.send("And 5 + 6?", max_tokens=120, temperature=0))
    assert len(chat.messages) == 4


def test_every_public_name_can_be_imported():
    for name in mlx_mtp.__all__:
        assert getattr(mlx_mtp, name) is not None


def test_progress_of_loading():
    reports: list[mlx_mtp.Progress] = []
    with mlx_mtp.load(progress=reports.append):
        pass
    by_model = {name: [it for it in reports if it.model == name] for name in ("demo/target", "demo/drafter")}
    assert reports == [*by_model["demo/target"], *by_model["demo/drafter"]]
    for own in by_model.values():
        assert {it.stage for it in own} == {"load"} and len({it.total for it in own}) == 1
        counts = [it.done for it in own]
        assert counts[0] == 0 and counts[-1] == own[0].total > 0 and counts == sorted(counts) and len(counts) > 10


def test_what_a_progress_callback_raises_ends_the_loading():
    def stop(report: mlx_mtp.Progress) -> None:
        if report.done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mlx_mtp.load(progress=stop)
