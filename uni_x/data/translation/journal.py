"""The journal of a translation: what came of each row, line by line, so that it can go on after a kill."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from uni_x.data.translation.endpoint import Usage
from uni_x.errors import RunError
from uni_x.runs import writing_into


class Outcome(StrEnum):
    """What became of a row; the last two are never sent, and so not in a journal."""

    TRANSLATED = "translated"
    UNCHANGED = "unchanged"  # every text came back as it was
    FAILED = "failed"
    WITHOUT_TEXT = "without text"
    BROKEN = "broken"


@dataclass(frozen=True)
class Entry:
    """What came of one row.

    `texts` stand in for all texts of the row in their order, or for those before the one that failed. `unchanged` names
    a column for each text that came back as it was, `column` and `reason` tell of the failure, and `usage` is what this
    attempt has cost.
    """

    row: int
    outcome: Outcome
    texts: list[str]
    unchanged: list[str]
    column: str = ""
    reason: str = ""
    usage: Usage = field(default_factory=Usage)


@contextmanager
def open_journal(path: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal at `path`, new or from an earlier run, for this process alone.

    `settings` are named as the options of the command are, and besides there are `format` and `source`. Raises
    `RunError` for a journal of other settings that has rows, for a file that is none, while another process has it, and
    where it cannot be written.
    """
    with writing_into(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with open(descriptor, "r+b") as stream:
        _lock(stream, path)
        yield Journal(stream, path, settings)


@contextmanager
def read_journal(path: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """A copy of the journal at `path`, empty where there is none; other runs may write it. Raises as `open_journal`."""
    with tempfile.TemporaryFile() as copy:
        if path.exists():
            with writing_into(path.parent), path.open("rb") as stream:
                shutil.copyfileobj(stream, copy)
            copy.seek(0)
        yield Journal(copy, path, settings)


class Journal:
    """Rows that were sent, one a line below a line of settings; of lines for the same row the last one counts.

    Only their places and outcomes are held in memory. `counts` are rows by outcome, and `unchanged_texts` those of rows
    that did not fail. `spent` adds up the attempts of this run, `spent_before` those of earlier ones. `output` is the
    digest of the output when it was written last, and `finished` says that nothing has been added since.
    """

    def __init__(self, stream: IO[bytes], path: Path, settings: Mapping[str, Any]):
        self.finished = False
        self.output = ""
        self.spent = self.spent_before = Usage()
        self.counts: Counter[Outcome] = Counter()
        self.unchanged_texts = 0
        self._stream = stream
        self._path = path
        self._rows: dict[int, tuple[int, Outcome]] = {}  # where the line of a row begins, and its outcome
        self._load(settings)

    def outcome(self, row: int) -> Outcome | None:
        """What came of a row; None where it has not been sent."""
        found = self._rows.get(row)
        return found[1] if found else None

    def read(self, row: int) -> Entry | None:
        """The last entry of a row; None where it has not been sent."""
        if row not in self._rows:
            return None
        self._stream.seek(self._rows[row][0])
        return _to_entry(json.loads(self._stream.readline()))

    def append(self, entry: Entry) -> None:
        """Adds an entry, and hands it to the operating system before it returns."""
        self._take(entry, self._write(asdict(entry)))
        self.spent += entry.usage

    def finish(self, output: str) -> None:
        """Notes that the output has been written, and its digest."""
        self._write({"output": output})
        self.output, self.finished = output, True

    def _write(self, line: Mapping[str, Any]) -> int:
        with writing_into(self._path.parent):
            place = self._stream.seek(0, os.SEEK_END)
            self._stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._stream.flush()
        return place

    def _take(self, entry: Entry, place: int) -> None:
        self.finished = False
        if earlier := self.outcome(entry.row):
            self.counts[earlier] -= 1
        self.counts[entry.outcome] += 1
        if entry.outcome is not Outcome.FAILED:
            self.unchanged_texts += len(entry.unchanged)
        self._rows[entry.row] = (place, entry.outcome)

    def _load(self, settings: Mapping[str, Any]) -> None:
        header = self._stream.readline()
        if header.endswith(b"\n"):
            difference = self._difference(header, settings)
            if not difference:
                self._load_rows()
                return
            if self._stream.read(1):
                raise RunError(f"{self._path}: {difference}")
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
                found = json.loads(line)
                if "output" in found:
                    self.output, self.finished = found["output"], True
                else:
                    entry = _to_entry(found)
                    self._take(entry, place)
                    self.spent_before += entry.usage
            except (ValueError, KeyError, TypeError):
                if self._stream.read(1):
                    raise RunError(
                        f"{self._path}: damaged at byte {place}; delete it and the output to start again"
                    ) from None
                self._stream.truncate(place)  # the line that was being written when a run was killed
                return
            place += len(line)

    def _difference(self, header: bytes, settings: Mapping[str, Any]) -> str:
        """Why the journal is not one of these settings, and the mend; empty where it is."""
        try:
            found = dict(json.loads(header))
        except (ValueError, TypeError):
            raise self._foreign() from None
        changed = [name for name, value in settings.items() if found.get(name) != value]
        if not changed:
            return ""
        if "format" in changed:
            return "another version of uni-x began this translation; choose another --out"
        if "source" in changed:
            return "this translation was begun with another source, or the source has changed; choose another --out"
        before = " and ".join(_as_option(name, found.get(name)) for name in changed)
        now = " and ".join(_as_option(name, settings[name]) for name in changed)
        return (
            f"this translation was begun {before}, and is now run {now}; "
            "to go on, run it as it was begun, or choose another --out to start a new one"
        )

    def _foreign(self) -> RunError:
        return RunError(f"{self._path}: not a journal of translations; delete it, or choose another --out")


def _as_option(name: str, value: Any) -> str:
    """The option as it was given, in words that stand behind a verb."""
    if not value:
        return f"without --{name}"
    values = value if isinstance(value, list) else [value]
    return "with " + shlex.join(word for each in values for word in (f"--{name}", each))


def _to_entry(found: dict[str, Any]) -> Entry:
    return Entry(**{**found, "outcome": Outcome(found["outcome"]), "usage": Usage(**found["usage"])})


def _lock(stream: IO[bytes], path: Path) -> None:
    """Keeps a second run away for as long as the stream is open, however the process ends."""
    try:
        import fcntl
    except ImportError:  # not there on Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{path}: another run is writing it; wait for that one, or choose another --out") from None
