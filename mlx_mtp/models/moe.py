"""The mixture of experts of the 26B-A4B model: a router and expert MLPs, in addition to the dense MLP."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import TextConfig
from ..system.fusing import counting, on_gpu
from .attention import GATE_AND_UP, apply_projections, fuse_projections
from .avoided import AVOIDED, GatherShape, dequantized, gather_by_hand
from .elementwise import geglu

SORT_FROM, SORT_FROM_CUDA = 64, 600
"""Number of token-expert pairs from which sorting them by expert pays: neighbours then read the same weights.

For experts that aren't quantised, MLX's CUDA kernel for sorted pairs is slow for few tokens. On an H100, at 26B-A4B's
sizes, it is as fast as the one for unsorted pairs at SORT_FROM_CUDA (docs/measurements/cuda.md).
"""


class Router(nn.Module):
    """Chooses each token's experts and their weights.

    norm -> scale -> project -> softmax -> the best few, renormalised, each times its expert's scale.
    """

    def __init__(self, config: TextConfig) -> None:
        """Makes the router with empty weights."""
        super().__init__()
        self._eps, self._chosen, self._root = config.rms_norm_eps, config.experts_per_token, config.hidden_size**-0.5
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def prepare(self) -> None:
        """See `Attention.prepare`."""
        self._norm = self.scale * self._root
        mx.eval(self._norm)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Routes x [..., hidden].

        Returns:
            The experts, uint32 [..., experts_per_token], and their weights, of the same shape and x's dtype.
        """
        scores = self.proj(mx.fast.rms_norm(x, self._norm, self._eps))
        experts = mx.argpartition(scores, kth=-self._chosen, axis=-1)[..., -self._chosen :]
        # Softmax over all experts, renormalised over the chosen ones, is softmax over the chosen ones.
        weights = mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1, precise=True)
        return experts, weights * self.per_expert_scale[experts]


class _Bank(nn.Module):
    """The common part of both kinds of linear maps per expert."""

    weight: mx.array

    def shape(self, x: mx.array, experts: mx.array, in_order: bool) -> GatherShape:
        """The shape by which MLX chooses a kernel for a call with these arguments."""
        count, outputs = self.weight.shape[:2]
        return GatherShape.of(self, count, outputs, x, experts.size, in_order)

    def matrices(self, experts: mx.array) -> mx.array:
        """The weights of experts [n], dequantised: [n, out, in]."""
        return dequantized(self, experts)


class ExpertLinear(_Bank):
    """One linear map per expert, weight [experts, out, in]."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        """Makes the maps with empty weights."""
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool, rows: mx.array | None = None) -> mx.array:
        """Maps rows of x, each by an expert.

        Args:
            x: [..., 1, in].
            experts: uint32, the expert of each result.
            in_order: Promises that the experts are sorted.
            rows: uint32 of the same shape, the row of x for each result, as an index into all rows; None if each result
                has its own row.

        Returns:
            [*experts.shape, 1, out].
        """
        if AVOIDED and self.shape(x, experts, in_order) in AVOIDED:
            return gather_by_hand(self.matrices, x, experts, rows)
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rows, experts, sorted_indices=in_order)

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine", **_: object) -> QuantizedExpertLinear:
        """The same map with quantised weights (called by `nn.quantize`)."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(_Bank):
    """One quantised linear map per expert."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str) -> None:
        """Quantises the weight [experts, out, in] of an `ExpertLinear`; arguments as for `mx.quantize`."""
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        self.biases = biases[0] if biases else None
        self.freeze()

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool, rows: mx.array | None = None) -> mx.array:
        """As `ExpertLinear`."""
        if AVOIDED and self.shape(x, experts, in_order) in AVOIDED:
            return gather_by_hand(self.matrices, x, experts, rows)
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            lhs_indices=rows,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=in_order,
        )


class Experts(nn.Module):
    """The expert MLPs of a layer."""

    def __init__(self, config: TextConfig) -> None:
        """Makes the experts with empty weights."""
        super().__init__()
        self.gate_proj = ExpertLinear(config.num_experts, config.hidden_size, config.expert_size)
        self.up_proj = ExpertLinear(config.num_experts, config.hidden_size, config.expert_size)
        self.down_proj = ExpertLinear(config.num_experts, config.expert_size, config.hidden_size)

    def prepare(self) -> None:
        """See `Attention.prepare`."""
        fuse_projections(self, GATE_AND_UP)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Runs each token's experts and sums their weighted results.

        Args:
            x: [B, L, hidden].
            experts: uint32 [B, L, chosen], from the router.
            weights: [B, L, chosen], from the router.

        Returns:
            [B, L, hidden].
        """
        chosen = experts.shape[-1]
        # reshape instead of indexing with None: after the latter MLX takes the rows for columns.
        if experts.size < self._sort_from():
            # The row indices are given, as a cached constant, because MLX would compute them in every call.
            tokens = counting(experts.size // chosen, np.uint32).reshape(*experts.shape[:-1], 1)
            out = self._mlp(x.reshape(*x.shape[:-1], 1, 1, x.shape[-1]), experts, False, tokens)
        else:
            flat = experts.flatten()
            order = mx.argsort(flat)
            rows = x.reshape(-1, 1, x.shape[-1])[order // chosen]
            out = self._mlp(rows, flat[order], True)[mx.argsort(order)]
        return (weights[..., None, :] @ out.reshape(*experts.shape, -1)).squeeze(-2)

    def _sort_from(self) -> int:
        quantized = isinstance(self.gate_proj, QuantizedExpertLinear)
        return SORT_FROM if quantized or not on_gpu() or mx.metal.is_available() else SORT_FROM_CUDA

    def _mlp(self, x: mx.array, experts: mx.array, in_order: bool, tokens: mx.array | None = None) -> mx.array:
        inner = geglu(*mx.split(apply_projections(self, GATE_AND_UP, x, experts, in_order, tokens), 2, axis=-1))
        # From here on, each token-expert pair has its own row.
        rows = None if tokens is None else counting(experts.size, np.uint32).reshape(experts.shape)
        return self.down_proj(inner, experts, in_order, rows)
