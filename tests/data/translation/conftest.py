import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from uni_x.data.translation.translate import TranslateOptions


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
            self.wfile.write(piece.encode() if isinstance(piece, str) else piece)

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
