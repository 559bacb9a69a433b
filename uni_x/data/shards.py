"""The encoded form on disk: folders of Parquet shards, written whole or not at all.

A shard has the columns `id`, `images` (a list of `codes`, `height`, `width`, `pixel_height`, `pixel_width`),
`caption`, `messages` (a list of `role`, `content`), `text` and `source`. Codes are uint16, or uint32 for codebooks
of more than 65,536 codes.
"""

import bisect
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uni_x.data.arrow import whole_parquet
from uni_x.data.schema import CodeGrid, Message, Sample, is_unicode
from uni_x.errors import DataError

MANIFEST = "manifest.json"
_SHUFFLED_TOGETHER = 2**15  # samples
_END_BYTES = 2**16  # what Arrow reads of a file to find its footer
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_OPTIONAL_COLUMNS = {"caption": pa.string(), "messages": _MESSAGES, "text": pa.string(), "source": pa.string()}


def codes_dtype(codebook_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrower of uint16 and uint32 that holds every code."""
    return np.uint16 if codebook_size <= 2**16 else np.uint32


def parquet_schema(codebook_size: int) -> pa.Schema:
    """The columns of a shard whose codes come from a codebook of `codebook_size`."""
    code = pa.from_numpy_dtype(np.dtype(codes_dtype(codebook_size)))
    return pa.schema([("id", pa.string()), ("images", _images_type(code)), *_OPTIONAL_COLUMNS.items()])


def shard_to_bytes(samples: Iterable[Sample], codebook_size: int, metadata: dict[str, str] | None = None) -> bytes:
    """Samples as the content of a Parquet file, with `metadata` in its footer."""
    schema = parquet_schema(codebook_size).with_metadata(metadata or {})
    table = pa.Table.from_pylist([_to_record(sample) for sample in samples], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def shard_paths(folder: Path) -> list[Path]:
    """The Parquet files of a folder, in the order of their names; see `check_name`."""
    check_name(folder)
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def check_name(path: Path) -> None:
    """Raises `DataError` for a file or folder whose name is not UTF-8, as Arrow opens none."""
    if not is_unicode(str(path)):
        raise DataError(f"{str(path)!a}: the name is not valid UTF-8; give it another one")


def no_shards(folder: Path) -> DataError:
    """The error for a folder without shards; it names the folders in it that have some."""
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and shard_paths(path))
    if inside:
        return DataError(f"{folder}: no Parquet shards in it, but in its folders; name each ({', '.join(inside)})")
    return DataError(f"{folder}: no Parquet shards in it; `uni-x encode` makes them from pictures")


def iterate_samples(path: str | Path, codebook_size: int) -> Iterator[Sample]:
    """The samples of a folder of Parquet shards, or of one shard, of which one at a time is in memory.

    Raises `DataError` that names the file, and the sample where one is at fault. A folder whose manifest says that
    encoding has not finished is refused.
    """
    for file in _finished_shards(Path(path)):
        shard = _Shard(file, codebook_size)
        yield from (shard.sample(row) for row in range(len(shard)))


class ShuffledShards:
    """An endless sequence of the samples of a folder: pass after pass, each in an order of its own.

    Shards are shuffled, and the samples of as many shards as hold some ten thousand together; no more than these are
    in memory.

    Args:
        path: a folder of Parquet shards, or one shard.
        codebook_size: codes are below it.
        seed: decides on the orders.
        fraction: how much of the folder is used, the same samples in every pass and with every seed.
    """

    def __init__(self, path: str | Path, codebook_size: int, seed: tuple[int, ...], fraction: float = 1.0):
        self._paths = _finished_shards(Path(path))
        self._codebook_size = codebook_size
        self._seed = seed
        counts = np.array([_count_rows(shard) for shard in self._paths], dtype=np.int64)
        self._kept = np.diff(np.floor(np.cumsum(counts) * fraction + 0.5).astype(np.int64), prepend=0)
        self._counts = counts
        self._length = int(self._kept.sum())
        if not self._length:
            raise DataError(f"{path}: no samples in it")
        self._pass = -1
        self._groups: list[np.ndarray] = []
        self._group_ends: list[int] = []
        self._group = -1
        self._order = np.empty((0, 2), dtype=np.int64)  # (samples of the group, shard and row)
        self._loaded: dict[int, _Shard] = {}

    def __len__(self) -> int:
        """Samples of one pass."""
        return self._length

    @property
    def inventory(self) -> list[tuple[str, int, str, int]]:
        """Name, bytes, a digest of the end and used samples of each shard; other data most likely has another one."""
        return [
            (path.name, path.stat().st_size, _digest_of_end(path), kept)
            for path, kept in zip(self._paths, self._kept.tolist(), strict=True)
        ]

    def sample(self, position: int) -> Sample:
        """The sample at a place of the sequence. Raises `DataError` for a shard that cannot be read."""
        number, index = divmod(position, self._length)
        if number != self._pass:
            self._turn_to_pass(number)
        group = bisect.bisect_right(self._group_ends, index)
        if group != self._group:
            self._turn_to_group(group)
        shard, row = self._order[index - (self._group_ends[group - 1] if group else 0)].tolist()
        return self._loaded[shard].sample(row)

    def _turn_to_pass(self, number: int) -> None:
        order = np.random.default_rng((*self._seed, number)).permutation(len(self._paths))
        ends = np.cumsum(self._kept[order])
        groups = (ends - 1) // _SHUFFLED_TOGETHER
        cuts = np.flatnonzero(np.diff(groups)) + 1
        self._groups = np.split(order, cuts)
        self._group_ends = ends[[*(cuts - 1), -1]].tolist()
        self._pass, self._group = number, -1

    def _turn_to_group(self, group: int) -> None:
        shards = self._groups[group].tolist()
        self._loaded = {
            shard: self._loaded.get(shard) or _Shard(self._paths[shard], self._codebook_size) for shard in shards
        }
        places = np.concatenate([[(shard, row) for row in self._rows(shard)] for shard in shards if self._kept[shard]])
        self._order = np.random.default_rng((*self._seed, self._pass, group)).permutation(places)
        self._group = group

    def _rows(self, shard: int) -> list[int]:
        count, kept = int(self._counts[shard]), int(self._kept[shard])
        if kept == count:
            return list(range(count))
        return np.random.default_rng(shard).permutation(count)[:kept].tolist()


class _Shard:
    """The columns of one Parquet file, nested lists taken apart into flat arrays and offsets."""

    def __init__(self, path: Path, codebook_size: int):
        with whole_parquet(path):
            table = pq.read_table(path, partitioning=None)
        self._ids = _column(path, table, "id", pa.string())
        images = _column(path, table, "images", _images_type(_stored_code_type(table)))
        self._image_offsets = images.offsets.to_numpy()
        fields = images.values
        codes = fields.field("codes")
        self._code_offsets = codes.offsets.to_numpy()
        self._codes = codes.values.to_numpy(zero_copy_only=False)
        self._sizes = np.stack(
            [fields.field(name).fill_null(0).to_numpy() for name in ("height", "width", "pixel_height", "pixel_width")],
            axis=1,
        )  # (images, 4)
        self._caption, messages, self._text, self._source = (
            _column(path, table, name, type_) for name, type_ in _OPTIONAL_COLUMNS.items()
        )
        self._has_messages = messages.is_valid().to_numpy(zero_copy_only=False)
        self._message_offsets = messages.offsets.to_numpy()
        self._roles = messages.values.field("role").dictionary_encode()
        self._role_names = self._roles.dictionary.to_pylist()
        self._role_indices = self._roles.indices.to_numpy(zero_copy_only=False)
        self._contents = messages.values.field("content")
        for name, values in (
            ("id", self._ids),
            ("images.codes", codes.values),
            ("messages.role", self._roles),
            ("messages.content", self._contents),
        ):
            if values.null_count:
                raise DataError(f"{path}: {name} has {values.null_count} empty values; `uni-x data check` lists them")
        self._check_codes(path, codebook_size)

    def __len__(self) -> int:
        return len(self._ids)

    def sample(self, row: int) -> Sample:
        return Sample(
            id=self._ids[row].as_py(),
            images=tuple(self._grid(image) for image in range(self._image_offsets[row], self._image_offsets[row + 1])),
            caption=self._caption[row].as_py(),
            messages=self._messages(row) if self._has_messages[row] else None,
            text=self._text[row].as_py(),
            source=self._source[row].as_py() or "",
        )

    def _grid(self, image: int) -> CodeGrid:
        height, width, pixel_height, pixel_width = self._sizes[image].tolist()
        codes = self._codes[self._code_offsets[image] : self._code_offsets[image + 1]]
        return CodeGrid(codes, height, width, pixel_height or None, pixel_width or None)

    def _messages(self, row: int) -> tuple[Message, ...]:
        start, end = self._message_offsets[row], self._message_offsets[row + 1]
        contents = self._contents[start:end].to_pylist()
        roles = [self._role_names[index] for index in self._role_indices[start:end].tolist()]
        return tuple(map(Message, roles, contents))

    def _check_codes(self, path: Path, codebook_size: int) -> None:
        lengths = np.diff(self._code_offsets)
        wrong = np.flatnonzero((lengths != self._sizes[:, 0] * self._sizes[:, 1]) | (lengths == 0))
        if len(wrong):
            height, width = self._sizes[wrong[0], :2]
            raise DataError(
                f"{path}: sample {self._id_of_image(wrong[0])!r}, images.codes: {lengths[wrong[0]]} codes "
                f"do not fill a grid of {height} x {width}"
            )
        if len(self._codes) and self._codes.max() >= codebook_size:
            first = np.flatnonzero(self._codes >= codebook_size)[0]
            image = np.searchsorted(self._code_offsets, first, side="right") - 1
            raise DataError(
                f"{path}: sample {self._id_of_image(image)!r}, images.codes: code {self._codes[first]} is not in "
                f"a codebook of {codebook_size}; encode with this model's image tokenizer"
            )

    def _id_of_image(self, image: int) -> str:
        return self._ids[int(np.searchsorted(self._image_offsets, image, side="right")) - 1].as_py()


def _finished_shards(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    _check_finished(path / MANIFEST)
    check_name(path)
    paths = shard_paths(path) if path.is_dir() else [path]
    if not paths:
        raise no_shards(path)
    return paths


def _count_rows(path: Path) -> int:
    with whole_parquet(path):
        return pq.read_metadata(path).num_rows


def _digest_of_end(path: Path) -> str:
    """Of the footer, with the sizes and ranges of all columns, and of the texts in front of it as far as they reach."""
    with path.open("rb") as stream:
        stream.seek(-min(_END_BYTES, path.stat().st_size), os.SEEK_END)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What `uni-x encode` noted about a folder, `finished` at the least; None where there is no such note."""
    try:
        content = json.loads(path.read_bytes())
        content["finished"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return content


def _check_finished(manifest: Path) -> None:
    if not manifest.is_file():
        return
    content = read_manifest(manifest)
    if content is None:
        raise DataError(f"{manifest}: not a manifest of `uni-x encode`; encode into another folder")
    if not content["finished"]:
        raise DataError(f"{manifest.parent}: encoding has not finished; run `uni-x encode` again, it will carry on")


def _images_type(code: pa.DataType) -> pa.DataType:
    sizes = [(name, pa.int32()) for name in ("height", "width", "pixel_height", "pixel_width")]
    return pa.list_(pa.struct([("codes", pa.list_(code)), *sizes]))


def _stored_code_type(table: pa.Table) -> pa.DataType:
    """uint16 where the file has it, else uint32, into which other integers are cast."""
    with contextlib.suppress(KeyError, AttributeError):  # columns of another shape are refused by the cast
        if table.schema.field("images").type.value_type.field("codes").type.value_type == pa.uint16():
            return pa.uint16()
    return pa.uint32()


def _column(path: Path, table: pa.Table, name: str, type_: pa.DataType) -> pa.Array:
    if name not in table.column_names:
        if name in _OPTIONAL_COLUMNS:
            return pa.nulls(len(table), type_)
        raise DataError(f"{path}: the column {name!r} is missing; it has {', '.join(table.column_names)}")
    try:
        column = table.column(name).cast(type_).combine_chunks()
        column.validate(full=True)  # bytes that are no text
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: the column {name!r} cannot be read as {type_} ({error})") from None
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _to_record(sample: Sample) -> dict[str, object]:
    return {
        "id": sample.id,
        "images": [
            {
                "codes": grid.codes,
                "height": grid.height,
                "width": grid.width,
                "pixel_height": grid.pixel_height,
                "pixel_width": grid.pixel_width,
            }
            for grid in sample.images
        ],
        "caption": sample.caption,
        "messages": None
        if sample.messages is None
        else [{"role": message.role, "content": message.content} for message in sample.messages],
        "text": sample.text,
        "source": sample.source,
    }
