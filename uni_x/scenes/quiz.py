"""Test questions about fresh scenes, made so that their words alone give chance and no more.

A yes/no question stands in the set twice, word for word, once with a scene that says yes and once with one that says
no. Of a multiple-choice question first the words and options are drawn, then which option is true, then the scene.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from uni_x.errors import InputError
from uni_x.scenes.catalogue import COLOURABLE, COLOURS, KINDS, NUMBERS, training_colours
from uni_x.scenes.dice import pick, shuffled
from uni_x.scenes.looking import Look, looking_scene, yes_no_question
from uni_x.scenes.questions import OPEN_TOPICS, YES_NO_TOPICS, Choice, Question, compatible
from uni_x.scenes.world import Scene


@dataclass(frozen=True)
class YesNoItem:
    """A scene, a question and its answer, `yes` or `no`."""

    scene: Scene
    question: str
    answer: str
    topic: str


@dataclass(frozen=True)
class ChoiceItem:
    """A scene and a question with four options; `answer` is the index of the true one.

    `question` is the open form, `prompt` lists the options by letter.
    """

    scene: Scene
    question: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    topic: str


Item = TypeVar("Item", YesNoItem, ChoiceItem)


def yes_no_questions(count: int, seed: int, topics: Sequence[str] = YES_NO_TOPICS) -> list[YesNoItem]:
    """Yes/no questions in random order, the topics in turn; half of each topic's answers are yes.

    Raises:
        InputError: an odd count, or an unknown topic.
    """
    _check(topics, YES_NO_TOPICS)
    if count % 2:
        raise InputError(f"{count} yes/no questions cannot be balanced: ask for an even number")
    rng = np.random.default_rng(seed)
    items = []
    for index in range(count // 2):
        topic = topics[index % len(topics)]
        question, scene = _asked(rng, topic)
        items.append(YesNoItem(scene, question.text, "yes", topic))
        items.append(YesNoItem(_denying(rng, question), question.text, "no", topic))
    return shuffled(rng, items)


def multiple_choice_questions(count: int, seed: int, topics: Sequence[str] = OPEN_TOPICS) -> list[ChoiceItem]:
    """Questions with four options in random order, the topics in turn; the true option's place is balanced.

    Raises:
        InputError: an unknown topic.
    """
    _check(topics, OPEN_TOPICS)
    rng = np.random.default_rng(seed)
    items = []
    for index in range(count):
        topic, place = topics[index % len(topics)], index // len(topics) % 4
        question, options = _with_options(rng, topic)
        scene = _scene_for(rng, question, options, place)
        closed = Choice(question, options, place)
        items.append(ChoiceItem(scene, question.text, closed.prompt, options, place, topic))
    return shuffled(rng, items)


def with_other_pictures(items: Sequence[Item], seed: int) -> list[Item]:
    """The same questions, each with the scene of another one: what a model can answer without looking.

    Raises:
        InputError: fewer than two items.
    """
    if len(items) < 2:
        raise InputError("pictures can be exchanged between two questions or more")
    order = shuffled(np.random.default_rng(seed), range(len(items)))
    scenes = {place: items[other].scene for place, other in zip(order, order[1:] + order[:1], strict=True)}
    return [replace(item, scene=scenes[place]) for place, item in enumerate(items)]


def _check(topics: Sequence[str], known: Sequence[str]) -> None:
    for topic in topics:
        if topic not in known:
            raise InputError(f"no topic {topic!r}: it must be one of {', '.join(known)}")


def _asked(rng: np.random.Generator, topic: str) -> tuple[Question, Scene]:
    """A question and a scene that says yes."""
    while True:
        scene = looking_scene(rng)
        question = yes_no_question(rng, scene, topic, "yes")
        if question is not None:
            return question, scene


def _denying(rng: np.random.Generator, question: Question) -> Scene:
    """A scene that says no, and makes it hard where it can."""
    if question.topic == "exists":
        return looking_scene(rng, absent=[question.object])
    others = [colour for colour in training_colours(question.object) if colour != question.colour]
    wearers = [name for name in COLOURABLE if question.colour in training_colours(name)]
    other = pick(rng, [name for name in wearers if name != question.object])
    if rng.random() < 0.7:
        return looking_scene(rng, [(question.object, pick(rng, others))])
    return looking_scene(rng, [(other, question.colour)], absent=[question.object])


def _with_options(rng: np.random.Generator, topic: str) -> tuple[Question, tuple[str, ...]]:
    match topic:
        case "colour":
            question = Question(topic, pick(rng, COLOURABLE))
        case "count":
            question = Question(topic, pick(rng, tuple(KINDS)))
        case "coloured":
            question = Question(topic, colour=pick(rng, tuple(COLOURS)))
        case _:
            question = Question(topic)
    options: list[str] = []
    for candidate in shuffled(rng, question.candidates()):
        if len(options) < 4 and compatible(options, candidate):
            options.append(candidate)
    return question, tuple(options)


def _scene_for(rng: np.random.Generator, question: Question, options: Sequence[str], place: int) -> Scene:
    """A scene in which one option alone is true; the false ones may be in it where that misleads."""
    answer = options[place]
    false = [option for option in options if option != answer]
    required: list[str | Look]
    match question.topic:
        case "colour":
            required = [(question.object, answer)]
        case "count":
            look = looking_scene(rng, [question.object]).things[0]
            required = [(look.object, look.colour)] * NUMBERS.index(answer)
        case "coloured":
            required = [(answer, question.colour)]
        case _:
            required = [answer]
    absent = false if question.topic == "present" else []
    return _until(
        lambda: looking_scene(rng, required, absent),
        lambda scene: [option for option in options if option in question.answers(scene)] == [answer],
    )


def _until(make: Callable[[], Scene], fits: Callable[[Scene], bool]) -> Scene:
    while not fits(scene := make()):
        pass
    return scene
