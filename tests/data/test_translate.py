import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uni_x.data import text_tables
from uni_x.data.chat_endpoint import Pace, find_address, retry_after
from uni_x.data.text_tables import texts_of, with_texts
from uni_x.data.translate import (
    TranslateOptions,
    TranslatePlan,
    TranslateSummary,
    is_translatable,
    kept_parts,
    plan,
    translate,
)
from uni_x.data.translation_journal import open_journal
from uni_x.errors import DataError, MissingExtraError, RunError, UsageError

KEY = "sk-very-secret-7351"


def answer(text, **choice):
    """What a server sends for a translation."""
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3},
    }
    return 200, {}, json.dumps(body)


def into_chinese(text):
    return answer(f"译 {text}")


class ChatServer(ThreadingHTTPServer):
    """A server that translates by putting 译 in front; `reply` gives (status, headers, body or pieces of
    it) for a text, or None to hang up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = into_chinese
        self.requests = []
        self.keys = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self):
        return [request["messages"][-1]["content"] for request in self.requests]

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.keys.append(self.headers["Authorization"])
        found = self.server.reply(request["messages"][-1]["content"])
        if found is None:
            self.close_connection = True
            return
        status, headers, body = found
        if isinstance(body, str):
            headers = {"Content-Length": str(len(body.encode())), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in [body] if isinstance(body, str) else body:
            self.wfile.write(piece.encode())

    def log_message(self, *words):
        pass


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with ChatServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def options(server):
    def make(**changes):
        defaults = {"columns": ("text",), "base_url": server.url, "first_wait": 0.001}
        return TranslateOptions(**{"model": "m", "to": "Chinese", **defaults, **changes})

    return make


@pytest.fixture
def texts_file(tmp_path):
    """Writes a JSONL of texts."""

    def write(*texts):
        path = tmp_path / "source.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_texts(path):
    return [row["text"] for row in read_jsonl(path)]


def once(first):
    """Replies with `first` to the first request for each text, and translates after that."""
    seen = Counter()

    def reply(text):
        seen[text] += 1
        return first if seen[text] == 1 else into_chinese(text)

    return reply


class TestFormats:
    def test_jsonl_keeps_every_other_character(self, server, options, tmp_path):
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

    def test_conversations_in_every_shape(self, options, tmp_path):
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

    def test_parquet_keeps_schema_groups_and_other_columns(self, options, tmp_path):
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

    def test_tsv_keeps_pictures_and_untouched_rows(self, options, tmp_path):
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

    def test_prompt_lists_stay_one_prompt_a_line(self, server, options, tmp_path):
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
    def test_names_what_cannot_be_read_before_sending(self, server, options, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            translate(tmp_path / name, tmp_path / f"out-{name}", options())
        assert "\n" not in str(caught.value)
        assert not server.requests
        assert not list(tmp_path.glob("out*"))

    @pytest.mark.parametrize("kind", ["jsonl", "tsv", "txt", "parquet"])
    def test_refuses_a_row_that_is_too_large(self, options, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(text_tables, "MAX_ROW_BYTES", 2**20)
        source, large = tmp_path / f"in.{kind}", "x" * (2**20 + 1)
        if kind == "parquet":
            pq.write_table(pa.table({"text": ["a"] * 40, "image": ["b"] * 39 + [large]}), source)
        else:
            rows = {"jsonl": '{"text": "a", "image": "%s"}\n', "tsv": 'text\timage\na\t"b\n%s"\n', "txt": "a\n%s\n"}
            source.write_text(rows[kind] % large)
        with pytest.raises(DataError, match=r"larger than 1 MB"):
            plan(source, options(columns=() if kind == "txt" else ("text",)))
        monkeypatch.setattr(text_tables, "MAX_ROW_BYTES", 2**22)
        assert plan(source, options(columns=() if kind == "txt" else ("text",))).rows >= 1

    def test_columns_and_names_that_do_not_fit(self, options, tmp_path, texts_file):
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

    def test_texts_are_put_back_where_they_were(self):
        value = ["a", {"from": "x", "value": "b"}, 1.5, ["c"]]
        with pytest.raises(DataError, match="a list within a list"):
            texts_of(value)
        assert texts_of(value[:3]) == ["a", "b"]
        assert with_texts(value[:3], iter(["A", "B"])) == ["A", {"from": "x", "value": "B"}, 1.5]
        assert value[0] == "a"


class TestPlaceholders:
    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("<image>\nLook at <image>.", ["<image>", "<image>"]),
            ("<|vision_start|>1<|vision_end|>", ["<|vision_start|>", "<|vision_end|>"]),
            ("Dear {name}, {0} {} {{ user }}", ["{name}", "{0}", "{}", "{{ user }}"]),
            ("{x[1].y:.2f} and {z!r}", ["{x[1].y:.2f}", "{z!r}"]),
            ("one^^^turn_split^^^two^^^pair_split^^^", ["^^^turn_split^^^", "^^^pair_split^^^"]),
            ("See (https://a.org/b_c?d=1&e=%20), or http://x.y.", ["https://a.org/b_c?d=1&e=%20", "http://x.y"]),
            ("请看https://a.org/b。好", ["https://a.org/b"]),
            ("a</b><br/>", ["</b>", "<br/>"]),
            ("1 < 2 and 3 > 2, {a, b} and a | b", []),
        ],
    )
    def test_what_is_kept(self, text, kept):
        assert kept_parts(text) == Counter(kept)

    def test_texts_without_words_are_not_sent(self):
        assert not any(map(is_translatable, ["", " \n", "12.5 %", "<image>", "{name}: <|im_end|>", "https://a.org"]))
        assert all(map(is_translatable, ["A", "是", "<image> a"]))

    @pytest.mark.parametrize("bad", ["译 Hi", "译 <image><image> Hi", "译 <image> {x} Hi"])
    def test_asks_again_where_one_is_lost_or_invented(self, server, options, texts_file, tmp_path, bad):
        server.reply = once(answer(bad))
        summary = translate(texts_file("<image> Hi"), tmp_path / "out.jsonl", options())
        assert read_texts(tmp_path / "out.jsonl") == ["译 <image> Hi"]
        assert (summary.translated, summary.requests, summary.prompt_tokens) == (1, 2, 20)
        first, second = (request["messages"][0]["content"] for request in server.requests)
        assert "<image>" in first
        assert "not accepted" not in first
        assert "not accepted: it " in second

    def test_a_row_whose_placeholders_never_come_back_fails_whole(self, server, options, tmp_path):
        server.reply = lambda text: answer(f"译 {text.replace('{name}', 'Ann')}")
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        rows = [{"a": "Hello", "b": "Dear {name}"}, {"a": "Bye", "b": ""}, {"a": "...", "b": "1"}]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = translate(source, out, options(columns=("a", "b"), retries=2))
        assert read_jsonl(out) == [rows[0], {"a": "译 Bye", "b": ""}, rows[2]]
        assert summary == TranslateSummary(3, 1, 1, 1, requests=5, prompt_tokens=50, completion_tokens=15)
        assert read_jsonl(tmp_path / "out.jsonl.failed.jsonl") == [
            {"row": 1, "column": "b", "reason": "the translation was not accepted: it lost {name}"}
        ]

    def test_long_texts_fail_rather_than_being_cut(self, server, options, texts_file, tmp_path):
        source = texts_file("a" * 21, "1" * 21, "b" * 20)
        summary = translate(source, tmp_path / "out.jsonl", options(max_characters=20))
        assert read_texts(tmp_path / "out.jsonl") == ["a" * 21, "1" * 21, "译 " + "b" * 20]
        assert (summary.translated, summary.unchanged, summary.failed) == (1, 1, 1)
        [failed] = read_jsonl(tmp_path / "out.jsonl.failed.jsonl")
        assert failed["reason"] == "21 characters are more than 20"
        assert server.texts == ["b" * 20]


class TestRetries:
    @pytest.mark.parametrize(
        "bad",
        [
            (429, {}, ""),
            (500, {}, "<html>"),
            (503, {}, '{"error": {"message": "busy"}}'),
            (200, {}, "<html>sign in</html>"),
            (200, {}, "[]"),
            (200, {}, '{"choices": []}'),
            (200, {}, '{"choices": [{"message": null}]}'),
            answer(""),
            answer(" \n"),
            answer(None),
            answer("译", finish_reason="length"),
            answer("\ud800"),
            None,  # hangs up
        ],
    )
    def test_asks_again_after(self, server, options, texts_file, tmp_path, bad):
        server.reply = once(bad)
        summary = translate(texts_file("One", "Two"), tmp_path / "out.jsonl", options())
        assert read_texts(tmp_path / "out.jsonl") == ["译 One", "译 Two"]
        assert (summary.translated, summary.requests) == (2, 4)

    def test_asks_again_after_a_timeout(self, server, options, texts_file, tmp_path):
        over = threading.Event()
        seen = []

        def reply(text):
            seen.append(text)
            if len(seen) == 1:
                over.wait(30)
            return into_chinese(text)

        server.reply = reply
        summary = translate(texts_file("One"), tmp_path / "out.jsonl", options(timeout=0.5))
        over.set()
        assert (summary.translated, summary.requests) == (1, 2)

    def test_an_answer_that_comes_in_drops_times_out_too(self, server, options, texts_file, tmp_path):
        over = threading.Event()
        seen = []

        def drops(content):
            for _ in range(100):
                yield " "
                if over.wait(0.1):
                    return
            yield content

        def reply(text):
            seen.append(text)
            status, headers, body = into_chinese(text)
            return (status, {"Connection": "close"}, drops(body)) if len(seen) == 1 else (status, headers, body)

        server.reply = reply
        summary = translate(texts_file("One"), tmp_path / "out.jsonl", options(timeout=0.5))
        over.set()
        assert (summary.translated, summary.requests) == (1, 2)

    def test_the_server_s_retry_after_is_kept_in_place_of_the_own_wait(self, server, options, texts_file, tmp_path):
        opens = []

        def reply(text):
            with server.lock:
                opens.append(time.monotonic() + 0.4)
            return (429, {"Retry-After": "0.5"}, "") if time.monotonic() < opens[0] else into_chinese(text)

        server.reply = reply
        source, out = texts_file("One", "Two"), tmp_path / "out.jsonl"
        # the wait of its own is longer than the test's patience, and a request too early costs the only retry
        hasty = options(first_wait=10_000, retries=1)
        thread = threading.Thread(target=translate, args=(source, out, hasty), daemon=True)
        thread.start()
        thread.join(20)
        assert out.exists()
        assert read_texts(out) == ["译 One", "译 Two"]

    def test_a_retry_after_of_hours_ends_the_run(self, server, options, texts_file, tmp_path):
        server.reply = lambda text: (429, {"Retry-After": "7200"}, "")
        with pytest.raises(RunError, match="429: come back in 7200 seconds"):
            translate(texts_file("One"), tmp_path / "out.jsonl", options())
        assert len(server.requests) == 1

    def test_reads_retry_after_as_seconds_or_date(self):
        assert retry_after("2.5", 0) == 2.5
        assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 40) == 60
        assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 1000) == 0
        assert [retry_after(header, 0) for header in (None, "soon", "inf", "")] == [None] * 4

    def test_the_pace_is_even_and_stops_for_pauses(self):
        pace = Pace(requests_per_minute=30)
        assert [pace.delay(100), pace.delay(100.5), pace.delay(102), pace.delay(102)] == [0, 1.5, 0, 2]
        pace.pause(102, 10)
        assert [pace.delay(104), pace.delay(112), pace.delay(112)] == [8, 0, 2]
        pace.pause(112, 0)
        assert pace.delay(112) == 2
        free = Pace(None)
        assert [free.delay(1), free.delay(1)] == [0, 0]

    def test_a_row_that_always_breaks_the_server_fails_alone(self, server, options, texts_file, tmp_path):
        server.reply = lambda text: (500, {}, "boom") if text == "Bad" else into_chinese(text)
        summary = translate(texts_file("One", "Bad", "Two"), tmp_path / "out.jsonl", options(retries=2))
        assert read_texts(tmp_path / "out.jsonl") == ["译 One", "Bad", "译 Two"]
        assert server.texts.count("Bad") == 3
        assert read_jsonl(tmp_path / "out.jsonl.failed.jsonl") == [
            {"row": 2, "column": "text", "reason": "the server answers 500 (boom)"}
        ]
        assert (summary.rows, summary.translated, summary.failed) == (3, 2, 1)

    def test_what_the_server_will_not_take_is_not_sent_again(self, server, options, texts_file, tmp_path):
        refusal = '{"error": {"message": "unsafe\\n text"}}'
        server.reply = lambda text: (400, {}, refusal) if text == "Bad" else into_chinese(text)
        translate(texts_file("Bad", "One"), tmp_path / "out.jsonl", options())
        assert server.texts.count("Bad") == 1
        [failed] = read_jsonl(tmp_path / "out.jsonl.failed.jsonl")
        assert failed["reason"] == "the server answers 400 (unsafe text)"

    def test_an_endpoint_that_is_down_costs_no_row(self, server, options, texts_file, tmp_path):
        source, out = texts_file("One", "Two", "Three"), tmp_path / "out.jsonl"
        server.reply = lambda text: into_chinese(text) if text == "One" else (503, {}, "")
        with pytest.raises(RunError, match="answers 503; the same command goes on"):
            translate(source, out, options(retries=1, concurrency=1))
        assert not out.exists()
        server.reply = into_chinese
        summary = translate(source, out, options())
        assert read_texts(out) == ["译 One", "译 Two", "译 Three"]
        assert summary.failed == 0
        assert server.texts.count("One") == 1

    def test_nothing_listens(self, options, texts_file, tmp_path):
        with pytest.raises(RunError, match=r"no connection to http://127\.0\.0\.1:1/v1"):
            translate(texts_file("One"), tmp_path / "out.jsonl", options(base_url="http://127.0.0.1:1/v1", retries=1))

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            ((401, {}, ""), "401: the key in OPENAI_API_KEY is missing or refused"),
            ((402, {}, ""), "402: the account has no credit"),
            ((404, {}, '{"error": "no model m"}'), r"404: no such address or model.*no model m"),
            ((307, {"Location": "https://b.org/v1"}, ""), "307: it has moved to https://b.org/v1"),
        ],
    )
    def test_what_the_user_must_mend_ends_the_run(self, server, options, texts_file, tmp_path, reply, message):
        server.reply = lambda text: reply
        with pytest.raises(RunError, match=message):
            translate(texts_file("One"), tmp_path / "out.jsonl", options())
        assert len(server.requests) == 1


class TestRequests:
    def test_what_is_asked(self, server, options, texts_file, tmp_path):
        source = texts_file("Hello")
        translate(source, tmp_path / "out.jsonl", options(source_language="English"))
        [request] = server.requests
        assert request["model"] == "m"
        system, user = request["messages"]
        assert (system["role"], user) == ("system", {"role": "user", "content": "Hello"})
        assert "from English to Chinese" in system["content"]

    def test_so_many_at_once_and_no_more(self, server, options, texts_file, tmp_path):
        meeting = threading.Barrier(4)
        busy, most = 0, 0

        def reply(text):
            nonlocal busy, most
            with server.lock:
                busy += 1
                most = max(most, busy)
            try:
                meeting.wait(20)  # ends only when four requests are here together
            except threading.BrokenBarrierError:
                return 400, {}, "alone"
            finally:
                with server.lock:
                    busy -= 1
            return into_chinese(text)

        server.reply = reply
        texts = [f"Text {number}" for number in range(12)]
        summary = translate(texts_file(*texts), tmp_path / "out.jsonl", options(concurrency=4))
        assert read_texts(tmp_path / "out.jsonl") == [f"译 {text}" for text in texts]
        assert (summary.translated, most) == (12, 4)

    def test_order_is_the_source_s_whatever_comes_first(self, server, options, texts_file, tmp_path):
        second_is_done = threading.Event()

        def reply(text):
            if text == "First":
                second_is_done.wait(20)
            return into_chinese(text)

        server.reply = reply
        seen = []

        def progress(done, total, word):
            seen.append((done, total))
            if done:
                second_is_done.set()

        translate(texts_file("First", "Second", "3"), tmp_path / "out.jsonl", options(), progress)
        assert read_texts(tmp_path / "out.jsonl") == ["译 First", "译 Second", "3"]
        assert [entry["row"] for entry in read_jsonl(tmp_path / "out.jsonl.journal.jsonl")[1:-1]] == [2, 1]
        assert seen == [(0, 2), (1, 2), (2, 2)]

    def test_the_key_is_sent_and_shown_nowhere(self, server, options, texts_file, tmp_path, monkeypatch, capfd):
        monkeypatch.setenv("MY_KEY", f" {KEY}\n")
        server.reply = lambda text: (400, {}, f"no: {KEY}") if text == "Bad" else into_chinese(text)
        source, out = texts_file("Good", "Bad"), tmp_path / "out.jsonl"
        translate(source, out, options(key_variable="MY_KEY"))
        assert set(server.keys) == {f"Bearer {KEY}"}
        written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"no: ***" in written
        server.reply = lambda text: (401, {}, f"wrong key {KEY}")
        with pytest.raises(RunError, match="MY_KEY is missing or refused") as caught:
            translate(source, tmp_path / "again.jsonl", options(key_variable="MY_KEY"))
        shown = f"{caught.value!r} {caught.value} {find_address(server.url, 'MY_KEY')!r} {capfd.readouterr()}"
        assert KEY not in shown + written.decode()

    def test_the_address_comes_from_the_environment(self, server, options, texts_file, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        translate(texts_file("One"), tmp_path / "out.jsonl", options(base_url=None))
        assert server.keys == [None]

    def test_keys_go_only_where_nobody_listens_in(self, monkeypatch):
        assert find_address().url == "https://api.openai.com/v1"
        assert find_address("http://10.0.0.7:8000/v1").key == ""
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        for url in ("http://10.0.0.7:8000/v1", "http://localhost.evil.org/v1", "http://0.0.0.0/v1"):
            with pytest.raises(UsageError, match="would send the key in the clear") as caught:
                find_address(url)
            assert KEY not in str(caught.value)
        for url in ("https://a.org/v1", "http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:8000/v1"):
            assert find_address(url).key == KEY
        for url in ("a.org/v1", "ftp://a.org", "https://", "https://u:p@a.org/v1", "https://a.org:x/v1"):
            with pytest.raises(UsageError, match="the base URL must"):
                find_address(url)

    def test_keys_that_are_none(self, monkeypatch):
        with pytest.raises(UsageError, match="MY_KEY is not set"):
            find_address("https://a.org/v1", "MY_KEY")
        monkeypatch.setenv("MY_KEY", "schlüssel")
        with pytest.raises(UsageError, match="MY_KEY holds characters that no key has"):
            find_address("https://a.org/v1", "MY_KEY")

    def test_a_proxy_does_not_come_between_a_machine_and_itself(
        self, server, options, texts_file, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert translate(texts_file("One"), tmp_path / "out.jsonl", options()).translated == 1

    def test_says_what_to_install(self, options, texts_file, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "httpx2", None)
        with pytest.raises(MissingExtraError, match=r"uni-x\[translate\]"):
            translate(texts_file("One"), tmp_path / "out.jsonl", options())

    @pytest.mark.parametrize(
        "changes",
        [
            {"concurrency": 0},
            {"retries": -1},
            {"requests_per_minute": 0},
            {"timeout": float("nan")},
            {"to": " "},
            {"columns": ("a", "a")},
        ],
    )
    def test_options_out_of_range(self, options, changes):
        with pytest.raises(UsageError, match=next(iter(changes))):
            options(**changes)


class TestGoingOn:
    def test_ctrl_c_keeps_what_is_done(self, server, options, texts_file, tmp_path):
        texts = [f"Text {number}" for number in range(10)]
        source, out = texts_file(*texts), tmp_path / "out.jsonl"

        def interrupt(done, total, word):
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            translate(source, out, options(concurrency=1), interrupt)
        assert not out.exists()
        seen = []
        summary = translate(source, out, options(concurrency=1), lambda done, total, word: seen.append(done))
        assert seen[0] == 4
        assert read_texts(out) == [f"译 {text}" for text in texts]
        assert len(server.texts) == len(set(server.texts)) == 10
        assert (summary.requests, summary.prompt_tokens, summary.completion_tokens) == (10, 100, 30)

    def test_ctrl_c_ends_requests_in_order_whoever_handles_it(self, server, options, texts_file, tmp_path):
        over = threading.Event()
        calls = []

        def handler(number, frame):
            calls.append(number)

        def reply(text):
            if text == "Two":
                os.kill(os.getpid(), signal.SIGINT)
                over.wait(20)
            return into_chinese(text)

        server.reply = reply
        before = signal.signal(signal.SIGINT, handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                translate(texts_file("One", "Two"), tmp_path / "out.jsonl", options(concurrency=1))
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            over.set()
            signal.signal(signal.SIGINT, before)
        assert not calls
        assert len(read_jsonl(tmp_path / "out.jsonl.journal.jsonl")) == 2

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_a_killed_process_loses_only_the_rows_in_flight(self, server, options, texts_file, tmp_path, number):
        texts = [f"Text {index}" for index in range(30)]
        source, out = texts_file(*texts), tmp_path / "out.jsonl"
        enough, over = threading.Event(), threading.Event()
        seen = []

        def reply(text):
            seen.append(text)
            if len(seen) > 10:
                enough.set()
                over.wait(60)
            return into_chinese(text)

        server.reply = reply
        code = (
            "import sys; from pathlib import Path; from uni_x.data.translate import *\n"
            "options = TranslateOptions('m', 'Chinese', ('text',), base_url=sys.argv[3], concurrency=3)\n"
            "translate(Path(sys.argv[1]), Path(sys.argv[2]), options)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, source, out, server.url],
            stderr=subprocess.PIPE,
            # where the tests run in the background of a shell, Ctrl-C is ignored by all that they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert enough.wait(60)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
        over.set()
        server.reply = into_chinese
        assert process.returncode != 0
        assert (b"KeyboardInterrupt" in said) == (number == signal.SIGINT)
        assert not out.exists()
        summary = translate(source, out, options())
        assert read_texts(out) == [f"译 {text}" for text in texts]
        assert (summary.rows, summary.translated, summary.requests) == (30, 30, 30)
        assert len(server.texts) <= 30 + 3

    def test_a_line_that_was_being_written_does_not_count(self, server, options, texts_file, tmp_path):
        source, out = texts_file("One", "Two", "Three"), tmp_path / "out.jsonl"
        journal = tmp_path / "out.jsonl.journal.jsonl"
        translate(source, out, options(concurrency=1))
        whole = journal.read_bytes()
        header, first, second, *_ = whole.splitlines(keepends=True)
        for cut in (len(header) // 2, len(header), len(header) + 5, len(header + first + second) - 1):
            out.unlink()
            server.requests.clear()
            journal.write_bytes(whole[:cut])
            assert translate(source, out, options(concurrency=1)).translated == 3
            assert read_texts(out) == ["译 One", "译 Two", "译 Three"]
            assert server.texts == ["One", "Two", "Three"][whole[:cut].count(b"\n") - 1 if cut >= len(header) else 0 :]
            assert journal.read_bytes() == whole

    def test_finished_work_is_left_alone(self, server, options, texts_file, tmp_path):
        source, out = texts_file("One", "2"), tmp_path / "out.jsonl"
        first = translate(source, out, options())
        assert not first.already_done
        out.write_text("mine now")
        server.requests.clear()
        again = translate(source, out, options(concurrency=3, base_url="http://127.0.0.1:1/v1"))
        assert again == TranslateSummary(**{**vars(first), "already_done": True})
        assert out.read_text() == "mine now"
        out.unlink()
        assert not translate(source, out, options()).already_done
        assert read_texts(out) == ["译 One", "2"]
        assert not server.requests

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "n"}, r"another model \('m', now 'n'\)"),
            ({"to": "German"}, r"another to \('Chinese', now 'German'\)"),
            ({"source_language": "English"}, "another source language"),
            ({"columns": ("text", "b")}, "another columns"),
            ({"max_characters": 5}, "another max characters"),
            ({}, "another source;"),
        ],
    )
    def test_another_source_or_setting_is_refused(self, server, options, tmp_path, changes, message):
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text('{"text": "One", "b": "Two"}\n')
        translate(source, out, options())
        if not changes:
            source.write_text('{"text": "One", "b": "Three"}\n')
        kept = (tmp_path / "out.jsonl.journal.jsonl").read_bytes()
        with pytest.raises(RunError, match=message) as caught:
            translate(source, out, options(**changes))
        assert "\n" not in str(caught.value)
        assert (tmp_path / "out.jsonl.journal.jsonl").read_bytes() == kept
        assert len(server.requests) == 1

    def test_a_journal_without_rows_binds_nobody(self, server, options, texts_file, tmp_path):
        source, out = texts_file("One"), tmp_path / "out.jsonl"
        with pytest.raises(UsageError, match="is not set"):
            translate(source, out, options(key_variable="NO_SUCH_KEY"))
        assert translate(source, out, options(to="German")).translated == 1

    def test_files_of_others_are_not_touched(self, options, texts_file, tmp_path):
        source, out = texts_file("One"), tmp_path / "out.jsonl"
        out.write_text("precious")
        with pytest.raises(RunError, match="exists already"):
            translate(source, out, options())
        assert out.read_text() == "precious"
        for content in ("a list\n", "{}", '{"row": 1}\n{"row": 2}\n'):
            (tmp_path / "out.jsonl.journal.jsonl").write_text(content)
            with pytest.raises(RunError, match=r"not a journal|another format"):
                translate(source, out, options())
            assert (tmp_path / "out.jsonl.journal.jsonl").read_text() == content

    def test_a_damaged_journal_is_refused(self, options, texts_file, tmp_path):
        source, out = texts_file("One", "Two"), tmp_path / "out.jsonl"
        translate(source, out, options())
        journal = tmp_path / "out.jsonl.journal.jsonl"
        header, first, *rest = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(header + first[:-5] + b"\n" + b"".join(rest))
        with pytest.raises(RunError, match=f"damaged at byte {len(header)}"):
            translate(source, out, options())

    def test_two_runs_at_once_are_refused(self, options, texts_file, tmp_path):
        with (
            open_journal(tmp_path / "out.jsonl.journal.jsonl", {"format": 1}),
            pytest.raises(RunError, match="another run is writing it"),
        ):
            translate(texts_file("One"), tmp_path / "out.jsonl", options())

    def test_failures_of_an_earlier_journal_go_with_it(self, options, texts_file, tmp_path):
        source, out = texts_file("One hundred"), tmp_path / "out.jsonl"
        translate(source, out, options(max_characters=5))
        assert (tmp_path / "out.jsonl.failed.jsonl").exists()
        (tmp_path / "out.jsonl.journal.jsonl").unlink()
        out.unlink()
        translate(source, out, options())
        assert not (tmp_path / "out.jsonl.failed.jsonl").exists()


class TestPlan:
    def test_counts_and_sends_nothing(self, server, options, texts_file):
        source = texts_file("Hello", "12", "x" * 50, "Hello <image>")
        counted = plan(source, options(max_characters=20))
        prompts = counted.prompt_tokens
        assert counted == TranslatePlan(4, 1, 1, 2, 18, prompts, text_tokens=6, estimated=True)
        assert prompts > 100
        assert not server.requests

    def test_with_a_tokenizer(self, options, texts_file, text_tokenizer, tmp_path):
        text_tokenizer.save_pretrained(tmp_path / "tokenizer")
        counted = plan(
            texts_file("a red heart left of a blue car", "two yellow stars"), options(), tmp_path / "tokenizer"
        )
        expected = sum(
            len(text_tokenizer(text)["input_ids"]) for text in ("a red heart left of a blue car", "two yellow stars")
        )
        assert (counted.requests, counted.text_tokens, counted.estimated) == (2, expected, False)
        assert counted.prompt_tokens > expected

    def test_tokenizers_that_cannot_be_read(self, options, texts_file, tmp_path):
        with pytest.raises(DataError, match=r"no tokenizer\.json"):
            plan(texts_file("a"), options(), tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(DataError, match="the tokenizer cannot be read"):
            plan(texts_file("a"), options(), tmp_path)

    def test_agrees_with_what_translating_took(self, server, options, texts_file, tmp_path):
        source = texts_file("Hello", "12", "x" * 50, "Bye")
        counted = plan(source, options(max_characters=20))
        summary = translate(source, tmp_path / "out.jsonl", options(max_characters=20))
        assert (counted.requests, counted.rows, counted.unchanged) == (summary.requests, 4, summary.unchanged)
        assert counted.too_long == summary.failed == 1
        assert counted.requests == len(server.requests)
