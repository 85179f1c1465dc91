"""Trains the drafter to say what the target says next, several tokens ahead.

From many places of a text at once it is unrolled on the state it will have when it runs: the target's hidden state at
the last committed position, the target's keys and values up to there and no further, then its own projected state.
What it learns is the target's distribution and, as much, the target's first choice: a draft counts only if it is that.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from . import config
from .model import Drafter, Target
from .text import Batch, batch_ids, stream
from .training import Trainer

BATCH_TOKENS = 1536
STARTS = 320
"""Places per batch from which the drafter is unrolled."""
UNROLL = 7
DECAY = 0.85
"""Weight of a draft against the one before it: it counts only if that one is accepted."""
STRAYED = 0.3
"""Weight of drafts that follow a token which wasn't the target's first choice."""
CLUSTER_SHARE = 0.2


def balanced_clusters(rows: Tensor, clusters: int, rounds: int = 12) -> Tensor:
    """K-means with clusters of equal size.

    Args:
        rows: [n, width]; `clusters` divides n.
        clusters: Number of clusters.
        rounds: Iterations.

    Returns:
        int64 [n], the rows' numbers cluster by cluster, ascending inside a cluster.
    """
    rows = F.normalize(rows, dim=-1)
    size = len(rows) // clusters
    centres = rows[torch.linspace(0, len(rows) - 1, clusters).long()]
    owner = torch.zeros(len(rows), dtype=torch.long)
    for _ in range(rounds):
        owner.fill_(-1)
        room = [size] * clusters
        # The closest pairs choose first; whoever finds a cluster full takes the next one.
        for pair in (rows @ centres.T).flatten().argsort(descending=True).tolist():
            row, cluster = divmod(pair, clusters)
            if room[cluster] and owner[row] < 0:
                owner[row] = cluster
                room[cluster] -= 1
        centres = F.normalize(torch.stack([rows[owner == c].mean(0) for c in range(clusters)]), dim=-1)
    return owner.argsort(stable=True)


def _starts(weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Last committed positions [B, A] to draft from, and whether each is one (the others are filling)."""
    allowed = weights[:, 1:-UNROLL] > 0.5  # the token after the last committed one is the model's own
    keys = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0)
    best, at = keys.topk(min(max(count // len(weights), 1), allowed.shape[1]), dim=1)
    return at, best >= 0


def loss(drafter: Drafter, target: Target, batch: Batch, generator: torch.Generator) -> Tensor:
    """Cross entropy of the drafts with the target's choice, and of the clusters with the choice's cluster."""
    # Room to unroll from the last tokens too.
    tokens, own = (F.pad(a, (0, UNROLL)) for a in (batch.tokens, batch.weights))
    at, real = _starts(own, STARTS, generator)
    rows = torch.arange(len(at))[:, None]
    ahead = at[:, :, None] + torch.arange(1, UNROLL + 1)
    with torch.no_grad():
        run = target(tokens)
        read = tokens[rows[:, :, None], ahead]
        wanted = target.logits(run.hidden[rows[:, :, None], ahead])
        choice = wanted.argmax(-1)
        probabilities = 0.5 * wanted.softmax(-1)
        probabilities.scatter_add_(-1, choice[..., None], torch.full(choice.shape, 0.5)[..., None])
        order = drafter.masked_embedding.token_ordering
        clusters = probabilities[..., order].unflatten(-1, (config.DRAFTER["num_centroids"], -1)).sum(-1)
        kept = (choice[:, :, :-1] == read[:, :, 1:]).cumprod(-1)
        weights = torch.where(F.pad(kept, (1, 0), value=1) > 0, 1.0, STRAYED) * DECAY ** torch.arange(UNROLL)
        weights = weights * real[:, :, None] * (own[rows[:, :, None], ahead] > 0.5)
        embedded = target.embed(read)
    total = torch.zeros(())
    for j, h in enumerate(drafter.unroll(embedded, run.hidden[rows, at], run.lent, at)):
        token = F.cross_entropy(drafter.logits(h).flatten(0, 1), probabilities[:, :, j].flatten(0, 1), reduction="none")
        cluster = F.cross_entropy(
            drafter.cluster_logits(h).flatten(0, 1), clusters[:, :, j].flatten(0, 1), reduction="none"
        )
        total = total + ((token + CLUSTER_SHARE * cluster) * weights[:, :, j].flatten()).sum()
    return total / weights.sum()


def train(
    tokenizer: Tokenizer, target: Target, own_texts: list[list[int]], steps: int, seed: int, state: Path
) -> tuple[Drafter, Trainer]:
    """Trains a drafter for a finished target.

    Args:
        tokenizer: The pair's.
        target: As it will be published, already rounded.
        own_texts: Texts that the target wrote itself, with their prompts.
        steps: Optimiser steps.
        seed: Fixes everything random.
        state: Folder for the checkpoint.
    """
    torch.manual_seed(seed)
    target.requires_grad_(False)
    drafter = Drafter(config.DRAFTER)
    rows = target.embed_tokens.weight.detach()
    drafter.model.embed_tokens.weight.data.copy_(rows)
    drafter.masked_embedding.token_ordering.copy_(balanced_clusters(rows, config.DRAFTER["num_centroids"]))
    trainer = Trainer("drafter", drafter, steps, muon=0.02, adam=2e-3, state=state)
    ours, its_own = stream(tokenizer, seed + 1, BATCH_TOKENS), batch_ids(own_texts, tokenizer, BATCH_TOKENS, seed)
    batches = itertools.chain.from_iterable(zip(ours, ours, ours, its_own, strict=True))
    generator = torch.Generator().manual_seed(seed + trainer.step)
    for batch in itertools.islice(batches, trainer.step, steps):
        trainer.update(loss(drafter, target, batch, generator))
    return drafter, trainer
