"""Small Python programs (functions.txt, classes.txt) and JSON objects for the embedded pair."""

from __future__ import annotations

import json
import re
from random import Random

from .sections import read


def _program(body: str) -> tuple[str, str]:
    """Code and remark."""
    parts = re.fullmatch(r"```python\n(.*)\n```\n\n(.*)", body, flags=re.DOTALL)
    assert parts, body
    return parts[1], parts[2]


FUNCTIONS: list[tuple[list[str], str, str]] = [(does, *_program(body)) for does, body in read("functions.txt")]
"""What it does (as in "a function that ..."), code with VALUE as an argument's name, remark."""

CLASSES: list[tuple[str, str, str]] = [(what, *_program(body)) for (what,), body in read("classes.txt")]
"""What it is for, code, remark."""

CITIES = ["Paris", "Rome", "Tokyo", "Oslo", "Lima", "Cairo", "Berlin", "Madrid", "Vienna", "Ottawa"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white"]
JOBS = ["teacher", "baker", "doctor", "pilot", "farmer", "painter"]


def json_object(rng: Random, names: list[str]) -> tuple[str, str]:
    """A request for a JSON object, and the object."""
    name, city, age = rng.choice(names), rng.choice(CITIES), rng.randint(18, 60)
    colour, job = rng.choice(COLOURS), rng.choice(JOBS)
    kind = rng.randrange(5)
    if kind == 0:
        want = f"a person named {name}, {age} years old, from {city}"
        value: object = {"name": name, "age": age, "city": city}
    elif kind == 1:
        want = f"a {job} named {name} who lives in {city}"
        value = {"name": name, "job": job, "address": {"city": city}, "languages": ["English"]}
    elif kind == 2:
        price = rng.randint(2, 30)
        want = f"a {colour} bicycle for {price}0 euros"
        value = {"product": "bicycle", "colour": colour, "price": price * 10, "currency": "EUR", "in_stock": True}
    elif kind == 3:
        others = rng.sample(names, 3)
        want = f"a list of three users: {others[0]}, {others[1]} and {others[2]}"
        value = {"users": [{"id": i + 1, "name": other, "active": True} for i, other in enumerate(others)]}
    else:
        length = rng.randint(1, 8)
        want = f"a configuration with draft length {length}"
        options = {"stream": True, "seed": None}
        value = {"model": "gemma-4", "draft_length": length, "temperature": 0, "options": options}
    return want, json.dumps(value, indent=2)
