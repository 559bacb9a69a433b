"""The journal of a long piece of work on rows: what is done, kept line by line, so that it can go on after a kill."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from uni_x.errors import RunError
from uni_x.runs import writing_into


@contextmanager
def open_journal(path: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal at `path`, new or from an earlier run, for this process alone.

    Raises `RunError` for a journal of other settings that has rows, for a file that is none, while another process has
    it, and where it cannot be written.
    """
    with writing_into(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with open(descriptor, "r+b") as stream:
        _lock(stream, path)
        yield Journal(stream, path, settings)


class Journal:
    """Finished rows, one a line below a line of settings. Only their places are held in memory."""

    def __init__(self, stream: IO[bytes], path: Path, settings: Mapping[str, Any]):
        self.finished = False
        self.counts: Counter[str] = Counter()
        self._stream = stream
        self._path = path
        self._places: dict[int, int] = {}  # where the lines of rows begin
        self._load(settings)

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entries by row."""
        return (self.read(row) for row in sorted(self._places))

    def read(self, row: int) -> dict[str, Any]:
        """The entry of a row that is in the journal."""
        self._stream.seek(self._places[row])
        return json.loads(self._stream.readline())

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a finished row, and hands it to the operating system before it returns."""
        self._count(entry, self._write(entry))

    def finish(self) -> None:
        """Notes that the output has been written."""
        if not self.finished:
            self._write({"finished": True})
            self.finished = True

    def _write(self, entry: Mapping[str, Any]) -> int:
        with writing_into(self._path.parent):
            place = self._stream.seek(0, os.SEEK_END)
            self._stream.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._stream.flush()
        return place

    def _count(self, entry: Mapping[str, Any], place: int) -> None:
        self._places[entry["row"]] = place
        self.counts["translated" if "texts" in entry else "failed"] += 1
        for name in ("requests", "prompt_tokens", "completion_tokens"):
            self.counts[name] += entry[name]

    def _load(self, settings: Mapping[str, Any]) -> None:
        header = self._stream.readline()
        if header.endswith(b"\n"):
            difference = self._difference(header, settings)
            if not difference:
                self._load_rows()
                return
            if self._stream.read(1):
                raise RunError(
                    f"{self._path}: begun with another {difference}; choose another output, or delete it to start again"
                )
        elif not b'{"format"'.startswith(header[:9]):
            raise self._foreign()
        self._stream.truncate(0)  # new, stopped before its first line was whole, or without a row
        self._write(settings)

    def _load_rows(self) -> None:
        place = self._stream.tell()
        while line := self._stream.readline():
            try:
                if not line.endswith(b"\n"):
                    raise ValueError
                entry = json.loads(line)
                if "finished" in entry:
                    self.finished = True
                else:
                    self._count(entry, place)
            except (ValueError, KeyError, TypeError):
                if self._stream.read(1):
                    raise RunError(f"{self._path}: damaged at byte {place}; delete it to start again") from None
                self._stream.truncate(place)  # the line that was being written when a run was killed
                return
            place += len(line)

    def _difference(self, header: bytes, settings: Mapping[str, Any]) -> str:
        try:
            found = dict(json.loads(header))
        except (ValueError, TypeError):
            raise self._foreign() from None
        for name, value in settings.items():
            if found.get(name) != value:
                shown = "" if name in ("format", "source") else f" ({found.get(name)!r}, now {value!r})"
                return name.replace("_", " ") + shown
        return ""

    def _foreign(self) -> RunError:
        return RunError(f"{self._path}: not a journal of translations; delete it, or choose another output")


def _lock(stream: IO[bytes], path: Path) -> None:
    """Keeps a second run away for as long as the stream is open, however the process ends."""
    try:
        import fcntl
    except ImportError:  # not there on Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{path}: another run is writing it; wait for that one, or choose another output") from None
