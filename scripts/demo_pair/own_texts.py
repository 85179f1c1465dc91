"""Texts that the target writes itself, many at a time: the drafter has to guess these, not ours."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from . import config
from .data import conversations, prose
from .text import render

ROWS = 64
LONGEST_PROMPT = 256
ANSWER = 224
"""Most tokens of an answer."""


def prompts(tokenizer: Tokenizer, seed: int, count: int) -> list[list[int]]:
    """Token ids of `count` prompts: conversations up to the last answer, and one in eight the start of a page."""
    pages = [tokenizer.encode("<bos>" + d.text).ids[:48] for d in prose(held_out=False) if not d.messages]
    talk = (tokenizer.encode(render(d, prompt=True)).ids for d in conversations(seed, 4 * count))
    short = [ids for ids in talk if len(ids) <= LONGEST_PROMPT]
    chosen = [pages[i // 8 % len(pages)] if i % 8 == 7 else short[i] for i in range(count)]
    return sorted(chosen, key=len)


def write(folder: Path, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Continues prompts with the exported target, every second one greedily, the others sampled at temperature 1.

    Args:
        folder: The target.
        prompts: Token ids, each at most LONGEST_PROMPT.
        seed: Of the sampling.

    Returns:
        Prompts and answers together.
    """
    import mlx.core as mx

    from mlx_mtp.checkpoint.description import read_target
    from mlx_mtp.checkpoint.load import load_target
    from mlx_mtp.kv import KVBuffers

    model = load_target(read_target(folder, dtype="float32"))
    mx.random.seed(seed)
    texts: list[list[int]] = []
    for first in range(0, len(prompts), ROWS):
        rows = prompts[first : first + ROWS]
        width = max(map(len, rows))
        kv = KVBuffers(model.config, len(rows), mx.float32, width)
        kv.reserve(width + ANSWER)
        # Short prompts are filled up on the right: what lies above `lengths` is never seen, and overwritten.
        block = mx.array([ids + [0] * (width - len(ids)) for ids in rows], dtype=mx.int32)
        lengths = mx.array([len(ids) for ids in rows], dtype=mx.int32)
        hidden = model(block, mx.zeros_like(lengths), kv)[mx.arange(len(rows)), lengths - 1]
        heat = mx.array([i % 2 for i in range(len(rows))])[:, None]
        running, stops = mx.ones(lengths.shape, dtype=mx.bool_), mx.array(config.STOP_TOKENS)
        answers = []
        for _ in range(ANSWER):
            scores = model.logits(hidden)
            tokens = mx.argmax(scores + heat * mx.random.gumbel(scores.shape), axis=-1).astype(mx.int32)
            tokens = mx.where(running, tokens, 0)
            answers.append(tokens)
            running = running & ~(tokens[:, None] == stops).any(axis=1)
            mx.eval(tokens, running, kv.arrays())
            if not running.any().item():
                break
            hidden = model(tokens[:, None], lengths, kv)[:, 0]
            lengths = lengths + 1
        written = mx.stack(answers, axis=1).tolist()
        texts += [ids + [t for t in answer if t] for ids, answer in zip(rows, written, strict=True)]
    return texts
