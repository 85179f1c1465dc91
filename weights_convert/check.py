"""Measures on sample text how a converted model differs from its source.

For a target, compares the distributions of the next token; for a drafter, how many of its drafts the target accepts.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

import mlx_mtp
from mlx_mtp.errors import CheckpointError, MemoryBudgetError

SAMPLES = (
    (
        "A river that has carried snow down from the mountains all summer is lowest in the first weeks of autumn. "
        "Then the gravel banks lie open, herons stand in the shallows, and children walk across without getting their "
        "knees wet."
    ),
    (
        "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
        "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n"
    ),
    (
        "Question: a train leaves at 9:40 and arrives at 13:05. How long does the journey take?\nAnswer: from 9:40 to "
        "13:00 are 3 hours and 20 minutes, and 5 minutes more make 3 hours and 25 minutes."
    ),
    (
        "Die Bibliothek ist montags geschlossen. La bibliothèque est ouverte jusqu'à dix-huit heures. "
        "La biblioteca tiene tres salas de lectura. 図書館は駅の近くにあります。"
    ),
)
"""Texts to compare targets on: prose, code, arithmetic, and several languages."""

QUESTIONS = (
    "What is the capital of France?",
    "How many metres are 3 kilometres?",
    "Tell me a short story about a fox.",
    "Write a Python function that adds two numbers.",
    "What does a drafter do in speculative decoding?",
    "How many minutes are 2 hours?",
)
"""Prompts to compare drafters on."""

DRAFTS = 4
"""Draft length at which drafters are compared."""

_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Agreement:
    """How closely a converted target agrees with its source.

    Attributes:
        tokens: Number of positions compared.
        kl: Mean Kullback-Leibler divergence KL(source || converted) for the next token, in nats per token.
        top1: Share of positions at which both have the same most probable token.
    """

    tokens: int
    kl: float
    top1: float


def compare(source: Path, result: Path, samples: tuple[str, ...] = SAMPLES) -> Agreement:
    """Compares two targets, one after the other in memory.

    Args:
        source: Folder of the original, with a tokenizer.
        result: Folder of the converted target.
        samples: Texts to compare them on.

    Raises:
        CheckpointError: There is no tokenizer, or a model can't be loaded.
        MemoryBudgetError: The original doesn't fit in memory.
    """
    with closing(_original(source, drafter=False)) as original:
        if original.tokenizer is None:
            raise CheckpointError(f"{source} has no tokenizer.json: models can't be compared on text")
        # Every text that Gemma was trained on begins with this token; without it predictions are unusually poor.
        begin = original.tokenizer.encode("<bos>") if original.tokenizer.token_id("<bos>") is not None else []
        texts = [begin + original.tokenizer.encode(text) for text in samples]
        expected = [_log_probabilities(original, tokens) for tokens in texts]
    divergence, agreed = 0.0, 0
    with closing(mlx_mtp.load(result, drafter=False)) as converted:
        for tokens, p in zip(texts, expected, strict=True):
            q = _log_probabilities(converted, tokens)
            divergence += float((mx.exp(p) * (p - q)).sum())
            agreed += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    count = sum(map(len, texts))
    return Agreement(count, divergence / count, agreed / count)


def acceptance(target: Path, drafter: Path, questions: tuple[str, ...] = QUESTIONS) -> float:
    """Accepted drafts per round (bonus token not counted) at draft length DRAFTS, on greedy answers.

    Args:
        target: Folder of the target.
        drafter: Folder of the drafter.
        questions: Prompts.

    Raises:
        CheckpointError: A model can't be loaded.
        PairingError: The drafter was made for another target.
        MemoryBudgetError: The target doesn't fit in memory.
    """
    with closing(_original(target, drafter)) as lm:
        answers = lm.generate_batch(list(questions), max_tokens=_ANSWER_TOKENS, temperature=0, draft_length=DRAFTS)
        stats = [answer.stats for answer in answers]
    return sum(s.accepted for s in stats) / max(1, sum(s.rounds for s in stats))


def _original(folder: Path, drafter: Path | Literal[False]) -> mlx_mtp.MTPModel:
    try:
        return mlx_mtp.load(folder, drafter)
    except MemoryBudgetError as error:  # its advice, to quantise, doesn't apply here
        raise MemoryBudgetError(f"{folder} doesn't fit in memory here, so nothing can be compared with it") from error


def _log_probabilities(lm: mlx_mtp.MTPModel, tokens: list[int]) -> mx.array:
    logits = lm.logits(tokens)
    result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(result)
    return result
