"""The rows of Parquet shards as they are stored, with whatever is wrong in them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from uni_x.data.arrow import whole_parquet
from uni_x.data.schema import CodeGrid
from uni_x.data.shards import parquet_schema
from uni_x.errors import DataError

ANY_CODEBOOK = 2**32
"""A codebook that has every code which a shard can hold."""

Turn: TypeAlias = "tuple[str | None, str | None] | None"
"""Role and content of a message as they are stored; None is null."""

_ROWS_AT_ONCE = 256
_COLUMNS = ("id", "images", "caption", "messages", "text")


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row as it is stored; None is null, and a code of -1 too."""

    id: str | None
    images: tuple[CodeGrid | None, ...]  # codes are int64
    caption: str | None
    messages: tuple[Turn, ...] | None
    text: str | None

    def texts(self) -> Iterator[tuple[str, str | None]]:
        """Every text with the name of its field."""
        yield "caption", self.caption
        yield "text", self.text
        for number, message in enumerate(self.messages or ()):
            if message is not None:
                yield f"messages[{number}].content", message[1]

    def content(self) -> bytes:
        """The same for the same texts and codes."""
        texts = json.dumps([self.caption, self.messages, self.text])
        parts = [texts.encode()]
        for image in self.images:
            parts += (b"",) if image is None else (f"{image.height} {image.width}".encode(), image.codes.tobytes())
        return b"\0".join(parts)


def read_rows(path: Path) -> Iterator[StoredRow]:
    """The rows of a shard, a few hundred in memory. Raises `DataError` with the reason where one cannot be read."""
    with whole_parquet(), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for name in ("id", "images"):
            if name not in names:
                raise DataError(f"the column {name!r} is missing; it has {', '.join(names)}")
        columns = [name for name in _COLUMNS if name in names]
        for group in range(file.num_row_groups):  # a batch over two would be lost to a fault in the second
            for batch in file.iter_batches(_ROWS_AT_ONCE, [group], columns):
                yield from _rows_of(batch)


def read_id(path: Path, row: int) -> str | None:
    """The id of a row, counted from 1, that has been read before."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["id"]):
            if row <= len(batch):
                return _texts(_column(batch.slice(row - 1, 1), "id"))[0]
            row -= len(batch)
    return None


def _rows_of(batch: pa.RecordBatch) -> Iterator[StoredRow]:
    ids, captions, texts = (_texts(_column(batch, name)) for name in ("id", "caption", "text"))
    images, messages = _images(_column(batch, "images")), _messages(_column(batch, "messages"))
    return map(StoredRow, ids, images, captions, messages, texts)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column in the type that training wants, but codes as int64, so that each is judged on its own."""
    type_ = parquet_schema(ANY_CODEBOOK).field(name).type
    if name == "images":
        fields = [pa.field(f.name, pa.list_(pa.int64())) if f.name == "codes" else f for f in type_.value_type]
        type_ = pa.list_(pa.struct(fields))
    if name not in batch.schema.names:
        return pa.nulls(len(batch), type_)
    try:
        return batch.column(name).cast(type_)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"the column {name!r} cannot be read as {type_} ({error})") from None


def _texts(column: pa.StringArray) -> list[str | None]:
    """Bytes that are not UTF-8 become lone surrogates, which no text may hold."""
    values = column.cast(pa.binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


def _images(column: pa.ListArray) -> Iterator[tuple[CodeGrid | None, ...]]:
    fields, spans = _flatten(column)
    codes, code_spans = _flatten(fields.field("codes"))
    values = codes.fill_null(-1).to_numpy()
    there = pc.and_(fields.is_valid(), fields.field("codes").is_valid()).to_pylist()
    heights, widths = (fields.field(name).fill_null(0).to_pylist() for name in ("height", "width"))
    grids = [
        CodeGrid(values[start:end], height, width) if given else None
        for given, (start, end), height, width in zip(there, code_spans, heights, widths, strict=True)
    ]
    return (tuple(grids[start:end]) for start, end in spans)


def _messages(column: pa.ListArray) -> Iterator[tuple[Turn, ...] | None]:
    fields, spans = _flatten(column)
    roles, contents = _texts(fields.field("role")), _texts(fields.field("content"))
    turns = [
        turn if given else None
        for given, turn in zip(fields.is_valid().to_pylist(), zip(roles, contents, strict=True), strict=True)
    ]
    for given, (start, end) in zip(column.is_valid().to_pylist(), spans, strict=True):
        yield tuple(turns[start:end]) if given else None


def _flatten(column: pa.ListArray) -> tuple[pa.Array, list[tuple[int, int]]]:
    """The values of a list array, which may be a slice of a longer one, and where each list begins and ends in them."""
    offsets = column.offsets.to_pylist()
    first = offsets[0]
    spans = [(start - first, end - first) for start, end in itertools.pairwise(offsets)]
    return column.values.slice(first, offsets[-1] - first), spans
