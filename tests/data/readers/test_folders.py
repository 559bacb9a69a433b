import csv
import json
import os

import pytest
from PIL import Image

from tests.data.readers.conftest import ANSWERED, ASKED, RED, make_picture, read, reasons, write_jsonl
from uni_x.data.encode import encode
from uni_x.data.readers import open_source
from uni_x.data.schema import Rejection
from uni_x.errors import DataError


def test_a_folder_is_read_in_the_order_of_its_paths(picture_folder):
    (picture_folder / "notes.md").write_text("no picture")
    (picture_folder / "._00.png").write_bytes(b"litter")
    rows = read(picture_folder)
    assert [row.id for row in rows] == [f"{number:02d}.png" for number in range(18)] + ["more/18.png", "more/19.png"]
    assert rows[0].caption == "picture number 0"
    assert rows[0].images == (picture_folder / "00.png",)
    assert rows[0].source == "pictures"
    assert [row.id for row in rows if isinstance(row, Rejection)] == ["06.png", "13.png"]


def test_captions_that_are_missing_empty_or_not_text_are_told(tmp_path):
    for name, caption in {"a": None, "b": b" \n", "c": b"\xff\xfe\xfa", "d": "\ufeffé".encode()}.items():
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        if caption is not None:
            (tmp_path / f"{name}.txt").write_bytes(caption)
    *rejected, good = read(tmp_path)
    assert [row.reason for row in rejected] == [
        "the caption is missing: a.txt",
        "caption: it is empty",
        "caption: not valid UTF-8 (byte 1)",
    ]
    assert (good.caption, good.source) == ("é", tmp_path.name)


@pytest.mark.skipif(os.name != "posix", reason="file names are Unicode elsewhere")
def test_file_names_need_not_be_unicode(tmp_path):
    try:
        Image.new("RGB", (4, 4)).save(tmp_path / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    (row,) = read(tmp_path)
    assert row.id == "caf\\udce9.png"


def test_captions_stand_in_json_beside_the_pictures(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(RED)
    (tmp_path / "a.json").write_text('{"caption": "a cat", "image": "elsewhere.png"}')
    (tmp_path / "b.json").write_text(json.dumps({"id": "own", "conversations": ASKED}))
    (tmp_path / "c.json").write_text('{"caption": "cut o')
    (tmp_path / "d.json").write_bytes(b'{"text": "\xff"}')
    (tmp_path / "e.txt").write_text("a dog")
    (tmp_path / "e.json").write_text('{"width": 6}')
    rows = read(tmp_path)
    assert [row.id for row in rows] == ["a.png", "own", "c.png", "d.png", "e.png"]
    assert rows[0].images == (tmp_path / "a.png",)
    assert (rows[0].caption, rows[1].messages, rows[4].caption) == ("a cat", ANSWERED, "a dog")
    assert reasons(rows).keys() == {"c.png", "d.png"}
    assert "not valid JSON" in rows[2].reason
    assert rows[3].reason == "not valid UTF-8 (byte 11)"


@pytest.mark.parametrize("name", ["captions.csv", "metadata.csv"])
def test_captions_stand_in_a_csv(tmp_path, name):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.png").write_bytes(RED)
    with (tmp_path / name).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["file_name", "caption"], ["more/a.png", 'a "big" cat,\nasleep'], ["more/a.png", "é"]])
    rows = read(tmp_path)
    assert [(row.id, row.caption) for row in rows] == [
        (f"{name}:2", 'a "big" cat,\nasleep'),
        (f"{name}:4", "é"),
    ]
    assert rows[0].images == (tmp_path / "more" / "a.png",)


def test_bad_lines_of_a_csv_cost_themselves_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path.parent / "outside.png").write_bytes(RED)
    table = [
        b"image,text",
        b"a.png,first",
        b"../outside.png,out",
        f"{tmp_path}/a.png,absolute".encode(),
        b"..\\outside.png,out",
        b"gone.png,missing",
        b"a\0.png,zero",
        b"x" * 300 + b".png,long",
        b"a.png,\xff\xfe",
        b"a.png,one,two",
        b",nameless",
        b'a.png,"a "cat" here"',
        b"a.png,last",
        b'a.png,"never closed',
        b"a.png,behind it",
    ]
    (tmp_path / "captions.csv").write_bytes(b"\n".join(table))
    rows = read(tmp_path)
    assert [row.caption for row in rows if not isinstance(row, Rejection)] == ["first", "absolute", "last", "behind it"]
    assert rows[-1].caption == "behind it"
    found = reasons(rows)
    assert list(found) == [f"captions.csv:{number}" for number in (3, 5, 6, 7, 8, 9, 10, 11, 12, 14)]
    assert found["captions.csv:3"].startswith("the picture is outside the folder of the file that names it")
    assert found["captions.csv:6"] == "the picture is missing: gone.png"
    assert found["captions.csv:7"].startswith("the picture is missing: a")
    assert found["captions.csv:8"].startswith("the picture is missing: xxx")
    assert found["captions.csv:9"] == "not valid UTF-8 (byte 7)"
    assert found["captions.csv:10"] == "3 fields under a header of 2"
    assert found["captions.csv:11"] == "no file name in it (column file_name or file or image or path)"
    assert found["captions.csv:12"].startswith("not a comma-separated row (")
    assert found["captions.csv:14"] == "a quotation mark opens a field, and none closes it"


def test_a_quote_in_a_csv_that_is_never_closed_costs_its_line_and_long_captions_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    lines = ["file_name,caption", 'a.png,"2" wide', *(f"a.png,number {number}" for number in range(500))]
    lines += [f"a.png,{'long ' * 40_000}", 'a.png,"two\nlines"', 'a.png,"open', *["a.png,more"] * 500]
    (tmp_path / "captions.csv").write_text("\r".join(lines))  # as spreadsheets of old write them
    rows = read(tmp_path)
    assert len(rows) == len(lines) - 1
    assert list(reasons(rows)) == ["captions.csv:2", "captions.csv:506"]
    assert len(rows[501].caption) == 40_000 * 5


def test_captions_stand_in_the_metadata_of_an_image_folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(RED)
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "conversations": ASKED}]
    write_jsonl(tmp_path / "metadata.jsonl", [*rows, {"file_name": "../a.png", "text": "a"}, {"text": "a"}])
    first, second, *bad = read(tmp_path)
    assert (first.caption, first.images) == ("a cat", (tmp_path / "a.png",))
    assert second.messages == ANSWERED
    assert [row.reason.partition(":")[0] for row in bad] == [
        "the picture is outside the folder of the file that names it (--pictures allows another)",
        "no file name in it (column file_name or file or image or path)",
    ]


def test_captions_without_pictures_are_rows_that_are_rejected(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.png", "more/c.JPG"):
        (tmp_path / name).write_bytes(RED)
    for name in ("a.txt", "b.txt", "more/c.TXT", "more/d.txt"):
        (tmp_path / name).write_text("a cat")
    (tmp_path / "more" / "e.json").write_text('{"caption": "a cat"}')
    rows = read(tmp_path)
    assert [row.id for row in rows] == ["a.txt", "b.png", "more/c.JPG", "more/d.txt", "more/e.json"]
    lonely = "no picture stands beside the caption"
    assert reasons(rows) == dict.fromkeys(("a.txt", "more/d.txt", "more/e.json"), lonely)


def test_pictures_of_other_formats_are_rows_too(tmp_path):
    for name in ("a.heic", "b.heic", "c.ppm", "d.jfif"):
        (tmp_path / name).write_bytes(make_picture("red", "JPEG"))
    for name in "acd":
        (tmp_path / f"{name}.txt").write_text("a cat")
    rows = read(tmp_path)
    assert [row.id for row in rows] == ["a.heic", "b.heic", "c.ppm", "d.jfif"]
    assert reasons(rows) == {"b.heic": "the caption is missing: b.txt"}  # that a.heic is none is told by decoding it


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")
def test_links_that_leave_the_folder_are_told_and_not_followed(tmp_path):
    for folder in ("source/inside", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(RED)
        (tmp_path / folder / "a.txt").write_text("a cat")
    source = tmp_path / "source"
    for name, target in {
        "leaving": tmp_path / "elsewhere",
        "within": source / "inside",
        "b.png": tmp_path / "elsewhere" / "a.png",
        "c.png": source / "inside" / "a.png",
        "c.txt": source / "inside" / "a.txt",
        "d.png": source / "inside" / "a.png",
        "d.txt": tmp_path / "elsewhere" / "a.txt",
    }.items():
        (source / name).symlink_to(target)
    rows = read(source)
    assert [row.id for row in rows] == ["b.png", "c.png", "d.png", "inside/a.png", "leaving"]
    told = "a symbolic link that leads outside the folder is not followed: "
    assert reasons(rows) == {"b.png": f"{told}b.png", "d.png": f"{told}d.txt", "leaving": f"{told}leaving"}
    (tmp_path / "link").symlink_to(source)
    assert [row.id for row in read(tmp_path / "link")] == [row.id for row in rows]


@pytest.mark.skipif(os.name != "posix", reason="named pipes lie in folders there alone")
def test_named_pipes_are_not_waited_for(tmp_path, image_tokenizer):
    (folder := tmp_path / "pictures").mkdir()
    (folder / "a.png").write_bytes(RED)
    os.mkfifo(folder / "a.txt")
    os.mkfifo(folder / "b.png")
    (folder / "b.txt").write_text("b")
    (folder / "c.png").write_bytes(RED)
    os.mkfifo(folder / "c.json")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"image": "pictures/b.png", "text": "b"}])
    for source, expected in (
        (folder, {"a.png": "a.txt", "b.png": "b.png", "c.png": "c.json"}),
        (rows, {"rows.jsonl:1": "b.png"}),
    ):
        out = tmp_path / f"out-{source.name}"
        encode(open_source(str(source)), image_tokenizer, out, source="pictures")
        rejects = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
        assert {each["id"]: each["reason"] for each in rejects} == {
            name: f"no plain file: {pipe}" for name, pipe in expected.items()
        }


def test_json_is_a_source_of_its_own_unless_it_captions_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(RED)
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "labels.json").write_text('{"caption": "a dog"}')
    with pytest.raises(DataError, match=r"json files such as labels\.json, pictures with captions"):
        read(tmp_path)
    (tmp_path / "b.json").write_text('{"caption": "a dog"}')
    rows = read(tmp_path)
    assert [row.id for row in rows] == ["a.png", "b.png", "labels.json"]
    assert reasons(rows) == {"labels.json": "no picture stands beside the caption"}
