"""Packs sequences into rows of a fixed length: whole sequences only, so that no image is ever cut."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from uni_x.data.render import IGNORED, Rendered

_GOOD_FILL = 0.95
_OPEN_ROWS = 8  # more would fill little better, and leave more rows at the end that are sorted by length

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents one after the other; each one's first label is -100, so that none predicts the next.

    `document_ids` count the documents from 1. All three are int64 of one length. `sample_ids` and `folders` say of each
    document which sample it is, and which of the mixed folders that comes from. `image_tokens` is how many of the ids
    are image codes or their separators.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray
    sample_ids: tuple[str, ...] = ()
    folders: tuple[int, ...] = ()
    image_tokens: int = 0


@dataclass(frozen=True)
class PackingStatistics:
    """What packing made of its sequences: `fill` is the share of `rows * max_length` that holds tokens.

    `dropped` sequences were longer than a row; `split` ones were texts, of which each piece became a document.
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

    @property
    def documents_per_row(self) -> float:
        """The mean; 0 where there are no rows."""
        return self.documents / self.rows if self.rows else 0.0


class BestFit(Generic[Item]):
    """Best fit of items into a number of open rows: an item goes where it leaves the least room.

    Rows are thus mixed as the items come; a row is given out when it is full, or when it is the fullest of more than
    `open_rows`. With `open_rows=0` each item has a row of its own. No item is longer than `max_length`.
    """

    def __init__(self, max_length: int, open_rows: int = _OPEN_ROWS):
        self._max_length = max_length
        self._limit = open_rows
        self._by_room: list[tuple[int, int]] = []  # (room left, number of the row), ascending
        self._open: dict[int, list[tuple[int, Item]]] = {}
        self._next_number = 0

    def add(self, length: int, item: Item) -> Iterator[list[Item]]:
        """Takes an item and gives out the rows that it finished; to be used up before the next is added."""
        self._place(length, item)
        while self._by_room and (self._by_room[0][0] == 0 or len(self._by_room) > self._limit):
            yield self._give_out(self._by_room[0])

    def finish(self) -> list[list[Item]]:
        """Gives out what is open; rows that are not nearly full are packed again first, longest item first."""
        allowed_room = int((1 - _GOOD_FILL) * self._max_length)
        rows = [self._give_out(entry) for entry in self._by_room[:] if entry[0] <= allowed_room]
        rest = [item for number in sorted(self._open) for item in self._open[number]]
        self._by_room, self._open = [], {}
        for length, item in sorted(rest, key=lambda entry: entry[0], reverse=True):
            self._place(length, item)
        return rows + [self._give_out(entry) for entry in self._by_room[:]]

    def _place(self, length: int, item: Item) -> None:
        index = bisect.bisect_left(self._by_room, (length, -1))
        if index < len(self._by_room):
            room, number = self._by_room.pop(index)
        else:
            room, number = self._max_length, self._next_number
            self._next_number += 1
            self._open[number] = []
        self._open[number].append((length, item))
        bisect.insort(self._by_room, (room - length, number))

    def _give_out(self, entry: tuple[int, int]) -> list[Item]:
        self._by_room.remove(entry)
        return [item for _, item in self._open.pop(entry[1])]


def plan_rows(lengths: Iterable[int], max_length: int) -> list[list[int]]:
    """How sequences of these lengths, none above `max_length`, are packed: the indices of those in each row."""
    fit = BestFit[int](max_length)
    rows = [row for index, length in enumerate(lengths) for row in fit.add(length, index)]
    return rows + fit.finish()


def pack(
    sequences: Iterable[Rendered], max_length: int, *, join: bool = True, split: bool = True
) -> tuple[list[PackedRow], PackingStatistics]:
    """Packs sequences into rows of at most `max_length` tokens.

    Args:
        sequences: in the order in which they are mixed.
        max_length: tokens in a row.
        join: puts several into a row; otherwise each has a row of its own.
        split: cuts texts that are longer than a row into several, rather than leaving them out. What is longer and
            has images or answers is always left out.
    """
    fit = BestFit[Rendered](max_length, **({} if join else {"open_rows": 0}))
    documents: list[list[Rendered]] = []
    dropped = cut = 0
    for sequence in sequences:
        pieces = _pieces(sequence, max_length, split)
        dropped, cut = dropped + (not pieces), cut + (len(pieces) > 1)
        documents += [row for piece in pieces for row in fit.add(len(piece.input_ids), piece)]
    documents += fit.finish()
    rows = [_join(row) for row in documents]
    tokens = sum(len(row.input_ids) for row in rows)
    return rows, PackingStatistics(max_length, len(rows), sum(map(len, documents)), tokens, dropped, cut)


def _pieces(sequence: Rendered, max_length: int, split: bool) -> list[Rendered]:
    length = len(sequence.input_ids)
    if length <= max_length:
        return [sequence]
    if not (split and sequence.can_be_cut):
        return []
    cuts = [slice(start, start + max_length) for start in range(0, length, max_length)]
    return [replace(sequence, input_ids=sequence.input_ids[cut], labels=sequence.labels[cut]) for cut in cuts]


def _join(documents: list[Rendered]) -> PackedRow:
    lengths = np.array([len(document.input_ids) for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    labels[np.cumsum(lengths) - lengths] = IGNORED
    return PackedRow(
        input_ids=np.concatenate([document.input_ids for document in documents]),
        labels=labels,
        document_ids=np.repeat(np.arange(1, len(documents) + 1), lengths),
        sample_ids=tuple(document.sample_id for document in documents),
        folders=tuple(document.folder for document in documents),
        image_tokens=sum(document.image_tokens for document in documents),
    )
