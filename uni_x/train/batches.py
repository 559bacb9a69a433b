"""What a recipe trains on: its renderer, its batches, and those held out."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import TrainingArguments

from uni_x.data.collate import Collator
from uni_x.data.dataset import Batch, Source, TrainingStream, held_out_batches, start_positions
from uni_x.data.encode import read_fingerprint, tokenizer_fingerprint, tokenizer_in_brackets
from uni_x.data.render import Renderer, Vocabulary
from uni_x.errors import DataError
from uni_x.images import ImageTokenizer
from uni_x.model_folder import ModelFolder
from uni_x.recipe import TrainRecipe
from uni_x.train.checkpoints import Standing

logger = logging.getLogger(__name__)


def make_renderer(recipe: TrainRecipe, start: ModelFolder) -> Renderer:
    """What makes sequences of samples."""
    return Renderer(
        start.text_tokenizer, Vocabulary.from_config(start.model.config), recipe.data.render, recipe.data.stage
    )


def make_stream(
    recipe: TrainRecipe, arguments: TrainingArguments, renderer: Renderer, standing: Standing | None = None
) -> TrainingStream:
    """This process's batches, from where a checkpoint has left them.

    Raises:
        DataError: for sources that cannot be read, are empty, or have no sample that fits.
    """
    data = recipe.data
    former = None if standing is None else standing.positions
    positions = start_positions(arguments.world_size, arguments.dataloader_num_workers, former)
    return TrainingStream(
        [Source(source.path, source.weight, source.fraction) for source in data.sources],
        renderer,
        _collator(renderer),
        data.max_length,
        arguments.per_device_train_batch_size,
        recipe.seed,
        packing=data.packing != "none",
        split_long_texts=data.long_texts == "split",
        position=positions[arguments.process_index],
    )


def names_of_folders(paths: Sequence[str]) -> list[str]:
    """Names for the log that tell folders apart: the ends of their paths, as short as can be."""
    parts = [Path(path).resolve().parts for path in paths]
    names = []
    for number, own in enumerate(parts):
        others = [other for index, other in enumerate(parts) if index != number and other != own]
        length = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        again = parts[:number].count(own)  # a folder may be mixed in twice
        names.append("/".join(own[-length:]) + (f"#{again + 1}" if again else ""))
    return names


def make_held_out(recipe: TrainRecipe, renderer: Renderer, batch_size: int) -> list[Batch]:
    """The batches of the recipe's validation; none where it has no such section."""
    section = recipe.validation
    if section is None:
        return []
    return held_out_batches(
        section.sources,
        renderer,
        _collator(renderer),
        recipe.data.max_length,
        batch_size,
        section.samples,
        packing=recipe.data.packing != "none",
    )


def tell_what_is_not_held_out(recipe: TrainRecipe) -> None:
    """Warns of folders that are both trained on and validated on; samples are not compared."""
    trained_on = {Path(source.path).resolve() for source in recipe.data.sources}
    for folder in recipe.held_out_folders:
        if Path(folder).resolve() in trained_on:
            logger.warning("validation.sources: %s is trained on too; losses on it are not of held-out data", folder)


def tell_what_is_left_out(stream: TrainingStream) -> None:
    """Warns of samples that are longer than a row."""
    forecast = stream.forecast
    if forecast.dropped or forecast.split:
        logger.warning(
            "of the first %d sequences %d are longer than max_length (%d) and left out, and %d are cut into several",
            forecast.documents + forecast.dropped,
            forecast.dropped,
            forecast.max_length,
            forecast.split,
        )


def check_codes_are_of(tokenizer: ImageTokenizer, folders: Iterable[str | Path]) -> None:
    """Raises `DataError` for a folder with codes of another image tokenizer, which look like any others."""
    ours, name = tokenizer_fingerprint(tokenizer), tokenizer.name_or_path
    for folder in folders:
        theirs = read_fingerprint(folder)
        if theirs is not None and theirs != ours:
            raise DataError(
                f"{folder}: was encoded with another image tokenizer{tokenizer_in_brackets(folder)} than {name}; "
                f"encode it with this one (uni-x encode --image-tokenizer {name}), or name that one, or a model of it, "
                "in place of this one"
            )


def _collator(renderer: Renderer) -> Collator:
    vocabulary = renderer.vocabulary
    return Collator(vocabulary.image_token_offset + vocabulary.image_codebook_size, vocabulary.pad_token_id)
