"""What control over the text costs, and what the host's drafts bring, as ratios of speeds in one run.

    beside        seven free rows beside one that is held to a JSON schema / beside one that is free as well
    beside, 26b   the same on a mixture-of-experts pair of medium size, whose rounds take longer
    json          a record by schema with draft length "auto" / 0
    prediction    a text of which 90 % are known, with a prediction / with draft length 0
    quoting       a text that says again what its prompt says, "auto" with the host's drafts / with the drafter alone
    nothing       a text without repetitions, likewise: what looking for them costs

Turns alternate; medians of ratios, with their spread. On the embedded pair, greedy. With --tokenizer FILE (a published
tokenizer.json, which isn't part of this project), also what a grammar's mask costs over its vocabulary.

    python scripts/bench_control.py [--turns 7] [--tokenizer FILE]
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest import mock

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()

import tokenizers
import typer

import mlx_mtp
from mlx_mtp.control.grammar import Grammars
from mlx_mtp.decode.host_drafts import HostDrafts
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.measuring.spread import Spread, seconds
from scripts.medium_pair import add_tokenizer, make_medium_pair

SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 8},
        "date_of_birth": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        "subscription_active": {"type": "boolean"},
        "preferred_language": {"enum": ["English", "German", "French"]},
        "number_of_orders": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": [
        "customer_name", "date_of_birth", "subscription_active", "preferred_language", "number_of_orders",
    ],
    "additionalProperties": False,
}  # fmt: skip


def records(count: int) -> dict[str, Any]:
    """The response format of so many records."""
    many = {"type": "array", "items": SCHEMA, "minItems": count, "maxItems": count}
    return {"type": "json_schema", "json_schema": {"schema": many}}


RECORDS, LONG_RECORDS = records(4), records(20)
FREE = (
    "Tell me a short story about a fox.", "Describe a walk along a river in autumn.",
    "Tell me about the history of the bicycle.", "Write a Python function that adds two numbers.",
    "What is speculative decoding?", "Tell me a short story about a castle.",
    "Write a Python function that reverses a string.", "Give me a JSON record for a book.",
)  # fmt: skip
CODE = "Write a Python function that counts the words of a text."

Turn = Callable[[], float]


def compare(name: str, bound: str, ours: Turn, baseline: Turn, turns: int) -> None:
    """Prints how many times as fast `ours` is, by seconds that both return in turn."""
    ours(), baseline()
    ratios = Spread.of([baseline() / ours() for _ in range(turns)])
    print(f"{name:<12} {ratios.text()}, {bound}", flush=True)


def free_rows(lm: mlx_mtp.MTPModel, constrained: bool) -> float:
    """Seconds until seven free rows have their tokens, beside one that is constrained, or free as well."""
    rows: list[dict[str, Any]] = [{"prompt": prompt, "max_tokens": 100, "ignore_eos": True} for prompt in FREE]
    enough = threading.Event()
    if constrained:  # it is there until the others are done
        rows[-1] = {"prompt": FREE[-1], "max_tokens": 2000, "response_format": LONG_RECORDS, "cancel": enough}
    slowest = 0.0
    for finished, (index, result) in enumerate(lm.generate_each(rows, temperature=0), 1):
        if index < len(rows) - 1:
            slowest = max(slowest, result.stats.generation_seconds)
        if finished == len(rows) - 1:
            enough.set()
    return slowest


def without_lookup() -> Any:
    """The drafter alone: the host offers nothing."""
    return mock.patch.object(HostDrafts, "offer", return_value=None)


def main(
    turns: Annotated[int, typer.Option(help="Turns of each comparison.")] = 7,
    tokenizer: Annotated[Path | None, typer.Option(help="A published tokenizer.json.")] = None,
) -> None:
    """Measures and prints."""
    print(f"{machine_line()}, BLAS {BLAS}")
    with mlx_mtp.load() as lm:

        def timed(prompt: Any, **options: Any) -> Turn:
            return lambda: seconds(lambda: lm.generate(prompt, temperature=0, **options))

        compare("beside", ">= 0.97", lambda: free_rows(lm, True), lambda: free_rows(lm, False), turns)
        record: dict[str, Any] = {"response_format": RECORDS, "max_tokens": 400}
        compare("json", ">= 1.3", timed(CODE, **record), timed(CODE, draft_length=0, **record), turns)
        known = lm.generate(CODE, 200, temperature=0).text
        middle = len(known) // 2
        edited = known[:middle] + "#" * (len(known) // 10) + known[middle + len(known) // 10 :]
        whole: dict[str, Any] = {"max_tokens": 200}
        compare(
            "prediction", ">= 2", timed(CODE, prediction=edited, **whole), timed(CODE, draft_length=0, **whole), turns
        )
        story = lm.generate(FREE[0], 150, temperature=0).text
        again = [
            {"role": "user", "content": FREE[0]}, {"role": "assistant", "content": story},
            {"role": "user", "content": FREE[0]},
        ]  # fmt: skip
        for name, bound, prompt in (("quoting", ">= 1.3", again), ("nothing", ">= 0.97", FREE[0])):
            ours = timed(prompt, max_tokens=150)

            def alone(prompt: Any = prompt) -> float:
                with without_lookup():
                    return timed(prompt, max_tokens=150)()

            compare(name, bound, ours, alone, turns)
    with TemporaryDirectory() as folder:
        pair = make_medium_pair("26b", Path(folder))
        add_tokenizer(pair[0])
        with mlx_mtp.load(*pair, dtype="float32", profile=None) as lm:
            compare("beside, 26b", ">= 0.97", lambda: free_rows(lm, True), lambda: free_rows(lm, False), turns)
    if tokenizer:
        mask_cost(tokenizer)


def mask_cost(path: Path) -> None:
    """Prints what a grammar costs the host with a published vocabulary."""
    vocabulary = tokenizers.Tokenizer.from_file(str(path))
    ends = [vocabulary.token_to_id(name) for name in ("<eos>", "<turn|>")]
    begun = time.perf_counter()
    grammars = Grammars(vocabulary, vocabulary.get_vocab_size(), ends)
    read = time.perf_counter() - begun
    begun = time.perf_counter()
    matcher = grammars.matcher(RECORDS)
    compiled = time.perf_counter() - begun
    text = json.dumps([{
        "customer_name": "Ada", "date_of_birth": "1815-12-10", "subscription_active": True,
        "preferred_language": "English", "number_of_orders": 7}] * 4)  # fmt: skip
    took = []
    for token in vocabulary.encode(text, add_special_tokens=False).ids:
        took.append(seconds(matcher.allowed))
        if not matcher.push(token):
            break
    print(
        f"vocabulary of {vocabulary.get_vocab_size():,}: read once in {read:.1f} s, schema compiled in "
        f"{1e3 * compiled:.1f} ms, a mask in {1e6 * median(took):.0f} us (at most {1e6 * max(took):.0f})"
    )


if __name__ == "__main__":
    typer.run(main)
