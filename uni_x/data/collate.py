"""Makes batches of packed rows, and checks them while they are on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from uni_x.data.packing import PackedRow
from uni_x.data.render import IGNORED
from uni_x.errors import InputError


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest one."""

    vocab_size: int
    pad_token_id: int

    def __call__(self, rows: Sequence[PackedRow]) -> dict[str, torch.Tensor]:
        """Gives `input_ids`, `labels`, `document_ids` and `attention_mask`, each `(batch, length)` int64.

        Where padded the mask is 0, the label -100 and the document id 0. Raises `InputError` that names the row for
        ids and labels outside the vocabulary, and for documents that do not count up from 1.
        """
        if not rows:
            raise InputError("a batch needs at least one row")
        for number, row in enumerate(rows):
            self._check(number, row)
        document_ids = _pad([row.document_ids for row in rows], 0)
        return {
            "input_ids": _pad([row.input_ids for row in rows], self.pad_token_id),
            "labels": _pad([row.labels for row in rows], IGNORED),
            "document_ids": document_ids,
            "attention_mask": (document_ids > 0).long(),
        }

    def _check(self, number: int, row: PackedRow) -> None:
        shapes = {array.shape for array in (row.input_ids, row.labels, row.document_ids)}
        if len(shapes) != 1 or row.input_ids.ndim != 1 or not len(row.input_ids):
            raise InputError(f"row {number}: ids, labels and document ids must have one length, found {sorted(shapes)}")
        if row.input_ids.min() < 0 or row.input_ids.max() >= self.vocab_size:
            raise InputError(
                f"row {number}: ids from {row.input_ids.min()} to {row.input_ids.max()}, the vocabulary is "
                f"0 to {self.vocab_size - 1}"
            )
        strange = (row.labels != row.input_ids) & (row.labels != IGNORED)
        if strange.any():
            raise InputError(f"row {number}: label {row.labels[strange][0]} is neither the id at its place nor -100")
        steps = np.diff(row.document_ids)
        if row.document_ids[0] != 1 or ((steps != 0) & (steps != 1)).any():
            raise InputError(f"row {number}: document ids must count up from 1")


def _pad(arrays: Sequence[np.ndarray], value: int) -> torch.Tensor:
    padded = np.full((len(arrays), max(map(len, arrays))), value, dtype=np.int64)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)
