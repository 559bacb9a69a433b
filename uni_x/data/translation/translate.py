"""Translates text columns of a file through an OpenAI-compatible endpoint; interrupted at any moment, it carries on.

Each finished row goes into a journal beside the output at once, and the output is written in one step when no row is
left. A row counts as translated, unchanged (nothing in it to translate, so it was not sent) or failed; a failed one
stays whole in its own language. An answer that loses or invents a placeholder is not taken.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from uni_x.data.translation.endpoint import ChatEndpoint, Pace, Usage, find_address
from uni_x.data.translation.journal import Journal, open_journal
from uni_x.data.translation.placeholders import is_translatable
from uni_x.data.translation.tables import Row, Table, open_table
from uni_x.data.translation.translator import TranslateOptions, Translator, hindrance, instructions, texts_by_column
from uni_x.data.translation.values import texts_of, with_texts
from uni_x.errors import DataError, RunError, UsageError
from uni_x.runs import write_atomically

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told how many of the rows with something to translate are done, how many there are, and a word on it."""

_FORMAT = 1


@dataclass(frozen=True)
class TranslateSummary:
    """What became of the rows (`rows == translated + unchanged + failed`), and what it cost.

    Requests and tokens are those of all finished rows, from earlier runs too, as the endpoint counts them.
    `already_done` says that an earlier run had finished the output.
    """

    rows: int = 0
    translated: int = 0
    unchanged: int = 0
    failed: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    already_done: bool = False


@dataclass(frozen=True)
class TranslatePlan:
    """What translating a whole file takes if each text is asked for once: `rows`, of which `unchanged` are not sent.

    `too_long` rows will fail, which is known beforehand. `characters` are those of the texts. `prompt_tokens` are those
    of texts and instructions, and `text_tokens` those of the texts alone, about as many as the translation will have.
    They come from a tokenizer, or are `estimated` as one token for four bytes.
    """

    rows: int = 0
    unchanged: int = 0
    too_long: int = 0
    requests: int = 0
    characters: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0
    estimated: bool = True


def plan(source: Path, options: TranslateOptions, tokenizer: Path | None = None) -> TranslatePlan:
    """Counts what `translate` would send; nothing is sent. `tokenizer` is a folder with a `tokenizer.json`.

    Raises `DataError` and `UsageError` for a file that cannot be translated, and `DataError` for a tokenizer that
    cannot be read.
    """
    table = open_table(source, options.columns)
    counted = _survey(source, table, options, _token_counter(tokenizer))
    return replace(counted, estimated=tokenizer is None)


def translate(source: Path, out: Path, options: TranslateOptions, progress: Progress | None = None) -> TranslateSummary:
    """Translates columns of `source` into `out`, a file of the same kind; run again after a stop, it goes on.

    Beside `out` stand `OUT.journal.jsonl`, which later runs go on from, and `OUT.failed.jsonl` if rows failed. On
    finished work it returns at once. It cannot be called where an event loop is running. Ctrl-C comes through as
    `KeyboardInterrupt`, with the journal kept.

    Raises:
        DataError: for a source that cannot be read; checked before anything is sent.
        UsageError: for columns, names and addresses that cannot be used.
        RunError: for a journal of another source or other settings, for an `out` that has none, where the endpoint
            refuses key or model or is out of reach, and where the disk is full.
        MissingExtraError: httpx2 is not installed.
    """
    table = open_table(source, options.columns)
    if out.suffix.lower() != source.suffix.lower():
        raise UsageError(f"{out}: the output is of the source's kind, so its name must end in {source.suffix}")
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out}: the output would take the source's place; choose another name")
    path = out.with_name(f"{out.name}.journal.jsonl")
    if out.exists() and not path.exists():
        raise RunError(f"{out}: exists already, and {path.name} is not beside it; choose another name")
    counted = _survey(source, table, options)
    with open_journal(path, _settings(source, options)) as journal:
        if journal.finished and out.exists():
            return _summarize(journal, counted, already_done=True)
        with _orderly_interrupts():
            asyncio.run(_translate_rows(table, options, journal, counted, progress or (lambda done, total, word: None)))
        table.copy(out, lambda row: _changes(row, journal))
        _write_failed(out.with_name(f"{out.name}.failed.jsonl"), journal)
        journal.finish()
        return _summarize(journal, counted)


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


async def _translate_rows(
    table: Table, options: TranslateOptions, journal: Journal, counted: TranslatePlan, progress: Progress
) -> None:
    address = find_address(options.base_url, options.key_variable)
    total = counted.rows - counted.unchanged

    def report() -> None:
        counts = journal.counts
        progress(counts["translated"] + counts["failed"], total, f"{counts['failed']} failed")

    async def work(rows: Iterator[Row]) -> None:
        for row in rows:  # all workers take from the same iterator
            journal.append(await translator.translate_row(row))
            report()

    report()
    pace = Pace(options.requests_per_minute)
    async with ChatEndpoint(address, options.model, pace, options.timeout) as endpoint:
        translator = Translator(endpoint, options)
        rows = (row for row in table.rows() if row.number not in journal and _is_sent(row))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(options.concurrency):
                    group.create_task(work(rows))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


def _is_sent(row: Row) -> bool:
    return any(is_translatable(text) for _, text in texts_by_column(row))


def _survey(source: Path, table: Table, options: TranslateOptions, count: Callable[[str], int] = len) -> TranslatePlan:
    """Reads the whole table, so that what is wrong with it is said before anything is sent."""
    rows = unchanged = too_long = requests = characters = prompt_tokens = text_tokens = 0
    missing = set(options.columns)
    count_instructions = lru_cache(1024)(count)
    for row in table.rows():
        rows += 1
        missing -= row.values.keys()
        for column, value in row.values.items():
            try:
                texts_of(value)
            except DataError as error:
                raise DataError(f"{source}, row {row.number}, column {column!r}: {error}") from None
        texts = [text for _, text in texts_by_column(row) if is_translatable(text)]
        if not texts:
            unchanged += 1
        elif any(hindrance(text, options) for text in texts):
            too_long += 1
        else:
            requests += len(texts)
            for text in texts:
                tokens = count(text.strip())
                characters += len(text)
                text_tokens += tokens
                prompt_tokens += tokens + count_instructions(instructions(options, text))
    if rows and missing:
        raise DataError(f"{source}: no row has a column {sorted(missing)[0]!r}")
    return TranslatePlan(rows, unchanged, too_long, requests, characters, prompt_tokens, text_tokens)


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
    """What the translations depend on: not where the model is asked, nor how fast."""
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "format": _FORMAT,
        "source": digest,
        "model": options.model,
        "source_language": options.source_language,
        "to": options.to,
        "columns": list(options.columns),
        "max_characters": options.max_characters,
    }


def _changes(row: Row, journal: Journal) -> dict[str, Any]:
    if row.number not in journal:
        return {}
    entry = journal.read(row.number)
    texts = iter(entry.get("texts", ()))
    return {column: with_texts(value, texts) for column, value in row.values.items()} if "texts" in entry else {}


def _write_failed(path: Path, journal: Journal) -> None:
    failed = [{name: entry[name] for name in ("row", "column", "reason")} for entry in journal if "reason" in entry]
    if failed:
        write_atomically(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in failed))
    else:
        path.unlink(missing_ok=True)


def _summarize(journal: Journal, counted: TranslatePlan, already_done: bool = False) -> TranslateSummary:
    counts = {name: journal.counts[name] for name in ("translated", "failed", *asdict(Usage()))}
    return TranslateSummary(rows=counted.rows, unchanged=counted.unchanged, already_done=already_done, **counts)
