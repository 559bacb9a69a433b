import gzip
import json

import numpy as np
import pytest

from tests.data.readers.conftest import ASKED, RED, read, reasons, write_jsonl
from uni_x.data.readers import lines, open_source
from uni_x.data.schema import Rejection


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
    assert found["rows.jsonl:2"] == "not valid UTF-8 (byte 11)"
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
    assert reasons(rows) == {
        "rows.json:2": "not valid UTF-8 (byte 11)",
        "rows.json:3": "a JSON object is needed, not int",
    }
    assert (rows[0].text, rows[3].text) == ("a", "b")


def test_files_that_are_gone_are_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (part,) = open_source(str(path))
    path.unlink()
    (load,) = part.rows()
    assert load() == Rejection("a.jsonl:rest", "the rest of a.jsonl is lost, from row 1 on: No such file or directory")
