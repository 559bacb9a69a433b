"""Encodes the pictures of a source into codes on disk, once; interrupted at any moment, it carries on when run again.

A source is a list of parts. Shard `part-P-C.parquet` holds what is left of the rows `C * shard_size` to
`(C + 1) * shard_size - 1` of part P after the rejects. Its footer tells which rows those were, which of them were
rejected, and whether they were the part's last, so that moving the shard into place is the one step that decides
whether they are done, and the folder alone tells whether it is whole. Any number of processes can thus work on it
without speaking to each other: which shards are whose follows from their numbers, and whoever finds all of them there
writes the manifest that says so.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uni_x.data.inventory import Inventory
from uni_x.data.prepare import Filters, Pixels, Prepared, map_ahead, prepare
from uni_x.data.readers.parts import to_unicode
from uni_x.data.ready_ids import TextOfIds
from uni_x.data.rejects import write_rejects
from uni_x.data.schema import CodeGrid, Load, Part, Rejection, Sample
from uni_x.data.shards import MANIFEST, check_name, codes_dtype, read_manifest, shard_to_bytes
from uni_x.errors import ProcessError, RunError
from uni_x.runs import refuse_to_overwrite, remove_leftovers, write_atomically, writing_into

if TYPE_CHECKING:
    import torch

    from uni_x.images import ImageTokenizer

PREPARING_THREADS = 4
_FORMAT = 2
_RECORD_KEY = b"uni_x.shard"
_NOT_COMPARED = ("inventory", "image_tokenizer")  # as they are; a tokenizer may have been moved
_PARTS_A_PROCESS = 4  # where there are as many, a process takes whole parts, and reads no other


@dataclass(frozen=True)
class EncodeSummary:
    """How many source rows were read, written and rejected; `read == written + rejected`.

    `finished` says that the folder is whole, and the counts are then those of the folder; otherwise other processes
    are still at work, and they are this one's. `already_done` says that an earlier run had finished the folder.
    """

    read: int = 0
    written: int = 0
    rejected: int = 0
    finished: bool = False
    already_done: bool = False

    def __add__(self, other: EncodeSummary) -> EncodeSummary:
        return EncodeSummary(self.read + other.read, self.written + other.written, self.rejected + other.rejected)


Progress = Callable[[EncodeSummary], None]


@dataclass(frozen=True)
class Share:
    """Which of several processes this is; `rank` counts from 0."""

    rank: int = 0
    processes: int = 1

    def is_mine(self, part: int, parts: int, chunk: int) -> bool:
        """Whether this process makes a shard. A part's empty shard, of a part without rows, is chunk 0."""
        number = part if parts >= _PARTS_A_PROCESS * self.processes else part + chunk
        return number % self.processes == self.rank


def encode(
    parts: Sequence[Part],
    tokenizer: ImageTokenizer,
    out_dir: str | Path,
    *,
    source: str,
    inventory: Inventory | None = None,
    shard_size: int = 1000,
    batch_size: int | None = None,
    filters: Filters | None = None,
    text_of_ids: TextOfIds | None = None,
    share: Share | None = None,
    progress: Progress | None = None,
) -> EncodeSummary:
    """Writes rows as Parquet shards of codes into `out_dir`, with `manifest.json` and `rejects.jsonl`.

    Args:
        parts: the same in every run and process.
        tokenizer: encodes the pictures.
        out_dir: the folder, which all processes share.
        source: says in words where the rows come from, and changes when they would.
        inventory: of the source's files; None where it has none that could change.
        shard_size: rows of a shard, rejects included.
        batch_size: pictures a call of the tokenizer; None for as many as its memory allows.
        filters: which pictures are rejected.
        text_of_ids: reads rows of ready `input_ids`, which are rejected without it.
        share: which of several processes this is.
        progress: called with this process's totals so far after each batch and each shard that was there already.

    On finished work it returns at once. Raises `RunError` where the folder holds other things, or was made with other
    tokenizers, another source, filter or shard size, where the source's files or rows have changed since, and where the
    folder cannot be written.
    """
    out_dir, filters, share = Path(out_dir), filters or Filters(), share or Share()
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "source": source,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "image_tokenizer": _name_of(tokenizer),
        "codebook_size": tokenizer.codebook_size,
        "shard_size": shard_size,
        "filters": asdict(filters),
        "text_tokenizer": None if text_of_ids is None else text_of_ids.fingerprint,
    }
    if inventory is not None:
        manifest["inventory"] = asdict(inventory)
    finished = _open_folder(out_dir, manifest)
    if finished is not None:
        return finished
    folder = _Folder(out_dir, parts, shard_size)
    prepare_row = partial(prepare, tokenizer=tokenizer, filters=filters, text_of_ids=text_of_ids)
    own = _Encoder(folder, tokenizer, prepare_row, batch_size, progress or (lambda summary: None)).run(share)
    return folder.finish(manifest) or own


def tokenizer_fingerprint(tokenizer: ImageTokenizer) -> str:
    """A digest of an image tokenizer's configuration and weights."""
    digest = hashlib.sha256(tokenizer.config.model_dump_json().encode())
    for name, tensor in sorted(tokenizer.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()


def read_fingerprint(folder: str | Path) -> str | None:
    """The digest of the image tokenizer that a folder was encoded with; None where it does not say."""
    manifest = read_manifest(Path(folder) / MANIFEST)
    digest = None if manifest is None else manifest.get("tokenizer")
    return digest if isinstance(digest, str) else None


def tokenizer_in_brackets(folder: str | Path) -> str:
    """The image tokenizer that a folder was encoded with, as ` (its folder)`; empty where it does not say."""
    name = (read_manifest(Path(folder) / MANIFEST) or {}).get("image_tokenizer")
    return f" ({name})" if isinstance(name, str) else ""


def _name_of(tokenizer: ImageTokenizer) -> str | None:
    """The same from wherever it is named."""
    name = tokenizer.name_or_path
    return name if name is None or name == "scenes" else to_unicode(os.path.realpath(name))


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _open_folder(out_dir: Path, manifest: dict[str, Any]) -> EncodeSummary | None:
    """Starts the folder, or checks that it was started alike; gives the summary where it is finished."""
    check_name(out_dir)
    path = out_dir / MANIFEST
    with writing_into(out_dir):
        if not path.exists():
            refuse_to_overwrite(out_dir, MANIFEST)
            out_dir.mkdir(parents=True, exist_ok=True)
            _write_json(path, {**manifest, "finished": False})
            return None
        remove_leftovers(out_dir)
    found = read_manifest(path)
    if found is None or (found["finished"] and "counts" not in found):
        raise RunError(f"{path}: not a manifest of `uni-x encode`; choose another folder")
    _check_made_alike(out_dir, found, manifest)
    return EncodeSummary(**found["counts"], finished=True, already_done=True) if found["finished"] else None


def _check_made_alike(out_dir: Path, found: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raises `RunError` where an earlier run, by the manifest that was found, would have made something else."""
    mend = "choose another folder, or delete this one to encode again"
    for key, value in manifest.items():
        if key not in _NOT_COMPARED and not _is_alike(key, found.get(key), value):
            was, now = (_shown(key, each) for each in (found.get(key), value))
            raise RunError(f"{out_dir}: made with another {key.replace('_', ' ')} ({was}, now {now}); {mend}")
    if "inventory" in found and "inventory" in manifest:  # manifests of earlier versions have none
        now, then = Inventory(**manifest["inventory"]), Inventory(**found["inventory"])
        if changed := now.changed_since(then):
            raise RunError(f"{out_dir}: {manifest['source']} has changed since it was encoded ({changed}); {mend}")


def _shown(key: str, value: object) -> object:
    """What a manifest says, in a few words."""
    if value is None:
        return "none"
    return str(value)[:12] if key.endswith("tokenizer") else value


def _is_alike(key: str, earlier: object, now: object) -> bool:
    if key == "source" and isinstance(earlier, str):
        return now in (earlier, os.path.realpath(earlier))  # earlier versions kept paths as they were typed
    return earlier == now


@dataclass(frozen=True)
class _ShardRecord:
    """What the footer of a shard tells: the rows of the source it stands for, those of them that were rejected, whose
    `row` counts from 0 there, and whether the part ends with it."""

    read: int
    first_id: str
    last_id: str
    rejects: list[dict[str, Any]]
    last: bool

    @property
    def summary(self) -> EncodeSummary:
        return EncodeSummary(self.read, self.read - len(self.rejects), len(self.rejects))


@dataclass(frozen=True)
class _Chunk:
    """A run of rows of one part, which becomes one shard."""

    part: int
    number: int
    path: Path


@dataclass(frozen=True)
class _Row:
    """A row of a chunk."""

    chunk: _Chunk
    load: Load


@dataclass(frozen=True)
class _End:
    """Marks the end of a chunk among its rows."""

    chunk: _Chunk
    last: bool


class _Folder:
    """The shards of a folder: which there are to be, and which there are."""

    def __init__(self, path: Path, parts: Sequence[Part], shard_size: int):
        self.path = path
        self.parts = parts
        self.shard_size = shard_size

    def chunk(self, part: int, number: int) -> _Chunk:
        return _Chunk(part, number, self.path / f"part-{part:05d}-{number:05d}.parquet")

    def finish(self, manifest: dict[str, Any]) -> EncodeSummary | None:
        """Writes rejects and manifest, where every shard is there; None where one is missing."""
        total = EncodeSummary()

        def rejects() -> Iterator[dict[str, Any]]:
            nonlocal total
            for record in self._records():
                total += record.summary
                yield from ({**reject, "row": reject["row"] + 1} for reject in record.rejects)

        try:
            write_rejects(self.path, rejects())
        except _ShardMissingError:
            return None
        counts = {"read": total.read, "written": total.written, "rejected": total.rejected}
        _write_json(self.path / MANIFEST, {**manifest, "finished": True, "counts": counts})
        return replace(total, finished=True)

    def _records(self) -> Iterator[_ShardRecord]:
        """What every shard tells, in their order. Raises `_ShardMissingError` at the first that is not there."""
        for part in range(len(self.parts)):
            for number in itertools.count():
                record = read_record(self.chunk(part, number).path)
                if record is None:
                    raise _ShardMissingError
                yield record
                if record.last:
                    break


class _ShardMissingError(Exception):
    """Other processes are still at work."""


def read_record(path: Path) -> _ShardRecord | None:
    """None where there is no shard, or one that a fault of the disk has damaged."""
    try:
        return _ShardRecord(**json.loads(pq.read_schema(path).metadata[_RECORD_KEY]))
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


class _Encoder:
    """One process's work: rows are prepared by threads, encoded here, and written by another thread, all at once."""

    def __init__(
        self,
        folder: _Folder,
        tokenizer: ImageTokenizer,
        prepare_row: Callable[[Load], Prepared | Rejection],
        batch_size: int | None,
        progress: Progress,
    ):
        self._folder = folder
        self._tokenizer = tokenizer
        self._prepare_row = prepare_row
        self._batch_size = batch_size or tokenizer.pictures_at_once
        self._progress = progress
        self._done = EncodeSummary()

    def run(self, share: Share) -> EncodeSummary:
        """Makes the shards that are this process's and that are not there yet."""
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            written: Future[None] | None = None
            shard: _Shard | None = None
            ahead = 2 * self._batch_size
            for item, prepared in map_ahead(self._prepare, self._rows(share), PREPARING_THREADS, ahead):
                if shard is None:
                    shard = _Shard(self._tokenizer, self._folder, item.chunk)
                if prepared is not None:
                    shard.add(prepared)
                if shard.waiting_pictures >= self._batch_size or prepared is None:
                    shard.encode_waiting(self._batch_size)
                    self._progress(self._done + shard.summary)
                if isinstance(item, _End):
                    if written is not None:
                        written.result()  # one shard at a time waits to be written
                    written = writer.submit(shard.write, item.last)
                    self._done += shard.summary
                    shard = None
            if written is not None:
                written.result()
        return self._done

    def _prepare(self, item: _Row | _End) -> Prepared | Rejection | None:
        return self._prepare_row(item.load) if isinstance(item, _Row) else None

    def _rows(self, share: Share) -> Iterator[_Row | _End]:
        """The rows of the chunks that this process has to make, each chunk followed by its end."""
        parts = self._folder.parts
        for part, content in enumerate(parts):
            if not any(share.is_mine(part, len(parts), chunk) for chunk in range(share.processes)):
                continue
            loads = iter(content.rows())
            following = next(loads, None)
            for number in itertools.count():
                chunk = self._folder.chunk(part, number)
                mine = share.is_mine(part, len(parts), number)
                record = read_record(chunk.path) if mine else None
                first = last = following
                read = 0
                while following is not None and read < self._folder.shard_size:
                    if mine and record is None:
                        yield _Row(chunk, following)
                    last, following, read = following, next(loads, None), read + 1
                if record is not None:
                    _check_same_rows(chunk.path, record, read, first, last)
                    self._done += record.summary
                    self._progress(self._done)
                elif mine:
                    yield _End(chunk, last=following is None)
                if following is None:
                    break


def _check_same_rows(path: Path, record: _ShardRecord, read: int, first: Load | None, last: Load | None) -> None:
    ids = tuple("" if load is None else load().id for load in (first, last))
    if (read, *ids) != (record.read, record.first_id, record.last_id):
        raise ProcessError(
            f"{path}: the source now gives other rows here than when this shard was made; "
            "choose another folder, or delete this one to encode again"
        )


@dataclass
class _Shard:
    """A shard in the making: rows go in one by one, and their pictures wait for a whole batch."""

    tokenizer: ImageTokenizer
    folder: _Folder
    chunk: _Chunk
    waiting_pictures: int = 0
    _samples: list[Sample] = field(default_factory=list)
    _ids: list[str] = field(default_factory=list)
    _rejects: list[dict[str, Any]] = field(default_factory=list)
    _waiting: list[Prepared] = field(default_factory=list)

    @property
    def summary(self) -> EncodeSummary:
        """Counts of the rows that are encoded or rejected."""
        return EncodeSummary(len(self._samples) + len(self._rejects), len(self._samples), len(self._rejects))

    def add(self, prepared: Prepared | Rejection) -> None:
        if isinstance(prepared, Rejection):
            part, row = self.folder.parts[self.chunk.part].name, self.chunk.number * self.folder.shard_size
            place = {"part": part, "row": row + len(self._ids)}
            self._ids.append(prepared.id)
            self._rejects.append({**place, "id": prepared.id, "reason": prepared.reason})
            return
        self._ids.append(prepared.row.id)
        self._waiting.append(prepared)
        self.waiting_pictures += sum(isinstance(image, Pixels) for image in prepared.images)

    def encode_waiting(self, batch_size: int) -> None:
        import torch

        pixels = [image.pixels for row in self._waiting for image in row.images if isinstance(image, Pixels)]
        dtype = codes_dtype(self.tokenizer.codebook_size)
        codes: list[np.ndarray] = []
        for start in range(0, len(pixels), batch_size):
            batch = torch.stack(pixels[start : start + batch_size])  # (batch, 3, resolution, resolution)
            codes += list(self.tokenizer.encode_pixels(batch).numpy().astype(dtype))
        remaining = iter(codes)
        for prepared in self._waiting:
            row = prepared.row
            grids = tuple(
                _to_grid(next(remaining), image) if isinstance(image, Pixels) else image for image in prepared.images
            )
            self._samples.append(Sample(row.id, grids, row.caption, row.messages, row.text, row.source))
        self._waiting.clear()
        self.waiting_pictures = 0

    def write(self, last: bool) -> None:
        """Puts the shard into place; `last` says that the part ends with it."""
        ends = (self._ids[0], self._ids[-1]) if self._ids else ("", "")
        record = _ShardRecord(len(self._ids), *ends, self._rejects, last)
        metadata = {_RECORD_KEY.decode(): json.dumps(asdict(record))}
        write_atomically(self.chunk.path, shard_to_bytes(self._samples, self.tokenizer.codebook_size, metadata))


def _to_grid(codes: np.ndarray, picture: Pixels) -> CodeGrid:
    height, width = codes.shape
    return CodeGrid(codes.reshape(-1), height, width, picture.height, picture.width)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
