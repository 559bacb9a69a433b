"""What `uni-x encode` and `uni-x tokenizer train` read: a folder of pictures, or a source by name."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from uni_x import scenes
from uni_x.data.encode import EncodeSummary, encode
from uni_x.data.readers import read_picture_folder
from uni_x.data.schema import Message, Rejection, SourceRow
from uni_x.errors import DataError
from uni_x.images import ImageTokenizer
from uni_x.recipe import ScenesSection
from uni_x.runs import installed_versions

SCENES, OPENMOJI = "scenes", "openmoji"

Progress = Callable[[int, int, str], None]
"""Told how many rows are done, how many there are (0 where that is not known), and a word on it."""


def encode_source(
    source: str, tokenizer: ImageTokenizer, out: Path, limit: int | None = None, progress: Progress | None = None
) -> EncodeSummary:
    """Encodes at most `limit` rows of a folder of pictures with captions, or of `openmoji`, into `out`.

    Raises:
        DataError: where the source is not there; and what `encode` raises.
    """

    def report(summary: EncodeSummary) -> None:
        if progress is not None:
            progress(summary.read, limit or 0, f"{summary.rejected} rejected")

    name = source if source == OPENMOJI else str(Path(source))
    if limit is not None:
        name += f", the first {limit}"
    return encode(
        islice(read_source(source, tokenizer.resolution), limit), tokenizer, out, source=name, progress=report
    )


def read_source(source: str, resolution: int) -> Iterable[SourceRow | Rejection]:
    """Rows of a folder of pictures with captions, or of `openmoji` at `resolution` pixels."""
    if source == OPENMOJI:
        return (to_source_row(row, OPENMOJI) for row in scenes.openmoji_rows(resolution))
    if not Path(source).is_dir():
        raise DataError(f"{source}: no such folder (a source is a folder of pictures, `{SCENES}` or `{OPENMOJI}`)")
    return read_picture_folder(source)


def encode_scenes(
    amounts: ScenesSection, seed: int, out: Path, tokenizer: ImageTokenizer, progress: Progress | None = None
) -> EncodeSummary:
    """Draws scenes and encodes them into the folders `drawing`, `looking` and `text` below `out`."""
    kinds: dict[str, tuple[Iterator[scenes.SourceRow], int]] = {
        "drawing": (scenes.drawing_rows(scenes.drawing_samples(amounts.drawings, seed)), amounts.drawings),
        "looking": (scenes.looking_rows(scenes.looking_samples(amounts.looking, seed)), amounts.looking),
        "text": (scenes.text_rows(scenes.sentences(amounts.texts, seed)), amounts.texts),
    }
    total = sum(count for _, count in kinds.values())
    version = installed_versions().get("uni-x")
    done = EncodeSummary()

    def report(kind: str, before: int, summary: EncodeSummary) -> None:
        if progress is not None:
            progress(before + summary.read, total, kind)

    for kind, (rows, count) in kinds.items():
        done += encode(
            (to_source_row(row, kind) for row in rows),
            tokenizer,
            out / kind,
            source=f"scenes of uni-x {version}, {count} of {kind} from seed {seed}",
            progress=partial(report, kind, done.read),
        )
    return done


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
