import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import uni_x
from uni_x.data.schema import CodeGrid, Message, Sample, check_sample
from uni_x.data.shards import iterate_samples, parquet_schema, shard_to_bytes
from uni_x.errors import DataError

IMAGE = CodeGrid(np.array([0, 1, 2, 63], dtype=np.uint16), height=2, width=2)
QUESTION = (Message("user", "<image>What is it?"), Message("assistant", "A heart."))


def with_codes(codes, height=2, width=2):
    return Sample("x", (CodeGrid(codes, height, width),), caption="a heart")


@pytest.mark.parametrize(
    "sample",
    [
        Sample("x", (IMAGE,), caption="a heart"),
        Sample("x", (IMAGE,), messages=QUESTION),
        Sample("x", (IMAGE, IMAGE), messages=(Message("user", "Compare."), Message("assistant", "Alike."))),
        Sample("x", (IMAGE,), messages=(Message("user", "Draw a heart."), Message("assistant", "<image>"))),
        Sample("x", (), text="Hearts are red."),
        Sample("x", (IMAGE,), text="A heart <image> is red."),
    ],
)
def test_whole_samples_pass(sample):
    check_sample(sample, codebook_size=64)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("x"), "exactly one of caption, messages and text must be given, found none"),
        (Sample("x", (IMAGE,), caption="a", text="b"), "found caption and text"),
        (Sample("x", (), caption="a heart"), "'x', images: a caption goes with exactly one image, found 0"),
        (Sample("x", (IMAGE,), caption="<image>"), "'x', caption: a caption holds no <image>"),
        (Sample("x", (IMAGE,), caption=" \n"), "'x', caption: it is empty"),
        (Sample("x", (IMAGE,), caption="\ud800"), "'x', caption: it is not valid Unicode"),
        (Sample("x", (IMAGE, IMAGE), messages=QUESTION), "'x', messages: 1 <image> for 2 images"),
        (Sample("x", (), messages=QUESTION), "'x', messages: 1 <image> for 0 images"),
        (Sample("x", (IMAGE,), messages=QUESTION[:1]), "must end with the assistant's turn"),
        (Sample("x", (), messages=()), "must end with the assistant's turn"),
        (Sample("x", (), messages=(Message("human", "a"), QUESTION[1])), "messages\\[0\\].role: 'human' is none of"),
        (Sample("x", (), messages=(Message("user", ""), QUESTION[1])), "messages\\[0\\].content: it is empty"),
        (Sample("x", (IMAGE,), text="no place for it"), "'x', text: 0 <image> for 1 image"),
        (with_codes(np.array([0, 1, 64, 3], dtype=np.uint16)), "codes: code 64 is not in a codebook of 64"),
        (with_codes(np.array([0, 1], dtype=np.uint16)), "codes: 2 codes do not fill a grid of 2 x 2"),
        (with_codes(np.array([0, 1, 2, 3])), "uint16 or uint32 is needed, not int64"),
        (with_codes(np.zeros((2, 2), dtype=np.uint16)), "uint16 of shape \\(2, 2\\)"),
    ],
)
def test_faults_name_the_sample_and_the_field(sample, message):
    with pytest.raises(DataError, match=message):
        check_sample(sample, codebook_size=64)


@pytest.mark.parametrize(("codebook_size", "dtype"), [(64, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_shards_give_samples_back(tmp_path, codebook_size, dtype):
    image = CodeGrid(np.array([0, 1, 2, 63, 5, 6], dtype=dtype), 2, 3, pixel_height=32, pixel_width=48)
    written = [
        Sample("a", (image,), caption="a heart", source="s"),
        Sample("b", (IMAGE, image), messages=(Message("user", "<image><image>?"), Message("assistant", "é🙂"))),
        Sample("c", (), text="Hearts are red."),
    ]
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(shard_to_bytes(written, codebook_size))

    read = list(iterate_samples(tmp_path, codebook_size))

    assert pq.read_schema(path).equals(parquet_schema(codebook_size))
    assert [(sample.id, sample.caption, sample.messages, sample.text, sample.source) for sample in read[:]] == [
        (sample.id, sample.caption, sample.messages, sample.text, sample.source) for sample in written
    ]
    grid = read[0].images[0]
    assert grid.codes.dtype == dtype
    assert grid.codes.tolist() == [0, 1, 2, 63, 5, 6]
    assert (grid.height, grid.width, grid.pixel_height, grid.pixel_width) == (2, 3, 32, 48)
    assert [len(image.codes) for image in read[1].images] == [4, 6]
    assert read[1].images[0].pixel_height is None
    assert read[-1].images == ()


def test_samples_of_many_shards_are_numbered_through(encoded_folder, samples):
    read = list(iterate_samples(encoded_folder(samples), 64))
    assert [sample.id for sample in read] == [sample.id for sample in samples]


def test_shards_of_other_writers_are_read(tmp_path):
    pandas_like = {"id": ["a"], "images": [[{"codes": [1, 2], "height": 1, "width": 2}]], "caption": ["a heart"]}
    pq.write_table(pa.table(pandas_like), tmp_path / "own.parquet")
    grid = next(iterate_samples(tmp_path / "own.parquet", 64)).images[0]
    assert (grid.codes.tolist(), grid.height, grid.width, grid.pixel_height) == ([1, 2], 1, 2, None)


def test_damaged_and_foreign_shards_are_refused(tmp_path):
    content = shard_to_bytes([Sample("first", (IMAGE,), caption="a"), Sample("second", (IMAGE,), caption="b")], 64)
    half = tmp_path / "half.parquet"
    half.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"half\.parquet: not a whole Parquet file"):
        list(iterate_samples(half, 64))

    whole = tmp_path / "whole.parquet"
    whole.write_bytes(content)
    with pytest.raises(
        DataError, match=r"whole\.parquet: sample 'first', images\.codes: code 63 is not in a codebook of 60"
    ):
        list(iterate_samples(whole, 60))

    wrong_grid = Sample("third", (CodeGrid(IMAGE.codes, 2, 3),), caption="c")
    whole.write_bytes(shard_to_bytes([Sample("first", (IMAGE,), caption="a"), wrong_grid], 64))
    with pytest.raises(DataError, match=r"sample 'third', images\.codes: 4 codes do not fill a grid of 2 x 3"):
        list(iterate_samples(whole, 64))

    pq.write_table(pq.read_table(whole).drop_columns("images"), whole)
    with pytest.raises(DataError, match="the column 'images' is missing"):
        list(iterate_samples(whole, 64))

    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet shards"):
        list(iterate_samples(tmp_path / "empty", 64))
    with pytest.raises(DataError, match="no such file"):
        list(iterate_samples(tmp_path / "nowhere", 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": pa.array([None], pa.string())}, "id has 1 empty values"),
        ({"images": [[{"codes": [1, None, 2, 3], "height": 2, "width": 2}]]}, "images.codes has 1 empty values"),
        ({"messages": [[{"role": None, "content": "x"}]]}, "messages.role has 1 empty values"),
        ({"messages": [[{"role": "user", "content": None}]]}, "messages.content has 1 empty values"),
        ({"text": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())}, "'text' cannot be read as string"),
    ],
)
def test_gaps_in_foreign_shards_are_named(tmp_path, change, message):
    columns = {"id": ["a"], "images": [[{"codes": [0, 1, 2, 3], "height": 2, "width": 2}]]} | change
    pq.write_table(pa.table(columns), tmp_path / "one.parquet")
    with pytest.raises(DataError, match=message):
        list(iterate_samples(tmp_path, 64))


def test_the_modules_import_neither_torch_nor_transformers():
    modules = ", ".join(
        f"uni_x.data.{name}"
        for name in ("schema", "readers", "encode", "shards", "render", "packing", "text_tokenizer")
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(uni_x.__file__).parents[1]).returncode == 0
