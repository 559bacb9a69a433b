"""The rows that a training run sees: samples drawn from encoded folders by weight, rendered and packed.

Everything follows from the seed and the epoch: every process of a run and every run resumed has the same rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from uni_x.data.packing import PackedRow, Packer, PackingStatistics
from uni_x.data.render import Rendered, Renderer
from uni_x.data.schema import Sample
from uni_x.data.shards import EncodedSamples
from uni_x.errors import DataError

_DRAWN_AT_ONCE = 512


@dataclass(frozen=True)
class TokenCounts:
    """What was drawn from one source: sequences of each kind, tokens of text (markers among them) and image codes."""

    sequences: Mapping[str, int]
    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class EpochStatistics:
    """How an epoch was packed, and what was drawn for it, by the samples' `source`."""

    packing: PackingStatistics
    by_source: Mapping[str, TokenCounts]


class TrainingData(Dataset[PackedRow]):
    """A map-style dataset of `rows_per_epoch` packed rows, which differ from epoch to epoch.

    Args:
        sources: folders of Parquet shards with their weights, which are shares of the sequences, not of the tokens.
        renderer: renders the samples.
        max_length: tokens in a row.
        rows_per_epoch: the length of the dataset, which fits as many samples as the rows can hold.
        seed: decides on order, mixing and what the renderer leaves to chance.
        open_rows: see `Packer`; 0 gives each sequence a row of its own.

    A source is gone through in a new random order each time, and the next epoch carries on where the last one ended,
    up to the error of an estimate of how many samples fit into the rows. An epoch's rows are held in memory, 24 bytes
    a token. Raises `DataError` for sources that cannot be read, are empty, or have no sample that fits into a row.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | Path, float]],
        renderer: Renderer,
        max_length: int,
        rows_per_epoch: int,
        seed: int = 0,
        open_rows: int = 64,
    ):
        if not sources or any(weight < 0 for _, weight in sources) or not any(weight for _, weight in sources):
            raise DataError("training needs at least one source, with weights of 0 or more and one above 0")
        codebook_size = renderer.vocabulary.image_codebook_size
        self._sources = [
            _ShuffledSource(path, codebook_size, (seed, number)) for number, (path, weight) in enumerate(sources)
        ]
        weights = np.array([weight for _, weight in sources], dtype=np.float64)
        self._shares = weights / weights.sum()
        self._renderer = renderer
        self._max_length = max_length
        self._rows_per_epoch = rows_per_epoch
        self._seed = seed
        self._open_rows = open_rows
        self._epoch = 0
        self._built: _Epoch | None = None
        self._samples_per_epoch = self._estimate_samples_per_epoch()

    def __len__(self) -> int:
        return self._rows_per_epoch

    def __getitem__(self, index: int) -> PackedRow:
        return self._rows_of_epoch().rows[index]

    @property
    def statistics(self) -> EpochStatistics:
        """What the current epoch is made of."""
        return self._rows_of_epoch().statistics

    def set_epoch(self, epoch: int) -> None:
        """Turns to another epoch; its rows are built when the first of them is asked for."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._built = None

    def _rows_of_epoch(self) -> _Epoch:
        if self._built is None:
            self._built = self._build(self._epoch)
        return self._built

    def _build(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng((self._seed, epoch))
        positions = [int(epoch * self._samples_per_epoch * share) for share in self._shares]
        packer = Packer(self._max_length, self._open_rows)
        counts = _Counts()
        rows: list[PackedRow] = []
        while len(rows) + packer.open_tokens // self._max_length < self._rows_per_epoch:
            sequences = self._draw(positions, rng)
            counts.add(sequences)
            rows += packer.add(sequences)
        rows += packer.finish()
        # The rows at the end are the least full ones, and sorted by the lengths of their documents.
        rows = rows[: self._rows_per_epoch]
        order = rng.permutation(len(rows))
        return _Epoch([rows[index] for index in order], EpochStatistics(packer.statistics, counts.by_source()))

    def _draw(self, positions: list[int], rng: np.random.Generator) -> list[Rendered]:
        """Renders samples of all sources by their shares, and moves the sources' positions on."""
        samples = []
        for number in rng.choice(len(self._sources), size=_DRAWN_AT_ONCE, p=self._shares).tolist():
            samples.append(self._sources[number].sample(positions[number]))
            positions[number] += 1
        return self._renderer.render_all(samples, rng)

    def _estimate_samples_per_epoch(self) -> float:
        sequences = self._draw([0] * len(self._sources), np.random.default_rng(self._seed))
        packer = Packer(self._max_length, self._open_rows)
        rows = len(packer.add(sequences)) + packer.open_tokens / self._max_length
        if not rows:
            raise DataError(f"max_length: {self._max_length} tokens are too few for each of {len(sequences)} samples")
        return self._rows_per_epoch * len(sequences) / rows


@dataclass(frozen=True)
class _Epoch:
    rows: list[PackedRow]
    statistics: EpochStatistics


class _ShuffledSource:
    """An endless sequence of the samples of one source: pass after pass, each in an order of its own."""

    def __init__(self, path: str | Path, codebook_size: int, seed: tuple[int, ...]):
        self._samples = EncodedSamples(path, codebook_size)
        if not len(self._samples):
            raise DataError(f"{path}: no samples in it")
        self._seed = seed
        self._pass = -1
        self._order = np.empty(0, dtype=np.int64)

    def sample(self, position: int) -> Sample:
        number, index = divmod(position, len(self._samples))
        if number != self._pass:
            self._pass = number
            self._order = np.random.default_rng((*self._seed, number)).permutation(len(self._samples))
        return self._samples[int(self._order[index])]


class _Counts:
    def __init__(self) -> None:
        self._kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self._text_tokens: Counter[str] = Counter()
        self._image_tokens: Counter[str] = Counter()

    def add(self, sequences: Sequence[Rendered]) -> None:
        for sequence in sequences:
            self._kinds[sequence.source][sequence.kind] += 1
            self._text_tokens[sequence.source] += len(sequence.input_ids) - sequence.image_tokens
            self._image_tokens[sequence.source] += sequence.image_tokens

    def by_source(self) -> dict[str, TokenCounts]:
        return {
            source: TokenCounts(dict(kinds), self._text_tokens[source], self._image_tokens[source])
            for source, kinds in self._kinds.items()
        }
