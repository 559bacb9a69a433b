"""What encoded folders hold once rendered: sequences, tokens and lengths, and how they will fill rows in training."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uni_x.data.packing import PackingStatistics, plan_rows
from uni_x.data.shards import ShuffledShards
from uni_x.errors import DataError

if TYPE_CHECKING:
    from uni_x.data.render import Renderer
    from uni_x.data.schema import Sample

KINDS = ("draw", "describe", "converse", "text")
_BARS = 60  # at most, in a histogram
_RENDERED_AT_ONCE = 512
_ROWS_TOGETHER = 512  # planned at once, about as many as training packs together


@dataclass(frozen=True)
class TokenCounts:
    """Sequences, and their tokens: image codes with their separators, and all others, which are text."""

    sequences: int = 0
    text_tokens: int = 0
    image_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Of both modalities."""
        return self.text_tokens + self.image_tokens

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.sequences + other.sequences,
            self.text_tokens + other.text_tokens,
            self.image_tokens + other.image_tokens,
        )


@dataclass(frozen=True)
class FolderStatistics:
    """What a folder holds, and its part in the mixture.

    Attributes:
        path: as it was given.
        counts: by what the samples themselves name as their source, and by the kind of sequence that they became.
        refused: samples that layout or template refuse.
        refusal: why the first of them was; None where there is none.
        weight: its share of the sequences in training.
        token_share: its share of the tokens in training.
    """

    path: Path
    counts: Mapping[tuple[str, str], TokenCounts]
    refused: int
    refusal: str | None
    weight: float
    token_share: float

    @property
    def total(self) -> TokenCounts:
        """All together."""
        return sum(self.counts.values(), start=TokenCounts())

    @property
    def by_origin(self) -> dict[str, TokenCounts]:
        """By what the samples name as their source, most tokens first."""
        sums = _sum_by(0, [self])
        return dict(sorted(sums.items(), key=lambda item: (-item[1].tokens, item[0])))


@dataclass(frozen=True)
class Lengths:
    """Lengths of sequences in tokens; 95% of them are no longer than `p95`."""

    shortest: int
    median: float
    mean: float
    p95: float
    longest: int


@dataclass(frozen=True)
class Histogram:
    """How many sequences of each kind have which length.

    Bar n counts lengths from `n * width` to below `(n + 1) * width`, and the last one all that are longer too.
    """

    width: int
    counts: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TooLong:
    """Sequences that are longer than a row, and their tokens: texts that are cut into several, others left out."""

    split: int
    split_tokens: int
    dropped: int
    dropped_tokens: int


@dataclass(frozen=True)
class DataStatistics:
    """What was counted. Everything but `folders` and `packing` is about the samples as they are there, unweighted.

    Attributes:
        folders: in the order in which they were given.
        lengths: of the sequences, uncut.
        histogram: of the same lengths.
        too_long: of them, those longer than a row.
        packing: how as many sequences as were rendered, mixed by weight, fill rows; a forecast.
    """

    max_length: int
    folders: tuple[FolderStatistics, ...]
    lengths: Lengths
    histogram: Histogram
    too_long: TooLong
    packing: PackingStatistics

    @property
    def total(self) -> TokenCounts:
        """All together."""
        return sum((folder.total for folder in self.folders), start=TokenCounts())

    @property
    def by_kind(self) -> dict[str, TokenCounts]:
        """By kind, in the order of `KINDS`."""
        sums = _sum_by(1, self.folders)
        return {kind: sums[kind] for kind in KINDS if kind in sums}

    @property
    def refused(self) -> int:
        """Samples that layout or template refuse."""
        return sum(folder.refused for folder in self.folders)


def _sum_by(place: int, folders: Iterable[FolderStatistics]) -> dict[str, TokenCounts]:
    """Counts by origin (place 0 of their keys) or by kind (place 1)."""
    sums: defaultdict[str, TokenCounts] = defaultdict(TokenCounts)
    for folder in folders:
        for key, counts in folder.counts.items():
            sums[key[place]] += counts
    return sums


def statistics(
    folders: Sequence[tuple[Path, float]],
    renderer: Renderer,
    max_length: int,
    seed: int = 0,
    limit: int | None = None,
    *,
    fractions: Sequence[float] | None = None,
    join: bool = True,
    split: bool = True,
) -> DataStatistics:
    """Renders every sample of the folders once and counts; 6 bytes a sample stay in memory.

    Samples that layout or template refuse are counted apart; training leaves them out as well.

    Args:
        folders: folders of shards with their weights, which are shares of the sequences in training.
        renderer: renders the samples.
        max_length: tokens in a row.
        seed: decides on order and on what the renderer leaves to chance.
        limit: at most so many samples of each folder, drawn at random.
        fractions: how much of each folder is used; all of it where they are left out.
        join: whether rows hold several sequences.
        split: whether texts that are longer than a row are cut into several; otherwise they are left out.

    Raises `DataError` for folders that cannot be read, are not finished, or hold no samples or none that can be
    rendered, and for weights of which none is above 0.
    """
    weights = np.array([weight for _, weight in folders], dtype=np.float64)
    if not len(weights) or (weights < 0).any() or not weights.any():
        raise DataError("statistics need at least one folder, with weights of 0 or more and one above 0")
    shares = weights / weights.sum()
    rng = np.random.default_rng(seed)
    counted = [
        _count(path, renderer, rng, (seed, number), 1.0 if fractions is None else fractions[number], limit)
        for number, (path, _) in enumerate(folders)
    ]
    lengths = np.concatenate([folder.lengths for folder in counted])
    kinds = np.concatenate([folder.kinds for folder in counted])
    is_text = np.concatenate([folder.is_text for folder in counted])
    return DataStatistics(
        max_length,
        _describe_folders(folders, counted, shares),
        _describe(lengths),
        _histogram(lengths, kinds, max_length),
        _too_long(lengths, is_text & split, max_length),
        _forecast(*_mix(counted, shares, len(lengths), rng), max_length, join, split),
    )


@dataclass
class _Folder:
    """What is kept of a folder's sequences: for each its length, its kind and whether it is text and nothing else."""

    lengths: np.ndarray  # (sequences,) uint32
    kinds: np.ndarray  # (sequences,) uint8, places in KINDS
    is_text: np.ndarray  # (sequences,) bool
    counts: dict[tuple[str, str], TokenCounts]
    refused: int
    refusal: str | None

    @property
    def mean_length(self) -> float:
        return float(self.lengths.mean())


def _count(
    path: Path, renderer: Renderer, rng: np.random.Generator, seed: tuple[int, int], fraction: float, limit: int | None
) -> _Folder:
    lengths, kinds, is_text = array("I"), array("B"), array("B")
    refused, refusal = 0, None
    sums: defaultdict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(3, dtype=np.int64))
    for samples in _batches(path, renderer.vocabulary.image_codebook_size, seed, fraction, limit):
        for sequence in renderer.try_all(samples, rng):
            if isinstance(sequence, DataError):
                refused, refusal = refused + 1, refusal or str(sequence)
                continue
            length = len(sequence.input_ids)
            lengths.append(length)
            kinds.append(KINDS.index(sequence.kind))
            is_text.append(sequence.can_be_cut)
            sums[sequence.source, sequence.kind] += (1, length - sequence.image_tokens, sequence.image_tokens)
    if not lengths:
        raise DataError(f"{path}: none of its {refused:,} samples can be rendered; the first: {refusal}")
    counts = {key: TokenCounts(*values.tolist()) for key, values in sorted(sums.items())}
    flags = np.asarray(is_text).astype(bool)
    return _Folder(np.asarray(lengths), np.asarray(kinds), flags, counts, refused, refusal)


def _batches(
    path: Path, codebook_size: int, seed: tuple[int, int], fraction: float, limit: int | None
) -> Iterator[list[Sample]]:
    shards = ShuffledShards(path, codebook_size, seed, fraction)
    count = len(shards) if limit is None else min(limit, len(shards))
    for start in range(0, count, _RENDERED_AT_ONCE):
        yield [shards.sample(position) for position in range(start, min(start + _RENDERED_AT_ONCE, count))]


def _describe_folders(
    folders: Sequence[tuple[Path, float]], counted: Sequence[_Folder], shares: np.ndarray
) -> tuple[FolderStatistics, ...]:
    tokens = shares * [folder.mean_length for folder in counted]
    parts = zip(folders, counted, shares.tolist(), (tokens / tokens.sum()).tolist(), strict=True)
    return tuple(
        FolderStatistics(path, folder.counts, folder.refused, folder.refusal, share, token_share)
        for (path, _), folder, share, token_share in parts
    )


def _describe(lengths: np.ndarray) -> Lengths:
    median, p95 = np.percentile(lengths, (50, 95)).tolist()
    return Lengths(int(lengths.min()), median, float(lengths.mean()), p95, int(lengths.max()))


def _histogram(lengths: np.ndarray, kinds: np.ndarray, max_length: int) -> Histogram:
    reach = min(int(lengths.max()), 2 * max_length)
    width = reach // _BARS + 1
    bars = np.minimum(lengths, reach) // width
    return Histogram(
        width,
        {
            kind: tuple(np.bincount(bars[kinds == number], minlength=reach // width + 1).tolist())
            for number, kind in enumerate(KINDS)
            if (kinds == number).any()
        },
    )


def _too_long(lengths: np.ndarray, is_cut: np.ndarray, max_length: int) -> TooLong:
    longer = lengths > max_length
    cut, left_out = lengths[longer & is_cut], lengths[longer & ~is_cut]
    return TooLong(len(cut), int(cut.sum()), len(left_out), int(left_out.sum()))


def _mix(
    counted: Sequence[_Folder], shares: np.ndarray, total: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of `total` sequences in the proportions of training, and which are text alone.

    A folder that has fewer than its share is repeated.
    """
    bounds = np.rint(np.concatenate(([0.0], np.cumsum(shares))) * total).astype(np.int64)
    # the sequences of a folder come in random order, so that the first ones stand for all
    taken = [np.arange(count) % len(folder.lengths) for folder, count in zip(counted, np.diff(bounds), strict=True)]
    lengths = np.concatenate([folder.lengths[places] for folder, places in zip(counted, taken, strict=True)])
    is_text = np.concatenate([folder.is_text[places] for folder, places in zip(counted, taken, strict=True)])
    order = rng.permutation(len(lengths))
    return lengths[order], is_text[order]


def _forecast(lengths: np.ndarray, is_text: np.ndarray, max_length: int, join: bool, split: bool) -> PackingStatistics:
    pieces: list[int] = []
    for length, can_be_cut in zip(lengths.tolist(), (is_text & split).tolist(), strict=True):
        whole, rest = divmod(length, max_length)
        if length <= max_length:
            pieces.append(length)
        elif can_be_cut:
            pieces += [max_length] * whole + [rest] * (rest > 0)
    tokens = sum(pieces)
    if not join or not pieces:
        return PackingStatistics(max_length, len(pieces), len(pieces), tokens)
    together = max(1, _ROWS_TOGETHER * max_length * len(pieces) // tokens)
    rows = sum(
        len(plan_rows(pieces[start : start + together], max_length)) for start in range(0, len(pieces), together)
    )
    return PackingStatistics(max_length, rows, len(pieces), tokens)
