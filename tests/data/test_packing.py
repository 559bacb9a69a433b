import numpy as np
import pytest

from uni_x.data.packing import pack, plan_rows
from uni_x.data.render import IGNORED, Rendered


def sequence(length, first=0, kind="draw", image_tokens=1):
    ids = np.arange(first, first + length)
    return Rendered(ids, ids.copy(), kind, "s", image_tokens)


def documents_of(row):
    return [row.input_ids[row.document_ids == number] for number in range(1, row.document_ids.max() + 1)]


@pytest.fixture
def mixed():
    lengths = np.random.default_rng(0).integers(1, 1101, 3000)
    starts = np.cumsum(lengths) - lengths
    return [sequence(int(length), int(start)) for length, start in zip(lengths, starts, strict=True)]


def test_a_mix_of_short_and_long_fills_rows_to_99_percent(mixed):
    rows, statistics = pack(mixed, 4096)
    assert statistics.fill >= 0.99
    assert statistics.rows == len(rows)
    assert statistics.tokens == sum(len(row.input_ids) for row in rows) == sum(len(s.input_ids) for s in mixed)
    assert statistics.documents == len(mixed)
    assert (statistics.dropped, statistics.split) == (0, 0)


def test_each_sequence_is_one_whole_document_of_one_row(mixed):
    rows, _ = pack(mixed, 4096)
    documents = sorted((document.tolist() for row in rows for document in documents_of(row)), key=lambda ids: ids[0])
    assert documents == [sequence.input_ids.tolist() for sequence in mixed]
    assert max(len(row.input_ids) for row in rows) <= 4096


def test_documents_are_numbered_from_one_and_predict_nothing_of_the_next(mixed):
    rows, _ = pack(mixed, 4096)
    for row in rows:
        assert row.input_ids.dtype == row.labels.dtype == row.document_ids.dtype == np.int64
        assert row.document_ids[0] == 1
        starts = np.flatnonzero(np.diff(row.document_ids, prepend=0))
        assert np.diff(row.document_ids)[starts[1:] - 1].tolist() == [1] * (len(starts) - 1)
        assert (row.labels[starts] == IGNORED).all()
        others = np.delete(np.arange(len(row.labels)), starts)
        assert (row.labels[others] == row.input_ids[others]).all()


def test_the_sequences_themselves_stay_as_they_are(mixed):
    pack(mixed, 4096)
    assert all(sequence.labels[0] == sequence.input_ids[0] for sequence in mixed)


def test_rows_are_mixed_as_the_sequences_come():
    short, long = sequence(10, kind="converse"), sequence(30)
    rows, _ = pack([short, long] * 500, 400)
    shares = [np.mean([len(document) == 10 for document in documents_of(row)]) for row in rows]
    assert np.std(shares[:-2]) < 0.1


def test_a_plan_packs_lengths_as_sequences_are(mixed):
    rows, _ = pack(mixed, 4096)
    plan = plan_rows([len(sequence.input_ids) for sequence in mixed], 4096)
    assert [sum(len(mixed[index].input_ids) for index in row) for row in plan] == [len(r.input_ids) for r in rows]
    assert sorted(index for row in plan for index in row) == list(range(3000))


def test_overlong_images_and_answers_are_dropped_overlong_texts_split():
    sequences = [
        sequence(9),
        sequence(9, kind="converse", image_tokens=0),
        sequence(9, kind="text", image_tokens=4),
        sequence(19, kind="text", image_tokens=0),
        sequence(8),
    ]
    rows, statistics = pack(sequences, 8)
    assert (statistics.dropped, statistics.split) == (3, 1)
    documents = sorted(document.tolist() for row in rows for document in documents_of(row))
    assert documents == [list(range(8)), list(range(8)), list(range(8, 16)), list(range(16, 19))]


def test_texts_are_left_out_rather_than_cut_on_request():
    rows, statistics = pack([sequence(19, kind="text", image_tokens=0), sequence(8)], 8, split=False)
    assert (len(rows), statistics.dropped, statistics.split) == (1, 1, 0)


def test_unjoined_each_sequence_has_a_row_of_its_own(mixed):
    rows, statistics = pack(mixed, 4096, join=False)
    assert [row.input_ids.tolist() for row in rows] == [sequence.input_ids.tolist() for sequence in mixed]
    assert all((row.document_ids == 1).all() for row in rows)
    assert statistics.documents == statistics.rows == len(mixed)


def test_nothing_packed_is_no_rows():
    rows, statistics = pack([], 8)
    assert rows == []
    assert statistics.fill == 1.0
