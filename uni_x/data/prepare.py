"""From source rows to pixels: what `uni-x encode` does with a row before the image tokenizer sees it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from uni_x.data.ready_ids import TextOfIds, with_text
from uni_x.data.schema import CodeGrid, Load, Rejection, Sample, SourceRow, check_content, check_sample
from uni_x.errors import DataError
from uni_x.pictures import Picture, open_picture

if TYPE_CHECKING:
    import torch

    from uni_x.images import ImageTokenizer

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Filters:
    """Which pictures are of no use.

    Attributes:
        max_aspect: longer side over shorter side, at the most; 0 takes any.
        min_side: of the shorter side, in pixels.
    """

    max_aspect: float = 2.5
    min_side: int = 0

    def check(self, width: int, height: int) -> None:
        """Raises `DataError` with the reason for a picture that is too long or too small."""
        short, long = sorted((width, height))
        if short < self.min_side:
            raise DataError(f"the picture is too small: {width} x {height} pixels, min_side is {self.min_side}")
        if self.max_aspect and long > self.max_aspect * short:
            raise DataError(f"the picture is too long: {width} x {height} pixels, max_aspect is {self.max_aspect:g}")


@dataclass(frozen=True)
class Pixels:
    """A picture as the tokenizer takes it, and the size that it had."""

    pixels: torch.Tensor  # (3, resolution, resolution)
    height: int
    width: int


@dataclass(frozen=True)
class Prepared:
    """A row whose pictures are ready to be encoded, or have been."""

    row: SourceRow
    images: list[Pixels | CodeGrid]


def prepare(
    load: Load, tokenizer: ImageTokenizer, filters: Filters, text_of_ids: TextOfIds | None = None
) -> Prepared | Rejection:
    """Reads a row, checks its content, and decodes its pictures to the tokenizer's resolution, and its ready ids."""
    row = load()
    if isinstance(row, Rejection):
        return row
    try:
        row = with_text(row, text_of_ids)
        check_content(row)
        return Prepared(row, [_prepare_image(row, number, tokenizer, filters) for number in range(len(row.images))])
    except DataError as error:
        return Rejection(row.id, str(error).removeprefix(f"sample {row.id!r}, "))


def _prepare_image(row: SourceRow, number: int, tokenizer: ImageTokenizer, filters: Filters) -> Pixels | CodeGrid:
    image = row.images[number]
    if isinstance(image, CodeGrid):
        if (image.height, image.width) != tuple(tokenizer.grid):
            height, width = tokenizer.grid
            raise DataError(
                f"images[{number}]: {image.height} x {image.width} codes, this image tokenizer's pictures have "
                f"{height} x {width}"
            )
        check_sample(Sample(row.id, (image,), caption="-"), tokenizer.codebook_size)
        return image
    try:
        return _to_pixels(image, tokenizer, filters)
    except DataError as error:
        where = f"images[{number}]: " if len(row.images) > 1 else ""
        raise DataError(f"{where}{error}") from None


def _to_pixels(picture: Picture, tokenizer: ImageTokenizer, filters: Filters) -> Pixels:
    image = open_picture(picture)
    filters.check(image.width, image.height)
    return Pixels(tokenizer.preprocess([image])[0], image.height, image.width)


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in their order; threads work on the next `ahead` items meanwhile."""
    iterator = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            waiting.extend((item, pool.submit(function, item)) for item in itertools.islice(iterator, ahead))
            while waiting:
                item, future = waiting.popleft()
                result = future.result()
                waiting.extend(
                    (following, pool.submit(function, following)) for following in itertools.islice(iterator, 1)
                )
                yield item, result
        finally:
            for _, future in waiting:
                future.cancel()
