"""Trains the target: next-token cross entropy on answers and documentation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from . import config
from .model import Target
from .text import Batch, stream
from .training import Trainer

BATCH_TOKENS = 2048


def loss(target: Target, batch: Batch) -> Tensor:
    """Weighted mean cross entropy."""
    hidden = target(batch.tokens[:, :-1]).hidden
    chosen = batch.weights[:, 1:] > 0
    logits = target.logits(hidden[chosen])
    weights = batch.weights[:, 1:][chosen]
    losses = F.cross_entropy(logits, batch.tokens[:, 1:][chosen], reduction="none")
    return (losses * weights).sum() / weights.sum()


DRILL_SHARE = 0.2
"""Steps of the drill that follows the training, as a share of its steps; at a lower rate."""


def train(tokenizer: Tokenizer, steps: int, seed: int, state: Path) -> tuple[Target, tuple[Trainer, Trainer]]:
    """Trains a target from scratch, or goes on from the checkpoints in `state`.

    Returns:
        The target, and its two trainings: of everything, and the drill.
    """
    torch.manual_seed(seed)
    target = Target(config.TARGET)
    trainer = Trainer("target", target, steps, muon=0.02, adam=4e-3, state=state)
    _run(target, trainer, stream(tokenizer, seed, BATCH_TOKENS))
    drill = Trainer("drill", target, int(DRILL_SHARE * steps), muon=0.01, adam=2e-3, state=state)
    _run(target, drill, stream(tokenizer, seed + 3, BATCH_TOKENS, drill=True))
    return target, (trainer, drill)


def _run(target: Target, trainer: Trainer, batches: Iterator[Batch]) -> None:
    for batch in islice(batches, trainer.step, trainer.steps):
        trainer.update(loss(target, batch))
