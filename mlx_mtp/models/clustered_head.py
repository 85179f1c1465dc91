"""The clustered output head of the E2B and E4B drafters.

The vocabulary is divided into clusters of equal size. A hidden state is scored against the cluster centroids, and then
only against the tokens of the best clusters: in the published drafters 32 of 2048 clusters, 4,096 of 262,144 tokens.

The embedding's rows are in cluster order, [clusters, tokens_per_cluster, hidden], so that a cluster is one contiguous
block. No array over the full vocabulary is made, and the host reads nothing back.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..system.fusing import counting, on_gpu
from .avoided import AVOIDED, GatherShape


class ClusteredHead(nn.Module):
    """Scores the tokens of the best clusters.

    Attributes:
        centroids: Linear map from hidden states to cluster scores.
        token_ordering: int32 [vocab], the token ids cluster by cluster.
        embedding: The embedding's rows in that order; an `nn.Embedding`, so that `nn.quantize` finds it.
    """

    def __init__(self, vocab_size: int, hidden_size: int, clusters: int, clusters_read: int) -> None:
        """Makes the head with empty weights.

        Args:
            vocab_size: Number of token ids, a multiple of `clusters`.
            hidden_size: Width of the drafter's hidden states.
            clusters: Number of clusters.
            clusters_read: Number of best clusters whose tokens are scored.
        """
        super().__init__()
        self._clusters, self._read = clusters, clusters_read
        self.centroids = nn.Linear(hidden_size, clusters, bias=False)
        self.token_ordering = mx.arange(vocab_size, dtype=mx.int32)
        self.embedding = nn.Embedding(vocab_size, hidden_size)

    def __call__(self, hidden: mx.array) -> tuple[mx.array, mx.array]:
        """Scores hidden states [B, hidden].

        Returns:
            Logits [B, n] and their token ids, int32 [B, n]; n = clusters read * tokens per cluster.
        """
        best = mx.argpartition(self.centroids(hidden), kth=-self._read, axis=-1)[:, -self._read :]
        ids = self.token_ordering.reshape(self._clusters, -1)[best]
        return self.scores(hidden, best), ids.flatten(1)

    def scores(self, hidden: mx.array, best: mx.array) -> mx.array:
        """Scores the tokens of given clusters.

        Args:
            hidden: [B, hidden].
            best: uint32 [B, clusters read], the clusters.

        Returns:
            Logits [B, n], see `__call__`.
        """
        # MLX has no gathered product of 16-bit numbers on a CPU.
        if on_gpu() and not (AVOIDED and self.shape(hidden) in AVOIDED):
            return self._gathered(hidden, best).flatten(1)
        return (self.matrices(best).flatten(1, 2) @ hidden[:, :, None]).squeeze(-1)

    def shape(self, hidden: mx.array) -> GatherShape:
        """The shape by which MLX chooses a kernel for the scores of hidden states [B, hidden]."""
        each = len(self.token_ordering) // self._clusters
        return GatherShape.of(self.embedding, self._clusters, each, hidden, len(hidden) * self._read, False)

    def matrices(self, clusters: mx.array) -> mx.array:
        """The embeddings of the clusters' tokens: [*clusters.shape, tokens per cluster, hidden]."""
        rows = self._in_clusters(self.embedding.weight)[clusters]
        if isinstance(self.embedding, nn.QuantizedEmbedding):
            e = self.embedding
            biases = None if e.biases is None else self._in_clusters(e.biases)[clusters]
            rows = mx.dequantize(
                rows, self._in_clusters(e.scales)[clusters], biases, group_size=e.group_size, bits=e.bits, mode=e.mode
            )
        return rows

    def _gathered(self, hidden: mx.array, best: mx.array) -> mx.array:
        """Logits [B, clusters read, 1, tokens per cluster], without a copy of the chosen rows."""
        e, x = self.embedding, hidden[:, None, None, :]
        rows = counting(len(hidden), np.uint32)[:, None]
        if isinstance(e, nn.QuantizedEmbedding):
            biases = None if e.biases is None else self._in_clusters(e.biases)
            weight, scales = self._in_clusters(e.weight), self._in_clusters(e.scales)
            return mx.gather_qmm(
                x, weight, scales, biases, rows, best, group_size=e.group_size, bits=e.bits, mode=e.mode
            )
        return mx.gather_mm(x, self._in_clusters(e.weight).swapaxes(-1, -2), rows, best)

    def _in_clusters(self, rows: mx.array) -> mx.array:
        return rows.reshape(self._clusters, -1, rows.shape[-1])
