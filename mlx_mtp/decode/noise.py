"""The noise of sampling: a pure function of seed, position and token, the same on every backend."""

from __future__ import annotations

from hashlib import blake2b

import mlx.core as mx

from ..errors import PromptError
from .limits import is_int


def gumbel(first: mx.array, second: mx.array, positions: mx.array, token_ids: mx.array) -> mx.array:
    """Standard Gumbel noise as a pure function of its arguments, which broadcast against each other.

    A counter-based generator: only the candidates' noise is computed, and its bits are the same on every backend.

    Args:
        first: uint32, the first word of each row's key, see `seed_key`.
        second: uint32, the second word.
        positions: int32, absolute positions.
        token_ids: int32 or uint32.

    Returns:
        float32 of the broadcast shape, finite.
    """
    positions = _scramble(positions.astype(mx.uint32))
    # Two words per position, so that all 64 bits of the key affect every token's noise.
    stream = _scramble(first ^ positions)
    other = _scramble(second ^ _scramble(positions ^ mx.array(0x9E3779B9, mx.uint32)))
    return noise_of_bits(_scramble(_scramble(token_ids.astype(mx.uint32) ^ stream) + other))


def noise_of_bits(bits: mx.array) -> mx.array:
    """Standard Gumbel noise, float32, from uniform bits, uint32: -log(-log(1 - u)) with u = (bits + 0.5) / 2**32.

    Large noise decides which token is drawn. Here it comes from small u, where float32 is precise: it reaches
    log(2**33) = 22.9, in fine steps. The usual form -log(-log(u)) has its largest values where u is nearly 1, in steps
    of 2**-24, and infinity among them, which would draw a token regardless of its logit.
    """
    u = (bits.astype(mx.float32) + 0.5) * 2**-32
    # The 128 largest integers are rounded to 2**32, and 1 would be minus infinity.
    return -mx.log(-mx.log1p(-mx.minimum(u, 1 - 2**-24)))


def row_seed(seed: int, row: int) -> int:
    """The seed of one row when a single seed is given for several rows.

    Args:
        seed: The seed given, any integer.
        row: Index of the row.

    Returns:
        The seed itself for row 0, and a 64-bit hash of seed and row for the others.

    Raises:
        PromptError: The seed isn't a whole number.
    """
    if not is_int(seed):
        raise PromptError(f"seed must be a whole number, not {seed!r}")
    return seed if row == 0 else _hash(seed, row)


def _scramble(x: mx.array) -> mx.array:
    """A bijection of uint32 in which every input bit affects all output bits (C. Wellons' "lowbias32" constants)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def seed_key(seed: int) -> tuple[int, int]:
    """The noise key of a seed of any size, as two words of 32 bits."""
    mixed = _hash(seed)
    return mixed >> 32, mixed & 0xFFFFFFFF


def _hash(*numbers: int) -> int:
    """A 64-bit hash of whole numbers of any size."""
    digest = blake2b(digest_size=8)
    for number in numbers:
        data = number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)
        digest.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(digest.digest(), "big")
