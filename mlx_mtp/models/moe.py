"""The mixture of experts of the 26B-A4B model: a router and a bank of expert MLPs beside the dense one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import TextConfig
from ..system.fusing import counting, on_gpu
from .attention import apply_projections, fuse_projections
from .avoided import AVOIDED, GatherShape, dequantized, gather_by_hand
from .elementwise import geglu

SORT_FROM, SORT_FROM_CUDA = 64, 600
"""Token-expert pairs from which sorting them by expert pays: neighbours then read the same weights.

MLX's CUDA product for sorted experts that aren't quantised is slow for few tokens; on an H100, at 26B-A4B's sizes, it
meets the one for unsorted ones here (docs/measurements/cuda.md).
"""


class Router(nn.Module):
    """Chooses each token's experts and their weights.

    norm -> scale -> project -> softmax -> the best few, renormalised, each times its expert's own scale.
    """

    def __init__(self, config: TextConfig):
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
            Experts, uint32 [..., experts_per_token], and their weights, in x's type.
        """
        scores = self.proj(mx.fast.rms_norm(x, self._norm, self._eps))
        experts = mx.argpartition(scores, kth=-self._chosen, axis=-1)[..., -self._chosen :]
        # Softmax over all experts, renormalised over the chosen ones, is softmax over the chosen ones.
        weights = mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1, precise=True)
        return experts, weights * self.per_expert_scale[experts]


class _Bank(nn.Module):
    """What both kinds of linear maps per expert have in common."""

    def shape(self, x: mx.array, experts: mx.array, in_order: bool) -> GatherShape:
        """What MLX chooses a kernel for such a call by."""
        return GatherShape.of(self, *self.weight.shape[:2], x, experts.size, in_order)

    def matrices(self, experts: mx.array) -> mx.array:
        """The weights [n, out, in] of experts [n]."""
        return dequantized(self, experts)


class ExpertLinear(_Bank):
    """One linear map per expert, weight [experts, out, in]."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool, rows: mx.array | None = None) -> mx.array:
        """Maps rows of x.

        Args:
            x: [..., 1, in].
            experts: uint32, an expert for each result.
            in_order: Promises that the experts are sorted.
            rows: uint32 of the same shape, the row of x for each result, counted through all of them; None if there
                is one for each.

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

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
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
    """The bank of expert MLPs."""

    _INPUTS = ["gate_proj", "up_proj"]

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = ExpertLinear(config.num_experts, config.hidden_size, config.expert_size)
        self.up_proj = ExpertLinear(config.num_experts, config.hidden_size, config.expert_size)
        self.down_proj = ExpertLinear(config.num_experts, config.expert_size, config.hidden_size)

    def prepare(self) -> None:
        """See `Attention.prepare`."""
        fuse_projections(self, self._INPUTS)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Weighted sum of each token's experts.

        Args:
            x: [B, L, hidden].
            experts: uint32 [B, L, chosen].
            weights: [B, L, chosen].

        Returns:
            [B, L, hidden].
        """
        chosen = experts.shape[-1]
        # Rows are made matrices of one row by reshaping: axes put in with None make MLX take them for columns.
        if experts.size < self._sort_from():
            # Told apart from none at all, rows are constants; MLX would make them anew each time.
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
        inner = geglu(*mx.split(apply_projections(self, self._INPUTS, x, experts, in_order, tokens), 2, axis=-1))
        # From here on each expert has a row of its own.
        rows = None if tokens is None else counting(experts.size, np.uint32).reshape(experts.shape)
        return self.down_proj(inner, experts, in_order, rows)
