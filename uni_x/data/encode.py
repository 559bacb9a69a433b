"""Encodes the pictures of a source into codes on disk, once; interrupted at any moment, it carries on when run again.

Shard k of a folder holds what is left of the source rows `k * shard_size` to `(k + 1) * shard_size - 1` after the
rejects. Its footer tells which rows those were and which were rejected, so that moving the shard into place is the
one step that decides whether they are done. `manifest.json` says what the folder was made from and whether it is whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uni_x.data.schema import CodeGrid, Rejection, Sample, SourceRow, check_content
from uni_x.data.shards import MANIFEST, codes_dtype, shard_to_bytes
from uni_x.errors import DataError, RunError
from uni_x.pictures import open_picture
from uni_x.runs import write_atomically, writing_into

if TYPE_CHECKING:
    import torch

    from uni_x.images import ImageTokenizer

REJECTS = "rejects.jsonl"
_FORMAT = 1
_RECORD_KEY = b"uni_x.shard"


@dataclass(frozen=True)
class EncodeSummary:
    """How many source rows were read, written and rejected; `read == written + rejected`.

    `already_done` says that an earlier run had finished the folder.
    """

    read: int = 0
    written: int = 0
    rejected: int = 0
    already_done: bool = False

    def __add__(self, other: EncodeSummary) -> EncodeSummary:
        return EncodeSummary(self.read + other.read, self.written + other.written, self.rejected + other.rejected)


Progress = Callable[[EncodeSummary], None]


def encode(
    rows: Iterable[SourceRow | Rejection],
    tokenizer: ImageTokenizer,
    out_dir: str | Path,
    *,
    source: str,
    shard_size: int = 1000,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> EncodeSummary:
    """Writes rows as Parquet shards of codes into `out_dir`, with `manifest.json` and `rejects.jsonl`.

    `rows` must come in the same order in every run; `source` says in words where they come from, and changes when
    they would. `batch_size` counts pictures a call of the tokenizer. `progress` is called with the totals so far after
    each batch and each shard that was already there. On finished work it returns at once.

    Raises `RunError` where the folder was made with another tokenizer, source or shard size, where the source's rows
    have changed since, and where the disk is full.
    """
    out_dir = Path(out_dir)
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "source": source,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "codebook_size": tokenizer.codebook_size,
        "shard_size": shard_size,
    }
    finished = _open_folder(out_dir, manifest)
    if finished is not None:
        return finished
    return _encode_shards(rows, tokenizer, out_dir, manifest, batch_size, progress or (lambda summary: None))


def tokenizer_fingerprint(tokenizer: ImageTokenizer) -> str:
    """A digest of an image tokenizer's configuration and weights."""
    digest = hashlib.sha256(tokenizer.config.model_dump_json().encode())
    for name, tensor in sorted(tokenizer.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()


def read_fingerprint(folder: str | Path) -> str | None:
    """The digest of the image tokenizer that a folder was encoded with; None where it does not say."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        digest = json.loads(path.read_bytes())["tokenizer"]
    except (ValueError, KeyError, TypeError):
        return None  # reading the samples says what is wrong
    return digest if isinstance(digest, str) else None


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _open_folder(out_dir: Path, manifest: dict[str, Any]) -> EncodeSummary | None:
    """Starts the folder, or checks that it was started alike; gives the summary where it is finished."""
    path = out_dir / MANIFEST
    if not path.exists():
        if out_dir.is_dir() and any(out_dir.glob("*.parquet")):
            raise RunError(f"{out_dir}: holds Parquet files but no {MANIFEST}; choose another folder")
        with writing_into(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
        _write_json(path, {**manifest, "finished": False})
        return None
    try:
        found = json.loads(path.read_bytes())
        finished = bool(found["finished"])
        summary = EncodeSummary(**found["counts"], already_done=True) if finished else None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: not a manifest of `uni-x encode`; delete the folder or choose another") from None
    for key, value in manifest.items():
        if found.get(key) != value:
            raise RunError(
                f"{out_dir}: made with another {key.replace('_', ' ')} ({_shorten(found.get(key))}, now "
                f"{_shorten(value)}); choose another folder, or delete this one to encode again"
            )
    return summary


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


def _encode_shards(
    rows: Iterable[SourceRow | Rejection],
    tokenizer: ImageTokenizer,
    out_dir: Path,
    manifest: dict[str, Any],
    batch_size: int,
    progress: Progress,
) -> EncodeSummary:
    shard_size = manifest["shard_size"]
    total = EncodeSummary()
    rejects: list[dict[str, Any]] = []
    for number, shard_rows in enumerate(_cut(rows, shard_size)):
        path = out_dir / f"part-{number:05d}.parquet"
        record = _read_record(path)
        if record is None:
            record = _write_shard(path, shard_rows, number * shard_size, tokenizer, batch_size, total, progress)
        elif _range_of(shard_rows) != (record.read, record.first_id, record.last_id):
            raise RunError(
                f"{path}: the source now gives other rows here than when this shard was made; "
                "choose another folder, or delete this one to encode again"
            )
        total += record.summary
        rejects += record.rejects
        progress(total)
    lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    # A lone surrogate, as a file name may hold one, becomes an escape of JSON.
    write_atomically(out_dir / REJECTS, lines.encode("utf-8", "backslashreplace"))
    _write_json(out_dir / MANIFEST, {**manifest, "finished": True, "counts": _counts(total)})
    return total


def _counts(summary: EncodeSummary) -> dict[str, int]:
    return {"read": summary.read, "written": summary.written, "rejected": summary.rejected}


def _cut(rows: Iterable[SourceRow | Rejection], size: int) -> Iterator[Iterator[SourceRow | Rejection]]:
    """Cuts rows into runs of `size`; each run must be used up before the next is asked for."""
    iterator = iter(rows)
    for first in iterator:
        yield itertools.chain([first], itertools.islice(iterator, size - 1))


@dataclass(frozen=True)
class _ShardRecord:
    """What the footer of a shard tells: the source rows it stands for, and those of them that were rejected."""

    read: int
    first_id: str
    last_id: str
    rejects: list[dict[str, Any]]

    @property
    def summary(self) -> EncodeSummary:
        return EncodeSummary(self.read, self.read - len(self.rejects), len(self.rejects))


def _read_record(path: Path) -> _ShardRecord | None:
    """None where there is no shard, or one that a fault of the disk has damaged."""
    try:
        return _ShardRecord(**json.loads(pq.read_schema(path).metadata[_RECORD_KEY]))
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def _range_of(rows: Iterable[SourceRow | Rejection]) -> tuple[int, str, str]:
    ids = [row.id for row in rows]
    return len(ids), ids[0], ids[-1]


def _write_shard(
    path: Path,
    rows: Iterator[SourceRow | Rejection],
    first_row: int,
    tokenizer: ImageTokenizer,
    batch_size: int,
    before: EncodeSummary,
    progress: Progress,
) -> _ShardRecord:
    shard = _ShardInProgress(tokenizer, first_row)
    for row in rows:
        shard.add(row)
        if shard.waiting_pictures >= batch_size:
            shard.encode_waiting(batch_size)
            progress(before + shard.record().summary)
    shard.encode_waiting(batch_size)
    record = shard.record()
    metadata = {_RECORD_KEY.decode(): json.dumps(asdict(record))}
    write_atomically(path, shard_to_bytes(shard.samples, tokenizer.codebook_size, metadata))
    return record


class _ShardInProgress:
    """Rows go in one by one; their pictures are turned into pixels at once and wait for a whole batch."""

    def __init__(self, tokenizer: ImageTokenizer, first_row: int):
        self.samples: list[Sample] = []
        self.waiting_pictures = 0
        self._tokenizer = tokenizer
        self._first_row = first_row
        self._ids: list[str] = []
        self._rejects: list[dict[str, Any]] = []
        self._waiting: list[tuple[SourceRow, list[_Pixels]]] = []

    def add(self, row: SourceRow | Rejection) -> None:
        self._ids.append(row.id)
        if isinstance(row, Rejection):
            self._reject(row.id, row.reason)
            return
        try:
            check_content(row)
            pixels = _prepare(row, self._tokenizer)
        except DataError as error:
            self._reject(row.id, str(error).removeprefix(f"sample {row.id!r}, "))
            return
        self._waiting.append((row, pixels))
        self.waiting_pictures += len(pixels)

    def encode_waiting(self, batch_size: int) -> None:
        import torch

        pixels = [picture.pixels for _, pictures in self._waiting for picture in pictures]
        dtype = codes_dtype(self._tokenizer.codebook_size)
        codes: list[np.ndarray] = []
        for start in range(0, len(pixels), batch_size):
            batch = torch.stack(pixels[start : start + batch_size])  # (batch, 3, resolution, resolution)
            codes += list(self._tokenizer.encode_pixels(batch).numpy().astype(dtype))
        remaining = iter(codes)
        for row, pictures in self._waiting:
            grids = tuple(_to_grid(next(remaining), picture) for picture in pictures)
            self.samples.append(Sample(row.id, grids, row.caption, row.messages, row.text, row.source))
        self._waiting.clear()
        self.waiting_pictures = 0

    def record(self) -> _ShardRecord:
        return _ShardRecord(len(self._ids), self._ids[0], self._ids[-1], self._rejects)

    def _reject(self, row_id: str, reason: str) -> None:
        self._rejects.append({"row": self._first_row + len(self._ids) - 1, "id": row_id, "reason": reason})


@dataclass(frozen=True)
class _Pixels:
    """A picture as the tokenizer takes it, and the size that it had."""

    pixels: torch.Tensor  # (3, resolution, resolution)
    height: int
    width: int


def _prepare(row: SourceRow, tokenizer: ImageTokenizer) -> list[_Pixels]:
    prepared = []
    for number, picture in enumerate(row.images):
        try:
            image = open_picture(picture)
            prepared.append(_Pixels(tokenizer.preprocess([image])[0], image.height, image.width))
        except DataError as error:
            where = f"images[{number}]: " if len(row.images) > 1 else ""
            raise DataError(f"{where}{error}") from None
    return prepared


def _to_grid(codes: np.ndarray, picture: _Pixels) -> CodeGrid:
    height, width = codes.shape
    return CodeGrid(codes.reshape(-1), height, width, picture.height, picture.width)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
