"""`uni-x generate`: a model folder and a prompt, to files or words."""

import logging
from pathlib import Path

from PIL import Image

from uni_x.data.schema import check_text
from uni_x.devices import choose_device
from uni_x.errors import DataError, one_line
from uni_x.generation.pipeline import UniXPipeline
from uni_x.generation.sampling import Sampling
from uni_x.pictures import open_picture
from uni_x.runs import writing_into

logger = logging.getLogger(__name__)


def draw(
    model: Path,
    prompt: str,
    out: Path,
    number: int = 1,
    seed: int = 0,
    temperature: float | None = None,
    guidance_scale: float | None = None,
    device: str = "auto",
) -> list[Path]:
    """Draws a prompt `number` times into files, the first with `seed`, and returns them.

    The folder of the files is made where it is not there. Raises `UniXError` for a prompt without words, and for files
    that cannot be written; names and folder are checked beforehand.
    """
    check_text(prompt, "the prompt")
    _check_name(out)
    pipeline = UniXPipeline.from_pretrained(model, choose_device(device))
    with writing_into(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    default = pipeline.image_sampling
    sampling = Sampling(
        temperature=default.temperature if temperature is None else temperature,
        top_k=default.top_k,
        top_p=default.top_p,
        guidance_scale=default.guidance_scale if guidance_scale is None else guidance_scale,
    )
    files = []
    for index, picture in enumerate(pipeline.draw([prompt] * number, sampling, seed)):
        file = out if number == 1 else out.with_stem(f"{out.stem}-{index + 1}")
        try:
            with writing_into(out.parent):
                picture.save(file)
        except (OSError, ValueError) as error:  # Pillow's own
            raise DataError(f"{file}: cannot be written ({one_line(error)})") from None
        files.append(file)
    return files


def _check_name(out: Path) -> None:
    formats = Image.registered_extensions()
    if formats.get(out.suffix.lower()) not in Image.SAVE:
        raise DataError(f"{out}: its name must end as that of a picture does, as in drawing.png")


def answer(
    model: Path,
    question: str,
    image: Path,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Answers a question about a picture. Raises `UniXError` for a question without words."""
    check_text(question, "the prompt")
    picture = _open(image)
    pipeline = UniXPipeline.from_pretrained(model, choose_device(device))
    grids = [tuple(pipeline.encode([picture]))]
    return _said(pipeline.ask([question], grids, max_new_tokens, _text_sampling(temperature, seed))[0])


def describe(model: Path, image: Path, max_new_tokens: int = 64, device: str = "auto") -> str:
    """A caption for a picture."""
    picture = _open(image)
    pipeline = UniXPipeline.from_pretrained(model, choose_device(device))
    return _said(pipeline.describe(pipeline.encode([picture]), max_new_tokens)[0])


def continue_text(
    model: Path,
    text: str,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Goes on with a text. Raises `UniXError` for one without words."""
    check_text(text, "the prompt")
    pipeline = UniXPipeline.from_pretrained(model, choose_device(device))
    return _said(pipeline.continue_text([text], max_new_tokens, _text_sampling(temperature, seed))[0], text)


def _said(words: str, prompt: str = "") -> str:
    """The words of a model, with a warning where it added none to the prompt that they begin with."""
    if not words.removeprefix(prompt).strip():
        logger.warning("the model ended its answer at once")
    return words


def _open(image: Path) -> Image.Image:
    if not image.is_file():
        raise DataError(f"{image}: no such picture")
    try:
        return open_picture(image)
    except DataError as error:
        raise DataError(f"{image}: {error}") from None


def _text_sampling(temperature: float | None, seed: int) -> Sampling:
    return Sampling(temperature=temperature or 0.0, seed=seed)
