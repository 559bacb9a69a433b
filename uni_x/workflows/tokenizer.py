"""`uni-x tokenizer train`: pictures of a folder, of the scenes or of OpenMoji, to an image tokenizer."""

from collections.abc import Callable
from pathlib import Path

from uni_x import scenes
from uni_x.errors import DataError
from uni_x.images import PictureFolder, TokenizerResult, train_tokenizer
from uni_x.recipe import TokenizerRecipe
from uni_x.workflows.scenes_tokenizer import train_scenes_tokenizer
from uni_x.workflows.sources import OPENMOJI


def train_tokenizer_from(
    recipe: TokenizerRecipe, out: Path, progress: Callable[[str, int, int, str], None] | None = None
) -> TokenizerResult:
    """Trains on what `recipe.source` names. Raises `DataError` where that is not there."""

    def report(step: int, steps: int, figures: dict[str, float]) -> None:
        if progress is not None:
            progress("tokenizer", step, steps, f"loss {figures['loss']:.4f}")

    if recipe.source == "scenes":
        return train_scenes_tokenizer(recipe, out, report)
    if recipe.source == OPENMOJI:
        pictures = [picture.image for picture in scenes.named_pictures(recipe.tokenizer.resolution)]
        return train_tokenizer(recipe, pictures, out, progress=report)
    if not Path(recipe.source).is_dir():
        raise DataError(f"source: {recipe.source} is not a folder (or one of `scenes`, `{OPENMOJI}`)")
    return train_tokenizer(recipe, PictureFolder(recipe.source), out, progress=report)
