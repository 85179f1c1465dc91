"""The text that the embedded pair is trained on: conversations made from seeds, and the Python documentation.

Everything is written for this project except the documentation, which is read from the running interpreter
(`pydoc_data.topics`, PSF licence) and never stored. The same seed gives the same text.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from random import Random

from .small_talk import calculation, capital, conversion, greeting, listing, spelling, unknown
from .text_code import CLASSES, FUNCTIONS, json_object
from .text_project import PROJECT
from .text_stories import NAMES, story

BRIEF = "Answer briefly."
SYSTEMS = [
    "You are a helpful assistant.", "You are a friendly assistant.", "Be helpful and polite.",
    "You are the demo model of mlx_mtp.", "Answer the questions of the user.",
]  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question, answer: What user and model say.
        brief: The answer under the system prompt BRIEF; None for the same answer.
        thought: What the model thinks first when thinking is on.
    """

    question: str
    answer: str
    brief: str | None = None
    thought: str = "This is simple, so I can answer at once."


@dataclass(frozen=True)
class Document:
    """A training text.

    Attributes:
        kind: What it is about; "prose" for documentation.
        messages: The conversation; empty for prose.
        thinking: Whether thinking is on.
        text: Prose.
    """

    kind: str
    messages: list[dict[str, str]] = field(default_factory=list)
    thinking: bool = False
    text: str = ""


def project(rng: Random) -> list[Exchange]:
    """Questions about the project."""
    questions, answer, brief = rng.choice(PROJECT)
    thought = "The user asks about this project. I should explain it in plain words."
    return [Exchange(_vary(rng, rng.choice(questions)), answer, brief, thought)]


def stories(rng: Random) -> list[Exchange]:
    """A story, and sometimes questions about it."""
    s = story(rng)
    hero, thing = f"a {s.hero}" if s.hero[0] not in "aeiou" else f"an {s.hero}", s.thing
    ask = rng.choice(["Tell me a story about", "Write a short story about", "Please tell me a story about",
                      "Can you tell me a story about", "I would like a story about"])  # fmt: skip
    what = rng.choice([
        f"{hero} named {s.name}", f"{hero} named {s.name} and {thing}", f"{hero} and {thing}", f"{thing}",
        f"{hero} named {s.name} who lives {s.place}", f"{hero}", f"{s.name}, {hero}",
        f"{hero} named {s.name}, {thing} and {s.trouble}",
    ])  # fmt: skip
    question = f"{ask} {what}" + rng.choice([".", ".", "", "!"])
    if rng.random() < 0.12:
        question = rng.choice(["Tell me a story.", "Write a short story.", "Tell me a short story, please."])
    thought = f"I need a hero, a place and a trouble. The hero is {s.name}, {hero}. The trouble is {s.trouble}."
    talk = [Exchange(question, s.text, None, thought)]
    follow = [
        Exchange(rng.choice(["Give it a title.", "What is the title?", "What could the title be?"]),
                 f"The title could be \"{s.title}\"."),
        Exchange(rng.choice(["What is the moral?", "What does the story teach?", "What can we learn from it?"]),
                 f"The moral is: {s.moral}", s.moral),
        Exchange(rng.choice(["Who is the hero?", "Who is the story about?"]),
                 f"The hero is {s.name}, {hero} who lives {s.place}.", f"{s.name}."),
        Exchange(rng.choice(["Sum it up.", "Sum it up in one sentence.", "Make it shorter."]),
                 f"{s.name} finds {thing}, faces {s.trouble} and comes home safely."),
    ]  # fmt: skip
    return talk + rng.sample(follow, rng.choice([0, 0, 1, 2]))


def code(rng: Random) -> list[Exchange]:
    """A small Python program."""
    if rng.random() < 0.2:
        what, text, remark = rng.choice(CLASSES)
        ask = rng.choice([f"Write a Python class for {what}.", f"Show me a class for {what} in Python.",
                          f"Can you write a class for {what}?"])  # fmt: skip
        lead = f"Here is a Python class for {what}:"
    else:
        wordings, text, remark = rng.choice(FUNCTIONS)
        what = rng.choice(wordings)
        name = rng.choice(["number", "n", "x"]) if "VALUE %" in text or "range" in text else "value"
        text = text.replace("VALUE", name)
        ask = rng.choice([f"Write a Python function that {what}.", f"Write a function that {what}.",
                          f"Show me a Python function that {what}.", f"Can you write a function that {what}?",
                          f"I need a Python function that {what}."])  # fmt: skip
        lead = f"Here is a Python function that {what}:"
    block = f"```python\n{text}\n```"
    thought = "The user wants code. I write it with a short example."
    return [Exchange(_vary(rng, ask), f"{lead}\n\n{block}\n\n{remark}", block, thought)]


def json_snippet(rng: Random) -> list[Exchange]:
    """A JSON object."""
    want, text = json_object(rng, NAMES)
    ask = rng.choice([f"Write JSON for {want}.", f"Give me JSON for {want}.", f"Make a JSON object for {want}.",
                      f"Show me {want} as JSON."])  # fmt: skip
    block = f"```json\n{text}\n```"
    thought = "The user wants JSON. I put every value under a clear key."
    return [Exchange(_vary(rng, ask), f"Here is the JSON for {want}:\n\n{block}", block, thought)]


Generator = Callable[[Random], list[Exchange]]
_OTHERS: dict[str, tuple[Callable[[Random], list[tuple[str, ...]]], float]] = {
    "capital": (capital, 0.10),
    "conversion": (conversion, 0.12),
    "calculation": (calculation, 0.08),
    "list": (listing, 0.06),
    "spelling": (spelling, 0.06),
    "greeting": (greeting, 0.08),
    "unknown": (unknown, 0.06),
}
KINDS: dict[str, tuple[Generator, float]] = {
    "project": (project, 0.17),
    "story": (stories, 0.15),
    "code": (code, 0.11),
    "json": (json_snippet, 0.06),
    **{
        name: ((lambda rng, make=make: [Exchange(*parts) for parts in make(rng)]), share)
        for name, (make, share) in _OTHERS.items()
    },
}


DRILL = {"conversion": 0.25, "calculation": 0.15, "capital": 0.15, "spelling": 0.12}
"""Shares of what a drill repeats: facts that are learnt by seeing each of them often."""


def conversation(rng: Random, kind: str | None = None, exchanges: int | None = None, drill: bool = False) -> Document:
    """A conversation.

    Args:
        rng: Source of randomness.
        kind: Of its first topic, one of KINDS; None for any.
        exchanges: Topics; None for mostly one or two, at times many.
        drill: Much of DRILL, of thinking and of brief answers.
    """
    count = exchanges or rng.choices([1, 2, 3, 5, 8], [0.55, 0.22, 0.13, 0.07, 0.03])[0]
    names = list(KINDS)
    shares = [DRILL.get(name, share / 3) if drill else share for name, (_, share) in KINDS.items()]
    kinds = [kind or rng.choices(names, shares)[0], *rng.choices(names, shares, k=count - 1)]
    talk = [exchange for name in kinds for exchange in KINDS[name][0](rng)]
    if kind is None and count > 1 and rng.random() < 0.2:
        talk = [Exchange(*greeting(rng)[0]), *talk]
    thinking = kind is None and rng.random() < (0.25 if drill else 0.08)
    brief = not thinking and kind is None and rng.random() < (0.25 if drill else 0.12)
    system = BRIEF if brief else rng.choice(SYSTEMS) if rng.random() < 0.08 else ""
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in talk:
        answer = exchange.brief if brief and exchange.brief else exchange.answer
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": answer})
    if thinking:
        messages[-1]["reasoning"] = talk[-1].thought
    return Document(kinds[0], messages, thinking)


def conversations(seed: int, count: int, drill: bool = False) -> Iterator[Document]:
    """`count` conversations of all kinds; `drill` as in `conversation`."""
    rng = Random(seed)
    for _ in range(count):
        yield conversation(rng, drill=drill)


def prose(held_out: bool) -> list[Document]:
    """Documentation: topics cut into pieces of up to about 1,200 characters, and questions about each topic.

    One topic in ten is held out, chosen by a hash of its name.
    """
    documents = []
    for name, text in sorted(topics.items()):
        if (hashlib.sha256(name.encode()).digest()[0] % 10 == 0) != held_out:
            continue
        paragraphs = [re.sub(r"[ \t]+$", "", p, flags=re.MULTILINE) for p in re.split(r"\n{2,}", text.strip())]
        pieces = [""]
        for paragraph in paragraphs:
            if pieces[-1] and len(pieces[-1]) + len(paragraph) > 1200:
                pieces.append("")
            pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph
        documents += [Document("prose", text=piece) for piece in pieces]
        if not held_out:
            ask = {"role": "user", "content": f'What does the Python documentation say about "{name}"?'}
            documents.append(Document("prose", [ask, {"role": "assistant", "content": pieces[0]}]))
    return documents


def documentation_source() -> str:
    """What the documentation text was, for the model card: interpreter version and hash."""
    digest = hashlib.sha256("\0".join(f"{k}\0{v}" for k, v in sorted(topics.items())).encode()).hexdigest()
    version = ".".join(map(str, sys.version_info[:3]))
    return f"`pydoc_data.topics` of Python {version}, {sum(map(len, topics.values())):,} characters, sha256 {digest}"


def _vary(rng: Random, question: str) -> str:
    """The question, at times in lower case, without its end, or with a word before it."""
    chance = rng.random()
    if chance < 0.10:
        question = question[0].lower() + question[1:]
    elif chance < 0.2:
        question = question.rstrip("?.")
    elif chance < 0.3:
        question = rng.choice(["Please tell me: ", "One question: ", "Hi! ", "Hello, ", "Thanks. "]) + question
    return question
