from uni_x.scenes import (
    drawing_rows,
    drawing_samples,
    looking_rows,
    looking_samples,
    openmoji_rows,
    sentences,
    text_rows,
)


def test_a_drawing_row_is_a_picture_and_its_caption():
    rows = list(drawing_rows(drawing_samples(3, seed=1)))

    assert [row.id for row in rows] == ["draw-000000", "draw-000001", "draw-000002"]
    assert [row.caption for row in rows] == [sample.caption for sample in drawing_samples(3, seed=1)]
    assert all(row.image.size == (128, 128) and row.text is None and not row.turns for row in rows)


def test_a_looking_row_is_a_picture_with_questions_and_answers():
    (row,) = looking_rows(looking_samples(1, seed=2))
    (sample,) = looking_samples(1, seed=2)

    assert row.turns == tuple(turn[:2] for turn in sample.turns)
    assert row.caption is None
    assert row.image.size == (128, 128)


def test_a_text_row_is_text_alone():
    (row,) = text_rows(sentences(1, seed=3))

    assert row.text.endswith(".")
    assert row.image is None


def test_openmoji_rows_are_pictures_with_their_names():
    rows = openmoji_rows(32)
    row = next(row for row in rows if row.caption == "beer mug" or row.caption == "anchor")

    assert row.image.size == (32, 32)
