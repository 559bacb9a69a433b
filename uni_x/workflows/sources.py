"""What `uni-x encode` and `uni-x tokenizer train` read: a folder of pictures, or a source by name."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

from uni_x import launch, scenes
from uni_x.data.encode import EncodeSummary, Share, encode
from uni_x.data.inventory import Inventory, take_inventory
from uni_x.data.prepare import Filters
from uni_x.data.readers import SourceOptions, open_source
from uni_x.data.readers.kinds import find_on_disk
from uni_x.data.readers.parts import to_unicode
from uni_x.data.ready_ids import TextOfIds
from uni_x.data.rejects import REJECTS, frequent_reasons
from uni_x.data.schema import Load, Message, Part, SourceRow
from uni_x.errors import DataError, ProcessError
from uni_x.images import ImageTokenizer
from uni_x.recipe import ScenesSection
from uni_x.runs import installed_versions, refuse_to_overwrite
from uni_x.words import count_of

SCENES, OPENMOJI = "scenes", "openmoji"

Progress = Callable[[int, int, str], None]
"""Told how many rows are done, how many there are (0 where that is not known), and a word on it."""


def encode_source(
    source: str,
    tokenizer: ImageTokenizer,
    out: Path,
    limit: int | None = None,
    progress: Progress | None = None,
    *,
    filters: Filters | None = None,
    batch_size: int | None = None,
    options: SourceOptions | None = None,
    text_tokenizer: Path | None = None,
) -> EncodeSummary:
    """Encodes a source into `out`, or this process's share of it where a launcher started several.

    Args:
        source: what `uni_x.data.readers.open_source` knows, or `openmoji`.
        tokenizer: encodes the pictures.
        out: the folder of shards.
        limit: at most so many rows, the first.
        progress: is told of this process's rows.
        filters: which pictures are rejected.
        batch_size: pictures that are encoded at once; None for as many as memory allows.
        options: what else is said of the source.
        text_tokenizer: the folder of the one that made ready `input_ids`.

    Raises:
        DataError: where the source or the text tokenizer is not there.
        RunError: where its files are not those that `out` was made of; and what else `encode` raises.
    """

    def report(summary: EncodeSummary) -> None:
        if progress is not None:
            progress(summary.read, limit or 0, f"{summary.rejected} rejected")

    options = replace(options or SourceOptions(), leave_out=out)
    name, inventory = _identity(source, options)
    parts = read_source(source, tokenizer.resolution, options)
    if limit is not None:
        name += f", the first {limit}"
        parts = [Part("first", partial(_first_rows, parts, limit))]
    return encode(
        parts,
        tokenizer,
        out,
        source=name,
        inventory=inventory,
        batch_size=batch_size,
        filters=filters,
        text_of_ids=None if text_tokenizer is None else TextOfIds(text_tokenizer),
        share=launched_share(),
        progress=report,
    )


def _identity(source: str, options: SourceOptions) -> tuple[str, Inventory | None]:
    """What tells a source from others, in words, and its files, or None where none are on this disk.

    Raises `DataError` where the folder to leave out is the source itself.
    """
    name, inventory = source, None
    found = None if source == OPENMOJI else find_on_disk(source, options.kind, options.leave_out)
    if found is not None:
        if options.leave_out is not None and _resolve(source) == _resolve(options.leave_out):
            raise DataError(f"{options.leave_out}: --out is the folder of the source itself; choose another")
        name = f"{_resolve(found.folder)}:{found.config}" if found.config else _resolve(source)
        inventory = take_inventory(found, options.leave_out)
    pictures = None if options.pictures is None else _resolve(options.pictures)
    said = {"split": options.split, "kind": options.kind, "pictures": pictures}
    name += "".join(f", {option} {value}" for option, value in said.items() if value is not None)
    return name, inventory


def _resolve(path: str | Path) -> str:
    """The same for the same file or folder, from wherever it is named."""
    return to_unicode(os.path.realpath(path))


def describe_encoded(source: str, out: Path, summary: EncodeSummary) -> str:
    """What became of the rows of a source, in a few lines. Raises `ProcessError` where none of them could be used."""
    if not summary.read:
        raise ProcessError(f"{source}: no rows in it")
    reasons = f"{frequent_reasons(out)}; all of them: {out / REJECTS}" if summary.rejected else ""
    if not summary.written:
        rows = count_of(summary.read, "row")
        raise ProcessError(f"{source}: of {rows} none can be used: {reasons}; mend them, delete {out}, run again")
    counts = _describe_counts(out, summary)
    return f"{counts}\nRejected: {reasons}" if reasons else counts


def describe_share(out: Path, summary: EncodeSummary) -> str:
    """What one of several processes has done, in a line."""
    process = f"process {launch.rank()} of {launch.processes()}"
    if summary.already_done:
        return f"{process}: {out} is finished already"
    return f"{process}: {_describe_counts(out, summary)}; not finished: the other processes have the rest"


def _describe_counts(out: Path, summary: EncodeSummary) -> str:
    return f"{summary.read} read = {summary.written} written + {summary.rejected} rejected, in {out}"


def launched_share() -> Share:
    """This process among those that torchrun or accelerate started."""
    return Share(launch.rank(), launch.processes())


def _first_rows(parts: Sequence[Part], limit: int) -> Iterator[Load]:
    return islice(chain.from_iterable(part.rows() for part in parts), limit)


def read_source(source: str, resolution: int, options: SourceOptions) -> list[Part]:
    """The parts of a source, or of `openmoji` at `resolution` pixels."""
    if source == OPENMOJI:
        return [_part(OPENMOJI, lambda: scenes.openmoji_rows(resolution))]
    return open_source(source, options)


def _part(name: str, rows: Callable[[], Iterable[scenes.SourceRow]]) -> Part:
    return Part(name, lambda: (partial(to_source_row, row, name) for row in rows()))


def encode_scenes(
    amounts: ScenesSection, seed: int, out: Path, tokenizer: ImageTokenizer, progress: Progress | None = None
) -> EncodeSummary:
    """Draws scenes and encodes them into the folders `drawing`, `looking` and `text` below `out`.

    Raises `RunError` where `out` holds other things; and what else `encode` raises.
    """
    kinds: dict[str, tuple[Callable[[], Iterator[scenes.SourceRow]], int]] = {
        "drawing": (
            lambda: scenes.drawing_rows(scenes.drawing_samples(amounts.drawings, seed)),
            amounts.drawings,
        ),
        "looking": (lambda: scenes.looking_rows(scenes.looking_samples(amounts.looking, seed)), amounts.looking),
        "text": (lambda: scenes.text_rows(scenes.sentences(amounts.texts, seed)), amounts.texts),
    }
    refuse_to_overwrite(out, own=next((kind for kind in kinds if (out / kind).exists()), "drawing"))
    total = sum(count for _, count in kinds.values())
    version = installed_versions().get("uni-x")
    done = EncodeSummary()

    def report(kind: str, before: int, summary: EncodeSummary) -> None:
        if progress is not None:
            progress(before + summary.read, total, kind)

    summaries = []
    for kind, (rows, count) in kinds.items():
        summary = encode(
            [_part(kind, rows)],
            tokenizer,
            out / kind,
            source=f"scenes of uni-x {version}, {count} of {kind} from seed {seed}",
            progress=partial(report, kind, done.read),
        )
        summaries.append(summary)
        done += summary
    return replace(
        done,
        finished=all(summary.finished for summary in summaries),
        already_done=all(summary.already_done for summary in summaries),
    )


def to_source_row(row: scenes.SourceRow, source: str) -> SourceRow:
    """A row of the scenes as the data layer takes it."""
    messages = [
        Message(role, text) for turn in row.turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return SourceRow(
        id=row.id,
        images=() if row.image is None else (row.image,),
        caption=row.caption,
        messages=tuple(messages) or None,
        text=row.text,
        source=source,
    )
