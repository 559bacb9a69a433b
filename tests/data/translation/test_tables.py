import csv
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.translation.conftest import answer, into_chinese, read_jsonl
from uni_x.data.translation import tables
from uni_x.data.translation.translate import (
    plan,
    translate,
)
from uni_x.data.translation.values import texts_of, with_texts
from uni_x.errors import DataError, UsageError


def test_jsonl_keeps_every_other_character(server, options, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"id": 1e5,  "text" : "Hello" ,"n":[0.10, {"text":"no"}], "e":"\\u00e9\\ud800"}\r\n'
        b"\n"
        b'{ "x": 12345678901234567890.5, "text": null }\n'
        b'{"text": 7}\n'
        b'{"x": 1, "text": " Good \\u00e9\\n"}'
    )
    summary = translate(source, out, options())
    assert (
        out.read_bytes()
        == (
            '{"id": 1e5,  "text" : "译 Hello" ,"n":[0.10, {"text":"no"}], "e":"\\u00e9\\ud800"}\r\n'
            "\n"
            '{ "x": 12345678901234567890.5, "text": null }\n'
            '{"text": 7}\n'
            '{"x": 1, "text": " 译 Good é\\n"}'
        ).encode()
    )
    assert (summary.rows, summary.translated, summary.unchanged, summary.failed) == (5, 2, 3, 0)
    assert sorted(server.texts) == ["Good é", "Hello"]


def test_conversations_in_every_shape(options, tmp_path):
    shapes = [
        ["Hi", None, "42", "Bye"],
        [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": None}],
        [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Bye"}],
        [{"user": "Hi", "assistant": "Bye"}, {"user": "So", "assistant": "No", "system": "Be kind"}],
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"c": shape}) + "\n" for shape in shapes))
    assert translate(source, tmp_path / "out.jsonl", options(columns=("c",))).translated == 4
    assert [row["c"] for row in read_jsonl(tmp_path / "out.jsonl")] == [
        ["译 Hi", None, "42", "译 Bye"],
        [{"role": "user", "content": "译 Hi", "name": "Ann"}, {"role": "assistant", "content": None}],
        [{"from": "human", "value": "译 <image>\nHi"}, {"from": "gpt", "value": "译 Bye"}],
        [
            {"user": "译 Hi", "assistant": "译 Bye"},
            {"user": "译 So", "assistant": "译 No", "system": "译 Be kind"},
        ],
    ]


def test_parquet_keeps_schema_groups_and_other_columns(options, tmp_path):
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
    summary = translate(source, out, options(columns=("turns", "kind")))
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
    assert (summary.rows, summary.translated, summary.unchanged) == (7, 6, 1)


def test_tsv_keeps_pictures_and_untouched_rows(options, tmp_path):
    picture = "iVBORw0KGgo=" * 30_000  # beyond the csv module's own limit for a field
    head = "index\timage\tquestion\tA\tB\tanswer\n"
    still = f'8\t"{picture}"\t12 + 3?\t15\t\tA\n'
    source, out = tmp_path / "in.tsv", tmp_path / "out.tsv"
    content = head + f'7\t{picture}\t"What is ""it""?\nLook."\tA cat\t5\tA\n' + still
    source.write_text("\ufeff" + content, encoding="utf-8")
    summary = translate(source, out, options(columns=("question", "A", "B")))
    written = out.read_text(encoding="utf-8")
    assert written == head + f'7\t{picture}\t"译 What is ""it""?\nLook."\t译 A cat\t5\tA\n' + still
    with out.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["question"] for row in rows] == ['译 What is "it"?\nLook.', "12 + 3?"]
    assert (summary.rows, summary.translated, summary.unchanged) == (2, 1, 1)


def test_prompt_lists_stay_one_prompt_a_line(server, options, tmp_path):
    def reply(text):
        return answer("一\n二") if text == "Two lines" else into_chinese(text)

    server.reply = reply
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes("A cat\r\n\n 123\nTwo\u2028halves\nTwo lines\nA dog".encode())
    summary = translate(source, out, options(columns=(), retries=1))
    assert out.read_bytes() == "译 A cat\r\n\n 123\n译 Two\u2028halves\nTwo lines\n译 A dog".encode()
    assert (summary.rows, summary.translated, summary.unchanged, summary.failed) == (6, 3, 2, 1)
    [failed] = read_jsonl(tmp_path / "out.txt.failed.jsonl")
    assert failed["row"] == 5
    assert "line break" in failed["reason"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "row 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "row 1: a JSON object is needed"),
        ("a.jsonl", '{"text": {"a": "b"}}\n', "row 1, column 'text': a mapping cannot be translated"),
        ("a.jsonl", '{"text": [{"speaker": "b"}]}\n', "a mapping of 'speaker' cannot be translated"),
        ("a.jsonl", '{"text": [{"role": "user", "content": ["a"]}]}\n', "'content' of a turn holds a list"),
        ("a.jsonl", '{"texts": "a"}\n', "no row has a column 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not valid UTF-8"),
        ("a.tsv", "index\tquestion\n1\ta\n", "no column 'text'; its columns are index, question"),
        ("a.tsv", "text\ttext\n1\ta\n", "more than one column 'text'"),
        ("a.tsv", "index\ttext\n1\ta\n2\n", "row 2: 1 fields under a header of 2"),
        ("a.tsv", 'index\ttext\n1\t"a\n', "not a tab-separated row"),
        ("a.tsv", "", "no column 'text'; its columns are none"),
        ("a.parquet", "PAR1", "the Parquet file cannot be read"),
        ("b.jsonl", None, "no such file"),
    ],
)
def test_names_what_cannot_be_read_before_sending(server, options, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        translate(tmp_path / name, tmp_path / f"out-{name}", options())
    assert "\n" not in str(caught.value)
    assert not server.requests
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "txt", "parquet"])
def test_refuses_a_row_that_is_too_large(options, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 2**20)
    source, large = tmp_path / f"in.{kind}", "x" * (2**20 + 1)
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a"] * 40, "image": ["b"] * 39 + [large]}), source)
    else:
        rows = {"jsonl": '{"text": "a", "image": "%s"}\n', "tsv": 'text\timage\na\t"b\n%s"\n', "txt": "a\n%s\n"}
        source.write_text(rows[kind] % large)
    with pytest.raises(DataError, match=r"larger than 1 MB"):
        plan(source, options(columns=() if kind == "txt" else ("text",)))
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 2**22)
    assert plan(source, options(columns=() if kind == "txt" else ("text",))).rows >= 1


def test_columns_and_names_that_do_not_fit(options, tmp_path, texts_file):
    source = texts_file("Hello")
    prompts = tmp_path / "a.txt"
    prompts.write_text("Hello\n")
    for path, out, columns, message in (
        (source, "out.jsonl", (), "name at least one"),
        (prompts, "out.txt", ("text",), "leave --column out"),
        (tmp_path / "a.csv", "out.csv", ("text",), "must end in one of .jsonl, .parquet, .tsv, .txt"),
        (source, "out.tsv", ("text",), "must end in .jsonl"),
        (source, source.name, ("text",), "take the source's place"),
    ):
        with pytest.raises(UsageError, match=message):
            translate(path, tmp_path / out, options(columns=columns))


def test_texts_are_put_back_where_they_were():
    value = ["a", {"from": "x", "value": "b"}, 1.5, ["c"]]
    with pytest.raises(DataError, match="a list within a list"):
        texts_of(value)
    assert texts_of(value[:3]) == ["a", "b"]
    assert with_texts(value[:3], iter(["A", "B"])) == ["A", {"from": "x", "value": "B"}, 1.5]
    assert value[0] == "a"
