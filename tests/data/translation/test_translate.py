import json
import threading
from collections import Counter

import pytest

from tests.data.translation.conftest import answer, into_chinese, once, read_jsonl, read_texts
from uni_x.data.translation.placeholders import is_translatable, kept_parts
from uni_x.data.translation.translate import (
    TranslatePlan,
    TranslateSummary,
    plan,
    translate,
)
from uni_x.errors import DataError, RunError, UsageError


def test_what_is_asked(server, options, texts_file, tmp_path):
    source = texts_file("Hello")
    translate(source, tmp_path / "out.jsonl", options(source_language="English"))
    [request] = server.requests
    assert request["model"] == "m"
    system, user = request["messages"]
    assert (system["role"], user) == ("system", {"role": "user", "content": "Hello"})
    assert "from English to Chinese" in system["content"]


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
def test_what_is_kept(text, kept):
    assert kept_parts(text) == Counter(kept)


def test_texts_without_words_are_not_sent():
    assert not any(map(is_translatable, ["", " \n", "12.5 %", "<image>", "{name}: <|im_end|>", "https://a.org"]))
    assert all(map(is_translatable, ["A", "是", "<image> a"]))


@pytest.mark.parametrize("bad", ["译 Hi", "译 <image><image> Hi", "译 <image> {x} Hi"])
def test_asks_again_where_one_is_lost_or_invented(server, options, texts_file, tmp_path, bad):
    server.reply = once(answer(bad))
    summary = translate(texts_file("<image> Hi"), tmp_path / "out.jsonl", options())
    assert read_texts(tmp_path / "out.jsonl") == ["译 <image> Hi"]
    assert (summary.translated, summary.requests, summary.prompt_tokens) == (1, 2, 20)
    first, second = (request["messages"][0]["content"] for request in server.requests)
    assert "<image>" in first
    assert "not accepted" not in first
    assert "not accepted: it " in second


def test_a_row_whose_placeholders_never_come_back_fails_whole(server, options, tmp_path):
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


def test_long_texts_fail_rather_than_being_cut(server, options, texts_file, tmp_path):
    source = texts_file("a" * 21, "1" * 21, "b" * 20)
    summary = translate(source, tmp_path / "out.jsonl", options(max_characters=20))
    assert read_texts(tmp_path / "out.jsonl") == ["a" * 21, "1" * 21, "译 " + "b" * 20]
    assert (summary.translated, summary.unchanged, summary.failed) == (1, 1, 1)
    [failed] = read_jsonl(tmp_path / "out.jsonl.failed.jsonl")
    assert failed["reason"] == "21 characters are more than 20"
    assert server.texts == ["b" * 20]


def test_a_row_that_always_breaks_the_server_fails_alone(server, options, texts_file, tmp_path):
    server.reply = lambda text: (500, {}, "boom") if text == "Bad" else into_chinese(text)
    summary = translate(texts_file("One", "Bad", "Two"), tmp_path / "out.jsonl", options(retries=2))
    assert read_texts(tmp_path / "out.jsonl") == ["译 One", "Bad", "译 Two"]
    assert server.texts.count("Bad") == 3
    assert read_jsonl(tmp_path / "out.jsonl.failed.jsonl") == [
        {"row": 2, "column": "text", "reason": "the server answers 500 (boom)"}
    ]
    assert (summary.rows, summary.translated, summary.failed) == (3, 2, 1)


def test_what_the_server_will_not_take_is_not_sent_again(server, options, texts_file, tmp_path):
    refusal = '{"error": {"message": "unsafe\\n text"}}'
    server.reply = lambda text: (400, {}, refusal) if text == "Bad" else into_chinese(text)
    translate(texts_file("Bad", "One"), tmp_path / "out.jsonl", options())
    assert server.texts.count("Bad") == 1
    [failed] = read_jsonl(tmp_path / "out.jsonl.failed.jsonl")
    assert failed["reason"] == "the server answers 400 (unsafe text)"


def test_an_endpoint_that_is_down_costs_no_row(server, options, texts_file, tmp_path):
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


def test_so_many_at_once_and_no_more(server, options, texts_file, tmp_path):
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


def test_order_is_the_source_s_whatever_comes_first(server, options, texts_file, tmp_path):
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
def test_options_out_of_range(options, changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        options(**changes)


def test_a_plan_counts_and_sends_nothing(server, options, texts_file):
    source = texts_file("Hello", "12", "x" * 50, "Hello <image>")
    counted = plan(source, options(max_characters=20))
    prompts = counted.prompt_tokens
    assert counted == TranslatePlan(4, 1, 1, 2, 18, prompts, text_tokens=6, estimated=True)
    assert prompts > 100
    assert not server.requests


def test_a_plan_counts_with_a_tokenizer(options, texts_file, text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path / "tokenizer")
    counted = plan(texts_file("a red heart left of a blue car", "two yellow stars"), options(), tmp_path / "tokenizer")
    expected = sum(
        len(text_tokenizer(text)["input_ids"]) for text in ("a red heart left of a blue car", "two yellow stars")
    )
    assert (counted.requests, counted.text_tokens, counted.estimated) == (2, expected, False)
    assert counted.prompt_tokens > expected


def test_tokenizers_that_cannot_be_read(options, texts_file, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        plan(texts_file("a"), options(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        plan(texts_file("a"), options(), tmp_path)


def test_a_plan_agrees_with_what_translating_took(server, options, texts_file, tmp_path):
    source = texts_file("Hello", "12", "x" * 50, "Bye")
    counted = plan(source, options(max_characters=20))
    summary = translate(source, tmp_path / "out.jsonl", options(max_characters=20))
    assert (counted.requests, counted.rows, counted.unchanged) == (summary.requests, 4, summary.unchanged)
    assert counted.too_long == summary.failed == 1
    assert counted.requests == len(server.requests)
