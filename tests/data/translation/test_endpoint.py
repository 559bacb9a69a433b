import sys
import threading
import time
import tracemalloc
import zlib

import pytest

from tests.data.translation.conftest import answer, into_chinese, once, read_texts
from uni_x.data.translation import translator
from uni_x.data.translation.endpoint import Pace, find_address, retry_after
from uni_x.data.translation.translate import translate
from uni_x.errors import MissingExtraError, RunError, UsageError

KEY = "sk-very-secret-7351"


@pytest.mark.parametrize(
    "bad",
    [
        (429, {}, ""),
        (500, {}, "<html>"),
        (503, {}, '{"error": {"message": "busy"}}'),
        (500, {"Content-Type": "text/plain; charset=hex"}, "no"),
        (500, {"Content-Type": "text/plain; charset=undefined"}, "no"),
        (503, {"Retry-After": "Sat, 01 Jan 99999999999 00:00:00 GMT"}, ""),
        (200, {"Content-Encoding": "br"}, "no"),
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
def test_asks_again_after(server, options, texts_file, tmp_path, bad):
    server.reply = once(bad)
    summary = translate(texts_file("One", "Two"), tmp_path / "out.jsonl", options())
    assert read_texts(tmp_path / "out.jsonl") == ["译 One", "译 Two"]
    assert (summary.translated, summary.spent.requests) == (2, 4)


def test_asks_again_after_a_timeout(server, options, texts_file, tmp_path):
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
    assert (summary.translated, summary.spent.requests) == (1, 2)


def test_an_answer_that_comes_in_drops_times_out_too(server, options, texts_file, tmp_path):
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
    assert (summary.translated, summary.spent.requests) == (1, 2)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("compressed", [False, True])
def test_answers_without_end_are_not_read_to_it(server, options, texts_file, tmp_path, status, compressed):
    piece = " " * 2**20
    headers = {"Connection": "close", **({"Content-Encoding": "gzip"} if compressed else {})}
    sent = []

    def endless():
        packer = zlib.compressobj(wbits=31)
        while len(sent) < 1000:
            sent.append(piece)
            yield packer.compress(piece.encode()) + packer.flush(zlib.Z_SYNC_FLUSH) if compressed else piece.encode()

    server.reply = once((status, headers, endless()))
    tracemalloc.start()
    summary = translate(texts_file("One"), tmp_path / "out.jsonl", options())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (summary.translated, summary.spent.requests) == (1, 2)
    assert peak < 300 * 2**20


def test_the_server_s_retry_after_is_kept_in_place_of_the_own_wait(server, options, texts_file, tmp_path):
    opens = []

    def reply(text):
        with server.lock:
            opens.append(time.monotonic() + 0.9)
        return (429, {"Retry-After": "1"}, "") if time.monotonic() < opens[0] else into_chinese(text)

    server.reply = reply
    source, out = texts_file("One", "Two"), tmp_path / "out.jsonl"
    # the wait of its own is longer than the test's patience, and what the server asks for costs no retry
    hasty = options(first_wait=10_000, retries=0)
    thread = threading.Thread(target=translate, args=(source, out, hasty), daemon=True)
    thread.start()
    thread.join(20)
    assert out.exists()
    assert read_texts(out) == ["译 One", "译 Two"]
    assert len(server.requests) == 4


def test_a_server_that_only_puts_off_is_not_waited_for_without_end(server, options, texts_file, tmp_path, monkeypatch):
    monkeypatch.setattr(translator, "_PATIENCE", 0.5)
    server.reply = lambda text: (429, {"Retry-After": "0"}, "later")
    with pytest.raises(RunError, match=r"gives no answers \(the server answers 429 \(later\)\)"):
        translate(texts_file("One"), tmp_path / "out.jsonl", options(retries=0))
    assert server.texts == ["One", "One", "Hello"]


def test_a_retry_after_of_hours_ends_the_run(server, options, texts_file, tmp_path):
    server.reply = lambda text: (429, {"Retry-After": "7200"}, "")
    with pytest.raises(RunError, match="429: come back in 7200 seconds"):
        translate(texts_file("One"), tmp_path / "out.jsonl", options())
    assert len(server.requests) == 1


def test_reads_retry_after_as_seconds_or_date():
    assert retry_after("2.5", 0) == 2.5
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 40) == 60
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 1000) == 0
    assert [retry_after(header, 0) for header in (None, "soon", "inf", "", "1 Jan 99999999999 00:00 GMT")] == [None] * 5


def test_the_pace_is_even_and_stops_for_pauses():
    pace = Pace(requests_per_minute=30)
    assert [pace.delay(100), pace.delay(100.5), pace.delay(102), pace.delay(102)] == [0, 1.5, 0, 2]
    pace.pause(102, 10)
    assert [pace.delay(104), pace.delay(112), pace.delay(112)] == [8, 0, 2]
    pace.pause(112, 0)
    assert pace.delay(112) == 2
    free = Pace(None)
    assert [free.delay(1), free.delay(1)] == [0, 0]


def test_nothing_listens(options, texts_file, tmp_path):
    with pytest.raises(RunError, match=r"no connection to http://127\.0\.0\.1:1/v1"):
        translate(texts_file("One"), tmp_path / "out.jsonl", options(base_url="http://127.0.0.1:1/v1", retries=1))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            (401, {}, ""),
            r"401: the environment variable OPENAI_API_KEY is not set; put the key of this server there \(export ",
        ),
        ((402, {}, ""), "402: the account has no credit"),
        ((404, {}, '{"error": "no model m"}'), r"404: no such address or model.*no model m"),
        ((307, {"Location": "https://b.org/v1"}, ""), "307: it has moved to https://b.org/v1"),
    ],
)
def test_what_the_user_must_mend_ends_the_run(server, options, texts_file, tmp_path, reply, message):
    server.reply = lambda text: reply
    with pytest.raises(RunError, match=message):
        translate(texts_file("One"), tmp_path / "out.jsonl", options())
    assert len(server.requests) == 1


def test_the_key_is_sent_and_shown_nowhere(server, options, texts_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    server.reply = lambda text: (400, {}, f"no: {KEY}") if text == "Bad" else into_chinese(text)
    source, out = texts_file("Good", "Bad"), tmp_path / "out.jsonl"
    translate(source, out, options(key_variable="MY_KEY"))
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"no: ***" in written
    server.reply = lambda text: (401, {}, f"wrong key {KEY}")
    with pytest.raises(RunError, match="401: the key in MY_KEY is refused") as caught:
        translate(source, tmp_path / "again.jsonl", options(key_variable="MY_KEY"))
    shown = f"{caught.value!r} {caught.value} {find_address(server.url, 'MY_KEY')!r} {capfd.readouterr()}"
    assert KEY not in shown + written.decode()


def test_the_address_comes_from_the_environment(server, options, texts_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    translate(texts_file("One"), tmp_path / "out.jsonl", options(base_url=None))
    assert server.keys == [None]


def test_keys_go_only_where_nobody_listens_in(monkeypatch):
    assert find_address("http://10.0.0.7:8000/v1").key == ""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert find_address().url == "https://api.openai.com/v1"
    for url in ("http://10.0.0.7:8000/v1", "http://localhost.evil.org/v1", "http://0.0.0.0/v1"):
        with pytest.raises(UsageError, match="would send the key in the clear") as caught:
            find_address(url)
        assert KEY not in str(caught.value)
    for url in ("https://a.org/v1", "http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:8000/v1"):
        assert find_address(url).key == KEY
    for url in ("a.org/v1", "ftp://a.org", "https://", "https://u:p@a.org/v1", "https://a.org:x/v1"):
        with pytest.raises(UsageError, match="the base URL must"):
            find_address(url)


def test_keys_that_are_none(monkeypatch):
    with pytest.raises(UsageError, match=r"MY_KEY is not set; .* key of a\.org there \(export MY_KEY=…\)$"):
        find_address("https://a.org/v1", "MY_KEY")
    with pytest.raises(UsageError, match=r"OPENAI_API_KEY is not set; .* or name a server that needs none"):
        find_address()
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(UsageError, match="MY_KEY holds characters that no key has"):
        find_address("https://a.org/v1", "MY_KEY")


def test_a_proxy_does_not_come_between_a_machine_and_itself(server, options, texts_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert translate(texts_file("One"), tmp_path / "out.jsonl", options()).translated == 1


def test_says_what_to_install(options, texts_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"uni-x\[translate\]"):
        translate(texts_file("One"), tmp_path / "out.jsonl", options())
