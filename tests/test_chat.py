"""Conversations on the embedded pair: history, thoughts, buffers that are kept (chat.py)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

import mlx_mtp

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def lm() -> Iterator[mlx_mtp.MTPModel]:
    with mlx_mtp.load() as model:
        yield model


def say(chat: mlx_mtp.Chat, text: str, **options: Any) -> str:
    return "".join(chunk.text for chunk in chat.send(text, **{**GREEDY, **options}))


def test_many_turns_are_what_a_fresh_model_would_say(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    for question in ("Who are you?", "What is a drafter?", "How many minutes are 3 hours?", "Thank you."):
        history = [*chat.messages, {"role": "user", "content": question}]
        before = chat.stats.prompt_tokens if chat.stats else 0
        answer = say(chat, question)
        assert answer == lm.generate(history, **GREEDY).text
        assert chat.stats is not None and chat.stats.cached_tokens >= before, "earlier turns are prefilled again"
    assert len(chat.messages) == 8


def test_an_answer_put_together_unusually_is_not_prefilled_again(lm: mlx_mtp.MTPModel):
    assert lm.tokenizer is not None
    unusual = 0
    for seed in range(5):
        chat = lm.chat()
        wild: dict[str, Any] = {"temperature": 3.0, "top_k": 64, "top_p": 0.95, "seed": seed}
        chunks = list(chat.send("Tell me a short story about a fox.", max_tokens=40, **wild))
        tokens = [t for chunk in chunks for t in chunk.tokens]
        if chat.messages[-1]["content"][0].isspace():
            continue  # which the chat format strips: other tokens
        while not lm.tokenizer.decode(tokens[-1:]).strip():  # the chat format strips answers
            tokens.pop()
        unusual += lm.tokenizer.encode(chat.messages[-1]["content"].rstrip()) != tokens
        list(chat.send("Go on.", **GREEDY))
        assert chat.stats is not None
        assert chat.stats.cached_tokens >= chunks[-1].stats.prompt_tokens + len(tokens) - 1
    assert unusual, "every answer was cut into tokens as the tokenizer does it: raise the temperature"


def test_history_holds_no_thoughts(lm: mlx_mtp.MTPModel):
    chat = lm.chat(thinking=True)
    chunks = list(chat.send("What is 3 + 4?", temperature=0, max_tokens=120))
    assert "".join(chunk.reasoning for chunk in chunks), "the model thought nothing: ask it something else"
    assert chat.messages[-1]["content"] == "".join(chunk.text for chunk in chunks)
    second = list(chat.send("What is 5 + 6?", temperature=0, max_tokens=120))
    history = [*chat.messages[:2], {"role": "user", "content": "What is 5 + 6?"}]
    alone = lm.generate(history, temperature=0, max_tokens=120, thinking=True)
    assert "".join(chunk.text for chunk in second) == alone.text
    assert "".join(chunk.reasoning for chunk in second) == alone.reasoning
    assert chat.stats is not None and chat.stats.prompt_tokens == alone.stats.prompt_tokens


def test_settings_may_change_between_turns(lm: mlx_mtp.MTPModel):
    chat = lm.chat(system="Answer briefly.")
    say(chat, "Who are you?")
    chat.system, chat.thinking = None, True
    answer = say(chat, "What is 3 + 4?", max_tokens=120)
    history = [*chat.messages[:2], {"role": "user", "content": "What is 3 + 4?"}]
    assert answer == lm.generate(history, temperature=0, max_tokens=120, thinking=True).text
    # For a single turn.
    sizes = {len(lm.encode("Who are you?", thinking=thinking)): thinking for thinking in (False, True)}
    assert len(sizes) == 2
    for size, thinking in sizes.items():
        chat = lm.chat(thinking=not thinking)
        say(chat, "Who are you?", thinking=thinking)
        assert chat.thinking != thinking and chat.stats is not None and chat.stats.prompt_tokens == size


def test_a_stop_string_ends_an_answer_and_the_next_turn_is_right(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    answer = say(chat, "Tell me a short story about a fox.", stop=["fox"])
    assert answer and "fox" not in answer
    assert chat.messages[-1]["content"] == answer
    history = [*chat.messages, {"role": "user", "content": "Go on."}]
    assert say(chat, "Go on.") == lm.generate(history, **GREEDY).text


def test_an_unfinished_answer_ends_when_the_next_message_is_sent(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    running = chat.send("Tell me a short story about a fox.", draft_length=0, **GREEDY)
    said = "".join(next(running).text for _ in range(5))
    history = [
        {"role": "user", "content": "Tell me a short story about a fox."},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Who are you?"},
    ]
    assert say(chat, "Who are you?") == lm.generate(history, **GREEDY).text
    assert list(running) == []
    assert chat.messages[:3] == history and len(chat.messages) == 4
    running = chat.send("Tell me a short story about a fox.", **GREEDY)
    next(running)
    chat.reset()
    assert chat.messages == [] and list(running) == []


def test_a_dropped_iterator_keeps_what_was_said(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    said = ""
    for chunk in chat.send("Who are you?", draft_length=0, **GREEDY):
        said += chunk.text
        if len(said) > 10:
            break
    del chunk
    gc.collect()
    assert chat.messages[-1] == {"role": "assistant", "content": said}


def test_a_refused_message_changes_nothing(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    with pytest.raises(mlx_mtp.PromptError, match="context"):
        chat.send("word " * 5000)
    assert chat.messages == []
    say(chat, "Who are you?")
    before = list(chat.messages)
    with pytest.raises(mlx_mtp.PromptError, match="reset"):
        chat.send("word " * 5000)
    with pytest.raises(mlx_mtp.PromptError, match="empty"):
        chat.send("\n")
    with pytest.raises(mlx_mtp.PromptError, match="max_tokens"):
        chat.send("Who are you?", max_tokens=0)
    assert chat.messages == before
    assert say(chat, "What is a drafter?")


def test_an_answer_that_never_began_has_no_statistics(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    say(chat, "Who are you?")
    assert chat.stats is not None
    chat.send("Who are you?", **GREEDY).close()
    assert chat.stats is None and len(chat.messages) == 2
