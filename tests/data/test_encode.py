import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import uni_x
from uni_x.data.encode import EncodeSummary, Share, encode, tokenizer_fingerprint
from uni_x.data.prepare import Filters
from uni_x.data.readers import open_source
from uni_x.data.schema import CodeGrid, Message, Part, Rejection, SourceRow
from uni_x.data.shards import iterate_samples
from uni_x.errors import DataError, RunError
from uni_x.images import ImageTokenizer
from uni_x.pictures import FORMATS


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def part_of(rows, name="rows"):
    return Part(name, lambda: (partial(lambda row: row, row) for row in rows))


def encode_folder(pictures, tokenizer, out_dir, **options):
    return encode(open_source(str(pictures)), tokenizer, out_dir, source=str(pictures), shard_size=4, **options)


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

    assert summary == EncodeSummary(read=20, written=18, rejected=2, finished=True)
    assert replace(calls[-1], finished=True) == summary
    assert [call.read for call in calls] == sorted(call.read for call in calls)
    assert len(list(out.glob("part-*.parquet"))) == 5
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert rejects[0] == {"part": "pictures", "row": 7, "id": "06.png", "reason": "the caption is missing: 06.txt"}
    assert [reject["row"] for reject in rejects] == [7, 14]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["source"] == str(picture_folder)
    assert manifest["tokenizer"] == tokenizer_fingerprint(image_tokenizer)
    assert manifest["image_tokenizer"] is None  # made in memory
    assert manifest["counts"] == {"read": 20, "written": 18, "rejected": 2}
    assert not list(out.glob(".*"))


def test_codes_are_those_of_the_tokenizer(picture_folder, image_tokenizer, tmp_path):
    encode_folder(picture_folder, image_tokenizer, tmp_path / "out", batch_size=3)
    for sample in iterate_samples(tmp_path / "out", image_tokenizer.codebook_size):
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
    summary = encode([part_of(rows)], image_tokenizer, tmp_path, source="rows", batch_size=2)
    assert summary == EncodeSummary(read=7, written=3, rejected=4, finished=True)
    samples = list(iterate_samples(tmp_path, image_tokenizer.codebook_size))
    assert [(sample.id, len(sample.images)) for sample in samples] == [("a", 2), ("b", 0), ("d", 1)]
    assert samples[0].messages == question
    no_picture = f"the file is no picture of a format that is read ({', '.join(FORMATS)})"
    assert [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [
        {"part": "rows", "row": 3, "id": "c", "reason": "the reader said so"},
        {"part": "rows", "row": 5, "id": "e", "reason": f"images[1]: {no_picture}"},
        {"part": "rows", "row": 6, "id": "f", "reason": "messages: 2 <image> for 1 image"},
        {"part": "rows", "row": 7, "id": "g", "reason": "caption: it is empty"},
    ]


def test_a_source_of_rejects_alone_is_finished_too(image_tokenizer, tmp_path):
    rows = [SourceRow("a", (b"",), caption="x"), Rejection("b", "no")]
    assert encode([part_of(rows)], image_tokenizer, tmp_path, source="rows") == EncodeSummary(2, 0, 2, True)
    assert not list(iterate_samples(tmp_path, image_tokenizer.codebook_size))


SLOW_ENCODE = """
import sys, time
from uni_x.data.encode import encode
from uni_x.data.readers import open_source
from uni_x.images import ImageTokenizer
from uni_x.workflows.sources import launched_share

pictures, tokenizer, out = sys.argv[1:]
tokenizer = ImageTokenizer.from_pretrained(tokenizer)
pause = lambda summary: time.sleep(0.05)
share = launched_share()
encode(
    open_source(pictures), tokenizer, out, source=pictures, shard_size=4, batch_size=1, share=share, progress=pause
)
"""


def test_a_killed_run_carries_on_row_for_row(picture_folder, image_tokenizer, tmp_path):
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_ENCODE, picture_folder, tmp_path / "tokenizer", out],
        cwd=Path(uni_x.__file__).parents[1],
    )
    third = out / "part-00000-00002.parquet"
    deadline = time.monotonic() + 60
    while not third.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match="out: encoding has not finished"):
        list(iterate_samples(out, image_tokenizer.codebook_size))
    assert not json.loads((out / "manifest.json").read_text())["finished"]
    assert not (out / "part-00000-00004.parquet").exists()
    written_before = third.stat().st_mtime_ns

    summary = encode_folder(picture_folder, ImageTokenizer.from_pretrained(tmp_path / "tokenizer"), out)

    assert summary == EncodeSummary(read=20, written=18, rejected=2, finished=True)
    assert third.stat().st_mtime_ns == written_before
    encode_folder(picture_folder, image_tokenizer, tmp_path / "uninterrupted")
    assert content_of(out) == content_of(tmp_path / "uninterrupted")


def test_finished_work_is_not_read_again(picture_folder, image_tokenizer, tmp_path):
    first = encode_folder(picture_folder, image_tokenizer, tmp_path / "out")

    def untouchable():
        raise AssertionError("the source was read")

    again = encode(
        [Part("rows", untouchable)], image_tokenizer, tmp_path / "out", source=str(picture_folder), shard_size=4
    )
    assert again == replace(first, already_done=True)


def test_a_damaged_shard_is_made_again(picture_folder, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    encode_folder(picture_folder, image_tokenizer, out)
    before = content_of(out)
    shard = out / "part-00000-00001.parquet"
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
    with pytest.raises(RunError, match=r"part-00000-00000\.parquet: the source now gives other rows"):
        encode_folder(picture_folder, image_tokenizer, out)


def test_folders_of_others_are_left_alone(image_tokenizer, tmp_path):
    (tmp_path / "mine.parquet").write_bytes(b"")
    with pytest.raises(RunError, match=r"holds other things, such as mine\.parquet; choose a new or an empty folder"):
        encode([], image_tokenizer, tmp_path, source="rows")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(RunError, match=r"manifest\.json: not a manifest"):
        encode([], image_tokenizer, tmp_path, source="rows")
    with pytest.raises(RunError, match=r"mine\.parquet: is a file; choose a folder"):
        encode([], image_tokenizer, tmp_path / "mine.parquet", source="rows")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_is_told(image_tokenizer, tmp_path):
    rows = [SourceRow("a", (picture(0),), caption="a heart")]
    (tmp_path / f".part-00000-00000.parquet.{socket.gethostname()}-{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(RunError, match=f"{tmp_path}: the disk is full"):
        encode([part_of(rows)], image_tokenizer, tmp_path, source="rows")
    assert encode([part_of(rows)], image_tokenizer, tmp_path, source="rows") == EncodeSummary(1, 1, 0, True)


def test_what_the_system_refuses_is_told_in_one_line(uni_x, tmp_path):
    (source := tmp_path / "texts.jsonl").write_text('{"text": "Hearts are red."}\n')
    (loop := tmp_path / "loop").symlink_to(loop)
    encode = ("encode", source, "--image-tokenizer", "scenes", "--out")
    odd = tmp_path / "odd-\udcff"
    odd.mkdir()
    for words in ((*encode, odd), ("data", "check", odd)):
        code, _, err = uni_x(*words)
        assert (code, err.count("\n")) == (1, 1), err
        assert "the name is not valid UTF-8; give it another one" in err
    for out, reason in (
        (loop / "out", "Too many levels of symbolic links"),
        (tmp_path / ("n" * 300), "File name too long"),
        (source / "out", "Not a directory"),
    ):
        code, _, err = uni_x(*encode, out)
        assert (code, err.count("\n")) == (1, 1), err
        assert err.startswith(f"error: {out}: cannot be written ({reason}"), err
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-m", "uni_x", *encode, out],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    error = f"error: {out}: cannot be written (File too large); choose another folder"
    assert (run.returncode, run.stderr.splitlines()[-1], run.stderr.count("error")) == (1, error, 1)
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


def test_two_runs_into_one_folder_both_finish(picture_folder, image_tokenizer, tmp_path):
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    out.mkdir()
    # What killed processes of this machine and of another one left; that of the other may still be writing.
    dead, other = (
        out / f".part-00000-00000.parquet.{name}.partial" for name in (f"{socket.gethostname()}-999999999", "other-1")
    )
    dead.touch()
    other.touch()
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_ENCODE, picture_folder, tmp_path / "tokenizer", out],
            cwd=Path(uni_x.__file__).parents[1],
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [(b"", 0), (b"", 0)]
    encode_folder(picture_folder, image_tokenizer, tmp_path / "alone")
    assert content_of(out) == content_of(tmp_path / "alone")
    assert other in list(out.glob(".*"))
    for leftover in (other, foreign := out / ".notes.partial"):
        leftover.touch()
        os.utime(leftover, (0, 0))
    encode_folder(picture_folder, image_tokenizer, out)
    assert list(out.glob(".*")) == [foreign]


@pytest.mark.parametrize("parts", [1, 2, 9])
def test_several_processes_write_what_one_writes(image_tokenizer, tmp_path, parts):
    source = [
        part_of([SourceRow(f"{part}-{row}", (picture(row),), caption="a heart") for row in range(3 * part)], str(part))
        for part in range(parts)
    ]

    def run(out, **options):
        return encode(source, image_tokenizer, tmp_path / out, source="rows", shard_size=2, batch_size=2, **options)

    alone = run("alone")
    for rank in (1, 0):
        together = run("together", share=Share(rank, 2))
        assert together.finished == (rank == 0)
    assert together == alone
    assert content_of(tmp_path / "together") == content_of(tmp_path / "alone")


def test_accelerate_divides_the_work(picture_folder, image_tokenizer, tmp_path):
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "uni_x", "encode", str(picture_folder), "--image-tokenizer", str(tmp_path / "tokenizer")]
    command += ["--out", str(tmp_path / "together"), "--min-side", "0", "--batch-size", "2"]
    run = subprocess.run(command, cwd=Path(uni_x.__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "20 read = 18 written + 2 rejected" in run.stdout
    encode(open_source(str(picture_folder)), image_tokenizer, tmp_path / "alone", source=str(picture_folder))
    assert content_of(tmp_path / "together") == content_of(tmp_path / "alone")


def test_two_killed_processes_carry_on_row_for_row(picture_folder, image_tokenizer, tmp_path):
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    together = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_ENCODE, picture_folder, tmp_path / "tokenizer", out],
            cwd=Path(uni_x.__file__).parents[1],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 60
    while not list(out.glob("*.parquet")):
        assert all(process.poll() is None for process in together)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in together:
        process.send_signal(signal.SIGKILL)
    for process in together:
        process.wait()
    assert not json.loads((out / "manifest.json").read_text())["finished"]
    encode_folder(picture_folder, image_tokenizer, out)
    encode_folder(picture_folder, image_tokenizer, tmp_path / "uninterrupted")
    assert content_of(out) == content_of(tmp_path / "uninterrupted")


def test_pictures_of_no_use_are_rejected(image_tokenizer, tmp_path):
    shapes = [(20, 50), (20, 51), (9, 20), (10, 20)]
    rows = [
        SourceRow(str(number), (Image.new("RGB", shape),), caption="a shape") for number, shape in enumerate(shapes)
    ]
    encode([part_of(rows)], image_tokenizer, tmp_path, source="rows", filters=Filters(2.5, 10))
    assert [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [
        "the picture is too long: 20 x 51 pixels, max_aspect is 2.5",
        "the picture is too small: 9 x 20 pixels, min_side is 10",
    ]
    with pytest.raises(RunError, match="made with another filters"):
        encode([part_of(rows)], image_tokenizer, tmp_path, source="rows", filters=Filters(0))


def test_ready_codes_are_taken_as_they_are(image_tokenizer, tmp_path):
    def codes(count, dtype=np.uint16, first=0):
        return np.arange(first, first + count, dtype=dtype)

    grids = [CodeGrid(codes(4), 2, 2), CodeGrid(codes(6), 2, 3), CodeGrid(codes(4, first=61), 2, 2)]
    rows = [SourceRow(str(number), (grid,), caption="codes") for number, grid in enumerate(grids)]
    encode([part_of(rows)], image_tokenizer, tmp_path, source="rows")
    assert [sample.images[0].codes.tolist() for sample in iterate_samples(tmp_path, 64)] == [[0, 1, 2, 3]]
    assert [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [
        "images[0]: 2 x 3 codes, this image tokenizer's pictures have 2 x 2",
        "images[0].codes: code 64 is not in a codebook of 64",
    ]
