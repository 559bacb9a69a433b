import base64
import gzip

import pytest

from tests.data.readers.conftest import BLUE, RED, read, reasons
from uni_x.data.readers import lines
from uni_x.data.schema import Rejection


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
        ("5", good, '{"caption": "cut o'),
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
    assert bad["a.tsv:5"] == "not valid UTF-8 (byte 2)"
    assert bad["a.tsv:10"] == "not valid UTF-8 (byte 1)"
    assert bad["a.tsv:6"].startswith("not valid JSON")
    assert bad["a.tsv:7"] == "caption: it is empty"
    assert bad["a.tsv:8"] == "the line is longer than 1 MiB"


def test_each_caption_is_plain_or_json_whatever_the_first_one_is(tmp_path):
    captions = [
        "plain",
        '{"caption": "red"}',
        '["", "blue"]',
        "[sic]",
        '"quoted"',
        '"half" quoted',
        "7",
        '"' + "\\u00e9" + '"',
    ]
    read_as = ["plain", "red", "blue", "[sic]", "quoted", '"half" quoted', "7", "é"]
    for order in (1, -1):
        rows = [(coded(RED), caption) for caption in captions[::order]]
        found = read(write_lines(tmp_path / "part-00000", rows))
        assert [row.caption for row in found] == read_as[::order]
