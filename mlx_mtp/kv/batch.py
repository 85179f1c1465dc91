"""The KV of a running batch: rows in groups of about the same length, so that none pays for a much longer one.

Buffers are rectangular: every row takes, and attention reads, as many slots as the longest row needs. Rows whose
lengths differ much therefore lie in different buffers. Attention runs once per group, which costs a few more kernels in
each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import mlx.core as mx

from ..config import TextConfig
from .blocks import BlockKV, GroupedBlock, View, in_batch
from .buffers import BufferState, KVBuffers, capacity_for, kv_bytes

GROUP_SLOTS = 4096
"""Slots that another group must save to be worth its kernels.

A group adds about four kernels to every layer: some 10 microseconds, in which a Mac reads 1 to 5 MB of KV. A slot takes
2 to 8 kB in a full layer, and one layer in five or six is full.
"""


class BatchKV:
    """Rows in groups of buffers.

    Attributes:
        groups: The buffers; their rows, one group after the other, are the batch's rows in order.
    """

    def __init__(self) -> None:
        """Makes a batch without rows; `arrange` adds some."""
        self.groups: list[KVBuffers] = []

    @classmethod
    def of(cls, rows: Sequence[KVBuffers], positions: int) -> BatchKV:
        """Makes a batch from copies of single rows.

        Args:
            rows: Buffers of one row each.
            positions: Positions that each row has room for.
        """
        batch = cls()
        batch.arrange([(row, 0) for row in rows], [positions] * len(rows), consume=False)
        return batch

    @property
    def batch(self) -> int:
        """Number of rows."""
        return sum(group.batch for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Size of all buffers, in bytes."""
        return sum(group.nbytes for group in self.groups)

    def arrays(self) -> list[mx.array]:
        """All buffers, for evaluation."""
        return [array for group in self.groups for array in group.arrays()]

    def fits(self, positions: Sequence[int]) -> bool:
        """Whether there is room for these numbers of positions, one for each row."""
        return all(max(positions[rows]) <= group.capacity for rows, group in self._groups_with_rows())

    def reserve(self, positions: Sequence[int]) -> None:
        """Makes room for the positions that each row may reach, see `KVBuffers.reserve`."""
        for rows, group in self._groups_with_rows():
            group.reserve(max(positions[rows]))

    def snapshot(self) -> list[BufferState]:
        """See `KVBuffers.snapshot`."""
        return [group.snapshot() for group in self.groups]

    def restore(self, snapshots: Sequence[BufferState]) -> None:
        """See `KVBuffers.restore`."""
        for group, snapshot in zip(self.groups, snapshots, strict=True):
            group.restore(snapshot)

    def block(self, lengths: mx.array, width: int) -> dict[bool, BlockKV]:
        """See `KVBuffers.block`."""
        if len(self.groups) == 1:
            return self.groups[0].block(lengths, width)
        blocks = [(rows, group.block(lengths[rows], width)) for rows, group in self._groups_with_rows()]
        return {kind: GroupedBlock([(rows, block[kind]) for rows, block in blocks]) for kind in blocks[0][1]}

    def shared(self, lengths: mx.array, window: int) -> dict[bool, list[View]]:
        """See `KVBuffers.shared`."""
        if len(self.groups) == 1:
            return self.groups[0].shared(lengths, window)
        shared = [(rows, group.shared(lengths[rows], window)) for rows, group in self._groups_with_rows()]
        return {kind: in_batch((rows, view) for rows, views in shared for view in views[kind]) for kind in shared[0][1]}

    def row(self, index: int, positions: int) -> KVBuffers:
        """One row as separate buffers, see `KVBuffers.row`."""
        group, within = self.find(index)
        return group.row(within, positions)

    def find(self, index: int) -> tuple[KVBuffers, int]:
        """The buffers of a row, and its index in them.

        Raises:
            IndexError: There is no such row.
        """
        for rows, group in self._groups_with_rows():
            if index < rows.stop:
                return group, index - rows.start
        raise IndexError(index)

    def arrange(self, rows: Sequence[tuple[KVBuffers, int]], room: Sequence[int], consume: bool = True) -> list[int]:
        """Sets the rows of the batch, and sorts them into groups.

        Groups whose rows stay the same aren't touched. All other arrays are replaced one after the other, so that
        little more than one of them exists twice at any time.

        Args:
            rows: For each row its buffers and its index in them: the batch's own (see `find`), or others.
            room: Positions that each row must have room for, those already written included.
            consume: Whether joining buffers may be taken apart; False copies their rows.

        Returns:
            The new order: for each row of the batch, its index in `rows`.
        """
        groups, made = [], []
        order = list(range(len(rows)))
        spans = in_groups([capacity_for(positions) for positions in room], GROUP_SLOTS)
        if len(spans) > 1:
            order = [i for span in spans for i in span]
        for span in spans:
            own, most = [rows[i] for i in span], max(room[i] for i in span)
            first = own[0][0]
            reusable = consume or first in self.groups
            if reusable and own == [(first, i) for i in range(first.batch)] and most <= first.capacity:
                groups.append(first)
                continue
            new = first.empty(most)
            new.written = max(source.written for source, _ in own)
            groups.append(new)
            made.append((new, [(it, [i for _, i in run]) for it, run in groupby(own, key=lambda row: row[0])]))
        sources_of = {id(it): it for it in (*self.groups, *(source for source, _ in rows if consume))}
        left = [it for it in sources_of.values() if it not in groups]
        for name in ("keys", "values") if made else ():
            for layer in list(getattr(rows[0][0], name)):
                for new, sources in made:
                    parts = [source.rows_of(name, layer, own, new.capacity) for source, own in sources]
                    joined = mx.contiguous(parts[0]) if len(parts) == 1 else mx.concatenate(parts)
                    del parts
                    mx.eval(joined)
                    getattr(new, name)[layer] = joined
                    del joined
                for old in left:
                    del getattr(old, name)[layer]
        self.groups = groups
        if made:
            max(groups, key=lambda it: it.nbytes).bound_pool()
        return order

    def _groups_with_rows(self) -> list[tuple[slice, KVBuffers]]:
        """The groups, each with its rows' indices in the batch."""
        ends = list(accumulate(group.batch for group in self.groups))
        return [(slice(end - group.batch, end), group) for end, group in zip(ends, self.groups, strict=True)]


def in_groups(slots: Sequence[int], price: int) -> list[list[int]]:
    """Splits rows into the cheapest groups, by dynamic programming over the rows sorted by slots.

    A row costs as many slots as the longest row of its group, and each group costs `price`.

    Args:
        slots: The slots that each row needs.
        price: The cost of a group, in slots.

    Returns:
        The row indices of each group, groups of shorter rows first.
    """
    rows = sorted(range(len(slots)), key=lambda i: slots[i])
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n rows: their cost, and where their last group begins
    for end in range(1, len(rows) + 1):
        best.append(min((best[b][0] + (end - b) * slots[rows[end - 1]] + price, b) for b in range(end)))
    groups: list[list[int]] = []
    end = len(rows)
    while end:
        begin = best[end][1]
        groups.insert(0, rows[begin:end])
        end = begin
    return [sorted(group) for group in groups]


def batch_bytes(config: TextConfig, tokens: Sequence[int], dtype_bytes: int) -> int:
    """Upper bound of a batch's KV bytes while its rows grow to their full length.

    Args:
        config: The target's.
        tokens: Each row's full length in tokens.
        dtype_bytes: Bytes of a key's or value's number.
    """
    slots = [capacity_for(count) for count in tokens]
    groups = in_groups(slots, GROUP_SLOTS)
    # While rows are shorter they may be in fewer groups. Each group less may take up to a group's price more, and all
    # its rows have rings as large as the longest row's.
    held = sum(len(group) * max(slots[i] for i in group) for group in groups) + (len(groups) - 1) * GROUP_SLOTS
    full = kv_bytes(config, held, dtype_bytes, sliding=False)
    return full + len(slots) * kv_bytes(config, max(slots), dtype_bytes, sliding=True)
