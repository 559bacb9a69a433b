"""Rows of text that a tokenizer has made into ids already: back to text, which is what shards hold."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from uni_x.data.schema import SourceRow
from uni_x.data.text_tokenizer import load_text_tokenizer, tokenize
from uni_x.errors import DataError

OPTION = "--text-tokenizer"


class TextOfIds:
    """Turns ids back into the text of which rendering makes the same ids, with the tokenizer that made them.

    Args:
        folder: of the tokenizer, such as a model folder.

    Raises `DataError` for a folder that is none.
    """

    def __init__(self, folder: str | Path):
        self._tokenizer = load_text_tokenizer(folder, OPTION)
        vocabulary = self._tokenizer.get_vocab()
        self._known = frozenset(vocabulary.values())
        added = self._tokenizer.added_tokens_decoder
        self._special = {id_: str(token) for id_, token in added.items() if token.special}
        self._ends = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        self._lock = threading.Lock()  # threads cannot share a tokenizer while its settings change
        self.fingerprint = hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. What rendering puts around a text itself is taken off: bos, eos and padding.

        Raises `DataError` with the reason where no text stands for the ids: they are none of the tokenizer's, as those
        of images are, special tokens, or others than the tokenizer makes of their text.
        """
        first, end = 0, len(ids)
        while end and ids[end - 1] in self._ends:
            end -= 1
        if end and ids[0] == self._tokenizer.bos_token_id:
            first = 1
        own = list(ids[first:end])
        for number, id_ in enumerate(own, start=first):
            if reason := self._misfit(id_):
                raise DataError(f"input_ids[{number}]: {reason}")
        with self._lock:
            text = str(self._tokenizer.decode(own, clean_up_tokenization_spaces=False))
            (again,) = tokenize(self._tokenizer, [text])
        if again != own:
            raise DataError(f"input_ids: {OPTION} makes other ids of the text that they spell; give the text itself")
        return text

    def _misfit(self, id_: int) -> str | None:
        """Why an id is no part of a text; None where it may be."""
        if id_ in self._special:
            return f"the special token {self._special[id_]}, which a text cannot hold"
        if id_ not in self._known:
            return f"{id_} is none of the {len(self._known)} ids of {OPTION} (of images codes are read, not ids)"
        return None


def with_text(row: SourceRow, text_of_ids: TextOfIds | None) -> SourceRow:
    """The row with the text of its ready ids, where it has any.

    Raises `DataError` with the reason where no text stands for them, and where there is no `text_of_ids`.
    """
    if row.input_ids is None:
        return row
    if text_of_ids is None:
        raise DataError(f"input_ids: ids mean nothing without the tokenizer that made them; name its folder ({OPTION})")
    return replace(row, text=text_of_ids.decode(row.input_ids), input_ids=None)
