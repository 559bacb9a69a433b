import json
import threading
from collections import Counter
from dataclasses import replace

import pytest

from tests.data.translation.conftest import answer, into_chinese, once, read_jsonl, read_texts
from uni_x.data.translation.endpoint import Usage
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
    assert (summary.translated, summary.spent.requests, summary.spent.prompt_tokens) == (1, 2, 20)
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
    spent = Usage(requests=5, prompt_tokens=50, completion_tokens=15)
    assert summary == TranslateSummary(rows=3, translated=1, without_text=1, failed=1, spent=spent, spent_in_all=spent)
    assert read_jsonl(tmp_path / "out.jsonl.untranslated.jsonl") == [
        {"row": 1, "outcome": "failed", "column": "b", "reason": "the translation was not accepted: it lost {name}"}
    ]


def test_long_texts_fail_rather_than_being_cut(server, options, texts_file, tmp_path):
    source = texts_file("a" * 21, "1" * 21, "b" * 20)
    summary = translate(source, tmp_path / "out.jsonl", options(max_characters=20))
    assert read_texts(tmp_path / "out.jsonl") == ["a" * 21, "1" * 21, "译 " + "b" * 20]
    assert (summary.translated, summary.without_text, summary.failed) == (1, 1, 1)
    [failed] = read_jsonl(tmp_path / "out.jsonl.untranslated.jsonl")
    assert failed["reason"] == "21 characters are more than the 20 of --max-characters"
    assert server.texts == ["b" * 20]
    # a higher limit is no other translation
    assert translate(source, tmp_path / "out.jsonl", options(max_characters=21)).failed == 0
    assert read_texts(tmp_path / "out.jsonl") == ["译 " + "a" * 21, "1" * 21, "译 " + "b" * 20]
    assert server.texts == ["b" * 20, "a" * 21]


def test_prompts_stay_one_a_line(server, options, tmp_path):
    server.reply = lambda text: answer("一\n二")
    (tmp_path / "in.txt").write_text("One\n\n")
    summary = translate(tmp_path / "in.txt", tmp_path / "out.txt", options(columns=(), retries=1))
    assert (tmp_path / "out.txt").read_text() == "One\n\n"
    assert (summary.rows, summary.without_text, summary.failed, summary.spent.requests) == (2, 1, 1, 2)
    [failed] = read_jsonl(tmp_path / "out.txt.untranslated.jsonl")
    assert "line break" in failed["reason"]


@pytest.mark.parametrize(("name", "head", "broken"), [("in.jsonl", "", "[1]"), ("in.tsv", "text\tn\n", "Two")])
def test_a_broken_row_stands_as_it_stood(server, options, tmp_path, name, head, broken):
    source, out = tmp_path / name, tmp_path / f"out-{name}"
    one, two = ('{"text": "One"}', '{"text": "Two"}') if name == "in.jsonl" else ("One\t1", "Two\t2")
    source.write_text(f"{head}{one}\n{broken}\n{two}\n")
    summary = translate(source, out, options())
    assert out.read_text() == source.read_text().replace("One", "译 One").replace(two, two.replace("Two", "译 Two"))
    assert (summary.rows, summary.translated, summary.broken) == (3, 2, 1)
    [found] = read_jsonl(tmp_path / f"out-{name}.untranslated.jsonl")
    assert (found["row"], found["outcome"]) == (2, "broken")
    assert translate(source, out, options()) == replace(summary, spent=Usage(), already_done=True)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]\n[2]\n", "no row can be read; row 1: a JSON object is needed"),
        ('{"text": {"a": "b"}}\n', "row 1: column 'text': a mapping cannot be translated"),
        ('{"id": 1, "texts": "a"}\n[1]\n{"n": 2}\n', "no row .* a column 'text'; its columns are id, texts, n$"),
    ],
)
def test_a_file_without_a_row_to_read_is_refused_before_sending(server, options, tmp_path, content, message):
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        translate(source, tmp_path / "out.jsonl", options())
    assert str(caught.value).startswith(f"{source}: ")
    assert not server.requests
    assert list(tmp_path.iterdir()) == [source]


def test_names_of_outputs_that_do_not_fit(options, texts_file, tmp_path):
    source = texts_file("Hello")
    for out, message in (("out.tsv", "must end in .jsonl"), (source.name, "take the source's place")):
        with pytest.raises(UsageError, match=message):
            translate(source, tmp_path / out, options())


def test_a_text_that_comes_back_as_it_was_is_asked_for_once_more(server, options, texts_file, tmp_path):
    server.reply = once(answer("Hello"))
    summary = translate(texts_file(" Hello\n"), tmp_path / "out.jsonl", options())
    assert read_texts(tmp_path / "out.jsonl") == [" 译 Hello\n"]
    assert (summary.translated, summary.unchanged_texts, summary.spent.requests) == (1, 0, 2)
    assert "not accepted: it was the message itself" in server.requests[1]["messages"][0]["content"]


@pytest.mark.parametrize(("retries", "times"), [(6, 2), (1, 2), (0, 1)])
def test_texts_that_stay_as_they_were_are_counted_apart(server, options, tmp_path, retries, times):
    server.reply = lambda text: answer(text) if text in ("Paris", "Ann") else into_chinese(text)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ['{"a":  "Paris", "b": "Ann"}', '{"a": "Paris", "b": "12"}', '{"a": "Paris", "b": "Bye"}']
    source.write_text("\n".join(lines))
    summary = translate(source, out, options(columns=("a", "b"), retries=retries))
    assert out.read_text() == source.read_text().replace("Bye", "译 Bye")
    assert (summary.rows, summary.translated, summary.unchanged, summary.unchanged_texts) == (3, 1, 2, 4)
    assert Counter(server.texts) == {"Paris": 3 * times, "Ann": times, "Bye": 1}
    places = [(line["row"], line["column"]) for line in read_jsonl(tmp_path / "out.jsonl.untranslated.jsonl")]
    assert places == [(1, "a"), (1, "b"), (2, "a"), (3, "a")]
    assert translate(source, out, options(columns=("a", "b"))).already_done


def test_a_row_that_always_breaks_the_server_fails_alone(server, options, texts_file, tmp_path):
    server.reply = lambda text: (500, {}, "boom") if text == "Bad" else into_chinese(text)
    summary = translate(texts_file("One", "Bad", "Two"), tmp_path / "out.jsonl", options(retries=2))
    assert read_texts(tmp_path / "out.jsonl") == ["译 One", "Bad", "译 Two"]
    assert server.texts.count("Bad") == 3
    assert read_jsonl(tmp_path / "out.jsonl.untranslated.jsonl") == [
        {"row": 2, "outcome": "failed", "column": "text", "reason": "the server answers 500 (boom)"}
    ]
    assert (summary.rows, summary.translated, summary.failed) == (3, 2, 1)


def test_what_the_server_will_not_take_is_not_sent_again(server, options, texts_file, tmp_path):
    refusal = '{"error": {"message": "unsafe\\n text"}}'
    server.reply = lambda text: (400, {}, refusal) if text == "Bad" else into_chinese(text)
    translate(texts_file("Bad", "One"), tmp_path / "out.jsonl", options())
    assert server.texts.count("Bad") == 1
    [failed] = read_jsonl(tmp_path / "out.jsonl.untranslated.jsonl")
    assert failed["reason"] == "the server answers 400 (unsafe text)"


def test_an_endpoint_that_answers_others_is_not_down(server, options, texts_file, tmp_path):
    others = threading.Event()

    def reply(text):
        if text == "Good":
            return into_chinese(text)
        others.wait(20)
        return 500, {}, ""

    server.reply = reply
    summary = translate(
        texts_file("Bad", "Good"), tmp_path / "out.jsonl", options(retries=0), lambda done, *rest: done and others.set()
    )
    assert (summary.translated, summary.failed) == (1, 1)
    assert sorted(server.texts) == ["Bad", "Good"]


def test_rows_that_failed_are_tried_again_alone(server, options, tmp_path):
    server.reply = lambda text: (400, {}, "no") if text == "Bad" else into_chinese(text)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"a": "One", "b": "Two"}, {"a": "Three", "b": "Bad"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = options(columns=("a", "b"))
    assert translate(source, out, both).failed == 1
    assert read_jsonl(out) == [{"a": "译 One", "b": "译 Two"}, rows[1]]
    server.requests.clear()
    assert translate(source, out, both).failed == 1  # in vain
    assert [text for text in server.texts if text != "Hello"] == ["Bad"]  # and a greeting, to see if it is the server
    server.requests.clear()
    server.reply = into_chinese
    seen = []
    summary = translate(source, out, both, lambda done, total, word: seen.append((done, total, word)))
    assert server.texts == ["Bad"]
    assert seen == [(1, 2, "1 failed"), (2, 2, "0 failed")]
    assert read_jsonl(out) == [{"a": "译 One", "b": "译 Two"}, {"a": "译 Three", "b": "译 Bad"}]
    assert not (tmp_path / "out.jsonl.untranslated.jsonl").exists()
    assert (summary.translated, summary.failed) == (2, 0)
    assert (summary.spent.requests, summary.spent_in_all.requests) == (1, 4 + 1 + 1)  # a greeting is no row's
    assert translate(source, out, both).already_done


def test_an_output_that_was_mended_by_hand_is_not_written_over(server, options, texts_file, tmp_path):
    server.reply = lambda text: (400, {}, "no") if text == "Bad" else into_chinese(text)
    source, out = texts_file("One", "Bad"), tmp_path / "out.jsonl"
    translate(source, out, options())
    out.write_text("mended")
    server.requests.clear()
    with pytest.raises(RunError, match="was changed after it was written"):
        translate(source, out, options())
    assert (out.read_text(), server.requests) == ("mended", [])
    out.unlink()
    server.reply = into_chinese
    translate(source, out, options())
    assert read_texts(out) == ["译 One", "译 Bad"]


def test_an_endpoint_that_is_down_costs_no_row(server, options, texts_file, tmp_path):
    source, out = texts_file("One", "Two", "Three"), tmp_path / "out.jsonl"
    server.reply = lambda text: into_chinese(text) if text == "One" else (503, {}, "")
    with pytest.raises(RunError, match=r"answers 503\); once it does, the same command goes on"):
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


def test_a_plan_counts_and_sends_nothing(server, options, texts_file, tmp_path):
    source = texts_file("Hello", "12", "x" * 50, "Hello <image>")
    with source.open("a") as stream:
        stream.write("[1]\n")
    counted = plan(source, tmp_path / "out.jsonl", options(max_characters=20))
    prompts = counted.prompt_tokens
    assert counted == TranslatePlan(
        rows=5,
        without_text=1,
        too_long=1,
        broken=1,
        first_broken="row 5: a JSON object is needed, not a list",
        requests=2,
        characters=18,
        prompt_tokens=prompts,
        text_tokens=6,
    )
    assert prompts > 100
    assert not server.requests
    assert list(tmp_path.iterdir()) == [source]


def test_a_plan_counts_what_is_left(server, options, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [["Hello"], ["One", "Bad"], ["12"], ["Paris"], ["x" * 50], ["y" * 30, "Bad"]]
    source.write_text("".join(json.dumps({"text": texts}) + "\n" for texts in rows))
    server.reply = lambda text: {"Bad": (400, {}, "no"), "Paris": answer("Paris")}.get(text) or into_chinese(text)
    translate(source, out, options(max_characters=40))
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sent = len(server.requests)
    counted = plan(source, out, options(max_characters=40))
    assert (counted.rows, counted.done, counted.without_text, counted.too_long, counted.requests) == (6, 2, 1, 1, 2)
    assert (counted.characters, plan(source, out, options(max_characters=20)).too_long) == (6, 2)
    with pytest.raises(RunError, match="was begun with --to Chinese, and is now run with --to French"):
        plan(source, out, options(to="French"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert len(server.requests) == sent
    server.reply = into_chinese
    translate(source, out, options(max_characters=100))
    counted = plan(source, out, options(max_characters=40))
    assert (counted.done, counted.too_long, counted.requests, counted.prompt_tokens) == (5, 0, 0, 0)


def test_nothing_to_send_needs_no_key(options, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("12\n")
    assert translate(source, tmp_path / "out.txt", options(base_url=None, columns=())).without_text == 1


def test_a_plan_beside_a_journal_that_is_none(options, texts_file, tmp_path):
    (tmp_path / "out.jsonl.journal.jsonl").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        plan(texts_file("a"), tmp_path / "out.jsonl", options())


def test_a_plan_counts_with_a_tokenizer(options, texts_file, text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = texts_file("a red heart left of a blue car", "two yellow stars")
    counted = plan(source, tmp_path / "out.jsonl", options(), tmp_path / "tokenizer")
    expected = sum(
        len(text_tokenizer(text)["input_ids"]) for text in ("a red heart left of a blue car", "two yellow stars")
    )
    assert (counted.requests, counted.text_tokens, counted.estimated) == (2, expected, False)
    assert counted.prompt_tokens > expected


def test_tokenizers_that_cannot_be_read(options, texts_file, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        plan(texts_file("a"), tmp_path / "out.jsonl", options(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        plan(texts_file("a"), tmp_path / "out.jsonl", options(), tmp_path)


def test_a_plan_agrees_with_what_translating_took(server, options, texts_file, tmp_path):
    source = texts_file("Hello", "12", "x" * 50, "Bye")
    counted = plan(source, tmp_path / "out.jsonl", options(max_characters=20))
    summary = translate(source, tmp_path / "out.jsonl", options(max_characters=20))
    assert (counted.requests, counted.rows, counted.without_text) == (summary.spent.requests, 4, summary.without_text)
    assert counted.too_long == summary.failed == 1
    assert counted.requests == len(server.requests)
