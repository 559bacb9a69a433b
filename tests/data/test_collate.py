from dataclasses import replace

import numpy as np
import pytest
import torch

from uni_x.data.collate import Collator
from uni_x.data.packing import PackedRow
from uni_x.errors import InputError

LONG = PackedRow(np.array([1, 2, 3, 4, 5]), np.array([-100, 2, -100, 4, 5]), np.array([1, 1, 2, 2, 2]))
SHORT = PackedRow(np.array([6, 7]), np.array([-100, 7]), np.array([1, 1]))
COLLATE = Collator(vocab_size=10, pad_token_id=9)


def test_rows_are_padded_on_the_right():
    batch = COLLATE([LONG, SHORT])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]],
        "labels": [[-100, 2, -100, 4, 5], [-100, 7, -100, -100, -100]],
        "document_ids": [[1, 1, 2, 2, 2], [1, 1, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.array([6, 10]), "labels": np.array([-100, 10])}, "row 1: ids from 6 to 10"),
        ({"input_ids": np.array([-1, 7])}, "row 1: ids from -1 to 7"),
        ({"labels": np.array([-100, 8])}, "row 1: label 8 is neither the id at its place nor -100"),
        ({"labels": np.array([7])}, "row 1: ids, labels and document ids must have one length"),
        ({"document_ids": np.array([0, 1])}, "row 1: document ids must count up from 1"),
        ({"document_ids": np.array([1, 3])}, "row 1: document ids must count up from 1"),
        ({"document_ids": np.array([1, 0])}, "row 1: document ids must count up from 1"),
        ({name: np.array([], dtype=np.int64) for name in ("input_ids", "labels", "document_ids")}, "one length"),
    ],
)
def test_rows_that_no_model_can_take_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        COLLATE([LONG, replace(SHORT, **changes)])


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match="at least one row"):
        COLLATE([])
