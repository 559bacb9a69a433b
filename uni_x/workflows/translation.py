"""`uni-x data translate`: what came of it, in lines of plain English."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uni_x.data.translation.endpoint import Usage
from uni_x.data.translation.translate import TranslateOptions, TranslateSummary, plan, translate
from uni_x.words import count_of


@dataclass(frozen=True)
class Translated:
    """What to tell about a translation; `ok` where no row failed or is broken."""

    lines: tuple[str, ...]
    ok: bool


def plan_translation(source: Path, out: Path, options: TranslateOptions, tokenizer: Path | None = None) -> list[str]:
    """What a translation would send, without sending it. Raises `UniXError` for files that cannot be used."""
    counted = plan(source, out, options, tokenizer)
    how = "estimated, a token for four bytes" if counted.estimated else f"counted with {tokenizer}"
    done = f"{counted.done} done already, " if counted.done else ""
    lines = [
        f"{counted.rows} rows: {done}{counted.without_text} without text to translate, {counted.too_long} too long, "
        f"{counted.broken} broken, {counted.requests} requests of {counted.characters} characters for the others",
        f"{counted.prompt_tokens} prompt tokens, about {counted.text_tokens} in the answers ({how}); nothing was sent",
    ]
    if counted.broken:
        lines.append(f"Broken rows would be copied as they stand. The first: {source}, {counted.first_broken}")
    return lines


def translate_file(
    source: Path, out: Path, options: TranslateOptions, progress: Callable[[int, int, str], None]
) -> Translated:
    """Translates a file. Raises `UniXError` for files that cannot be read or written, and an endpoint that is dead."""
    summary = translate(source, out, options, progress)
    return Translated(tuple(_describe(summary, out)), ok=not summary.failed and not summary.broken)


def _describe_usage(usage: Usage) -> str:
    requests = count_of(usage.requests, "request")
    if usage.prompt_tokens or usage.completion_tokens:
        return f"{requests}, {count_of(usage.prompt_tokens, 'prompt token')} and {usage.completion_tokens:,} in answers"
    return f"{requests}, of which the endpoint counts no tokens" if usage.requests else requests


def _describe(summary: TranslateSummary, out: Path) -> Iterator[str]:
    if summary.already_done:
        yield f"Nothing is left to do. Delete {out} and its journal to translate again."
    yield (
        f"{summary.rows} rows = {summary.translated} translated + {summary.unchanged} unchanged + "
        f"{summary.without_text} without text + {summary.failed} failed + {summary.broken} broken, in {out}"
    )
    if not summary.already_done:
        yield f"This run: {_describe_usage(summary.spent)}"
    if summary.spent != summary.spent_in_all:
        yield f"All runs: {_describe_usage(summary.spent_in_all)}"
    if summary.unchanged_texts:
        yield f"Texts that came back as they were: {summary.unchanged_texts} (names, numbers and code may)"
    if summary.failed:
        yield "Failed rows stand in their own language; the same command tries them again."
    if summary.broken:
        yield "Broken rows cannot be read, and stand as they stood in the source."
    if summary.failed or summary.broken or summary.unchanged_texts:
        yield f"Which and why: {out.with_name(out.name + '.untranslated.jsonl')}"
