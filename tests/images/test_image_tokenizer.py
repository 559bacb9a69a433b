"""The contract of `ImageTokenizer`, on the patch network."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from uni_x.errors import ConfigError, DataError
from uni_x.images import ImageTokenizer
from uni_x.images import tokenizer as tokenizer_module
from uni_x.recipe import PatchNetwork, TokenizerConfig

CONFIG = TokenizerConfig(
    resolution=32,
    codebook_size=20,
    network=PatchNetwork(patch_size=8, embed_dim=6, encoder_sizes=(16,), decoder_sizes=(16,)),
)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return ImageTokenizer(CONFIG)


@pytest.fixture
def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(7)]


def test_pictures_become_a_grid_of_codes_and_codes_pictures(tokenizer, pictures):
    codes = tokenizer.encode(pictures)
    assert codes.dtype == torch.int64
    assert codes.shape == (7, *tokenizer.grid) == (7, 4, 4)
    decoded = tokenizer.decode(codes)
    assert [(picture.size, picture.mode) for picture in decoded] == [((32, 32), "RGB")] * 7


def test_the_size_of_the_batches_inside_changes_nothing(tokenizer, pictures, monkeypatch):
    codes, pixels = tokenizer.encode(pictures), tokenizer.decode_pixels(tokenizer.encode(pictures))
    monkeypatch.setattr(tokenizer_module, "FLOATS_AT_ONCE", 2 * tokenizer.network.floats_per_picture)
    assert torch.equal(tokenizer.encode(pictures), codes)
    torch.testing.assert_close(tokenizer.decode_pixels(codes), pixels)


def test_a_patch_has_the_same_code_wherever_it_stands(tokenizer):
    random = np.random.default_rng(1)
    patch = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = np.tile(patch, (4, 4, 1))
    assert len(tokenizer.encode([picture]).unique()) == 1


def test_no_pictures_are_no_codes(tokenizer):
    assert tokenizer.encode([]).shape == (0, 4, 4)
    assert tokenizer.decode(torch.empty(0, 4, 4, dtype=torch.int64)) == []


def test_a_saved_tokenizer_is_the_same(tokenizer, pictures, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    again = ImageTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == tokenizer.config
    assert torch.equal(again.codebook, tokenizer.codebook)
    assert torch.equal(again.encode(pictures), tokenizer.encode(pictures))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_weights_stored_in_half_precision_are_read_as_float32(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path, torch.float16)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.codebook.dtype == torch.float32
    torch.testing.assert_close(again.codebook, tokenizer.codebook, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 4, 4), 20), "codes are 0 to 19, these reach from 20 to 20"),
        (torch.full((1, 4, 4), -1), "codes are 0 to 19"),
        (torch.zeros(4, 4, dtype=torch.int64), r"codes have the shape \(n, 4, 4\)"),
        (torch.zeros(1, 2, 8, dtype=torch.int64), r"codes have the shape \(n, 4, 4\)"),
        (torch.zeros(1, 4, 4), "codes are integers"),
    ],
)
def test_codes_that_are_none_are_refused(tokenizer, codes, message):
    with pytest.raises(DataError, match=message):
        tokenizer.decode(codes)


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 32, 32), torch.zeros(1, 3, 16, 32), torch.zeros(1, 3, 32, 32).byte()]
)
def test_pixels_of_another_shape_are_refused(tokenizer, pixels):
    with pytest.raises(DataError, match=r"pixels are floats of shape \(n, 3, 32, 32\)"):
        tokenizer.encode_pixels(pixels)


def test_a_folder_without_a_tokenizer_says_what_is_needed(tmp_path):
    with pytest.raises(DataError, match=r"no image tokenizer here; needed is config\.json or vqgan\.yaml"):
        ImageTokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        ImageTokenizer.from_pretrained(tmp_path / "nowhere")


def test_half_a_weights_file_is_one_error(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors: not a whole safetensors file"):
        ImageTokenizer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: missing"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codebook_size": 21}, DataError, r"quantize\.embedding\.weight has the shape \(20, 6\)"),
        ({"resolution": 33}, ConfigError, "must be a multiple of the 8 pixels"),
        ({"codebok_size": 20}, ConfigError, "nearest known key is 'codebook_size'"),
        ({"model_type": "llama"}, ConfigError, "model_type is 'llama'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tokenizer, tmp_path, change, error, message):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        ImageTokenizer.from_pretrained(tmp_path)


def test_a_configuration_that_is_no_json_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        ImageTokenizer.from_pretrained(tmp_path)
