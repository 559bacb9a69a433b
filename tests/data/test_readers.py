import base64
import csv
import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import urllib.parse
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import uni_x
from uni_x.data.readers import lines, open_source
from uni_x.data.readers.fields import row_from_fields
from uni_x.data.schema import Message, Rejection, check_content
from uni_x.errors import DataError
from uni_x.pictures import open_picture


def make_picture(colour="red", format="PNG", size=(6, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


RED, BLUE = make_picture("red"), make_picture("blue", "JPEG")
ASKED = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A square."}]
ANSWERED = (Message("user", "<image>What is it?"), Message("assistant", "A square."))


def read(source, **options):
    """All rows of a source, read twice to show that they are the same and in the same order."""
    parts = open_source(str(source), **options)
    rows = [load() for part in parts for load in part.rows()]
    again = [load() for part in open_source(str(source), **options) for load in part.rows()]
    assert [row.id for row in again] == [row.id for row in rows]
    for row in rows:
        row.id.encode()
        if isinstance(row, Rejection):
            row.reason.encode()
            assert "\n" not in row.reason
    return rows


def reasons(rows):
    return {row.id: row.reason for row in rows if isinstance(row, Rejection)}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def to_row(**fields):
    return row_from_fields(fields, "row", "source", None)


# Which kind of row it is


def codes_of(*first, count=16):
    return [list(range(start, start + count)) for start in first]


def test_published_codes_come_as_a_json_string_or_a_list():
    codes = list(range(1024))
    for value in (json.dumps(codes), codes):
        row = to_row(data_type="t2i", vqcode_512=value, text="a cat", caption="not this")
        (grid,) = row.images
        assert (grid.height, grid.width, grid.codes.dtype) == (32, 32, np.uint16)
        assert grid.codes.tolist() == codes
        assert row.caption == "a cat"
        check_content(row)


def test_several_pictures_are_a_list_of_lists():
    row = to_row(vqcode_512=json.dumps(codes_of(0, 70_000)), data_type="interleaved", text="<image> then <image>")
    assert [grid.codes.dtype for grid in row.images] == [np.uint16, np.uint32]
    assert row.images[1].codes.tolist() == codes_of(70_000)[0]
    assert row.text == "<image> then <image>"
    check_content(row)


def test_a_caption_serves_where_the_text_is_null():
    assert to_row(data_type="image_text", vqcode_512=codes_of(0)[0], text=None, caption="a cat").caption == "a cat"
    assert to_row(data_type="text", caption="a document").text == "a document"


def test_published_conversations_are_turns_or_a_text_to_cut():
    text = "Hi^^^turn_split^^^Hello^^^pair_split^^^And?^^^turn_split^^^Bye"
    row = to_row(data_type="i2t", vqcode_512=codes_of(0)[0], text=text)
    contents = [(message.role, message.content) for message in row.messages]
    assert contents == [("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Bye")]
    check_content(row)
    assert to_row(data_type="i2t", vqcode_512=codes_of(0)[0], conversations=ASKED).messages == ANSWERED


def test_the_size_of_the_image_leads_the_first_question():
    turns = [{"from": "system", "value": "Be brief."}, *ASKED]
    row = to_row(data_type="i2t_multi", vqcode_512=codes_of(0), conversations=turns, width=640, height=480)
    question = "Image Size: Width is 640 Height is 480. <image>What is it?"
    assert row.messages == (Message("system", "Be brief."), Message("user", question), ANSWERED[1])


def test_a_caption_that_is_described_gets_a_question():
    row = to_row(data_type="i2t_reverse", vqcode_512=codes_of(0)[0], caption="a cat")
    assert row.messages == (Message("user", "The caption of this image is:"), Message("assistant", "a cat"))
    check_content(row)


def test_ready_ids_count_only_beside_their_text():
    assert to_row(data_type="text", text="words", input_ids=[1, 2]).text == "words"
    for fields in ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "data_type": "text", "text": None}):
        with pytest.raises(DataError, match="input_ids: ids of a tokenizer that is not known here"):
            to_row(**fields)


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "the whole prompt"},
            [("user", "Add.\n1 and 2"), ("assistant", "3")],
        ),
        ({"instruction": "Greet.", "input": "", "output": "Hi"}, [("user", "Greet."), ("assistant", "Hi")]),
        (
            {"id": "flan", "system_prompt": "Think.", "question": "1?", "response": "2"},
            [("system", "Think."), ("user", "1?"), ("assistant", "2")],
        ),
        ({"system_prompt": "", "question": "1?", "response": "2"}, [("user", "1?"), ("assistant", "2")]),
        (
            {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2"}]},
            [("user", "1?"), ("assistant", "2")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": "A cat."},
                ],
                "images": [RED],
            },
            [("user", "<image>What?"), ("assistant", "A cat.")],
        ),
        (
            {"images": [{"bytes": RED, "path": None}], "texts": [{"user": "1?", "assistant": "2"}] * 2},
            [("user", "1?"), ("assistant", "2"), ("user", "1?"), ("assistant", "2")],
        ),
    ],
)
def test_conversations_of_every_kind(fields, messages):
    row = to_row(**fields)
    assert [(message.role, message.content) for message in row.messages] == messages
    check_content(row)


def test_a_picture_with_one_text_is_a_caption_unless_the_text_places_it():
    assert to_row(image=RED, text="a cat").caption == "a cat"
    assert to_row(images=[RED], caption="a cat", text="elsewhere").caption == "a cat"
    assert to_row(image=RED, text="see <image>").text == "see <image>"
    assert to_row(images=[RED, BLUE], text="<image> and <image>").images == (RED, BLUE)
    assert to_row(text="words").text == to_row(content="words").text == "words"
    assert to_row(text="HTML has <image> too").text == "HTML has <image> too"  # check_content decides


def test_ids_and_sources_of_its_own():
    assert to_row(text="a").id == "row"
    assert [to_row(text="a", **{name: 7}).id for name in ("id", "uid", "key", "__key__")] == ["7"] * 4
    assert to_row(text="a", id="", uid=True, key="k").id == "k"
    assert to_row(text="a", id="\ud83d").id == "\\ud83d"
    assert (to_row(text="a").source, to_row(text="a", source="web").source) == ("source", "web")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"vqcode_512": "[1, 2, 3]", "text": "a"}, "vqcode_512: 3 codes do not fill a square grid"),
        ({"vqcode_512": "[[1], [1, 2]]", "text": "a"}, r"vqcode_512\[1\]: 2 codes do not fill"),
        ({"vqcode_512": "[1, 2", "text": "a"}, "vqcode_512: not a JSON list"),
        ({"vqcode_512": "[" * 200_000, "text": "a"}, "vqcode_512: not a JSON list"),
        ({"vqcode_512": "7", "text": "a"}, "vqcode_512: a list is needed, not int"),
        ({"vqcode_512": [-1], "text": "a"}, "flat list of codes from 0 on"),
        ({"vqcode_512": [2**32], "text": "a"}, "flat list of codes from 0 on"),
        ({"vqcode_512": [0.5], "text": "a"}, "flat list of codes from 0 on"),
        ({"vqcode_512": [[1], []], "text": "a"}, "flat list of codes from 0 on"),
        ({"data_type": "i2t", "text": "no turns"}, r"not told apart by \^\^\^turn_split"),
        ({"data_type": "i2t", "text": "^^^turn_split^^^".join("abc")}, "text: 3 turns in pair 0"),
        ({"data_type": "t2i", "vqcode_512": [1]}, "neither text nor caption"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, r"conversations\[0\]\.from: 'tool' is none of human"),
        ({"conversations": [{"value": "a"}]}, r"conversations\[0\]\.role: None is none of"),
        ({"conversations": ["a"]}, r"conversations\[0\]: an object is needed, not str"),
        ({"conversations": "a"}, "conversations: a list is needed, not str"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: a text is needed, not NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, r"content\[0\]: neither a text nor an im"),
        ({"texts": [{"user": "a"}]}, r"texts\[0\]\.assistant: a text is needed"),
        ({"instruction": 1, "output": "a"}, "instruction: a text is needed, not int"),
        ({"image": 3, "caption": "a"}, "image: a picture is needed, not int"),
        ({"images": [RED, None], "text": "a"}, r"images\[1\]: a picture is needed, not NoneType"),
        ({"image": "a.png", "caption": "a"}, "image: the picture itself is needed, not the name of a file"),
        ({"caption": ["a"]}, "caption: a text is needed, not list"),
        ({"url": "a", "size": 3}, r"no caption, messages or text in it.*\(its fields: url, size\)"),
        ({}, r"\(its fields: none\)"),
    ],
)
def test_fields_that_fit_nothing_are_refused_with_a_reason(fields, reason):
    with pytest.raises(DataError, match=reason):
        to_row(**fields)


# Folders of pictures


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
    assert rows[3].reason == "not valid UTF-8"


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
        b"a.png,swallowed",
    ]
    (tmp_path / "captions.csv").write_bytes(b"\n".join(table))
    rows = read(tmp_path)
    assert [row.caption for row in rows if not isinstance(row, Rejection)] == ["first", "last"]
    found = reasons(rows)
    assert list(found) == [f"captions.csv:{number}" for number in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14)]
    leaving = [found[f"captions.csv:{number}"] for number in (3, 4, 5)]
    assert all(reason.startswith("the file name leads out of the folder: ") for reason in leaving)
    assert found["captions.csv:6"] == "the picture is missing: gone.png"
    assert found["captions.csv:7"].startswith("the picture is missing: a")
    assert found["captions.csv:8"].startswith("the picture is missing: xxx")
    assert found["captions.csv:9"] == "not valid UTF-8"
    assert found["captions.csv:10"] == "3 cells under 2 columns"
    assert found["captions.csv:11"] == "no file name in it (column file_name or file or image or path)"
    assert "lines 12 to 12 are not valid CSV" in found["captions.csv:12"]
    assert "lines 14 to 15 are not valid CSV" in found["captions.csv:14"]


def test_captions_stand_in_the_metadata_of_an_image_folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(RED)
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "conversations": ASKED}]
    write_jsonl(tmp_path / "metadata.jsonl", [*rows, {"file_name": "../a.png", "text": "a"}, {"text": "a"}])
    first, second, *bad = read(tmp_path)
    assert (first.caption, first.images) == ("a cat", (tmp_path / "a.png",))
    assert second.messages == ANSWERED
    assert [row.reason.partition(":")[0] for row in bad] == [
        "the file name leads out of the folder",
        "no file name in it (column file_name or file or image or path)",
    ]


# JSON


def test_json_lines_are_read_from_files_and_folders(tmp_path):
    folder = tmp_path / "chats"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "a.png").write_bytes(RED)
    write_jsonl(folder / "b.jsonl", [{"image": "pictures/a.png", "conversations": ASKED}])
    write_jsonl(folder / "a.jsonl", [{"id": "x", "text": "one"}, {"id": "x", "text": "two"}])
    with gzip.open(folder / "c.jsonl.gz", "wb") as stream:
        stream.write(b'\xef\xbb\xbf{"text": "three"}\r\n\r\n{"text": "four"}')
    parts = open_source(str(folder))
    assert [part.name for part in parts] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    rows = read(folder)
    # a row's own id is kept, also where it is given twice
    assert [row.id for row in rows] == ["x", "x", "b.jsonl:1", "c.jsonl.gz:1", "c.jsonl.gz:3"]
    assert [row.text for row in rows] == ["one", "two", None, "three", "four"]
    assert rows[2].images == (folder / "pictures" / "a.png",)
    assert {row.source for row in rows} == {"chats"}
    assert [row.source for row in read(folder / "c.jsonl.gz")] == ["c", "c"]


def test_bad_lines_cost_themselves_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_LIMIT", 2**20)
    path = tmp_path / "rows.jsonl"
    bad = [b'{"text": "\xff"}', b'{"text": ', b"[1]", b"null", b"[" * 100_000, b'{"text": "%s"}' % (b"a" * 2**22)]
    path.write_bytes(b'{"text": "first"}\n' + b"\n".join(bad) + b'\n{"text": "last"}\n{"text": "cut o')
    rows = read(path)
    assert [row.text for row in rows if not isinstance(row, Rejection)] == ["first", "last"]
    found = reasons(rows)
    assert list(found) == [f"rows.jsonl:{number}" for number in (2, 3, 4, 5, 6, 7, 9)]
    assert found["rows.jsonl:2"] == "not valid UTF-8"
    assert found["rows.jsonl:4"] == "a JSON object is needed, not list"
    assert found["rows.jsonl:5"] == "a JSON object is needed, not NoneType"
    assert all(found[f"rows.jsonl:{number}"].startswith("not valid JSON") for number in (3, 6, 9))
    assert found["rows.jsonl:7"] == "the line is longer than 1 MiB"


def test_lines_are_parsed_when_they_are_wanted(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    (part,) = open_source(str(path))
    loads = list(part.rows())
    path.unlink()
    assert [load().text for load in reversed(loads)] == ["two", "one"]


def test_a_gzipped_file_cut_in_half_gives_its_first_half(tmp_path):
    rng = np.random.default_rng(0)
    content = "".join(json.dumps({"text": rng.bytes(64).hex()}) + "\n" for _ in range(2000)).encode()
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(content)[: -len(gzip.compress(content)) // 2])
    *good, last = read(path)
    assert 500 < len(good) < 1500
    assert not reasons(good)
    assert last.id == "rows.jsonl.gz:rest"
    assert "the gzipped file is damaged or cut off" in last.reason


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_array(tmp_path, indent):
    rows = [{"id": number, "text": f'[{{ " é {number} {"x" * 700}'} for number in range(5000)]
    path = tmp_path / "rows.json"
    path.write_text("\ufeff " + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [(row.id, row.text) for row in read(path)] == [(str(row["id"]), row["text"]) for row in rows]


def test_a_json_file_may_have_one_object_a_line(tmp_path):
    path = write_jsonl(tmp_path / "rows.json", [{"text": "one"}, {"text": "two"}])
    assert [row.text for row in read(path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "good", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"}, {"tex', "ab", "breaks off or is not valid behind element 2"),
        (b'[{"text": "a"}, {"text": "b"}', "ab", "breaks off or is not valid behind element 2"),
        (b'[{"text": "a"}, oops, {"text": "b"}]', "a", "breaks off or is not valid behind element 1"),
        (b'[{"text": "a"} [{"text": "b"}]', "a", "not valid JSON behind element 1"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', "a", "goes on behind the array of 1 elements"),
        (b"[]", "", None),
        (b" [ ] ", "", None),
    ],
)
def test_damaged_arrays_give_what_is_before_the_damage(tmp_path, content, good, reason):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    rows = read(path)
    assert [row.text for row in rows if not isinstance(row, Rejection)] == list(good)
    if reason is None:
        assert not rows
    else:
        assert rows[-1].id == "rows.json:rest"
        assert reason in rows[-1].reason


def test_bytes_that_are_not_unicode_cost_one_element(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "a"}, {"text": "\xff"}, 12, {"text": "b"}]')
    rows = read(path)
    assert reasons(rows) == {"rows.json:2": "not valid UTF-8", "rows.json:3": "a JSON object is needed, not int"}
    assert (rows[0].text, rows[3].text) == ("a", "b")


# Parquet


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_parquet_of_many_kinds(tmp_path):
    (tmp_path / "disk.png").write_bytes(RED)
    write_parquet(
        tmp_path / "a.parquet",
        [{"images": [{"bytes": RED, "path": "a.png"}], "texts": [{"user": "1?", "assistant": "2"}], "source": "fine"}],
    )
    write_parquet(tmp_path / "b.parquet", [{"image": RED, "caption": "red"}, {"image": BLUE, "caption": "blue"}])
    on_disk = [{"image": {"bytes": None, "path": path}, "caption": "red"} for path in ("disk.png", "../disk.png")]
    write_parquet(tmp_path / "c.parquet", on_disk)
    (tmp_path / "README.md").write_text("not data")
    rows = read(tmp_path)
    ids = ["a.parquet:0", "b.parquet:0", "b.parquet:1", "c.parquet:0", "c.parquet:1"]
    assert [row.id for row in rows] == ids
    assert (rows[0].images, rows[0].source) == ((RED,), "fine")
    assert rows[0].messages == (Message("user", "1?"), Message("assistant", "2"))
    assert [row.images for row in rows[1:4]] == [(RED,), (BLUE,), (tmp_path / "disk.png",)]
    assert rows[1].source == tmp_path.name
    assert reasons(rows) == {"c.parquet:1": "the file name leads out of the folder: ../disk.png"}


def test_a_row_group_is_read_when_one_of_its_rows_is_wanted(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [{"text": f"{number}"} for number in range(9)], row_group_size=3)
    read_groups = []

    class Watched(pq.ParquetFile):
        def read_row_group(self, group, *arguments, **options):
            read_groups.append(group)
            return super().read_row_group(group, *arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    (part,) = open_source(str(path))
    loads = list(part.rows())
    assert (len(loads), read_groups) == (9, [])
    assert [load().text for load in loads[4:8]] == ["4", "5", "6", "7"]
    assert read_groups == [1, 2]


def test_a_parquet_file_cut_in_half_is_one_rejection(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"text": "a" * 1000}] * 10)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.parquet").write_bytes(b"<html>not found</html>")
    (tmp_path / "d.parquet").write_bytes(b"")
    write_parquet(tmp_path / "e.parquet", [{"text": "b"}])
    rows = read(tmp_path)
    assert len(rows) == 10 + 3 + 1
    assert list(reasons(rows)) == ["b.parquet:rest", "c.parquet:rest", "d.parquet:rest"]
    assert all("not a whole Parquet file" in reason for reason in reasons(rows).values())


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(6)]
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"text": text} for text in texts], row_group_size=2, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(content)
    rows = read(path)
    assert [row.text for row in rows if not isinstance(row, Rejection)] == texts[:2] + texts[4:]
    assert list(reasons(rows)) == ["a.parquet:2", "a.parquet:3"]
    assert "row group 1 cannot be read" in rows[2].reason


def test_text_that_is_not_unicode_costs_its_own_row(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], dtype=np.int32))
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row.text for row in (rows[0], rows[2])] == ["a", "b"]
    assert reasons(rows) == {"a.parquet:1": "not valid UTF-8"}


def test_encoded_folders_are_no_source(picture_folder, image_tokenizer, tmp_path):
    from uni_x.data.encode import encode

    encode([], image_tokenizer, tmp_path / "out", source="nothing")
    with pytest.raises(DataError, match="encoded already"):
        open_source(str(tmp_path / "out"))
    write_parquet(tmp_path / "out" / "part-00000.parquet", [{"text": "a"}])
    with pytest.raises(DataError, match="encoded already"):
        open_source(str(tmp_path / "out" / "part-00000.parquet"))


# WebDataset


@pytest.fixture
def webdataset():
    return pytest.importorskip("webdataset")


def write_tar(webdataset, path, rows):
    with webdataset.TarWriter(str(path)) as writer:
        for row in rows:
            writer.write(row)
    return path


def test_tars_written_by_webdataset(webdataset, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%02d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"sub.d/{number}", "jpg": BLUE, "txt": f"number {number}"})
    (tmp_path / "00_stats.json").write_text('{"count": 5}')
    parts = open_source(str(tmp_path))
    assert [part.name for part in parts] == ["00.tar", "01.tar", "02.tar"]
    rows = read(tmp_path)
    assert [row.id for row in rows] == [f"{number // 2:02d}.tar:sub.d/{number}" for number in range(5)]
    assert [row.caption for row in rows] == [f"number {number}" for number in range(5)]
    assert {row.images for row in rows} == {(BLUE,)}


def test_rows_of_a_tar_in_all_their_forms(webdataset, tmp_path):
    path = write_tar(
        webdataset,
        tmp_path / "a.tar",
        [
            {"__key__": "a", "png": RED, "json": {"key": "own", "caption": "red", "image": "elsewhere.png"}},
            {"__key__": "b", "webp": RED, "caption": "red"},
            {"__key__": "c", "img10.jpg": BLUE, "img2.jpg": RED, "json": {"messages": [
                {"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "!"}]}},
            {"__key__": "d", "json": {"vqcode_512": "[1]", "caption": "codes", "data_type": "t2i"}},
            {"__key__": "e", "png": RED[:20], "txt": "cut off"},
            {"__key__": "f", "jpg": RED, "txt": "named wrong"},
        ],
    )  # fmt: skip
    rows = read(path)
    assert not reasons(rows)
    assert [row.id for row in rows] == ["own", *(f"a.tar:{key}" for key in "bcdef")]
    assert [row.images for row in rows[:3]] == [(RED,), (RED,), (RED, BLUE)]
    assert rows[3].images[0].codes.tolist() == [1]
    assert rows[4].images == (RED[:20],)  # decoding it will tell
    assert open_picture(rows[5].images[0]).size == (6, 4)


def test_rows_of_a_tar_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.tar"
    members = [
        ("a.png", RED), ("b.txt", b"no picture"), ("c.png", RED), ("c.txt", b"\xff"), ("d.png", RED),
        ("d.json", b"{"), ("e.png", RED), ("e.PNG", RED), ("e.txt", b"two"), ("README", b""), ("._f.txt", b"litter"),
        ("g.png", RED), ("g.txt", b" good \n"), ("h.jpg", RED), ("h.txt", b""),
    ]  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("i.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    rows = read(path)
    found = reasons(rows)
    assert list(found) == [f"a.tar:{key}" for key in "abcde"]
    assert found["a.tar:a"] == "neither txt, caption nor json in it (its members end in png)"
    assert found["a.tar:b"].startswith("no picture stands beside the caption")
    assert found["a.tar:c"] == "the caption is not valid UTF-8"
    assert found["a.tar:d"].startswith("not valid JSON")
    assert found["a.tar:e"] == "two members of the row end in .png"
    good, empty = rows[5:]
    assert good.caption == "good"
    with pytest.raises(DataError, match="caption: it is empty"):
        check_content(empty)


def test_a_tar_cut_anywhere_gives_its_whole_rows_and_one_rejection(webdataset, tmp_path):
    rows = [{"__key__": f"{number}", "png": RED, "txt": f"number {number}"} for number in range(4)]
    whole = write_tar(webdataset, tmp_path / "whole.tar", rows).read_bytes()
    path = tmp_path / "a.tar"
    with tarfile.open(tmp_path / "whole.tar") as tar:
        begun = [member.offset_data for member in tar if member.name.endswith(".png")]
        end = tar.offset
    for cut in range(0, end + 1, 256):
        path.write_bytes(whole[:cut])
        *good, last = read(path)
        assert last.id == "a.tar:rest"
        assert "the rest of a.tar is lost" in last.reason
        assert not reasons(good)
        # a row counts as whole once the next one has begun
        assert len(good) == sum(offset <= cut for offset in begun[1:])
    assert not reasons(read(tmp_path / "whole.tar"))


def test_a_damaged_header_is_not_the_end(webdataset, tmp_path):
    rows = [{"__key__": f"{number}", "png": RED, "txt": f"number {number}"} for number in range(4)]
    content = bytearray(write_tar(webdataset, tmp_path / "a.tar", rows).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        start = tar.getmember("2.png").offset
    content[start : start + 512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(content)
    *good, last = read(tmp_path / "a.tar")
    assert [row.caption for row in good] == ["number 0"]
    assert f"breaks off or is damaged at byte {start:,}" in last.reason
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    assert list(reasons(read(tmp_path / "a.tar"))) == ["a.tar:rest"]


# Tab-separated lines


def coded(content, encode=base64.b64encode):
    return encode(content).decode()


def write_lines(path, rows):
    content = "".join("\t".join(row) + "\n" for row in rows).encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "part-00000", "part-00001.gz", "a.tsv.gz"])
@pytest.mark.parametrize(
    ("rows", "ids", "captions"),
    [
        ([(coded(RED), '["", "红色"]'), (coded(BLUE), '["蓝色", "x"]')], [None, None], ["红色", "蓝色"]),
        ([("7", coded(RED), '{"captions": ["红色"]}')], ["7"], ["红色"]),
        ([("7", '"红色"', coded(RED, base64.urlsafe_b64encode))], ["7"], ["红色"]),
        ([("7", "http://there", "红 色", coded(RED).rstrip("="))], ["7"], ["红 色"]),
        ([("红色", coded(RED))], [None], ["红色"]),
        ([("text", "id", "image"), ("[sic] red", "7", coded(RED))], ["7"], ["[sic] red"]),
        ([("base64", "caption"), (coded(RED), '"red"')], [None], ["red"]),
    ],
)
def test_columns_are_told_by_name_or_content(tmp_path, name, rows, ids, captions):
    found = read(write_lines(tmp_path / name, rows))
    assert not reasons(found)
    first = len(rows) - len(captions) + 1
    expected = [own or f"{name}:{first + number}" for number, own in enumerate(ids)]
    assert [row.id for row in found] == expected
    assert [row.caption for row in found] == captions
    assert found[0].images == (RED,)


def test_bad_lines_of_a_table_cost_themselves_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_LIMIT", 2**20)
    good = coded(RED)
    rows = [
        ("0", "AAAA" * 10, '"no picture yet"'),
        ("1", good, '"first"'),
        ("2", good),
        ("3", good[:-5] + "!" + good[-4:], '"a"'),
        ("4", good, '"\udcff"'),
        ("5", good, "no JSON"),
        ("6", good, '["", " "]'),
        ("7", good, '"' + "a" * 2**21 + '"'),
        ("8", coded(RED[:30]), '"cut off"'),
        ("\udcff", good, '"a"'),
        ("9", good, '"last"'),
    ]
    found = read(write_lines(tmp_path / "a.tsv", rows))
    bad = reasons(found)
    assert [row.caption for row in found if not isinstance(row, Rejection)] == ["first", "cut off", "last"]
    assert list(bad) == [f"a.tsv:{number}" for number in (1, 3, 4, 5, 6, 7, 8, 10)]
    assert bad["a.tsv:1"] == "no column holds a picture in base64"
    assert bad["a.tsv:3"] == "2 columns, where the lines before have 3"
    assert bad["a.tsv:4"] == "the picture is not valid base64"
    assert bad["a.tsv:5"] == bad["a.tsv:10"] == "not valid UTF-8"
    assert bad["a.tsv:6"].startswith("not valid JSON")
    assert bad["a.tsv:7"] == "the caption is empty"
    assert bad["a.tsv:8"] == "the line is longer than 1 MiB"


# datasets


@pytest.fixture
def datasets():
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    return library


@pytest.fixture
def dataset(datasets):
    named = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "images": named, "caption": datasets.Value("string")}
    )
    red, cut = {"bytes": RED, "path": None}, {"bytes": RED[:20], "path": "a.png"}
    rows = [{"id": number, "image": red, "images": None, "caption": f"number {number}"} for number in range(5)]
    rows[1].update(image=None, images=[cut])
    rows[2].update(image=None, images=[{"bytes": None, "path": "/etc/hostname"}])
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets(datasets, dataset, tmp_path, streaming):
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([4])}).save_to_disk(tmp_path / "dict")
    parts = open_source(str(tmp_path / "saved"), streaming=streaming)
    assert [part.name for part in parts] == (["train-00000", "train-00001"] if streaming else ["train"])
    rows = read(tmp_path / "saved", streaming=streaming)
    assert [row.id for row in rows] == ["0", "1", "2", "3", "4"]
    assert [rows[number].images for number in (0, 1, 3)] == [(RED,), (RED[:20],), (RED,)]
    assert rows[4].caption == "number 4"
    assert rows[0].source == "saved"
    assert reasons(rows) == {"2": "the picture is not in the dataset, only the name of a file: /etc/hostname"}
    assert [row.id for row in read(tmp_path / "dict", split="test", streaming=streaming)] == ["4"]
    with pytest.raises(DataError, match="no split 'val' in it; it has train, test"):
        open_source(str(tmp_path / "dict"), split="val", streaming=streaming)


def test_saved_datasets_that_are_damaged_are_told(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="not a saved dataset that can be read"):
        open_source(str(tmp_path / "saved"))


def test_the_library_is_named_where_it_is_missing(dataset, tmp_path, monkeypatch):
    dataset.save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (str(tmp_path / "saved"), "owner/name"):
        with pytest.raises(DataError, match=r'pip install "uni-x\[data\]"'):
            open_source(name)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a dataset of the folder `train` needs."""

    files: ClassVar[dict[str, bytes]]

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        commit = "a" * 40
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": name} for name, content in self.files.items()
        ]
        if path.startswith("/api/datasets/owner/name/tree/"):
            inside = path.split("/tree/")[1].partition("/")[2]
            folders = [] if inside else [{"type": "directory", "path": "train", "oid": "train"}]
            self.answer(json.dumps(folders + [entry for entry in entries if entry["path"].startswith(inside)]).encode())
        elif path.startswith("/api/datasets/owner/name"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "owner/name", "sha": commit, "siblings": siblings}).encode())
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in self.files:
            self.answer(self.files[name], ETag=f'"{name}"'.replace("/", "-"), **{"X-Repo-Commit": commit})
        else:
            self.answer(b"{}", status=404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content, status=200, **headers):
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if first and self.command == "GET":
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(content)}"
            content = content[int(first) : int(last) + 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


PICTURES = {
    "train/a.png": RED,
    "train/b.png": RED[:20],
    "train/metadata.csv": b"file_name,text\na.png,red\nb.png,cut off\n",
}
DOCUMENTS = {"train/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}

READ_HUB = """
from uni_x.data.readers import open_source
for streaming in (True, False):
    for part in open_source("owner/name", streaming=streaming):
        for row in (load() for load in part.rows()):
            images = [image if isinstance(image, bytes) else image.read_bytes() for image in row.images]
            print(row.id, row.caption or row.text, *(image.hex() for image in images))
"""


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize(
    ("files", "rows"),
    [(PICTURES, [f"red {RED.hex()}", f"cut off {RED[:20].hex()}"]), (DOCUMENTS, ["one", "two"])],
    ids=["pictures", "documents"],
)
def test_datasets_of_the_hub_are_read_streamed_or_not(tmp_path, files, rows):
    hub = type("Hub", (Hub,), {"files": files})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run(
            [sys.executable, "-c", READ_HUB],
            env={**os.environ, **own, "NO_PROXY": "127.0.0.1"},
            cwd=Path(uni_x.__file__).parents[1],
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert run.returncode == 0, run.stderr
    expected = [f"{part}:{number} {row}" for part in ("train-00000", "train") for number, row in enumerate(rows)]
    assert run.stdout.splitlines() == expected


@pytest.mark.usefixtures("datasets")
def test_datasets_that_cannot_be_had_are_told():
    with pytest.raises(DataError, match=r"owner/name:config: no such file or folder, nor a dataset of the hub"):
        open_source("owner/name:config")


# What is no source


def test_what_is_no_source_is_refused_with_the_kinds_there_are(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("notes")
    for name in ("empty", "notes.md", "nowhere/at/all"):
        with pytest.raises(DataError, match=r"a source is a folder of pictures with captions; .*\.parquet") as caught:
            open_source(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_files_that_are_gone_are_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (part,) = open_source(str(path))
    path.unlink()
    (load,) = part.rows()
    assert load() == Rejection("a.jsonl:rest", "the rest of a.jsonl is lost: No such file or directory")
