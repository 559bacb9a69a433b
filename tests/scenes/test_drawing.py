import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from uni_x.errors import InputError
from uni_x.scenes import (
    COLOURS,
    HELD_OUT_COLOURS,
    HELD_OUT_KINDS,
    HELD_OUT_PAIRS,
    TASKS,
    Scene,
    Thing,
    describe,
    drawing_prompts,
    drawing_samples,
)
from uni_x.scenes.drawing import Clause, caption, lay_out
from uni_x.scenes.judge import detections_of, judge


def test_a_caption_says_exactly_what_is_in_its_scene():
    for sample in drawing_samples(600, seed=1):
        words = sample.caption.replace("left of", "left").replace("right of", "right").split()
        counts = Counter(thing.object for thing in sample.scene.things)
        if sample.task == "counting":
            (name, count), *rest = counts.items()
            assert not rest
            assert words[0] == ("", "", "two", "three", "four")[count]
            assert words[-1].startswith(name[:-1])
            assert len({thing.colour for thing in sample.scene.things}) == 1
        else:
            assert all(words.count(name) == count for name, count in counts.items()), sample
        colours = {thing.colour for thing in sample.scene.things}
        assert {word for word in words if word in COLOURS} <= colours


def test_things_in_a_relation_stand_in_one_row_or_column():
    for sample in drawing_samples(200, seed=2, weights={"position": 1.0}):
        target, thing = sample.scene.things
        if "left of" in sample.caption:
            assert (thing.row, thing.column < target.column) == (target.row, True)
        elif "right of" in sample.caption:
            assert (thing.row, thing.column > target.column) == (target.row, True)
        elif "above" in sample.caption:
            assert (thing.column, thing.row < target.row) == (target.column, True)
        else:
            assert (thing.column, thing.row > target.row) == (target.column, True)


def test_no_training_scene_or_caption_holds_a_held_out_combination():
    for sample in drawing_samples(4000, seed=3):
        things = sample.scene.things
        assert not any((thing.object, thing.colour) in HELD_OUT_COLOURS for thing in things)
        assert not any(frozenset(pair) in HELD_OUT_PAIRS for pair in combinations(sample.scene.objects, 2))
        assert not any(f"{colour} {name}" in sample.caption for name, colour in HELD_OUT_COLOURS)


def test_every_task_has_its_share_of_the_samples():
    shares = Counter(sample.task for sample in drawing_samples(2000, seed=4, weights={"colors": 3, "position": 1}))

    assert shares["colors"] / 2000 == pytest.approx(0.75, abs=0.05)
    assert set(shares) == {"colors", "position"}
    assert set(Counter(sample.task for sample in drawing_samples(500, seed=4))) == set(TASKS)


def test_the_plain_forms():
    red_heart, blue_car = Clause("heart", colour="red"), Clause("car", colour="blue")

    assert caption((Clause("heart"),)) == "a heart"
    assert caption((Clause("butterfly", 3),)) == "three butterflies"
    assert caption((Clause("heart", 2, "orange"),)) == "two orange hearts"
    assert caption((red_heart, blue_car)) == "a red heart and a blue car"
    assert caption((blue_car, Clause("heart", colour="red", position=("left of", 0)))) == (
        "a red heart left of a blue car"
    )


def test_a_description_names_everything_in_reading_order():
    scene = Scene(
        (
            Thing("tree", None, 3, 0),
            Thing("car", "blue", 1, 2),
            Thing("heart", "red", 0, 1),
            Thing("car", "blue", 1, 1),
        )
    )

    assert describe(scene) == "a red heart, two blue cars and a tree"
    assert describe(Scene(scene.things[:1])) == "a tree"


@pytest.mark.parametrize("task", [task for task in TASKS if task != "single_object"])
def test_fifty_prompts_of_a_task_are_distinct(task):
    assert len({prompt.text for prompt in drawing_prompts(task, 50, seed=5)}) == 50


def test_prompts_start_again_when_all_are_used():
    texts = [prompt.text for prompt in drawing_prompts("single_object", 40, seed=5)]

    assert len(set(texts)) == 20
    assert texts[:20] == texts[20:]


def test_prompts_carry_the_metadata_of_geneval():
    counting = next(p for p in drawing_prompts("counting", 60, seed=6) if p.text == "three hearts")
    position = next(p for p in drawing_prompts("position", 1400, seed=6) if p.text == "a heart left of a car")

    assert counting.metadata() == {
        "tag": "counting",
        "include": [{"class": "heart", "count": 3}],
        "exclude": [{"class": "heart", "count": 4}],
        "prompt": "three hearts",
    }
    assert position.metadata()["include"] == [
        {"class": "car", "count": 1},
        {"class": "heart", "count": 1, "position": ["left of", 0]},
    ]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_laid_out_for_a_prompt_fulfils_it(task):
    rng = np.random.default_rng(7)
    for prompt in drawing_prompts(task, 100, seed=7):
        assert judge(prompt, detections_of(lay_out(prompt.include, rng))).correct, prompt


@pytest.mark.parametrize(("task", "kind"), HELD_OUT_KINDS.items())
def test_held_out_prompts_combine_what_training_does_not(task, kind):
    plain = drawing_prompts(task, 100, seed=8)
    held_out = drawing_prompts(task, 100, seed=8, held_out=True)

    assert {prompt.held_out for prompt in plain} == {None}
    assert {prompt.held_out for prompt in held_out} == {kind}
    for prompt in held_out:
        names = frozenset(clause.object for clause in prompt.include)
        colours = {(clause.object, clause.colour) for clause in prompt.include}
        assert (names in HELD_OUT_PAIRS, bool(colours & HELD_OUT_COLOURS)) == (
            kind == "held_out_pair",
            kind == "held_out_colour",
        )


def test_tasks_that_do_not_exist_are_told_with_those_that_do():
    with pytest.raises(InputError, match="no drawing task 'colours': it must be one of single_object"):
        drawing_prompts("colours", 1, seed=0)
    with pytest.raises(InputError, match="no held-out prompts for 'counting'"):
        drawing_prompts("counting", 1, seed=0, held_out=True)


def test_a_seed_gives_the_same_samples_in_another_process():
    program = """
from uni_x.scenes import drawing_samples, looking_samples, sentences, multiple_choice_questions
print([s.scene for s in drawing_samples(20, 9)], [s.turns for s in looking_samples(20, 9)])
print(list(sentences(20, 9)), multiple_choice_questions(10, 9))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }

    assert len(outputs) == 1
    assert "heart" in outputs.pop()
