"""The batches that a training run sees: samples of encoded folders, mixed by weight, rendered and packed, without end.

The stream is cut into blocks of samples. What a block holds follows from the seed and its number alone, and so do its
rows; a worker of a process builds every so many blocks. Where a run stands is thus a block and a batch for each
worker, which is what a checkpoint keeps: the run resumed sees the very batches that the other would have seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from uni_x.data.packing import PackedRow, PackingStatistics, pack
from uni_x.data.render import Rendered, Renderer
from uni_x.data.schema import Sample
from uni_x.data.shards import ShuffledShards, iterate_samples
from uni_x.errors import DataError

NOTES = "notes"  # the key in a batch of what the model does not see
_TRIED = 512
_BLOCK_TOKENS = 2**21
_MOST_ROWS = 512  # of a block
_TOLD = 5  # refused samples that the user is told of; the log has all

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A folder of Parquet shards and its part in the mixture.

    Attributes:
        path: the folder, or one shard.
        weight: its share of the sequences, over the sum of the weights.
        fraction: how much of it is used at all, the same part in every pass and every run.
    """

    path: str | Path
    weight: float = 1.0
    fraction: float = 1.0


@dataclass(frozen=True)
class BatchNotes:
    """What is known of a batch beside its tensors.

    Attributes:
        worker, block, used: its place in the stream: the batch is the `used`-th of a block that a worker has built.
        left_out, split: with the first batch of a block, how many samples of the block are in no batch, and how many
            texts are cut into several.
        tokens: how many text and image tokens it has.
        sample_ids: of the documents in each row.
        folders: `(batch, length)`, which of the mixed folders each token comes from; -1 for padding.
    """

    worker: int
    block: int
    used: int
    left_out: int
    split: int
    tokens: tuple[int, int]
    sample_ids: tuple[tuple[str, ...], ...]
    folders: np.ndarray


@dataclass(frozen=True)
class Block:
    """The rows of a block of samples, by batches.

    `left_out` of its samples are in none, because they are too long or refused, and `split` of its texts are cut into
    several sequences.
    """

    batches: list[list[PackedRow]]
    left_out: int
    split: int


@dataclass(frozen=True)
class WorkerPosition:
    """How far one worker has come.

    Attributes:
        left: blocks it has to build next, each with the number of its batches that are used up.
        following: the block after these, and from there on every `step`-th.
    """

    left: tuple[tuple[int, int], ...]
    following: int
    step: int

    def after(self, block: int, used: int) -> WorkerPosition:
        """Where the worker stands when `used` batches of a block are used up."""
        position = self
        while not position.left or position.left[0][0] != block:
            position = position.next()
        return replace(position, left=((block, used), *position.left[1:]))

    def next(self) -> WorkerPosition:
        """Where the worker stands at the beginning of its next block."""
        if len(self.left) > 1:
            return replace(self, left=self.left[1:])
        return WorkerPosition(((self.following, 0),), self.following + self.step, self.step)


@dataclass(frozen=True)
class StreamPosition:
    """How far one process has come: its workers, in their order, and how many batches it has used up in all."""

    workers: tuple[WorkerPosition, ...]
    batches: int = 0

    def after(self, batch: BatchNotes) -> StreamPosition:
        """Where the process stands once a batch is used up."""
        workers = list(self.workers)
        workers[batch.worker] = workers[batch.worker].after(batch.block, batch.used)
        return StreamPosition(tuple(workers), self.batches + 1)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StreamPosition:
        """What `to_json` made. Raises `KeyError` or `TypeError` for anything else."""
        workers = (
            WorkerPosition(tuple((block, used) for block, used in w["left"]), w["following"], w["step"])
            for w in content["workers"]
        )
        return cls(tuple(workers), content["batches"])


def start_positions(
    processes: int, workers: int, former: Sequence[StreamPosition] | None = None
) -> list[StreamPosition]:
    """Where the processes of a run begin, or go on from `former`, where those of an interrupted run stood.

    With as many processes and workers each goes on where it was. Otherwise what they have left is divided anew:
    nothing is lost and nothing is repeated, but the order is another.
    """
    workers = max(1, workers)
    streams = processes * workers
    if former and len(former) == processes and all(len(process.workers) == workers for process in former):
        return list(former)
    before = [worker for process in former or () for worker in process.workers]
    fresh = max((worker.following for worker in before), default=0)
    left = [place for worker in before for place in worker.left]
    left += [(block, 0) for worker in before for block in range(worker.following, fresh, worker.step)]
    divided = [
        WorkerPosition(tuple(sorted(left)[stream::streams]), fresh + stream, streams) for stream in range(streams)
    ]
    return [StreamPosition(tuple(divided[rank * workers : (rank + 1) * workers])) for rank in range(processes)]


class TrainingStream(IterableDataset[Batch]):
    """An endless stream of batches; each process of a run has its own.

    Args:
        sources: what is mixed. A source is gone through in a new random order each time, every sample once.
        renderer: renders the samples.
        collate: makes a batch of rows.
        max_length: tokens in a row.
        batch_size: rows in a batch; the last batch of a block may have fewer.
        seed: decides on order, mixing and what the renderer leaves to chance.
        packing: whether rows hold several sequences; otherwise batches hold sequences of similar length.
        split_long_texts: whether texts longer than a row are cut into several, or left out. Sequences with images or
            answers that are longer than a row are always left out.
        position: where this process begins, one of `start_positions`; None where there is one process, which has one
            worker.

    Raises `DataError` for sources that cannot be read, are empty, or have no sample that fits into a row.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        renderer: Renderer,
        collate: Callable[[Sequence[PackedRow]], Batch],
        max_length: int,
        batch_size: int = 1,
        seed: int = 0,
        *,
        packing: bool = True,
        split_long_texts: bool = True,
        position: StreamPosition | None = None,
    ):
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        if not sources or (weights < 0).any() or not weights.any():
            raise DataError("training needs at least one source, with weights of 0 or more and one above 0")
        codebook_size = renderer.vocabulary.image_codebook_size
        self._shards = [
            ShuffledShards(source.path, codebook_size, (seed, number), source.fraction)
            for number, source in enumerate(sources)
        ]
        self._bounds = np.concatenate(([0.0], np.cumsum(weights / weights.sum())))
        self._bounds[-1] = 1.0
        self._renderer = renderer
        self._collate = collate
        self._max_length = max_length
        self._batch_size = batch_size
        self._seed = seed
        self._packing = packing
        self._split_long_texts = split_long_texts
        self._told: set[str] = set()
        self.position = position or start_positions(1, 1)[0]
        self._block_size, self.forecast = self._choose_block_size()

    @property
    def fingerprint(self) -> str:
        """Changes where a position in this stream means another place in another one."""
        inventories = [shards.inventory for shards in self._shards]
        sizes = [self._bounds.tolist(), self._block_size, self._batch_size, self._max_length]
        return hashlib.sha256(json.dumps([inventories, sizes, self._seed, self._packing]).encode()).hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = get_worker_info(), len(self.position.workers)
        if (1 if worker is None else worker.num_workers) != workers:
            raise DataError(f"the stream's position is one of {workers} workers, the loader has another number")
        # a loader begins with its worker 0, but the interrupted one would have gone on with another
        own = (self.position.batches + (0 if worker is None else worker.id)) % workers
        position = self.position.workers[own]
        if not position.left:
            position = position.next()
        while True:
            number_of_block, used = position.left[0]
            block = self.block(number_of_block)
            for number in range(used, len(block.batches)):
                rows = block.batches[number]
                image_tokens = sum(row.image_tokens for row in rows)
                yield self._collate(rows) | {
                    NOTES: BatchNotes(
                        own,
                        number_of_block,
                        number + 1,
                        0 if number else block.left_out,
                        0 if number else block.split,
                        (sum(len(row.input_ids) for row in rows) - image_tokens, image_tokens),
                        tuple(row.sample_ids for row in rows),
                        _folders_of_tokens(rows),
                    )
                }
            position = position.next()

    def block(self, number: int) -> Block:
        """A block of the stream."""
        rng = np.random.default_rng((self._seed, number))
        samples = self._samples_between(number * self._block_size, (number + 1) * self._block_size, rng)
        sequences, refused = self._render(samples, rng)
        self._tell_once(refused)
        rows, packed = self._pack(sequences)
        left_out = len(samples) - len(sequences) + packed.dropped
        if not self._packing:
            rows.sort(key=lambda row: len(row.input_ids))
            batches = self._cut(rows)
            batches = [batches[index] for index in rng.permutation(len(batches))]
        else:
            # The rows at the end are the least full ones, and sorted by the lengths of their documents.
            batches = self._cut([rows[index] for index in rng.permutation(len(rows))])
        return Block(batches, left_out, packed.split)

    def _render(
        self, samples: list[tuple[int, Sample]], rng: np.random.Generator
    ) -> tuple[list[Rendered], dict[str, DataError]]:
        """Sequences of the samples, and why layout or template refuse others, by their ids."""
        sequences, refused = [], {}
        rendered = self._renderer.try_all([sample for _, sample in samples], rng)
        for (folder, sample), sequence in zip(samples, rendered, strict=True):
            if isinstance(sequence, DataError):
                refused[sample.id] = sequence
            else:
                sequences.append(replace(sequence, folder=folder))
        return sequences, refused

    def _tell_once(self, refused: Mapping[str, DataError]) -> None:
        for sample_id in refused.keys() - self._told:
            self._told.add(sample_id)
            logger.log(
                logging.WARNING if len(self._told) <= _TOLD else logging.INFO, "left out: %s", refused[sample_id]
            )

    def _cut(self, rows: list[PackedRow]) -> list[list[PackedRow]]:
        return [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]

    def _pack(self, sequences: list[Rendered]) -> tuple[list[PackedRow], PackingStatistics]:
        return pack(sequences, self._max_length, join=self._packing, split=self._split_long_texts)

    def _samples_between(self, first: int, end: int, rng: np.random.Generator) -> list[tuple[int, Sample]]:
        """The samples of the mixture from place `first` to before `end`, each with its folder's number, shuffled."""
        samples = []
        for number, shards in enumerate(self._shards):
            places = range(self._taken(number, first), self._taken(number, end))
            samples += [(number, shards.sample(place)) for place in places]
        return [samples[index] for index in rng.permutation(len(samples))]

    def _taken(self, source: int, samples: int) -> int:
        """How many of the first `samples` of the mixture are of this source; over all sources they add up."""
        below, above = (int(np.floor(samples * bound + 0.5)) for bound in self._bounds[source : source + 2])
        return above - below

    def _choose_block_size(self) -> tuple[int, PackingStatistics]:
        """Samples in a block, so that it has some hundred rows, and what packing made of those that were tried."""
        rng = np.random.default_rng(self._seed)
        samples = self._samples_between(0, _TRIED, rng)
        sequences, refused = self._render(samples, rng)
        _, packed = self._pack(sequences)
        if not sequences:
            why = next(iter(refused.values()))
            raise DataError(f"none of the first {len(samples)} samples can be rendered; the first: {why}")
        if not packed.rows:
            raise DataError(
                f"data.max_length: {self._max_length} tokens are too few for each sample that was tried; the shortest "
                f"needs {_shortest(sequences)}"
            )
        wanted = min(max(_BLOCK_TOKENS // self._max_length, 1), _MOST_ROWS)
        rows = packed.tokens / self._max_length if self._packing else packed.rows
        return max(1, round(wanted * len(sequences) / rows)), packed


def held_out_batches(
    folders: Sequence[str | Path],
    renderer: Renderer,
    collate: Callable[[Sequence[PackedRow]], Batch],
    max_length: int,
    batch_size: int,
    samples: int,
    *,
    packing: bool = True,
) -> list[Batch]:
    """The same batches each time, of the first `samples` of each folder; what layout or template refuse is left out.

    Raises `DataError` where no sample fits into a row, and as `TrainingStream` does.
    """
    rng = np.random.default_rng(0)
    codebook_size = renderer.vocabulary.image_codebook_size
    chosen = [sample for folder in folders for sample in islice(iterate_samples(folder, codebook_size), samples)]
    sequences = [sequence for sequence in renderer.try_all(chosen, rng) if isinstance(sequence, Rendered)]
    if not sequences:
        raise DataError(f"{', '.join(map(str, folders))}: no held-out sample can be rendered")
    rows, _ = pack(sequences, max_length, join=packing)
    if not rows:
        raise DataError(
            f"{', '.join(map(str, folders))}: no held-out sample fits into the {max_length} tokens of data.max_length; "
            f"the shortest needs {_shortest(sequences)}"
        )
    return [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _shortest(sequences: Sequence[Rendered]) -> int:
    return min(len(sequence.input_ids) for sequence in sequences)


def _folders_of_tokens(rows: Sequence[PackedRow]) -> np.ndarray:
    """`(rows, length)` int16: the folder of each token, -1 for padding."""
    folders = np.full((len(rows), max(len(row.document_ids) for row in rows)), -1, dtype=np.int16)
    for of_row, row in zip(folders, rows, strict=True):
        of_row[: len(row.document_ids)] = np.array(row.folders, dtype=np.int16)[row.document_ids - 1]
    return folders
