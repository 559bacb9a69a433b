import csv
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.translation.conftest import read_jsonl
from uni_x.data.translation import rows
from uni_x.data.translation.tables import open_table
from uni_x.data.translation.values import texts_of, with_texts
from uni_x.errors import DataError, UsageError


def copy_with_prefix(source, out, *columns):
    """Copies a table with 译 in front of every text that has letters, and gives its rows."""

    def changes(row):
        texts = [text for value in row.values.values() for text in texts_of(value)]
        if not any(map(has_letters, texts)):
            return {}
        new = iter(["译 " + text if has_letters(text) else text for text in texts])
        return {name: with_texts(value, new) for name, value in row.values.items()}

    table = open_table(source, columns)
    table.copy(out, changes)
    return list(table.rows())


def has_letters(text):
    return any(map(str.isalpha, text))


def faults(found):
    return {row.number: row.fault for row in found if row.fault}


def test_jsonl_keeps_every_other_character(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"id": 1e5,  "text" : "Hello" ,"n":[0.10, {"text":"no"}], "e":"\\u00e9\\ud800"}\r\n'
        b"\n"
        b'{ "x": 12345678901234567890.5, "text": null }\n'
        b'{"text": 7}\n'
        b'{"x": 1, "text": "Good \\u00e9\\n"}'
    )
    found = copy_with_prefix(source, out, "text")
    assert (
        out.read_bytes()
        == (
            '{"id": 1e5,  "text" : "译 Hello" ,"n":[0.10, {"text":"no"}], "e":"\\u00e9\\ud800"}\r\n'
            "\n"
            '{ "x": 12345678901234567890.5, "text": null }\n'
            '{"text": 7}\n'
            '{"x": 1, "text": "译 Good é\\n"}'
        ).encode()
    )
    assert [row.values for row in found] == [{"text": "Hello"}, {}, {"text": None}, {"text": 7}, {"text": "Good é\n"}]


def test_conversations_in_every_shape(tmp_path):
    shapes = [
        ["Hi", None, "42", "Bye"],
        [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": None}],
        [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Bye"}],
        [{"user": "Hi", "assistant": "Bye"}, {"user": "So", "assistant": "No", "system": "Be kind"}],
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"c": shape}) + "\n" for shape in shapes))
    copy_with_prefix(source, tmp_path / "out.jsonl", "c")
    assert [row["c"] for row in read_jsonl(tmp_path / "out.jsonl")] == [
        ["译 Hi", None, "42", "译 Bye"],
        [{"role": "user", "content": "译 Hi", "name": "Ann"}, {"role": "assistant", "content": None}],
        [{"from": "human", "value": "译 <image>\nHi"}, {"from": "gpt", "value": "译 Bye"}],
        [
            {"user": "译 Hi", "assistant": "译 Bye"},
            {"user": "译 So", "assistant": "译 No", "system": "译 Be kind"},
        ],
    ]


def test_parquet_keeps_schema_groups_and_other_columns(tmp_path):
    turn = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("time", pa.int64())])
    schema = pa.schema(
        [
            pa.field("image", pa.binary()),
            pa.field("kind", pa.dictionary(pa.int8(), pa.string()), metadata={"a": "b"}),
            pa.field("turns", pa.list_(turn)),
            pa.field("score", pa.decimal128(10, 3), nullable=False),
        ],
        metadata={"huggingface": '{"x": 1}'},
    )
    turns = [[{"role": "user", "content": f"Question {number}", "time": number}] for number in range(7)]
    turns[5] = None
    columns = [
        pa.array([bytes([number]) * 3 for number in range(7)], pa.binary()),
        pa.array(["cat", "dog", None, "cat", "7", "", "dog"]).dictionary_encode().cast(schema.field("kind").type),
        pa.array(turns, schema.field("turns").type),
        pa.array(list(range(7))).cast(pa.decimal128(22, 3)).cast(schema.field("score").type),
    ]
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table(columns, schema=schema), source, row_group_size=3, compression="zstd")
    before = pq.read_table(source)
    copy_with_prefix(source, out, "turns", "kind")
    after = pq.read_table(out)
    assert after.schema.equals(before.schema, check_metadata=True)
    assert after.select(["image", "score"]).equals(before.select(["image", "score"]))
    assert after.column("kind").to_pylist() == ["译 cat", "译 dog", None, "译 cat", "7", "", "译 dog"]
    assert after.column("turns").to_pylist() == [
        value and [{**value[0], "content": f"译 {value[0]['content']}"}] for value in turns
    ]
    metadata = pq.ParquetFile(out).metadata
    assert [metadata.row_group(group).num_rows for group in range(3)] == [3, 3, 1]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_tsv_keeps_pictures_and_untouched_rows(tmp_path):
    picture = "iVBORw0KGgo=" * 30_000  # beyond the csv module's own limit for a field
    head = "index\timage\tquestion\tA\tB\tanswer\n"
    still = f'8\t"{picture}"\t12 + 3?\t15\t\tA\n'
    source, out = tmp_path / "in.tsv", tmp_path / "out.tsv"
    content = head + f'7\t{picture}\t"What is ""it""?\nLook."\tA cat\t5\tA\n' + still
    source.write_text("\ufeff" + content, encoding="utf-8")
    found = copy_with_prefix(source, out, "question", "A", "B")
    written = out.read_text(encoding="utf-8")
    assert written == head + f'7\t{picture}\t"译 What is ""it""?\nLook."\t译 A cat\t5\tA\n' + still
    with out.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["question"] for row in read] == ['译 What is "it"?\nLook.', "12 + 3?"]
    assert [row.number for row in found] == [1, 2]


def test_a_column_of_values_that_python_has_none_for_breaks_their_rows(tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["One", "Two"], "when": pa.array([2**31 - 1, 1], pa.date32())}), source)
    reason = "column 'when': a value of the type date32[day] that cannot be read ("
    assert faults(open_table(source, ("when", "text")).rows())[1].startswith(reason)
    assert not faults(open_table(source, ("text",)).rows())


def test_prompt_lists_keep_their_line_ends(tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes("A cat\r\n\n 123\nTwo\u2028halves\nA dog".encode())
    copy_with_prefix(source, out)
    assert out.read_bytes() == "译 A cat\r\n\n 123\n译 Two\u2028halves\n译 A dog".encode()


def test_broken_lines_of_jsonl_are_copied_as_they_stand(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    turns = "{role, content}, {from, value} or {user, assistant}"
    broken = {
        b'{"text": \n': "not valid JSON (Expecting value at character 11 of its line)",
        b'{"text": "\xff"}\r\n': "not valid UTF-8 (byte 11)",
        b"[1]\n": "a JSON object is needed, not a list",
        b"[" * 100_000 + b"\n": "not valid JSON (it is nested too deeply, or holds a number too long)",
        b'{"text": {"a": "b"}}\n': "column 'text': a mapping cannot be translated; "
        f"a column holds a text, a list of texts or a list of {turns}",
        b'{"text": [{"speaker": "b"}]}\n': "column 'text': a mapping of 'speaker' cannot be translated; "
        f"a turn is {turns}",
        b'{"text": [{"role": "user", "content": []}]}\n': "column 'text': 'content' of a turn holds a list, not text",
        b'{"text": "a\\ud800"}\n': "column 'text': not valid Unicode (a lone surrogate)",
    }
    source.write_bytes(b'{"text": "One"}\n' + b"".join(broken) + b'{"text": "Two"}\n')
    found = copy_with_prefix(source, out, "text")
    assert faults(found) == dict(enumerate(broken.values(), start=2))
    assert out.read_bytes() == '{"text": "译 One"}\n'.encode() + b"".join(broken) + '{"text": "译 Two"}\n'.encode()


def test_broken_rows_of_a_tsv_take_no_other_with_them(tmp_path):
    source, out = tmp_path / "in.tsv", tmp_path / "out.tsv"
    lines = [
        b'1\t"One\n',  # the end of its quotation is in the row of the next mark
        b"2\tTwo\n",
        b'3\t"Th""ree\nlines"\n',
        b"4\n",
        b"\n",
        b"5\tF\xffve\n",
        b'6\t"Six" of them\n',
        b"7\tSeven\ttimes\r\n",
        b"8\tEig\rht\n",
        b'9\t"Nine\n',  # no mark follows at all
        b"10\tTen\n",
    ]
    source.write_bytes(b"index\ttext\n" + b"".join(lines))
    found = copy_with_prefix(source, out, "text")
    quotation = "a quotation mark opens a field, and none closes it"
    assert [row.values.get("text") for row in found if not row.fault] == ["Two", 'Th"ree\nlines', None, "Ten"]
    assert {number: reason.split(" (")[0] for number, reason in faults(found).items()} == {
        1: quotation,
        4: "1 fields under a header of 2",
        6: "not valid UTF-8",
        7: "not a tab-separated row",
        8: "3 fields under a header of 2",
        9: "not a tab-separated row",
        10: quotation,
    }
    for place, line in ((1, "2\t译 Two\n"), (2, '3\t"译 Th""ree\nlines"\n'), (10, "10\t译 Ten\n")):
        lines[place] = line.encode()
    assert out.read_bytes() == b"index\ttext\n" + b"".join(lines)


def test_broken_prompts_are_copied_as_they_stand(tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(b"One\nTw\xff\r\nThree")
    assert faults(copy_with_prefix(source, out)) == {2: "not valid UTF-8 (byte 3)"}
    assert out.read_bytes() == "译 One\n".encode() + b"Tw\xff\r\n" + "译 Three".encode()


def test_broken_values_of_parquet_are_copied_as_they_stand(tmp_path):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    offsets = pa.array([0, 3, 5, 8], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"OneT\xffTwo")])
    pq.write_table(pa.table({"text": broken, "id": [1, 2, 3]}), source)
    [[number, fault]] = faults(copy_with_prefix(source, out, "text")).items()
    assert (number, fault) == (2, "column 'text': not valid UTF-8")
    written = pq.read_table(out)
    assert written.column("text").cast(pa.binary()).to_pylist() == ["译 One".encode(), b"T\xff", "译 Two".encode()]
    assert written.column("id").to_pylist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "index\tquestion\n1\ta\n", "no column 'text'; its columns are index, question"),
        ("a.tsv", "text\ttext\n1\ta\n", "more than one column 'text'"),
        ("a.tsv", "", "no column 'text'; its columns are none"),
        ("a.tsv", 'index\t"text\n1\ta\n', "the header cannot be read: a quotation mark opens a field"),
        ("a.parquet", "PAR1", "the Parquet file cannot be read"),
        ("b.jsonl", None, "no such file"),
    ],
)
def test_says_what_is_wrong_with_a_whole_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}: {message}")) as caught:
        open_table(tmp_path / name, ("text",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "txt", "parquet"])
def test_refuses_a_row_that_is_too_large(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2**20)
    source, large = tmp_path / f"in.{kind}", "x" * (2**20 + 1)
    columns = () if kind == "txt" else ("text",)
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a"] * 40, "image": ["b"] * 39 + [large]}), source)
    else:
        content = {"jsonl": '{"text": "a", "image": "%s"}\n', "tsv": 'text\timage\na\t"b\n%s"\n', "txt": "a\n%s\n"}
        source.write_text(content[kind] % large)
    with pytest.raises(DataError, match=r"larger than 1 MB"):
        list(open_table(source, columns).rows())
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2**22)
    assert list(open_table(source, columns).rows())


def test_columns_that_do_not_go_with_the_file(tmp_path):
    for name, columns, message in (
        ("a.jsonl", (), "name at least one"),
        ("a.txt", ("text",), "leave --column out"),
        ("a.csv", ("text",), "must end in one of .jsonl, .parquet, .tsv, .txt"),
    ):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UsageError, match=message):
            open_table(tmp_path / name, columns)


def test_texts_are_put_back_where_they_were():
    value = ["a", {"from": "x", "value": "b"}, 1.5, ["c"]]
    with pytest.raises(DataError, match="a list within a list"):
        texts_of(value)
    assert texts_of(value[:3]) == ["a", "b"]
    assert with_texts(value[:3], iter(["A", "B"])) == ["A", {"from": "x", "value": "B"}, 1.5]
    assert value[0] == "a"
