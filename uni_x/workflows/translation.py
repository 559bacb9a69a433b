"""`uni-x data translate`: what came of it, in lines of plain English."""

from collections.abc import Callable
from pathlib import Path

from uni_x.data.translation.translate import TranslateOptions, plan, translate


def plan_translation(source: Path, options: TranslateOptions, tokenizer: Path | None = None) -> list[str]:
    """What a translation would send, without sending it. Raises `UniXError` for a source that cannot be read."""
    counted = plan(source, options, tokenizer)
    how = "estimated, a token for four bytes" if counted.estimated else f"counted with {tokenizer}"
    return [
        f"{counted.rows} rows: {counted.unchanged} with nothing to translate, {counted.too_long} too long, "
        f"{counted.requests} requests of {counted.characters} characters for the others",
        f"{counted.prompt_tokens} prompt tokens, about {counted.text_tokens} in the answers ({how}); nothing was sent",
    ]


def translate_file(
    source: Path, out: Path, options: TranslateOptions, progress: Callable[[int, int, str], None]
) -> list[str]:
    """Translates a file. Raises `UniXError` for files that cannot be read or written, and an endpoint that is dead."""
    summary = translate(source, out, options, progress)
    lines = []
    if summary.already_done:
        lines.append(f"This file is finished already. Delete {out} and its journal to translate again.")
    lines.append(
        f"{summary.rows} rows = {summary.translated} translated + {summary.unchanged} unchanged + "
        f"{summary.failed} failed, in {out}"
    )
    lines.append(
        f"{summary.requests} requests, {summary.prompt_tokens} prompt tokens and {summary.completion_tokens} in "
        "answers, as the endpoint counts them"
    )
    if summary.failed:
        lines.append(f"Why: {out.with_name(out.name + '.failed.jsonl')}")
    return lines
