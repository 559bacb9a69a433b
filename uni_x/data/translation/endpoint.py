"""A chat model behind an OpenAI-compatible address: one question, one answer, or the reason why there is none.

The endpoint keeps the pace that was asked for and the pauses that the server asks for. It does not ask again: whoever
asks knows what an answer is worth.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from uni_x.errors import MissingExtraError, RunError, UsageError, one_line

if TYPE_CHECKING:
    import httpx2

OPENAI = "api.openai.com"
DEFAULT_URL = f"https://{OPENAI}/v1"
URL_VARIABLE = "OPENAI_BASE_URL"
KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER_BYTES = 16 * 2**20
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 3600.0  # seconds that a server may ask for

_FOR_LATER = {408, 409, 425, 429}  # and 500 to 599
_FOR_THE_USER = {
    401: "the key in {key_variable} is refused",
    402: "the account has no credit left",
    404: "no such address or model; check the base URL and the model's name",
}


class NoAnswerError(Exception):
    """A request that brought no answer.

    `again` says that the same request may succeed later, `paused` that the server has said when; the pause is then part
    of the endpoint's pace.
    """

    def __init__(self, reason: str, again: bool = True, paused: bool = False):
        super().__init__(reason)
        self.again = again
        self.paused = paused


@dataclass
class Usage:
    """Requests that were sent, and tokens as the endpoint counts them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


class Pace:
    """When the next request may go: at an even rate, and not during a pause. Times are seconds of any clock."""

    def __init__(self, requests_per_minute: float | None):
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._free = -math.inf

    def delay(self, now: float) -> float:
        """Seconds to wait before asking here again; 0 takes the turn."""
        if now < self._free:
            return self._free - now
        self._free = now + self._interval
        return 0.0

    def pause(self, now: float, seconds: float) -> None:
        """Lets no request go for so long."""
        self._free = max(self._free, now + seconds)


@dataclass(frozen=True)
class Address:
    """Where to ask, and the key for it, which is empty where there is none and never shown."""

    url: str
    key: str
    key_variable: str
    is_local: bool

    def __repr__(self) -> str:
        return f"Address({self.url})"


def find_address(base_url: str | None = None, key_variable: str = KEY_VARIABLE) -> Address:
    """The address from `base_url` or `OPENAI_BASE_URL`, the key from the environment variable `key_variable`.

    Raises `UsageError` for an address that is none, one that would send the key unencrypted over a network, and a
    variable without a key where the address is OpenAI's, or another than `OPENAI_API_KEY` is named.
    """
    url = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UsageError("the base URL must look like https://HOST/v1, as the server's manual gives it")
    if "@" in parts.netloc:
        raise UsageError("the base URL must hold no user and password; put the key into the environment")
    key = os.environ.get(key_variable, "").strip()
    if not key and (host == OPENAI or key_variable != KEY_VARIABLE):
        instead = ", or name a server that needs none (--base-url)" if host == OPENAI else ""
        raise UsageError(f"{_no_key(key_variable, host)}{instead}")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"the environment variable {key_variable} holds characters that no key has")
    is_local = _is_loopback(host)
    if key and parts.scheme == "http" and not is_local:
        raise UsageError(f"{url} would send the key in the clear; use https, or unset {key_variable} if it needs none")
    return Address(url.rstrip("/"), key, key_variable, is_local)


def _no_key(variable: str, whose: str) -> str:
    return f"the environment variable {variable} is not set; put the key of {whose} there (export {variable}=…)"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ChatEndpoint:
    """Asks one model at one address. It is an async context manager, and belongs to one event loop.

    Args:
        address: from `find_address`.
        model: the name that the server knows the model by.
        pace: the rate of requests.
        timeout: seconds for a whole answer.

    Raises:
        MissingExtraError: httpx2 is not installed.
    """

    def __init__(self, address: Address, model: str, pace: Pace, timeout: float):
        try:
            import httpx2
        except ImportError:
            raise MissingExtraError("httpx2", "translate") from None
        self.answers = 0  # how many it has given so far
        self._address = address
        self._model = model
        self._pace = pace
        self._timeout = timeout
        key = {"Authorization": f"Bearer {address.key}"} if address.key else {}
        self._client = httpx2.AsyncClient(
            headers={"Accept-Encoding": "gzip", **key},
            timeout=timeout,
            limits=httpx2.Limits(max_connections=None),
            # A proxy of the environment has no business between this machine and itself.
            trust_env=not address.is_local,
        )

    async def __aenter__(self) -> ChatEndpoint:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    @property
    def url(self) -> str:
        """Where it is."""
        return self._address.url

    async def ask(self, messages: list[dict[str, str]], usage: Usage) -> str:
        """The model's answer, which is not empty, to messages of {role, content}; what it cost is added to `usage`.

        Raises:
            NoAnswerError: for what may pass (the server is busy, broken or out of reach, or answers nonsense), and for
                what the server will not take.
            RunError: for what the user must mend: key, credit, address, model.
        """
        import httpx2

        loop = asyncio.get_running_loop()
        while delay := self._pace.delay(loop.time()):
            await asyncio.sleep(delay)
        usage.requests += 1
        try:
            async with asyncio.timeout(self._timeout):
                response, content = await self._post(messages)
        except (TimeoutError, httpx2.TimeoutException):
            raise NoAnswerError(f"no answer within {self._timeout:g} seconds") from None
        except httpx2.HTTPError as error:
            reason = one_line(error)
            raise NoAnswerError(f"no connection to {self._address.url} ({reason})") from None
        if not response.is_success:
            self._refuse(response, content, loop.time())
        answer = _read_answer(content, usage)
        self.answers += 1
        return answer

    async def _post(self, messages: list[dict[str, str]]) -> tuple[httpx2.Response, bytes]:
        """What the server answers, of which no more than a little over `MAX_ANSWER_BYTES` is read."""
        question = {"model": self._model, "messages": messages}
        async with self._client.stream("POST", f"{self._address.url}/chat/completions", json=question) as response:
            encoding = (response.headers.get("content-encoding") or "identity").lower()
            if encoding not in ("identity", "gzip"):  # others may grow a millionfold
                raise NoAnswerError(f"the answer is compressed as {encoding[:20]}, which was not asked for")
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    break
            return response, bytes(content)

    def _refuse(self, response: httpx2.Response, content: bytes, now: float) -> None:
        status = response.status_code
        said = self._message(content)
        if status in _FOR_THE_USER:
            variable = self._address.key_variable
            mend = _FOR_THE_USER[status].format(key_variable=variable)
            if status == 401 and not self._address.key:
                mend = _no_key(variable, "this server")
            raise RunError(f"{self._address.url} answers {status}: {mend}{said}")
        if response.is_redirect:
            place = response.headers.get("location", "nowhere")
            raise RunError(f"{self._address.url} answers {status}: it has moved to {place}; give that as the base URL")
        again = status in _FOR_LATER or status >= 500
        pause = retry_after(response.headers.get("retry-after"), time.time()) if again else None
        if pause is not None:
            if pause > LONGEST_PAUSE:
                raise RunError(f"{self._address.url} answers {status}: come back in {pause:.0f} seconds{said}")
            self._pace.pause(now, max(pause, SHORTEST_PAUSE))
        raise NoAnswerError(f"the server answers {status}{said}", again, paused=pause is not None)

    def _message(self, content: bytes) -> str:
        """What the server says about an error, in one line and without the key."""
        said: Any = content.decode("utf-8", "replace")
        try:
            body = json.loads(content)
            error = body.get("error", body)
            said = error.get("message", said) if isinstance(error, dict) else error
        except (ValueError, AttributeError, RecursionError):
            pass
        said = " ".join(str(said).split())
        if self._address.key:
            said = said.replace(self._address.key, "***")
        return f" ({said[:200]})" if said else ""


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` asks for, in seconds or as a date, at the Unix time `now`; None where it is none."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _read_answer(content: bytes, usage: Usage) -> str:
    if len(content) > MAX_ANSWER_BYTES:
        raise NoAnswerError(f"the answer is larger than {MAX_ANSWER_BYTES // 2**20} MB")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise NoAnswerError("the answer is not JSON") from None
    if not isinstance(body, dict):
        raise NoAnswerError("the answer is no JSON object")
    _add_usage(body.get("usage"), usage)
    try:
        choice = body["choices"][0]
        answer, end = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        raise NoAnswerError("the answer has no choices with a message") from None
    if not isinstance(answer, str) or not answer.strip():
        raise NoAnswerError("the answer is empty")
    if end in ("length", "content_filter"):
        raise NoAnswerError(f"the answer was cut off ({end})")
    if any("\ud800" <= character <= "\udfff" for character in answer):
        raise NoAnswerError("the answer is not valid Unicode")
    return answer


def _add_usage(found: Any, usage: Usage) -> None:
    if not isinstance(found, dict):
        return
    prompt, completion = found.get("prompt_tokens"), found.get("completion_tokens")
    usage.prompt_tokens += prompt if isinstance(prompt, int) else 0
    usage.completion_tokens += completion if isinstance(completion, int) else 0
