"""Ctrl-C and SIGTERM as a wish to stop in order."""

import math
import signal
import threading
import time
from typing import Any, Self

SAME_REQUEST_SECONDS = 2  # a launcher passes on the Ctrl-C that its processes have had from the terminal themselves


class StopSignals:
    """Notes Ctrl-C and SIGTERM while it is used as a context; a second Ctrl-C stops at once.

    In another thread than the main one it notes nothing, as no signals come there.

    Attributes:
        requested: whether one has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}
        self._since = math.inf  # when the first one came

    def __enter__(self) -> Self:
        """Takes over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._since > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
        self._since = min(self._since, now)
        self.requested = True
