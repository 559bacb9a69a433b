import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from uni_x.errors import MissingExtraError
from uni_x.scenes import (
    COLOURS,
    KINDS,
    TASKS,
    Placement,
    Scene,
    Thing,
    chance,
    compose,
    compose_placements,
    drawing_prompts,
    drawing_samples,
    judge,
    looking_samples,
    read_picture,
)
from uni_x.scenes import scorer as scorer_module
from uni_x.scenes.drawing import Clause, DrawingPrompt, lay_out
from uni_x.scenes.geometry import directions
from uni_x.scenes.pictures import OBJECT, TILE
from uni_x.scenes.scorer import Detection

ALL_LOOKS = [(name, colour) for name, kind in KINDS.items() for colour in (COLOURS if kind.colourable else [None])]
HEART = DrawingPrompt("single_object", "a heart", (Clause("heart"),))


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 14.3, (128, 128, 3))  # 25 dB
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file)


DAMAGE = {
    "none": lambda image: image,
    "noise": noisy,
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "jpeg": compressed,
    "half size": lambda image: image.resize((64, 64), Image.Resampling.BOX),
    "double size": lambda image: image.resize((256, 256), Image.Resampling.BICUBIC),
    "transparent": lambda image: image.convert("RGBA"),
}


def looks(things):
    return sorted((thing.object, str(thing.colour)) for thing in things)


def scattered(rng: np.random.Generator, scene: Scene) -> list[Placement]:
    """The things of a scene anywhere in the picture, their squares apart by their white margins or less."""
    apart = OBJECT + 2
    while True:
        corners = rng.integers(-2, 128 - TILE + 3, (len(scene.things), 2))
        gaps = np.abs(corners[:, None] - corners[None]).max(axis=2) + apart * np.eye(len(corners))
        if gaps.min() >= apart:
            return [
                Placement(thing.object, thing.colour, left, top)
                for thing, (left, top) in zip(scene.things, corners.tolist(), strict=True)
            ]


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_object_in_every_colour_is_read_back(damage):
    for start in range(0, len(ALL_LOOKS), 6):
        scene = Scene(tuple(Thing(*look, *divmod(3 * i, 4)) for i, look in enumerate(ALL_LOOKS[start : start + 6])))
        assert looks(read_picture(DAMAGE[damage](compose(scene)))) == looks(scene.things)


@pytest.mark.parametrize("task", TASKS)
def test_true_scenes_of_a_task_are_judged_correct(task):
    rng = np.random.default_rng(1)
    prompts = drawing_prompts(task, 200, seed=1)
    right = sum(judge(prompt, compose(lay_out(prompt.include, rng))).correct for prompt in prompts)

    assert right >= 0.995 * len(prompts)


@pytest.mark.parametrize("task", TASKS)
def test_the_lattice_does_not_matter(task):
    rng = np.random.default_rng(2)
    prompts = drawing_prompts(task, 200, seed=2)
    right = 0
    for prompt in prompts:
        placed = scattered(rng, lay_out(prompt.include, rng))
        if prompt.include[-1].position:
            boxes = [(p.left, p.top, p.left + OBJECT, p.top + OBJECT) for p in placed]
            while prompt.include[-1].position[0] not in directions(boxes[1], boxes[0]):
                placed = scattered(rng, lay_out(prompt.include, rng))
                boxes = [(p.left, p.top, p.left + OBJECT, p.top + OBJECT) for p in placed]
        right += judge(prompt, compose_placements(placed)).correct

    assert right >= 0.995 * len(prompts)


def test_objects_that_touch_are_told_apart():
    placed = [Placement("book", "red", 20, 30), Placement("book", "blue", 48, 30), Placement("robot", None, 48, 58)]

    assert looks(read_picture(compose_placements(placed))) == looks(placed)


def test_a_detection_says_where_the_object_is():
    (found,) = read_picture(compose_placements([Placement("book", "green", 41, 67)]))
    left, top, right, bottom = found.box

    assert (found.object, found.colour) == ("book", "green")
    assert found.score > 0.99
    assert (left, top, right, bottom) == pytest.approx((43, 69, 71, 97), abs=1)


@pytest.mark.parametrize("name", KINDS)
def test_half_an_object_is_none(name):
    whole = compose(Scene((Thing(name, "red" if KINDS[name].colourable else None, 1, 1),)))
    for half in ((32, 32, 48, 64), (48, 32, 64, 64), (32, 32, 64, 48), (32, 48, 64, 64)):
        picture = whole.copy()
        picture.paste("white", half)
        assert read_picture(picture) == []


def test_mush_is_no_object():
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    blobs = Image.new("RGB", (128, 128), "white")
    for index, rgb in enumerate(COLOURS.values()):
        row, column = divmod(index, 4)
        ImageDraw.Draw(blobs).ellipse((column * 32 + 3, row * 64 + 3, column * 32 + 29, row * 64 + 29), fill=rgb)
    mean = np.mean([np.asarray(compose(Scene((Thing(*look, 1, 1),)))) for look in ALL_LOOKS], axis=0)

    even = [Image.new("RGB", (128, 128), rgb) for rgb in ("white", "gray", "black", *COLOURS.values())]
    for picture in (noise, blobs, Image.fromarray(mean.astype(np.uint8)), *even):
        assert read_picture(picture) == []
        assert judge(HEART, picture).reason == "expected heart>=1, found 0"


def test_drawings_of_something_else_rarely_pass():
    for task in TASKS:
        prompts = drawing_prompts(task, 50, seed=4)
        scenes = [sample.scene for sample in drawing_samples(50, seed=5, weights={task: 1.0})]
        passed = sum(judge(prompt, compose(scene)).correct for prompt, scene in zip(prompts, scenes, strict=True))
        assert passed <= 8, task
        assert chance(task, count=500) <= 0.1


def test_wrong_colours_and_swapped_positions_fail():
    red, blue = Thing("heart", "red", 1, 0), Thing("car", "blue", 1, 2)
    coloured = DrawingPrompt(
        "color_attr", "a blue heart and a red car", (Clause("heart", colour="blue"), Clause("car", colour="red"))
    )
    right_of = DrawingPrompt(
        "position", "a heart right of a car", (Clause("car"), Clause("heart", position=("right of", 0)))
    )
    picture = compose(Scene((red, blue)))

    assert judge(coloured, picture).reason == (
        "expected blue heart>=1, found 0 blue; and 1 red\nexpected red car>=1, found 0 red; and 1 blue"
    )
    assert judge(right_of, picture).reason == "expected heart right of target, found left of target"


def found(name, colour=None, left=0, top=0, score=1.0):
    return Detection(name, colour, (left, top, left + 28, top + 28), score)


def test_counting_wants_exactly_so_many_and_other_objects_do_not_hurt():
    prompt = DrawingPrompt("counting", "two hearts", (Clause("heart", 2),), (Clause("heart", 3),))

    assert judge(prompt, [found("heart"), found("heart"), found("tree")]).correct
    assert judge(prompt, [found("heart")]).reason == "expected heart>=2, found 1"
    assert judge(prompt, [found("heart")] * 3).reason == "expected heart<3, found 3"
    assert judge(HEART, [found("heart")] * 3).correct


def test_only_the_most_certain_objects_are_looked_at():
    prompt = DrawingPrompt("colors", "a red heart", (Clause("heart", colour="red"),))

    assert judge(prompt, [found("heart", "blue", score=0.92), found("heart", "red", score=0.97)]).correct
    assert judge(prompt, [found("heart", "red", score=0.92), found("heart", "blue", score=0.97)]).reason == (
        "expected red heart>=1, found 0 red; and 1 blue"
    )


def test_a_position_needs_its_target():
    prompt = DrawingPrompt("position", "a heart above a car", (Clause("car"), Clause("heart", position=("above", 0))))

    assert judge(prompt, [found("heart")]).reason == "expected car>=1, found 0\nno target for heart to be above"
    assert judge(prompt, [found("heart"), found("car", top=5)]).reason == ("expected heart above target, found  target")


@pytest.mark.parametrize(
    ("offset", "held"),
    [((-40, 0), ("left of",)), ((40, 40), ("right of", "below")), ((0, -11), ()), ((0, -12), ("above",)), ((0, 0), ())],
)
def test_directions_follow_the_margins_of_geneval(offset, held):
    left, top = offset
    assert directions((left, top, left + 28, top + 28), (0, 0, 28, 28)) == held


def test_every_thing_of_crowded_scenes_is_found_in_spite_of_noise():
    for sample in looking_samples(60, seed=6):
        assert looks(read_picture(noisy(compose(sample.scene)))) == looks(sample.scene.things)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(MissingExtraError, match="scipy"):
        scorer_module.read_picture(Image.new("RGB", (128, 128)))
