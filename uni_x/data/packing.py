"""Packs sequences into rows of a fixed length: whole sequences only, so that no image is ever cut."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from uni_x.data.render import IGNORED, Rendered

_GOOD_FILL = 0.98


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents one after the other; each one's first label is -100, so that none predicts the next.

    `document_ids` count the documents from 1. All three are int64 of one length.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray


@dataclass(frozen=True)
class PackingStatistics:
    """What packing made of its sequences: `fill` is the share of `rows * max_length` that holds tokens.

    `dropped` sequences were longer than a row and hold images or answers; `split` ones were longer texts, of which
    each piece became a document.
    """

    max_length: int
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    dropped: int = 0
    split: int = 0

    @property
    def fill(self) -> float:
        """Between 0 and 1; 1 where there are no rows."""
        return self.tokens / (self.rows * self.max_length) if self.rows else 1.0


class Packer:
    """Best fit into a number of open rows: a sequence goes where it leaves the least room.

    Rows are thus mixed as the sequences come; a row is given out when it is full, or when it is the fullest of more
    than `open_rows`. With `open_rows=0` each sequence has a row of its own.
    """

    def __init__(self, max_length: int, open_rows: int = 64):
        self.statistics = PackingStatistics(max_length)
        self._max_length = max_length
        self._limit = open_rows
        self._by_room: list[tuple[int, int]] = []  # (room left, number of the row), ascending
        self._open: dict[int, list[Rendered]] = {}
        self._next_number = 0

    @property
    def open_tokens(self) -> int:
        """Tokens in rows that are not given out yet."""
        return len(self._open) * self._max_length - sum(room for room, _ in self._by_room)

    def add(self, sequences: Iterable[Rendered]) -> list[PackedRow]:
        """Takes sequences and gives out the rows that were finished by them."""
        rows = []
        for sequence in sequences:
            for piece in self._fit(sequence):
                self._place(piece)
                while self._by_room and (self._by_room[0][0] == 0 or len(self._by_room) > self._limit):
                    rows.append(self._give_out(self._by_room[0]))
        return rows

    def finish(self) -> list[PackedRow]:
        """Gives out what is open; rows that are not nearly full are packed again first, longest sequence first."""
        allowed_room = int((1 - _GOOD_FILL) * self._max_length)
        rows = [self._give_out(entry) for entry in self._by_room[:] if entry[0] <= allowed_room]
        rest = [sequence for number in sorted(self._open) for sequence in self._open[number]]
        self._by_room, self._open = [], {}
        for sequence in sorted(rest, key=lambda sequence: len(sequence.input_ids), reverse=True):
            self._place(sequence)
        return rows + [self._give_out(entry) for entry in self._by_room[:]]

    def _fit(self, sequence: Rendered) -> list[Rendered]:
        length = len(sequence.input_ids)
        if length <= self._max_length:
            return [sequence]
        if sequence.kind != "text" or sequence.image_tokens:
            self.statistics = replace(self.statistics, dropped=self.statistics.dropped + 1)
            return []
        self.statistics = replace(self.statistics, split=self.statistics.split + 1)
        cuts = [slice(start, start + self._max_length) for start in range(0, length, self._max_length)]
        return [replace(sequence, input_ids=sequence.input_ids[cut], labels=sequence.labels[cut]) for cut in cuts]

    def _place(self, sequence: Rendered) -> None:
        length = len(sequence.input_ids)
        index = bisect.bisect_left(self._by_room, (length, -1))
        if index < len(self._by_room):
            room, number = self._by_room.pop(index)
        else:
            room, number = self._max_length, self._next_number
            self._next_number += 1
            self._open[number] = []
        self._open[number].append(sequence)
        bisect.insort(self._by_room, (room - length, number))

    def _give_out(self, entry: tuple[int, int]) -> PackedRow:
        self._by_room.remove(entry)
        room, number = entry
        documents = self._open.pop(number)
        self.statistics = replace(
            self.statistics,
            rows=self.statistics.rows + 1,
            documents=self.statistics.documents + len(documents),
            tokens=self.statistics.tokens + self._max_length - room,
        )
        return _join(documents)


def pack(
    sequences: Iterable[Rendered], max_length: int, open_rows: int = 64
) -> tuple[list[PackedRow], PackingStatistics]:
    """Packs all sequences into rows of at most `max_length` tokens; see `Packer`."""
    packer = Packer(max_length, open_rows)
    rows = packer.add(sequences) + packer.finish()
    return rows, packer.statistics


def _join(documents: list[Rendered]) -> PackedRow:
    lengths = np.array([len(document.input_ids) for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    labels[np.cumsum(lengths) - lengths] = IGNORED
    return PackedRow(
        input_ids=np.concatenate([document.input_ids for document in documents]),
        labels=labels,
        document_ids=np.repeat(np.arange(1, len(documents) + 1), lengths),
    )
