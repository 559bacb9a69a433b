import pytest

from uni_x.scenes import read_choice, read_yes_no


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("Yes, there is a heart.", "yes"),
        ("There is no heart", "no"),
        ("yes and no", None),
        ("I know nothing about it", None),
        ("", None),
    ],
)
def test_yes_or_no_is_the_word_that_stands_alone(text, answer):
    assert read_yes_no(text) == answer


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("B. blue", 1),
        ("(C)", 2),
        ("The answer is D.", 3),
        ("the answer is **B** because it looks like that to me", 1),
        ("A or B", None),
        ("A heart would be red, I think", 0),
        ("blue", 1),
        ("It is Light Blue", 1),
        ("red and blue", None),
        ("green, green and once more nothing but the finest green", None),
        ("b", None),
        ("", None),
    ],
)
def test_a_choice_is_a_letter_or_the_words_of_one_option(text, index):
    assert read_choice(text, ["red", "blue", "green", "pink"]) == index


def test_an_option_inside_another_word_does_not_count():
    assert read_choice("balloon", ["ball", "balloon", "car", "cat"]) == 1
