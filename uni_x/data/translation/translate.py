"""Translates text columns of a file through an OpenAI-compatible endpoint; interrupted at any moment, it carries on.

Each row that was sent goes into a journal beside the output at once, and the output is written in one step when no row
is left. It has every row of the source, in the same order: a row that failed or is broken stands there as it stood in
the source, and a list beside the output says which and why.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from uni_x.data.translation.endpoint import ChatEndpoint, Pace, Usage, find_address
from uni_x.data.translation.journal import Entry, Journal, Outcome, open_journal, read_journal
from uni_x.data.translation.tables import Row, Table, json_columns, open_table
from uni_x.data.translation.translator import TranslateOptions, Translator, instructions, texts_to_send, too_long
from uni_x.data.translation.values import with_texts
from uni_x.errors import DataError, RunError, UsageError, one_line
from uni_x.runs import remove_leftovers, write_atomically

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told how many of the rows with something to translate are done, how many there are, and a word on it."""

_FORMAT = 2
_TOLD = 20  # columns


@dataclass(frozen=True)
class TranslateSummary:
    """What became of the rows, and what it cost.

    `rows == translated + unchanged + without_text + failed + broken`. Of an unchanged row every text came back as it
    was; `unchanged_texts` counts those of translated rows too. Rows without text have no letters outside what must be
    kept, and are not sent. Broken ones cannot be read. `spent` is what rows took that came to an end in this run,
    `spent_in_all` what they took in this run and those before. `already_done` says that an earlier run had left nothing
    to do.
    """

    rows: int = 0
    translated: int = 0
    unchanged: int = 0
    without_text: int = 0
    failed: int = 0
    broken: int = 0
    unchanged_texts: int = 0
    spent: Usage = field(default_factory=Usage)
    spent_in_all: Usage = field(default_factory=Usage)
    already_done: bool = False


@dataclass(frozen=True)
class TranslatePlan:
    """What translating a file, or going on with it, takes if each text that is left is asked for once.

    Of the `rows`, those that earlier runs have `done`, and those without text, too long or broken are not sent;
    `first_broken` says where the first broken one is, and why. `characters` are those of the texts. `prompt_tokens` are
    those of texts and instructions, and `text_tokens` those of the texts alone, about as many as the translation will
    have. They come from a tokenizer, or are `estimated` as one token for four bytes.
    """

    rows: int = 0
    done: int = 0
    without_text: int = 0
    too_long: int = 0
    broken: int = 0
    first_broken: str = ""
    requests: int = 0
    characters: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    estimated: bool = True


def plan(source: Path, out: Path, options: TranslateOptions, tokenizer: Path | None = None) -> TranslatePlan:
    """Counts what `translate` would send; nothing is sent or written. `tokenizer` has a `tokenizer.json` in it.

    Raises what `translate` does for source, output and journal, and `DataError` for a tokenizer that cannot be read.
    """
    table, path = _open(source, out, options)
    survey = _survey(source, table, options)
    count = _token_counter(tokenizer)
    count_instructions = lru_cache(1024)(count)
    requests = characters = prompt_tokens = text_tokens = 0
    with read_journal(path, _settings(source, options)) as journal:
        waiting = _waiting(survey, journal)
        done = journal.counts[Outcome.TRANSLATED] + journal.counts[Outcome.UNCHANGED]
        for row in table.rows():
            for _, text in texts_to_send(row, journal.read(row.number)) if row.number in waiting else ():
                tokens = count(text.strip())
                requests += 1
                characters += len(text)
                text_tokens += tokens
                prompt_tokens += tokens + count_instructions(instructions(options, text))
    return TranslatePlan(
        rows=survey.rows,
        done=done,
        without_text=survey.without_text,
        too_long=survey.rows - done - survey.without_text - survey.broken - len(waiting),
        broken=survey.broken,
        first_broken=survey.first_broken,
        requests=requests,
        characters=characters,
        prompt_tokens=prompt_tokens,
        text_tokens=text_tokens,
        estimated=tokenizer is None,
    )


def translate(source: Path, out: Path, options: TranslateOptions, progress: Progress | None = None) -> TranslateSummary:
    """Translates columns of `source` into `out`, a file of the same kind; run again after a stop, it goes on.

    Rows that failed in an earlier run are tried again, and what was done is not. Beside `out` stand
    `OUT.journal.jsonl`, which later runs go on from, and `OUT.untranslated.jsonl`, which lists what is not translated,
    if there is any. Where nothing is left to do it returns at once. It cannot be called where an event loop is running.
    Ctrl-C comes through as `KeyboardInterrupt`, with the journal kept.

    Raises:
        DataError: for a source of which no row can be read; checked before anything is sent.
        UsageError: for columns, names and addresses that cannot be used.
        RunError: for a journal of another source or other settings, for an `out` that has none or was changed since,
            where the endpoint refuses key or model or is out of reach, and where the disk is full.
        MissingExtraError: httpx2 is not installed.
    """
    table, path = _open(source, out, options)
    survey = _survey(source, table, options)
    with open_journal(path, _settings(source, options)) as journal:
        waiting = _waiting(survey, journal)
        if journal.finished and out.exists() and not waiting:
            return _summarize(journal, survey, already_done=True)
        if journal.output and out.exists() and journal.output != _digest(out):
            raise RunError(
                f"{out}: was changed after it was written, and trying the rows that failed again would undo that; "
                "move it away, or choose another --out"
            )
        if waiting:
            with _orderly_interrupts():
                asyncio.run(_translate_rows(table, options, journal, survey.sendable, waiting, progress))
        _write_output(table, out, options, journal)
        journal.finish(_digest(out))
        return _summarize(journal, survey)


def _open(source: Path, out: Path, options: TranslateOptions) -> tuple[Table, Path]:
    """The source, and the path of the journal."""
    table = open_table(source, options.columns)
    if out.suffix.lower() != source.suffix.lower():
        raise UsageError(f"{out}: the output is of the source's kind, so its name must end in {source.suffix}")
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out}: the output would take the source's place; choose another name")
    path = out.with_name(f"{out.name}.journal.jsonl")
    if out.exists() and not path.exists():
        raise RunError(f"{out}: exists already, and {path.name} is not beside it; choose another name")
    return table, path


def _waiting(survey: _Survey, journal: Journal) -> set[int]:
    """The rows that are still to be sent."""
    return {row for row in survey.sendable if journal.outcome(row) in (None, Outcome.FAILED)}


@contextmanager
def _orderly_interrupts() -> Iterator[None]:
    """Leaves Ctrl-C to asyncio, which ends the requests first; another handler would raise amidst the event loop."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Survey:
    """What a look at the whole table has shown; the sets hold numbers of rows."""

    rows: int = 0
    without_text: int = 0
    broken: int = 0
    first_broken: str = ""
    sendable: set[int] = field(default_factory=set)
    too_long: set[int] = field(default_factory=set)


def _survey(source: Path, table: Table, options: TranslateOptions) -> _Survey:
    """Reads the whole table, so that what is wrong with it is known before anything is sent."""
    found = _Survey()
    missing = set(options.columns)
    for row in table.rows():
        found.rows += 1
        missing -= row.values.keys()
        if row.fault:
            found.broken += 1
            found.first_broken = found.first_broken or f"row {row.number}: {row.fault}"
        elif not texts_to_send(row):
            found.without_text += 1
        elif too_long(row, options):
            found.too_long.add(row.number)
        else:
            found.sendable.add(row.number)
    if found.rows and found.broken == found.rows:
        raise DataError(f"{source}: no row can be read; {found.first_broken}")
    if found.rows and missing:  # of JSON lines: other tables have looked into their headers
        there = ", ".join(json_columns(source)[:_TOLD]) or "none"
        raise DataError(
            f"{source}: no row that can be read has a column {sorted(missing)[0]!r}; its columns are {one_line(there)}"
        )
    return found


async def _translate_rows(
    table: Table,
    options: TranslateOptions,
    journal: Journal,
    sendable: set[int],
    waiting: set[int],
    progress: Progress | None,
) -> None:
    address = find_address(options.base_url, options.key_variable)
    done = len(sendable) - len(waiting)

    def report() -> None:
        if progress:
            progress(done, len(sendable), f"{journal.counts[Outcome.FAILED]} failed")

    async def work(rows: Iterator[Row]) -> None:
        nonlocal done
        for row in rows:  # all workers take from the same iterator
            journal.append(await translator.translate_row(row, journal.read(row.number)))
            done += 1
            report()

    report()
    pace = Pace(options.requests_per_minute)
    async with ChatEndpoint(address, options.model, pace, options.timeout) as endpoint:
        translator = Translator(endpoint, options)
        rows = (row for row in table.rows() if row.number in waiting)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(options.concurrency):
                    group.create_task(work(rows))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


def _token_counter(folder: Path | None) -> Callable[[str], int]:
    if folder is None:
        return lambda text: -(-len(text.encode("utf-8", "surrogatepass")) // 4)
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{folder}: no tokenizer.json in it; give the folder of a tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"{path}: the tokenizer cannot be read ({error})") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _settings(source: Path, options: TranslateOptions) -> dict[str, Any]:
    """What the translations depend on: not where the model is asked, nor how fast, nor how long a text may be."""
    return {
        "format": _FORMAT,
        "source": _digest(source),
        "model": options.model,
        "from": options.source_language,
        "to": options.to,
        "column": list(options.columns),
    }


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_output(table: Table, out: Path, options: TranslateOptions, journal: Journal) -> None:
    """Writes the output, and the list of what in it is not translated."""
    untranslated: list[dict[str, Any]] = []
    remove_leftovers(out.parent, out.name)

    def changes(row: Row) -> dict[str, Any]:
        entry = journal.read(row.number)
        untranslated.extend(_untranslated(row, entry, options))
        if entry is None or entry.outcome is not Outcome.TRANSLATED:
            return {}
        texts = iter(entry.texts)
        return {column: with_texts(value, texts) for column, value in row.values.items()}

    table.copy(out, changes)
    listing = out.with_name(f"{out.name}.untranslated.jsonl")
    if untranslated:
        write_atomically(listing, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in untranslated))
    else:
        listing.unlink(missing_ok=True)


def _untranslated(row: Row, entry: Entry | None, options: TranslateOptions) -> Iterator[dict[str, Any]]:
    """Why the row, or which of its texts, is not translated."""

    def line(outcome: Outcome, reason: str, **column: str) -> dict[str, Any]:
        return {"row": row.number, "outcome": outcome, **column, "reason": reason}

    if row.fault:
        yield line(Outcome.BROKEN, row.fault)
    elif entry is None:
        if found := too_long(row, options):
            yield line(Outcome.FAILED, found[1], column=found[0])
    elif entry.outcome is Outcome.FAILED:
        yield line(Outcome.FAILED, entry.reason, column=entry.column)
    else:
        for column in entry.unchanged:
            yield line(Outcome.UNCHANGED, "the text came back as it was", column=column)


def _summarize(journal: Journal, survey: _Survey, already_done: bool = False) -> TranslateSummary:
    never_sent = sum(journal.outcome(row) is None for row in survey.too_long)
    return TranslateSummary(
        rows=survey.rows,
        translated=journal.counts[Outcome.TRANSLATED],
        unchanged=journal.counts[Outcome.UNCHANGED],
        without_text=survey.without_text,
        failed=journal.counts[Outcome.FAILED] + never_sent,
        broken=survey.broken,
        unchanged_texts=journal.unchanged_texts,
        spent=journal.spent,
        spent_in_all=journal.spent_before + journal.spent,
        already_done=already_done,
    )
