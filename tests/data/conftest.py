from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uni_x.data.render import Renderer, RenderOptions, Vocabulary
from uni_x.data.schema import CodeGrid, Message, Sample
from uni_x.data.shards import shard_to_bytes
from uni_x.data.text_tokenizer import VISION_END, VISION_START, train_text_tokenizer
from uni_x.images import ImageTokenizer
from uni_x.recipe import PatchNetwork, TokenizerConfig

CODEBOOK_SIZE = 64
TEXTS = [
    "a red heart left of a blue car",
    "two yellow stars",
    "Is there a heart? Yes, there is one.",
    "What colour is the car? It is blue.",
] * 5


@pytest.fixture(scope="session")
def image_tokenizer():
    torch.manual_seed(0)
    network = PatchNetwork(patch_size=8, embed_dim=4, encoder_sizes=(8,), decoder_sizes=(8,))
    return ImageTokenizer(TokenizerConfig(resolution=16, codebook_size=CODEBOOK_SIZE, network=network))


@pytest.fixture(scope="session")
def text_tokenizer():
    return train_text_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture(scope="session")
def vocabulary(text_tokenizer):
    return Vocabulary(
        image_token_offset=len(text_tokenizer),
        image_codebook_size=CODEBOOK_SIZE,
        vision_start_token_id=text_tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=text_tokenizer.convert_tokens_to_ids(VISION_END),
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def make_renderer(text_tokenizer, vocabulary):
    def make(**options):
        return Renderer(text_tokenizer, vocabulary, RenderOptions(**options))

    return make


@pytest.fixture(scope="session")
def make_image():
    def make(first_code=0):
        codes = np.arange(first_code, first_code + 4, dtype=np.uint16)
        return CodeGrid(codes, height=2, width=2, pixel_height=16, pixel_width=16)

    return make


@pytest.fixture
def picture_folder(tmp_path):
    """Twenty captioned pictures, two of them in a subfolder, and every seventh caption missing."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(20):
        path = folder / ("more" if number >= 18 else "") / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(path)
        if number % 7 != 6:
            path.with_suffix(".txt").write_text(f"picture number {number}\n", encoding="utf-8")
    return folder


@pytest.fixture
def encoded_folder(tmp_path, make_image):
    """Writes samples as a folder of shards of ten."""

    def write(samples, name="encoded"):
        folder = Path(tmp_path, name)
        folder.mkdir()
        for start in range(0, len(samples), 10):
            content = shard_to_bytes(samples[start : start + 10], CODEBOOK_SIZE)
            (folder / f"part-{start // 10:05d}.parquet").write_bytes(content)
        return folder

    return write


@pytest.fixture
def samples(make_image):
    """Captions and conversations in turn, from the sources `drawn` and `asked`."""
    made = []
    for number in range(25):
        image = make_image(number)
        made.append(Sample(f"caption-{number}", (image,), caption=f"a red heart {number}", source="drawn"))
        messages = (Message("user", f"<image>Is there a heart {number}?"), Message("assistant", "Yes"))
        made.append(Sample(f"question-{number}", (image,), messages=messages, source="asked"))
    return made
