"""Conversations on the embedded pair: history, thoughts, buffers that are kept (chat.py)."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import mlx_mtp

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}


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


STORY = "Tell me a short story about a fox."


def test_a_rolling_conversation_leaves_out_its_oldest_turns(lm: mlx_mtp.MTPModel):
    chat = lm.chat(system="Answer briefly.", rolling=True)
    most = 1024  # tokens that an answer may have, which must have room too
    long, short = (
        [{"role": "user", "content": "word " * words}, {"role": "assistant", "content": "word " * words}]
        for words in (1700, 100)
    )
    # More than the context holds.
    chat.restore([{"role": "system", "content": "Answer briefly."}, *short, *long, *(short * 3)])
    answer = say(chat, "Who are you?", max_tokens=most)
    left_out = chat.forgotten
    assert left_out == 4 and len(chat.messages) == 12, "the history keeps all"
    seen = [{"role": "system", "content": "Answer briefly."}, *chat.messages[4:10]]
    assert (
        answer == lm.generate([*seen, {"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=most).text
    )
    say(chat, "What is a drafter?", max_tokens=most)
    assert chat.forgotten == left_out, "each turn would prefill the whole prompt again"
    assert chat.stats is not None and chat.stats.cached_tokens > 500
    with pytest.raises(mlx_mtp.PromptError, match="shorten"):
        chat.send("word " * 5000)
    chat.rolling = False
    with pytest.raises(mlx_mtp.PromptError, match="reset"):
        chat.send("Who are you?")
    assert len(chat.messages) == 14
    chat.reset()
    assert say(chat, "Who are you?") and chat.forgotten == 0


def test_several_answers_are_those_of_their_seeds(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    wild: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 30}
    texts = ["", "", ""]
    for i, chunk in chat.send_several(STORY, 3, **wild):
        texts[i] += chunk.text
    expected = lm.generate(STORY, n=3, **wild)
    assert isinstance(expected, list) and texts == [answer.text for answer in expected] and len(set(texts)) > 1
    assert chat.messages == [{"role": "user", "content": STORY}, {"role": "assistant", "content": texts[0]}]
    chat.choose(2)
    chat.choose(1)
    assert len(chat.messages) == 2 and chat.messages[1]["content"] == texts[1]
    history = [*chat.messages, {"role": "user", "content": "Go on."}]
    assert say(chat, "Go on.") == lm.generate(history, **GREEDY).text
    for i in (0, 3, -1, True):
        with pytest.raises(mlx_mtp.PromptError, match="no answer"):
            chat.choose(i)
    for n in (0, 17, "2"):
        with pytest.raises(mlx_mtp.PromptError, match="n must be"):
            chat.send_several(STORY, n)  # type: ignore[arg-type]
    assert len(chat.messages) == 4


def test_several_answers_end_together(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    long: dict[str, Any] = {"temperature": 2.0, "max_tokens": 4000, "draft_length": 0}
    running = chat.send_several(STORY, 3, **long)
    first = {next(running)[0] for _ in range(6)}
    assert len(first) > 1, "they run one after another"
    running.close()
    assert list(running) == [] and len(chat.messages) == 2
    chat.send_several(STORY, 3, **long)
    assert len(chat.messages) == 2, "dropped before anything came"
    with pytest.raises(mlx_mtp.PromptError, match="division"):
        list(chat.send_several(STORY, 2, logits_processors=[lambda tokens, logits: 1 / 0]))  # type: ignore[list-item]


def test_turns_are_taken_back(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    assert chat.undo() is None
    first = say(chat, "Who are you?")
    say(chat, "What is a drafter?")
    assert chat.undo() == "What is a drafter?" and len(chat.messages) == 2
    assert chat.undo() == "Who are you?" and chat.messages == []
    assert say(chat, "Who are you?") == first
    running = chat.send(STORY, **GREEDY)
    next(running)
    assert chat.undo() == STORY and list(running) == [] and len(chat.messages) == 2


@pytest.mark.parametrize("messages", [
    "text", [1], {"role": "user"}, [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": ["y"]}],
    [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
])  # fmt: skip
def test_what_is_no_conversation_is_not_restored(lm: mlx_mtp.MTPModel, messages: Any):
    chat = lm.chat(system="Answer briefly.")
    say(chat, "Who are you?")
    before = list(chat.messages)
    with pytest.raises(mlx_mtp.PromptError, match="conversation"):
        chat.restore(messages)
    assert chat.messages == before and chat.system == "Answer briefly."


def test_a_restored_conversation_goes_on(lm: mlx_mtp.MTPModel):
    chat = lm.chat(system="Answer briefly.")
    say(chat, "Who are you?")
    other = lm.chat(system="Other.")
    other.restore([{"role": "system", "content": "Answer briefly."}, *chat.messages])
    assert other.system == chat.system and other.messages == chat.messages
    assert say(other, "What is a drafter?") == say(chat, "What is a drafter?")
    other.restore([])
    assert other.system is None and other.messages == []
