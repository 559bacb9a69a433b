import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.data.translation.conftest import answer, into_chinese


@pytest.fixture
def command(server):
    """Starts `uni-x data translate` with words, a model and the server's address."""

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "uni_x", "data", "translate", *words, "--model", "m", "--base-url", server.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # where the tests run in the background of a shell, Ctrl-C is ignored by all that they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines()


def test_says_what_became_of_every_row(server, command, tmp_path):
    def reply(text):
        return {"Bad": (400, {}, "no"), "Paris": answer("Paris")}.get(text) or into_chinese(text)

    server.reply = reply
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"text": text}) for text in ("One", "Paris", "12", "Bad", "Two")]
    source.write_text("\n".join(lines) + "\n[1]\n")
    words = [source, "--out", out, "--column", "text", "--to", "Chinese"]

    code, said, _ = finish(command(*words, "--dry-run"))
    assert (code, server.requests) == (0, [])
    assert said[0].startswith("6 rows: 1 without text to translate, 0 too long, 1 broken, 4 requests")
    assert f"The first: {source}, row 6: a JSON object is needed, not a list" in said[2]

    code, said, _ = finish(command(*words))
    assert code == 1
    assert said == [
        f"6 rows = 2 translated + 1 unchanged + 1 without text + 1 failed + 1 broken, in {out}",
        f"This run: {len(server.requests)} requests, 40 prompt tokens and 12 in answers",
        "Texts that came back as they were: 1 (names, numbers and code may)",
        "Failed rows stand in their own language; the same command tries them again.",
        "Broken rows cannot be read, and stand as they stood in the source.",
        f"Which and why: {out}.untranslated.jsonl",
    ]

    code, said, _ = finish(command(*words, "--dry-run"))
    assert said[0].startswith("6 rows: 3 done already, 1 without text to translate, 0 too long, 1 broken, 1 requests")

    code, _, said = finish(command(*words[:-1], "French"))
    assert code == 1
    assert said[-1].startswith(f"error: {out}.journal.jsonl: this translation was begun with --to Chinese, and is now ")

    server.reply = into_chinese
    code, said, _ = finish(command(*words))
    assert code == 1  # there still is a broken row
    assert said[0].startswith("6 rows = 3 translated + 1 unchanged + 1 without text + 0 failed + 1 broken")


def test_goes_on_after_ctrl_c_and_leaves_finished_work_alone(server, command, tmp_path):
    over, several = threading.Event(), threading.Event()

    def reply(text):
        if text == "Prompt 5":
            several.set()
            over.wait(30)
        status, headers, body = into_chinese(text)
        return status, headers, json.dumps({**json.loads(body), "usage": None})

    server.reply = reply
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("".join(f"Prompt {number}\n" for number in range(9)))
    words = [source, "--out", out, "--to", "Chinese", "--concurrency", "1"]

    process = command(*words)
    assert several.wait(30)
    os.kill(process.pid, signal.SIGINT)
    code, _, said = finish(process)
    over.set()
    assert (code, said[-1]) == (130, "Stopped. Run the same command again to go on.")
    assert not out.exists()

    rows = f"9 rows = 9 translated + 0 unchanged + 0 without text + 0 failed + 0 broken, in {out}"
    this_run = "This run: 4 requests, of which the endpoint counts no tokens"
    all_runs = "All runs: 9 requests, of which the endpoint counts no tokens"
    assert finish(command(*words))[:2] == (0, [rows, this_run, all_runs])
    assert out.read_text() == "".join(f"译 Prompt {number}\n" for number in range(9))
    assert finish(command(*words))[:2] == (
        0,
        [f"Nothing is left to do. Delete {out} and its journal to translate again.", rows, all_runs],
    )
    assert len(server.requests) == 10
