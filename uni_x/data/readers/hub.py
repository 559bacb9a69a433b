"""Datasets of Hugging Face's library: folders that it saved, and repositories on the hub or on disk."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from uni_x.data.readers.fields import load_fields
from uni_x.data.readers.parquet import known_fields
from uni_x.data.readers.parts import Resolve, SourceOptions, reject_rest, to_unicode
from uni_x.data.schema import Load, Part
from uni_x.errors import DataError, one_line

_ROWS_A_PART = 10_000
_REASON_LIMIT = 300  # characters: the library tells long stories
_DEFAULT_SPLIT = "train"


def saved_dataset(folder: Path, options: SourceOptions, source: str) -> list[Part]:
    """A folder that `save_to_disk` wrote, with splits or without."""
    datasets = _library(f"{folder}: a saved dataset")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library lets all that its many readers raise through
        raise DataError(f"{folder}: not a saved dataset that can be read ({_reason(error)})") from None
    split = options.split or _DEFAULT_SPLIT
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{folder}: no split {split!r} in it; it has {', '.join(dataset)}")
        dataset = dataset[split]
    elif options.split not in (None, str(dataset.split)):
        raise DataError(f"{folder}: a data set without splits; leave --split {options.split} out")
    if options.streaming:
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset.cache_files), len(dataset))))
    return _parts(dataset, split, source, _cached_file)


def hub_dataset(name: str, options: SourceOptions) -> list[Part]:
    """A dataset of the hub by its id, with its configuration behind a colon: `owner/name:config`."""
    repository, _, config = name.partition(":")
    missing = f"{name}: no such file or folder"
    dataset = _load(
        repository, config, options, f"{missing}, and a dataset of the hub", f"{missing}, nor a dataset of the hub"
    )
    return _parts(dataset, options.split or _DEFAULT_SPLIT, repository, _cached_file)


def local_repository(folder: Path, config: str, options: SourceOptions, source: str, resolve: Resolve) -> list[Part]:
    """A folder that holds what a repository of the hub does, as a clone of it.

    It is streamed, whatever `options` say: the library's cache knows a folder by its base name, and no change in it.
    """
    options = replace(options, streaming=True)
    # The library would take a name without a folder for one of its own, such as "json".
    dataset = _load(os.path.abspath(folder), config, options, f"{folder}: this dataset", f"{folder}: no dataset")
    return _parts(dataset, options.split or _DEFAULT_SPLIT, source, resolve)


def _load(repository: str, config: str, options: SourceOptions, needing: str, refusal: str) -> Any:
    datasets = _library(needing)
    split = options.split or _DEFAULT_SPLIT
    try:
        return datasets.load_dataset(repository, config or None, split=split, streaming=options.streaming)
    except Exception as error:  # as above
        raise DataError(f"{refusal} with a split {split!r} that can be read ({_reason(error)})") from None


def _library(needing: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f'{needing} needs the library datasets: pip install "uni-x[data]"') from None
    return datasets


def _parts(dataset: Any, split: str, source: str, resolve: Resolve) -> list[Part]:
    # In Arrow's form a stored picture comes as it is, bytes or a path; of a stream it would have been decoded before.
    if hasattr(dataset, "__len__"):
        stored, count = dataset.with_format("arrow"), len(dataset)
        ranges = [range(start, min(start + _ROWS_A_PART, count)) for start in range(0, count, _ROWS_A_PART)]
        return [
            Part(f"{split}-{index:05d}", partial(_stored_rows, stored, rows, split, source, resolve))
            for index, rows in enumerate(ranges)
        ]
    dataset = (dataset.decode(False) if dataset.features else dataset).with_format("arrow")
    shards = dataset.num_shards
    names = [f"{split}-{index:05d}" for index in range(shards)]
    return [
        Part(name, partial(_streamed_rows, dataset.shard(num_shards=shards, index=index), name, source, resolve))
        for index, name in enumerate(names)
    ]


def _stored_rows(dataset: Any, rows: range, split: str, source: str, resolve: Resolve) -> Iterator[Load]:
    for number in rows:
        yield partial(load_fields, partial(_stored_fields, dataset, number), f"{split}:{number + 1}", source, resolve)


def _stored_fields(dataset: Any, number: int) -> Mapping[str, Any]:
    try:
        row = dataset[number]
    except Exception as error:  # as above
        raise DataError(f"it cannot be read ({_reason(error)})") from None
    return _to_fields(row)


def _streamed_rows(dataset: Any, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    return reject_rest(part, _stream(dataset, part, source, resolve))


def _stream(dataset: Any, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    rows = enumerate(dataset, start=1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise DataError(f"it cannot be read ({_reason(error)})") from None
        yield partial(load_fields, partial(_to_fields, row), f"{part}:{number}", source, resolve)


def _to_fields(table: Any) -> Mapping[str, Any]:
    return {name: _with_bytes(value) for name, value in known_fields(table).items()}


def _with_bytes(value: Any) -> Any:
    """Reads pictures that a streamed row only names, as files of the hub."""
    if isinstance(value, list):
        return [_with_bytes(element) for element in value]
    if isinstance(value, dict) and value.get("bytes") is None and _is_on_hub(value.get("path")):
        import fsspec

        try:
            with fsspec.open(value["path"], "rb") as stream:
                return {"bytes": stream.read(), "path": None}
        except Exception as error:  # as above
            raise DataError(f"a picture cannot be fetched ({_reason(error)})") from None
    return value


def _is_on_hub(path: object) -> bool:
    return isinstance(path, str) and path.rpartition("::")[2].startswith("hf://datasets/")


def _cached_file(path: str) -> Path:
    """A file that the library fetched; a row may name no other on this machine."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    file = Path(path)
    if ".." in file.parts or not any(file.is_relative_to(cache) for cache in caches):
        raise DataError(f"the picture is not in the dataset, only the name of a file: {to_unicode(path[:200])}")
    return file


def _reason(error: Exception) -> str:
    return to_unicode(one_line(error, _REASON_LIMIT))
