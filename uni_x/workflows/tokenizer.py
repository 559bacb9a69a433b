"""`uni-x tokenizer train`: pictures of a folder, of the scenes or of OpenMoji, to an image tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from uni_x import scenes
from uni_x.devices import choose_device
from uni_x.errors import DataError
from uni_x.images import PictureFolder, TokenizerResult, train_tokenizer
from uni_x.images.pixels import Picture
from uni_x.recipe import TokenizerRecipe
from uni_x.words import count_of
from uni_x.workflows.scenes_tokenizer import scenes_to_learn_from
from uni_x.workflows.sources import OPENMOJI, SCENES, Progress

_TOLD = 5  # pictures that cannot be read, each with the reason


def train_tokenizer_from(
    recipe: TokenizerRecipe,
    out: Path,
    progress: Progress | None = None,
    tell: Callable[[str], None] = print,
    device: str = "auto",
) -> TokenizerResult:
    """Trains on what `recipe.source` names; `tell` hears of pictures that cannot be read.

    Raises:
        DataError: where the source is not there; and what `train_tokenizer` raises.
    """

    def report(step: int, steps: int, figures: dict[str, float]) -> None:
        if progress is not None:
            progress(step, steps, f"loss {figures['loss']:.4f}")

    pictures, held_out = _pictures(recipe)
    remarks = list(_left_out(pictures)) if isinstance(pictures, PictureFolder) else []
    for remark in remarks:
        tell(remark)
    return train_tokenizer(recipe, pictures, out, held_out, report, choose_device(device), remarks)


def _pictures(recipe: TokenizerRecipe) -> tuple[Sequence[Picture], Sequence[Picture] | None]:
    """The pictures to train on, and those to measure where they are not taken from the others."""
    if recipe.source == SCENES:
        return scenes_to_learn_from(recipe)
    if recipe.source == OPENMOJI:
        named = scenes.named_pictures(recipe.tokenizer.resolution)
        return [picture.image for picture in islice(named, recipe.pictures)], None
    if not Path(recipe.source).is_dir():
        raise DataError(f"source: {recipe.source} is not a folder (or one of `{SCENES}`, `{OPENMOJI}`)")
    return PictureFolder(recipe.source, recipe.pictures), None


def _left_out(folder: PictureFolder) -> Iterator[str]:
    for path, reason in folder.unreadable[:_TOLD]:
        yield f"left out: {path} ({reason})"
    if more := folder.unreadable[_TOLD:]:
        kinds = sorted({path.suffix.lower() for path, _ in more})
        yield f"left out: {count_of(len(more), 'more picture')} that cannot be read ({', '.join(kinds)})"
