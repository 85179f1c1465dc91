"""Whether a pair fits in memory, with room for KV, at some number of bits; from its configs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import drafter_precision, sizes
from .description import DrafterDescription, TargetDescription
from .quantization import Format

CHOICES = (None, 8, 6, 4)
"""Bits to try for a target whose files aren't quantised, None as stored; fewer than 4 cost too much of the quality."""

_USEFUL_CONTEXT = 8192
"""Context in tokens that a conversation with a file or two needs."""


@dataclass(frozen=True)
class Fit:
    """The memory of a pair.

    Attributes:
        quantize: Bits to which it is quantised while loading; None as stored.
        needed: Bytes of the weights of both models.
        read_per_token: Bytes of weights that a decoding step of one row reads.
        longest_context: Longest context of a single row, in tokens; 0 if the pair doesn't fit.
    """

    quantize: int | None
    needed: int
    read_per_token: int
    longest_context: int


def fit(
    target: TargetDescription,
    drafter: DrafterDescription | None,
    bits: int | None,
    quantize_drafter: int | str | None = "auto",
    memory: int | None = None,
) -> Fit:
    """The memory of a pair at some number of bits.

    Args:
        target: The target.
        drafter: Its drafter, or None.
        bits: See `Fit.quantize`; None if the target's files are quantised.
        quantize_drafter: See `api.load`.
        memory: Bytes that models and KV may take; None for this machine's.
    """
    target, drafter = at_bits(target, drafter, bits, quantize_drafter)
    size = sizes.of(target)
    needed = size.weights + (sizes.of(drafter).weights if drafter else 0)
    room, _ = sizes.kv_budget(needed, memory=memory)
    return Fit(bits, needed, size.read_per_token, sizes.longest_context(target.text, room, target.dtype_bytes))


def at_bits(
    target: TargetDescription,
    drafter: DrafterDescription | None,
    bits: int | None,
    quantize_drafter: int | str | None = "auto",
) -> tuple[TargetDescription, DrafterDescription | None]:
    """The descriptions of a pair as it is loaded with `quantize=bits`; arguments as for `fit`."""
    like = replace(target, quantize=Format(bits) if bits else None)
    return like, drafter_precision.for_target(drafter, like, quantize_drafter) if drafter else None


def best(target: TargetDescription, drafter: DrafterDescription | None) -> Fit | None:
    """The fit with the most bits whose context is useful, on this machine; None if there is none."""
    choices = (None,) if target.stored else CHOICES
    useful = min(_USEFUL_CONTEXT, target.text.max_positions)
    return next((it for bits in choices if (it := fit(target, drafter, bits)).longest_context >= useful), None)
