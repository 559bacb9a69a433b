"""Goes through folders of Parquet shards and tells what is wrong with them, sample by sample.

What training refuses at its first fault is gone through to the end here, a few hundred rows at a time: a fault
is a finding, and so is a shard that cannot be read.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from uni_x.data.encode import read_record, tokenizer_in_brackets
from uni_x.data.overlap import BenchmarkTexts
from uni_x.data.rejects import REJECTS
from uni_x.data.schema import CodeGrid, Message, Sample, check_sample
from uni_x.data.shards import MANIFEST, no_shards, read_manifest, shard_paths
from uni_x.data.stored_rows import ANY_CODEBOOK, StoredRow, read_id, read_rows
from uni_x.errors import DataError

ERRORS = {
    "unreadable": "shards that cannot be read",
    "unfinished": "encoding has not finished",
    "empty": "no samples in it",
    "manifest": f"{MANIFEST} and the shards do not agree",
    "tokenizer": "encoded with another image tokenizer",
    "schema": "samples that cannot be trained on",
    "codes": "images that do not fit the image tokenizer",
    "benchmark": "samples with a text of a benchmark",
}
"""What training refuses, or should not see."""
REMARKS = {
    "id": "samples with the id of an earlier one",
    "content": "samples with the texts and codes of an earlier one",
    "shared id": "samples with the id of one in an earlier folder",
    "shared content": "samples with the texts and codes of one in an earlier folder",
}
"""What may be as it should be."""
KINDS = ERRORS | REMARKS
_REPEATED = {"id": "id", "content": "texts and codes"}


@dataclass(frozen=True, slots=True)
class Example:
    """One fault: the shard's name, the row in it, counted from 1, and the sample's id, where it has them."""

    message: str
    shard: str | None = None
    row: int | None = None
    id: str | None = None

    def __str__(self) -> str:
        row = None if self.row is None else f"row {self.row}" + (f" ({self.id!r})" if self.id is not None else "")
        place = ", ".join(part for part in (self.shard, row) if part is not None)
        return f"{place}: {self.message}" if place else self.message


@dataclass(frozen=True)
class Finding:
    """All faults of one kind (a key of `KINDS`): how many there are, and the first of them."""

    kind: str
    count: int
    examples: tuple[Example, ...]

    @property
    def is_error(self) -> bool:
        """Otherwise it is a remark."""
        return self.kind in ERRORS


@dataclass(frozen=True)
class Codes:
    """What an image tokenizer makes of a picture: codes below `size`, `grid` of them in height and width.

    `fingerprint` is that of `tokenizer_fingerprint`.
    """

    size: int
    grid: tuple[int, int] | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class CheckReport:
    """What a folder holds and what is wrong with it, one finding a kind in the order of `KINDS`."""

    folder: Path
    shards: int
    samples: int
    images: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no error was found; remarks there may be."""
        return not any(finding.is_error for finding in self.findings)


class FolderChecks:
    """Checks of folders, one after the other, and of what is in several; 16 bytes a sample stay in memory.

    Args:
        codes: what the images are held against; None for the manifest's codebook, or any where there is none. Where
            the manifest names another image tokenizer, that alone is told, and not what follows from it.
        benchmarks: files of prompts or questions that no sample may hold (see `BenchmarkTexts`).
        limit: examples of each kind.

    Raises `DataError` where a benchmark's file cannot be read.
    """

    def __init__(self, *, codes: Codes | None = None, benchmarks: Sequence[Path] = (), limit: int = 20):
        self._codes = codes
        self._benchmarks = BenchmarkTexts(benchmarks)
        self._limit = limit
        self._checked: list[_Samples] = []

    def check(self, folder: Path) -> CheckReport:
        """Goes through every sample of a folder that `uni-x encode` wrote, or of others with the same columns.

        Raises `DataError` where there is no such folder, or no shard in it.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: {'a file, not a folder of shards' if folder.is_file() else 'no such folder'}")
        paths = shard_paths(folder)
        if not paths:
            raise no_shards(folder)
        faults = _Faults(self._limit)
        manifest = _read_manifest(folder, faults)
        before = sum(samples.count for samples in self._checked)
        samples = _Samples(faults, _expected_codes(folder, manifest, self._codes, faults), self._benchmarks, before)
        for path in paths:
            samples.go_through(path)
        samples.report_repeats()
        self._checked.append(samples)
        if not faults.has("unreadable"):
            if manifest is not None and manifest["finished"]:
                _check_counts(folder, manifest, paths, faults)
            if not samples.count:
                faults.add("empty", Example(f"{REJECTS} says why" if _has_rejects(folder) else "nothing was encoded"))
        return CheckReport(folder, len(paths), samples.count, samples.images, faults.findings())

    def shared(self) -> tuple[Finding, ...]:
        """What folders have in common with those that were checked before them; examples name shards by their paths."""
        if len(self._checked) < 2:
            return ()
        faults = _Faults(self._limit)
        starts = np.array([samples.before for samples in self._checked])
        for kind, words in _REPEATED.items():
            repeats = _Digests.joined([samples.digests[kind] for samples in self._checked]).repeats()
            # As shards without rows, folders without samples start where the next one does.
            folders = np.searchsorted(starts, repeats, side="right") - 1  # (repeats, 2)
            across = folders[:, 0] != folders[:, 1]
            pairs = zip(repeats[across].tolist(), folders[across].tolist(), strict=True)
            for (position, first), (folder, earlier) in itertools.islice(pairs, self._limit):
                path, row = self._checked[folder].place(position - int(starts[folder]))
                before, first_row = self._checked[earlier].place(first - int(starts[earlier]))
                message = f"it has the {words} of {before}, row {first_row}"
                faults.add(f"shared {kind}", Example(message, str(path), row, read_id(path, row)))
            faults.add_unnamed(f"shared {kind}", max(0, int(across.sum()) - self._limit))
        return faults.findings()


class _Faults:
    """Counts faults by kind and keeps the first of each."""

    def __init__(self, limit: int):
        self.limit = limit
        self._counts = dict.fromkeys(KINDS, 0)
        self._examples: dict[str, list[Example]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, example: Example) -> None:
        self._counts[kind] += 1
        if len(self._examples[kind]) < self.limit:
            self._examples[kind].append(example)

    def add_unnamed(self, kind: str, count: int) -> None:
        self._counts[kind] += count

    def has(self, kind: str) -> bool:
        return self._counts[kind] > 0

    def findings(self) -> tuple[Finding, ...]:
        return tuple(Finding(kind, count, tuple(self._examples[kind])) for kind, count in self._counts.items() if count)


@dataclass
class _Samples:
    """The samples of all shards of a folder, gone through one after the other."""

    faults: _Faults
    codes: Codes
    benchmarks: BenchmarkTexts
    before: int  # samples of the folders before this one
    count: int = 0
    images: int = 0
    _paths: list[Path] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    digests: dict[str, _Digests] = field(default_factory=lambda: {kind: _Digests() for kind in _REPEATED})

    def go_through(self, path: Path) -> None:
        self._paths.append(path)
        self._starts.append(self.count)
        try:
            for number, row in enumerate(read_rows(path), start=1):
                self._check(row, path.name, number)
        except DataError as error:
            before = self.count - self._starts[-1]
            self.faults.add("unreadable", Example(str(error), path.name, before + 1 if before else None))

    def report_repeats(self) -> None:
        """Reports what is there twice, once the last shard has been gone through."""
        for kind, words in _REPEATED.items():
            repeats = self.digests[kind].repeats()
            for position, first in repeats[: self.faults.limit].tolist():
                before, first_row = self.place(first)
                path, row = self.place(position)
                message = f"it has the {words} of {before.name}, row {first_row}"
                self.faults.add(kind, Example(message, path.name, row, read_id(path, row)))
            self.faults.add_unnamed(kind, max(0, len(repeats) - self.faults.limit))

    def place(self, position: int) -> tuple[Path, int]:
        """The shard of a sample, and its row there, counted from 1."""
        # An unreadable shard has no rows, so that the next one starts where it does; the last of them has the row.
        shard = bisect.bisect_right(self._starts, position) - 1
        return self._paths[shard], position - self._starts[shard] + 1

    def _check(self, row: StoredRow, shard: str, number: int) -> None:
        def report(kind: str, message: str) -> None:
            self.faults.add(kind, Example(message, shard, number, row.id))

        if fault := _fault(row):
            report("schema", fault)
        for place, image in enumerate(row.images):
            if image is not None and (misfit := _misfit(image, self.codes)):
                report("codes", f"images[{place}]: {misfit}")
        for name, text in row.texts():
            if text and (match := self.benchmarks.find(text)):
                report("benchmark", f"{name}: it {'holds' if match.inside else 'is'} the text of {match.where}")
                break
        # what has no id repeats none
        number_of_all = str(self.before + self.count).encode()
        self.digests["id"].add(number_of_all if row.id is None else b"\0" + _utf8(row.id))
        self.digests["content"].add(row.content())
        self.count += 1
        self.images += len(row.images)


class _Digests:
    """A digest of 8 bytes for each of many values, in their order."""

    def __init__(self) -> None:
        self._digests = array("Q")

    def add(self, value: bytes) -> None:
        self._digests.frombytes(hashlib.blake2b(value, digest_size=8).digest())

    @classmethod
    def joined(cls, parts: Sequence[_Digests]) -> _Digests:
        """Those of all parts, one after the other."""
        whole = cls()
        for part in parts:
            whole._digests.extend(part._digests)
        return whole

    def repeats(self) -> np.ndarray:
        """Positions of values that were there before, each with the first position of its value: (repeats, 2)."""
        digests = np.asarray(self._digests)
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        firsts = np.searchsorted(ordered, ordered[again])
        repeats = np.stack([order[again], order[firsts]], axis=1)
        return repeats[np.argsort(repeats[:, 0])]


def _misfit(image: CodeGrid, codes: Codes) -> str | None:
    """Why an image is none of an image tokenizer's; None where it may be."""
    if codes.grid is not None and (image.height, image.width) != codes.grid:
        height, width = codes.grid
        return f"{image.height} x {image.width} codes, the tokenizer makes {height} x {width}"
    highest = image.codes.max(initial=0)
    if codes.size <= highest < ANY_CODEBOOK:
        return f"code {highest} is not in a codebook of {codes.size}"
    return None


def _fault(row: StoredRow) -> str | None:
    """What makes a row unfit for training with any image tokenizer, with the field; None where nothing does."""
    if row.id is None:
        return "id: it is null"
    for number, message in enumerate(row.messages or ()):
        for name, value in zip(("role", "content"), message or (None, None), strict=True):
            if value is None:
                return f"messages[{number}].{name}: it is null"
    for number, image in enumerate(row.images):
        if image is None:
            return f"images[{number}]: it is null"
        if len(image.codes) and not 0 <= image.codes.min() <= image.codes.max() < ANY_CODEBOOK:
            return f"images[{number}].codes: a code is null, below 0 or above {ANY_CODEBOOK - 1}"
    sample = Sample(
        row.id,
        tuple(CodeGrid(image.codes.astype(np.uint32), image.height, image.width) for image in row.images if image),
        row.caption,
        None if row.messages is None else tuple(Message(*message) for message in row.messages),  # type: ignore[misc]
        row.text,
    )
    try:
        check_sample(sample, ANY_CODEBOOK)
    except DataError as error:
        return str(error).removeprefix(f"sample {row.id!r}").lstrip(",: ")
    return None


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _read_manifest(folder: Path, faults: _Faults) -> dict[str, Any] | None:
    """What `uni-x encode` noted about the folder; None where there is no note, or none that can be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_manifest(path)
    if manifest is None:
        faults.add("manifest", Example(f"{MANIFEST} is not one of `uni-x encode`"))
        return None
    if not manifest["finished"]:
        faults.add("unfinished", Example("run `uni-x encode` again, it will carry on"))
    return manifest


def _expected_codes(folder: Path, manifest: dict[str, Any] | None, wanted: Codes | None, faults: _Faults) -> Codes:
    """What images are held against: what is wanted, or what the manifest tells where it tells of something else."""
    size, fingerprint = ((manifest or {}).get(key) for key in ("codebook_size", "tokenizer"))
    stated = Codes(size if isinstance(size, int) else ANY_CODEBOOK)
    if wanted is None:
        return stated
    if None in (wanted.fingerprint, fingerprint) or wanted.fingerprint == fingerprint:
        return wanted
    faults.add(
        "tokenizer", Example(f"check against that one{tokenizer_in_brackets(folder)}, or encode again with this one")
    )
    return stated


def _has_rejects(folder: Path) -> bool:
    rejects = folder / REJECTS
    return rejects.is_file() and rejects.stat().st_size > 0


def _check_counts(folder: Path, manifest: dict[str, Any], paths: Sequence[Path], faults: _Faults) -> None:
    """Holds the counts of a finished folder against its shards, what their footers tell, and the rejects."""
    counts = manifest.get("counts")
    if not isinstance(counts, dict):
        faults.add("manifest", Example(f"{MANIFEST} has no counts"))
        return
    found = dict.fromkeys(("read", "written", "rejected"), 0)
    for path in paths:
        rows = pq.read_metadata(path).num_rows
        record = read_record(path)
        if record is None:
            faults.add("manifest", Example("`uni-x encode` has not written it, as it has the folder", path.name))
            return
        if record.summary.written != rows:
            message = f"{record.summary.written:,} samples were written, it holds {rows:,}"
            faults.add("manifest", Example(message, path.name))
        found["read"] += record.read
        found["written"] += rows
        found["rejected"] += len(record.rejects)
    for name, count in found.items():
        if counts.get(name) != count:
            faults.add("manifest", Example(f"{counts.get(name)} rows were {name} by {MANIFEST}, {count} by the shards"))
    rejects = folder / REJECTS
    lines = _count_lines(rejects) if rejects.is_file() else 0
    if lines != found["rejected"]:
        faults.add("manifest", Example(f"{found['rejected']:,} rows were rejected, {REJECTS} has {lines:,}"))


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)
