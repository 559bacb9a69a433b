"""Any picture becomes an upright square on white; bytes and pixels are the same numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from uni_x.errors import DataError
from uni_x.images.pixels import comparison, on_white, pixels_to_bytes, preprocess


def half_and_half(width, height):
    """Left half black, right half white."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[:, width // 2 :] = 255
    return Image.fromarray(picture)


def test_a_picture_of_the_right_size_keeps_its_bytes():
    bytes_ = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for picture in (bytes_, Image.fromarray(bytes_)):
        pixels = preprocess([picture], 16)
        assert pixels.shape == (1, 3, 16, 16)
        assert np.array_equal(pixels_to_bytes(pixels)[0], bytes_)


def test_the_centre_is_cut_out_of_a_wide_picture():
    pixels = preprocess([half_and_half(96, 32)], 32)[0, 0]
    assert pixels[16, 2] == -1.0
    assert pixels[16, -3] == 1.0


def test_transparency_shows_white_and_is_cut_not_rounded():
    picture = Image.new("RGBA", (8, 8), (10, 20, 30, 100))
    expected = int((1 - 100 / 255) * 255 + 100 / 255 * 10)  # 158.92 becomes 158
    assert pixels_to_bytes(preprocess([picture], 8))[0, 0, 0, 0] == expected == 158


def test_a_palette_with_a_transparent_entry_shows_white():
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([255, 0, 0] * 256)
    picture.info["transparency"] = 0
    assert (preprocess([picture], 8) == 1.0).all()


def test_a_large_picture_is_blended_as_a_small_one_is():
    layers = np.random.default_rng(0).integers(0, 256, (1200, 700, 4), dtype=np.uint8)
    layers[:500, :, 3] = 255
    alpha = layers[..., 3:] / 255.0
    expected = ((1 - alpha) * 255 + alpha * layers[..., :3]).astype(np.uint8)
    assert np.array_equal(np.asarray(on_white(Image.fromarray(layers))), expected)


MEASURE_BLENDING = """
import resource
from PIL import Image
from uni_x.images.pixels import on_white
picture = Image.new("RGBA", (4000, 4000), (10, 20, 30, 100))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
on_white(picture)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory otherwise")
def test_blending_takes_little_more_memory_than_the_picture():
    run = subprocess.run([sys.executable, "-c", MEASURE_BLENDING], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 3 * 4000 * 4000 * 4


def test_the_orientation_in_the_exif_tag_counts(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    half_and_half(16, 16).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "turned.jpg") as picture:
        pixels = preprocess([picture], 16)[0, 0]
    assert pixels[:6].max() < -0.9
    assert pixels[10:].min() > 0.9


def test_sixteen_bit_grey_keeps_its_scale():
    picture = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert pixels_to_bytes(preprocess([picture], 8))[0, 0, 0, 0] == 128


def test_no_pictures_are_no_pixels():
    assert preprocess([], 8).shape == (0, 3, 8, 8)


def test_a_broken_picture_is_named(tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    reason = r"picture 2 of 2: .*half\.png: the picture cannot be read"
    with Image.open(path) as picture, pytest.raises(DataError, match=reason):
        preprocess([half_and_half(8, 8), picture], 8)


@pytest.mark.parametrize("array", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(DataError, match="uint8 of shape"):
        preprocess([array], 8)


def test_a_thread_of_a_picture_is_refused():
    with pytest.raises(DataError, match="too narrow"):
        preprocess([Image.new("RGB", (1, 500))], 64)


def test_originals_stand_above_their_reconstructions():
    sheet = comparison(torch.ones(3, 3, 16, 16), -torch.ones(3, 3, 16, 16), columns=2)
    assert sheet.size == (2 * 20 + 4, 2 * (2 * 16 + 12))
    assert sheet.getpixel((5, 5)) == (255, 255, 255)
    assert sheet.getpixel((5, 25)) == (0, 0, 0)
