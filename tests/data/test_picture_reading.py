import io
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.features
import pytest
from PIL import Image

from uni_x.errors import DataError
from uni_x.pictures import FORMATS, open_picture


def to_bytes(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


GREY_16_BIT = Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16))
FRAMES = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (to_bytes(Image.new("CMYK", (6, 4)), "JPEG"), "CMYK"),
        (to_bytes(GREY_16_BIT), "I;16"),
        (to_bytes(Image.new("P", (6, 4)), transparency=0), "P"),
        (to_bytes(Image.new("LA", (6, 4))), "LA"),
        (to_bytes(Image.new("1", (6, 4)), "BMP"), "1"),
        (to_bytes(Image.new("RGBA", (6, 4)), "WEBP"), "RGBA"),
        (to_bytes(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "P"),
    ],
)
def test_unusual_pictures_are_read_and_encoded(content, mode, image_tokenizer):
    image = open_picture(content)
    assert (image.mode, image.size) == (mode, (6, 4))
    assert image_tokenizer.encode([image]).shape == (1, 2, 2)


def test_animations_give_their_first_frame():
    content = to_bytes(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])
    assert open_picture(content).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_pictures_are_turned_upright_once(format):
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by a half
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste("black", (0, 0, 16, 8))
    content = to_bytes(picture, format, exif=exif)
    for opened in map(open_picture, (content, open_picture(content), Image.open(io.BytesIO(content)))):
        assert opened.convert("L").getpixel((8, 2)) > 200
        assert opened.convert("L").getpixel((8, 14)) < 50


def test_every_format_that_is_promised_is_read():
    features = {"AVIF": "avif", "WEBP": "webp"}
    for name in FORMATS:
        if name not in features or PIL.features.check(features[name]):
            assert open_picture(to_bytes(Image.new("RGB", (6, 4)), name)).size == (6, 4)
    assert open_picture(to_bytes(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])).size == (6, 4)


def test_the_content_tells_the_format(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(to_bytes(Image.new("RGB", (6, 4)), "PNG"))
    assert open_picture(path).size == (6, 4)


def truncated():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = to_bytes(Image.fromarray(noise), "JPEG")
    return content[: len(content) // 2]


def corrupt():
    content = bytearray(to_bytes(Image.new("RGB", (64, 64), "red")))
    content[45:60] = bytes(15)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (truncated(), "cannot be read .*truncated"),
        (corrupt(), "cannot be read"),
        (b"<html>not found</html>", "no picture of a format that is read"),
        (b"", "the picture is empty"),
        (to_bytes(Image.new("RGB", (6, 4)), "EPS"), r"no picture of a format that is read \(JPEG, PNG, .*\)"),
        (to_bytes(Image.new("F", (6, 4)), "TIFF"), "floating-point pixels"),
    ],
)
def test_bad_pictures_are_refused_with_a_reason(content, reason):
    with pytest.raises(DataError, match=reason):
        open_picture(content)


@pytest.mark.parametrize("side", [101, 200])  # Pillow itself only warns up to twice its limit
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(side, monkeypatch):
    content = to_bytes(Image.new("1", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(DataError, match="more than 10,000 pixels"):
        open_picture(content)


@pytest.fixture
def _hasty_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hasty_threads")
def test_threads_refuse_every_decompression_bomb(monkeypatch):
    large, small = (to_bytes(Image.new("1", (side, side))) for side in (110, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)

    def is_refused(content):
        try:
            open_picture(content)
        except DataError:
            return True
        return False

    with ThreadPoolExecutor(4) as pool:
        for _ in range(2000):
            with warnings.catch_warnings(action="ignore"):
                assert list(pool.map(is_refused, [small, large] * 4)) == [False, True] * 4


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        open_picture(tmp_path / "gone.png")
