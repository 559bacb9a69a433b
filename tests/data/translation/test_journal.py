import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from tests.data.translation.conftest import into_chinese, read_jsonl, read_texts
from uni_x.data.translation.endpoint import Usage
from uni_x.data.translation.journal import open_journal
from uni_x.data.translation.translate import (
    translate,
)
from uni_x.errors import RunError, UsageError


def test_ctrl_c_keeps_what_is_done(server, options, texts_file, tmp_path):
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
    assert (summary.spent, summary.spent_in_all) == (Usage(6, 60, 18), Usage(10, 100, 30))


def test_ctrl_c_ends_requests_in_order_whoever_handles_it(server, options, texts_file, tmp_path):
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
def test_a_killed_process_loses_only_the_rows_in_flight(server, options, texts_file, tmp_path, number):
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
        "import sys; from pathlib import Path; from uni_x.data.translation.translate import *\n"
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
    assert (summary.rows, summary.translated, summary.spent_in_all.requests) == (30, 30, 30)
    assert len(server.texts) <= 30 + 3


def test_a_line_that_was_being_written_does_not_count(server, options, texts_file, tmp_path):
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


def test_a_second_try_that_was_stopped_goes_on_too(server, options, texts_file, tmp_path):
    source, out = texts_file("One", "Bad 1", "Bad 2"), tmp_path / "out.jsonl"
    server.reply = lambda text: (400, {}, "no") if text.startswith("Bad") else into_chinese(text)
    assert translate(source, out, options(concurrency=1)).failed == 2
    server.requests.clear()
    server.reply = into_chinese

    def interrupt(done, total, word):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        translate(source, out, options(concurrency=1), interrupt)
    written = out.read_text()
    assert read_texts(out) == ["译 One", "Bad 1", "Bad 2"]
    out.write_text("mended")
    with pytest.raises(RunError, match="was changed after it was written"):
        translate(source, out, options())
    out.write_text(written)
    summary = translate(source, out, options(concurrency=1))
    assert read_texts(out) == ["译 One", "译 Bad 1", "译 Bad 2"]
    assert server.texts == ["Bad 1", "Bad 2"]
    assert (summary.translated, summary.failed) == (3, 0)


def test_finished_work_is_left_alone(server, options, texts_file, tmp_path):
    source, out = texts_file("One", "2"), tmp_path / "out.jsonl"
    first = translate(source, out, options())
    assert not first.already_done
    out.write_text("mine now")
    server.requests.clear()
    again = translate(source, out, options(concurrency=3, base_url="http://127.0.0.1:1/v1"))
    assert again == replace(first, spent=Usage(), already_done=True)
    assert out.read_text() == "mine now"
    out.unlink()
    assert not translate(source, out, options()).already_done
    assert read_texts(out) == ["译 One", "2"]
    assert not server.requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "n"}, "begun with --model m, and is now run with --model n;"),
        ({"to": "Old French"}, "begun with --to Chinese, and is now run with --to 'Old French';"),
        ({"source_language": "English"}, "begun without --from, and is now run with --from English;"),
        ({"columns": ("text", "b")}, "begun with --column text, and is now run with --column text --column b;"),
        (
            {"model": "n", "to": "German"},
            "begun with --model m and with --to Chinese, and is now run with --model n and with --to German;",
        ),
        ({}, "begun with another source, or the source has changed;"),
    ],
)
def test_another_source_or_setting_is_refused(server, options, tmp_path, changes, message):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "One", "b": "Two"}\n')
    translate(source, out, options())
    if not changes:
        source.write_text('{"text": "One", "b": "Three"}\n')
    kept = (tmp_path / "out.jsonl.journal.jsonl").read_bytes()
    with pytest.raises(RunError, match=message) as caught:
        translate(source, out, options(**changes))
    assert "\n" not in str(caught.value)
    assert "another --out" in str(caught.value)
    assert (tmp_path / "out.jsonl.journal.jsonl").read_bytes() == kept
    assert len(server.requests) == 1


def test_a_journal_without_rows_binds_nobody(server, options, texts_file, tmp_path):
    source, out = texts_file("One"), tmp_path / "out.jsonl"
    with pytest.raises(UsageError, match="is not set"):
        translate(source, out, options(key_variable="NO_SUCH_KEY"))
    assert translate(source, out, options(to="German")).translated == 1


def test_files_of_others_are_not_touched(options, texts_file, tmp_path):
    source, out = texts_file("One"), tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(RunError, match="exists already"):
        translate(source, out, options())
    assert out.read_text() == "precious"
    for content in ("a list\n", "{}", '{"row": 1}\n{"row": 2}\n'):
        (tmp_path / "out.jsonl.journal.jsonl").write_text(content)
        with pytest.raises(RunError, match=r"not a journal|another version of uni-x"):
            translate(source, out, options())
        assert (tmp_path / "out.jsonl.journal.jsonl").read_text() == content


def test_a_damaged_journal_is_refused(options, texts_file, tmp_path):
    source, out = texts_file("One", "Two"), tmp_path / "out.jsonl"
    translate(source, out, options())
    journal = tmp_path / "out.jsonl.journal.jsonl"
    header, first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(header + first[:-5] + b"\n" + b"".join(rest))
    with pytest.raises(RunError, match=f"damaged at byte {len(header)}"):
        translate(source, out, options())


def test_two_runs_at_once_are_refused(options, texts_file, tmp_path):
    with (
        open_journal(tmp_path / "out.jsonl.journal.jsonl", {"format": 1}),
        pytest.raises(RunError, match="another run is writing it"),
    ):
        translate(texts_file("One"), tmp_path / "out.jsonl", options())


def test_failures_of_an_earlier_journal_go_with_it(options, texts_file, tmp_path):
    source, out = texts_file("One hundred"), tmp_path / "out.jsonl"
    translate(source, out, options(max_characters=5))
    assert (tmp_path / "out.jsonl.untranslated.jsonl").exists()
    (tmp_path / "out.jsonl.journal.jsonl").unlink()
    out.unlink()
    translate(source, out, options())
    assert not (tmp_path / "out.jsonl.untranslated.jsonl").exists()
