"""What `uni-x encode` and `uni-x tokenizer train` read: a folder of pictures, or a source by name."""

from collections.abc import Callable, Iterable
from pathlib import Path

from uni_x import scenes
from uni_x.data.encode import EncodeSummary, encode
from uni_x.data.readers import read_picture_folder
from uni_x.data.schema import Rejection, SourceRow
from uni_x.errors import DataError
from uni_x.train.run import load_image_tokenizer

OPENMOJI = "openmoji"


def encode_source(
    source: str, image_tokenizer: str, out: Path, progress: Callable[[str, int, int, str], None] | None = None
) -> EncodeSummary:
    """Encodes a source into `out`. Raises `DataError` where it is not there, and what `encode` raises."""
    tokenizer = load_image_tokenizer(image_tokenizer)
    rows = read_source(source, tokenizer.resolution)

    def report(summary: EncodeSummary) -> None:
        if progress is not None:
            progress("encode", summary.read, 0, f"{summary.rejected} rejected")

    return encode(rows, tokenizer, out, source=source, progress=report)


def read_source(source: str, resolution: int) -> Iterable[SourceRow | Rejection]:
    """Rows of a folder of pictures with captions, or of `openmoji` at `resolution` pixels."""
    if source == OPENMOJI:
        return (
            SourceRow(row.id, (row.image,), caption=row.caption, source=OPENMOJI)
            for row in scenes.openmoji_rows(resolution)
            if row.image is not None
        )
    if not Path(source).is_dir():
        raise DataError(f"{source}: no such folder (a source is a folder of pictures, or `{OPENMOJI}`)")
    return read_picture_folder(source)
