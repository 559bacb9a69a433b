import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import uni_x
from uni_x.data.encode import EncodeSummary, encode, tokenizer_fingerprint
from uni_x.data.readers import read_picture_folder
from uni_x.data.schema import Message, Rejection, SourceRow
from uni_x.data.shards import EncodedSamples
from uni_x.errors import DataError, RunError
from uni_x.images import ImageTokenizer


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def encode_folder(pictures, tokenizer, out_dir, **options):
    return encode(read_picture_folder(pictures), tokenizer, out_dir, source=str(pictures), shard_size=4, **options)


def content_of(folder):
    """All that a run leaves, but for the manifest: rows with their footers, and rejects."""
    shards = {path.name: pq.read_table(path) for path in sorted(folder.glob("*.parquet"))}
    return (
        {name: (table.to_pylist(), table.schema.metadata) for name, table in shards.items()},
        (folder / "rejects.jsonl").read_text(),
    )


def test_a_folder_becomes_shards_rejects_and_a_manifest(picture_folder, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    calls = []
    summary = encode_folder(picture_folder, image_tokenizer, out, batch_size=3, progress=calls.append)

    assert summary == EncodeSummary(read=20, written=18, rejected=2)
    assert calls[-1] == summary
    assert [call.read for call in calls] == sorted(call.read for call in calls)
    assert len(list(out.glob("part-*.parquet"))) == 5
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert rejects[0] == {"row": 6, "id": "06.png", "reason": "the caption is missing: 06.txt"}
    assert [reject["row"] for reject in rejects] == [6, 13]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["source"] == str(picture_folder)
    assert manifest["tokenizer"] == tokenizer_fingerprint(image_tokenizer)
    assert manifest["counts"] == {"read": 20, "written": 18, "rejected": 2}
    assert not list(out.glob(".*"))


def test_codes_are_those_of_the_tokenizer(picture_folder, image_tokenizer, tmp_path):
    encode_folder(picture_folder, image_tokenizer, tmp_path / "out", batch_size=3)
    for sample in EncodedSamples(tmp_path / "out", image_tokenizer.codebook_size):
        expected = image_tokenizer.encode([Image.open(picture_folder / sample.id)])
        (grid,) = sample.images
        assert grid.codes.tolist() == expected.flatten().tolist()
        assert (grid.height, grid.width, grid.pixel_height, grid.pixel_width) == (2, 2, 16, 20)


def test_rows_of_every_kind_keep_their_order(image_tokenizer, tmp_path):
    question = (Message("user", "<image><image>Alike?"), Message("assistant", "No."))
    rows = [
        SourceRow("a", (picture(0), picture(1)), messages=question, source="s"),
        SourceRow("b", (), text="Hearts are red."),
        Rejection("c", "the reader said so"),
        SourceRow("d", (picture(2),), caption="a heart"),
        SourceRow("e", (picture(3), b"nonsense"), messages=question),
        SourceRow("f", (picture(3),), messages=question),
        SourceRow("g", (picture(4),), caption=""),
    ]
    summary = encode(rows, image_tokenizer, tmp_path, source="rows", batch_size=2)
    assert summary == EncodeSummary(read=7, written=3, rejected=4)
    samples = EncodedSamples(tmp_path, image_tokenizer.codebook_size)
    assert [(sample.id, len(sample.images)) for sample in samples] == [("a", 2), ("b", 0), ("d", 1)]
    assert samples[0].messages == question
    assert [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [
        {"row": 2, "id": "c", "reason": "the reader said so"},
        {"row": 4, "id": "e", "reason": "images[1]: the file is no picture that Pillow can read"},
        {"row": 5, "id": "f", "reason": "messages: 2 <image> for 1 images"},
        {"row": 6, "id": "g", "reason": "caption: it is empty"},
    ]


def test_a_source_of_rejects_alone_is_finished_too(image_tokenizer, tmp_path):
    rows = [SourceRow("a", (b"",), caption="x"), Rejection("b", "no")]
    assert encode(rows, image_tokenizer, tmp_path, source="rows") == EncodeSummary(2, 0, 2)
    assert len(EncodedSamples(tmp_path, image_tokenizer.codebook_size)) == 0


SLOW_ENCODE = """
import sys, time
from uni_x.data.encode import encode
from uni_x.data.readers import read_picture_folder
from uni_x.images import ImageTokenizer

pictures, tokenizer, out = sys.argv[1:]
tokenizer = ImageTokenizer.from_pretrained(tokenizer)
pause = lambda summary: time.sleep(0.05)
encode(read_picture_folder(pictures), tokenizer, out, source=pictures, shard_size=4, batch_size=1, progress=pause)
"""


def test_a_killed_run_carries_on_row_for_row(picture_folder, image_tokenizer, tmp_path):
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_ENCODE, picture_folder, tmp_path / "tokenizer", out],
        cwd=Path(uni_x.__file__).parents[1],
    )
    third = out / "part-00002.parquet"
    deadline = time.monotonic() + 60
    while not third.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match="out: encoding has not finished"):
        EncodedSamples(out, image_tokenizer.codebook_size)
    assert not json.loads((out / "manifest.json").read_text())["finished"]
    assert not (out / "part-00004.parquet").exists()
    written_before = third.stat().st_mtime_ns

    summary = encode_folder(picture_folder, ImageTokenizer.from_pretrained(tmp_path / "tokenizer"), out)

    assert summary == EncodeSummary(read=20, written=18, rejected=2)
    assert third.stat().st_mtime_ns == written_before
    encode_folder(picture_folder, image_tokenizer, tmp_path / "uninterrupted")
    assert content_of(out) == content_of(tmp_path / "uninterrupted")


def test_finished_work_is_not_read_again(picture_folder, image_tokenizer, tmp_path):
    first = encode_folder(picture_folder, image_tokenizer, tmp_path / "out")

    def untouchable():
        raise AssertionError("the source was read")
        yield

    again = encode(untouchable(), image_tokenizer, tmp_path / "out", source=str(picture_folder), shard_size=4)
    assert again == replace(first, already_done=True)


def test_a_damaged_shard_is_made_again(picture_folder, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    encode_folder(picture_folder, image_tokenizer, out)
    before = content_of(out)
    shard = out / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    unfinish(out)
    encode_folder(picture_folder, image_tokenizer, out)
    assert content_of(out) == before


def unfinish(out):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))


def test_another_tokenizer_source_or_shard_size_is_refused(picture_folder, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    encode_folder(picture_folder, image_tokenizer, out)
    torch.manual_seed(1)
    other = ImageTokenizer(image_tokenizer.config)
    with pytest.raises(RunError, match=r"out: made with another tokenizer .* choose another folder, or delete"):
        encode_folder(picture_folder, other, out)
    with pytest.raises(RunError, match="made with another source"):
        encode([], image_tokenizer, out, source="elsewhere", shard_size=4)
    with pytest.raises(RunError, match="made with another shard size"):
        encode([], image_tokenizer, out, source=str(picture_folder), shard_size=5)


def test_a_source_that_changed_in_between_is_refused(picture_folder, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    encode_folder(picture_folder, image_tokenizer, out)
    unfinish(out)
    (picture_folder / "00.png").unlink()
    with pytest.raises(RunError, match=r"part-00000\.parquet: the source now gives other rows"):
        encode_folder(picture_folder, image_tokenizer, out)


def test_folders_of_others_are_left_alone(image_tokenizer, tmp_path):
    (tmp_path / "mine.parquet").write_bytes(b"")
    with pytest.raises(RunError, match=r"holds Parquet files but no manifest\.json"):
        encode([], image_tokenizer, tmp_path, source="rows")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(RunError, match=r"manifest\.json: not a manifest"):
        encode([], image_tokenizer, tmp_path, source="rows")
    with pytest.raises(RunError, match=r"mine\.parquet: cannot be written"):
        encode([], image_tokenizer, tmp_path / "mine.parquet", source="rows")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_is_told(image_tokenizer, tmp_path):
    rows = [SourceRow("a", (picture(0),), caption="a heart")]
    (tmp_path / ".part-00000.parquet.partial").symlink_to("/dev/full")
    with pytest.raises(RunError, match=f"{tmp_path}: the disk is full"):
        encode(rows, image_tokenizer, tmp_path, source="rows")
    assert encode(rows, image_tokenizer, tmp_path, source="rows") == EncodeSummary(1, 1, 0)
