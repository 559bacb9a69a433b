"""The rows of a source that cannot be used: a line of JSON each, with the reason."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uni_x.runs import writing_whole
from uni_x.words import count_of

REJECTS = "rejects.jsonl"
_NAMED_REASONS = 3


def write_rejects(folder: Path, rejects: Iterable[Mapping[str, Any]]) -> None:
    """Writes `rejects.jsonl` into a folder, one reject in memory at a time; nothing where `rejects` raises."""
    with writing_whole(folder / REJECTS) as stream:
        for reject in rejects:
            line = json.dumps(reject, ensure_ascii=False) + "\n"
            # A lone surrogate, as a file name may hold one, becomes an escape of JSON.
            stream.write(line.encode("utf-8", "backslashreplace"))


def frequent_reasons(folder: Path) -> str:
    """The most frequent kinds of reason in a folder's `rejects.jsonl`, each with its count and an example."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with (folder / REJECTS).open(encoding="utf-8") as lines:
        for line in lines:
            reason = json.loads(line)["reason"]
            kind = _kind(reason)
            counts[kind] += 1
            examples.setdefault(kind, reason)
    named = [
        f"{count:,} {'with' if count == 1 else 'such as'} {examples[kind]!r}"
        for kind, count in counts.most_common(_NAMED_REASONS)
    ]
    others = len(counts) - len(named)
    return ", ".join(named) + (f", and {count_of(others, 'other reason')}" if others else "")


def _kind(reason: str) -> str:
    """What reasons have in common that differ in a field, a file, a number or what a library says."""
    field, separator, rest = reason.partition(": ")
    if separator and " " not in field:
        reason = rest
    common = reason.partition(": ")[0].partition(" (")[0]
    return "".join("0" if character.isdigit() else character for character in common)
