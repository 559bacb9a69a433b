import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from uni_x.errors import InputError
from uni_x.scenes import (
    COLOURS,
    HELD_OUT_COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    Scene,
    Thing,
    describe,
    drawing_samples,
    looking_samples,
    multiple_choice_questions,
    sentences,
    with_other_pictures,
    yes_no_questions,
)
from uni_x.scenes.questions import OPEN_TOPICS, YES_NO_TOPICS, Question

SCENE = Scene(
    (
        Thing("heart", "red", 0, 0),
        Thing("star", "blue", 0, 3),
        Thing("star", "blue", 3, 0),
        Thing("tree", None, 2, 2),
    )
)


def true_answer(question: str, scene: Scene) -> str:
    """Reads a question as a person would, from its words alone."""
    words = re.findall(r"[a-z]+", question)
    singular = {kind.plural: name for name, kind in KINDS.items()}
    names = [singular.get(word, word) for word in words if word in KINDS or word in singular]
    colours = [word for word in words if word in COLOURS]
    if question.startswith("is there"):
        wanted = [t for t in scene.things if t.object == names[0] and (not colours or t.colour == colours[0])]
        return "yes" if wanted else "no"
    if question.startswith("how many"):
        return ("zero", "one", "two", "three", "four")[len(scene.all_of(names[0]))]
    if question.startswith("what colour"):
        (thing,) = scene.all_of(names[0])
        return thing.colour
    if colours:
        return "/".join({t.object for t in scene.things if t.colour == colours[0]})
    return "/".join(scene.objects)


def phrases(text: str) -> list[str]:
    return [f"{colour} {name}" for name, colour in HELD_OUT_COLOURS if f"{colour} {name}" in text]


@pytest.mark.parametrize(
    ("question", "text", "answers"),
    [
        (Question("exists", "heart"), "is there a heart?", ("yes",)),
        (Question("exists_coloured", "heart", "orange"), "is there an orange heart?", ("no",)),
        (Question("colour", "heart"), "what colour is the heart?", ("red",)),
        (Question("colour", "star"), "what colour is the star?", ()),
        (Question("count", "star"), "how many stars are there?", ("two",)),
        (Question("coloured", colour="blue"), "what object is blue?", ("star",)),
        (Question("coloured", colour="green"), "what object is green?", ()),
        (Question("present"), "what object is in the picture?", ("heart", "star", "tree")),
    ],
)
def test_a_question_knows_its_words_and_every_true_answer(question, text, answers):
    assert question.text == text
    assert question.answers(SCENE) == answers


def test_every_training_answer_is_true():
    kinds = Counter()
    for sample in looking_samples(1500, seed=1):
        assert 1 <= len(sample.scene.objects) <= 3
        assert len(sample.turns) == 8
        for turn in sample.turns:
            kinds[turn.kind] += 1
            question, *listed = re.split(r" [A-D]\. ", turn.question)
            if turn.kind == "description":
                assert turn in (sample.turns[0], sample.turns[-1])
                assert turn.answer == describe(sample.scene)
                continue
            if turn.kind != "letter":
                assert turn.answer == true_answer(question, sample.scene), sample
                continue
            answers = true_answer(question, sample.scene).split("/")
            assert [letter for letter, option in zip("ABCD", listed, strict=True) if option in answers] == [turn.answer]

    assert set(kinds) == {"yes_no", "open", "letter", "description"}


def test_training_says_yes_as_often_as_no_to_the_same_words():
    tallies: dict[str, Counter] = defaultdict(Counter)
    for sample in looking_samples(6000, seed=2):
        for turn in sample.turns:
            if turn.kind == "yes_no":
                for word in re.findall(r"[a-z]+", turn.question):
                    tallies[word][turn.answer] += 1

    for word, tally in tallies.items():
        total = tally.total()
        assert tally["yes"] / total == pytest.approx(0.5, abs=0.02 + 4 / total**0.5), word  # a scene asks often


def test_nothing_in_training_holds_a_held_out_combination():
    for sample in looking_samples(2000, seed=3):
        assert not any((thing.object, thing.colour) in HELD_OUT_COLOURS for thing in sample.scene.things)
        assert not any(frozenset(pair) in HELD_OUT_PAIRS for pair in combinations(sample.scene.objects, 2))
        for turn in sample.turns:
            named = [word for word in re.findall(r"[a-z]+", turn.question) if word in KINDS]
            assert not any(frozenset(pair) in HELD_OUT_PAIRS for pair in combinations(named, 2)), turn
            assert not phrases(turn.question + turn.answer)
            if "what colour" in turn.question or "what object is" in turn.question:
                colours = [word for word in re.findall(r"[a-z]+", turn.question) if word in COLOURS]
                assert not any((name, colour) in HELD_OUT_COLOURS for name in named for colour in colours), turn
    for text in sentences(2000, seed=3):
        singular = {kind.plural: name for name, kind in KINDS.items()}
        words = [singular.get(word, word) for word in re.findall(r"[a-z]+", text)]
        assert not any(set(pair) <= set(words) for pair in (*HELD_OUT_COLOURS, *HELD_OUT_PAIRS)), text


def test_yes_no_questions_are_asked_once_for_each_answer():
    items = yes_no_questions(300, seed=4)

    assert len(items) == 300
    assert {item.topic for item in items} == set(YES_NO_TOPICS)
    assert all(item.answer == true_answer(item.question, item.scene) for item in items)
    by_answer = {answer: Counter(item.question for item in items if item.answer == answer) for answer in ("yes", "no")}
    assert by_answer["yes"] == by_answer["no"]


def test_most_coloured_questions_are_denied_by_another_colour():
    denied = [item for item in yes_no_questions(400, seed=5, topics=["exists_coloured"]) if item.answer == "no"]
    same_object = sum(item.question[:-1].split()[-1] in item.scene.objects for item in denied)

    assert same_object / len(denied) > 0.5


def test_one_option_alone_is_true_and_its_place_is_balanced():
    items = multiple_choice_questions(400, seed=6)

    for item in items:
        answers = true_answer(item.question, item.scene).split("/")
        assert len(set(item.options)) == 4
        assert [option in answers for option in item.options].index(True) == item.answer
        assert sum(option in answers for option in item.options) == 1
        listed = " ".join(f"{letter}. {option}" for letter, option in zip("ABCD", item.options, strict=True))
        assert item.prompt == f"{item.question} {listed}"
    assert Counter((item.topic, item.answer) for item in items) == {
        (topic, place): 25 for topic in OPEN_TOPICS for place in range(4)
    }


def test_no_word_is_more_often_true_than_another():
    right, offered = Counter(), Counter()
    for item in multiple_choice_questions(3000, seed=7):
        right[item.options[item.answer]] += 1
        offered.update(item.options)

    for word, count in offered.items():
        assert right[word] / count == pytest.approx(0.25, abs=4 * (0.19 / count) ** 0.5), word


def test_other_pictures_keep_the_questions_and_move_every_scene():
    items = multiple_choice_questions(60, seed=8)
    moved = with_other_pictures(items, seed=8)

    assert [item.prompt for item in moved] == [item.prompt for item in items]
    assert all(a.scene is not b.scene for a, b in zip(items, moved, strict=True))
    assert {item.scene for item in moved} == {item.scene for item in items}


def test_what_cannot_be_asked_is_told():
    with pytest.raises(InputError, match="an even number"):
        yes_no_questions(5, seed=0)
    with pytest.raises(InputError, match="no topic 'smell': it must be one of colour, count"):
        multiple_choice_questions(4, seed=0, topics=["smell"])
    with pytest.raises(InputError, match="two questions or more"):
        with_other_pictures(yes_no_questions(2, seed=0)[:1], seed=0)


def test_the_world_needs_few_words():
    texts = [sample.caption for sample in drawing_samples(3000, seed=9)]
    for sample in looking_samples(2000, seed=9):
        texts += [text for turn in sample.turns for text in turn[:2]]
    texts += sentences(1000, seed=9)
    texts += [item.prompt for item in multiple_choice_questions(200, seed=9)]

    assert len({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}) < 120
