"""Training samples that look: a scene of a few things, and short questions about it with their answers.

What a question's words are drawn from does not depend on its answer, so that nothing but the picture tells it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from uni_x.scenes.catalogue import COLOURABLE, HELD_OUT_COLOURS, KINDS, may_meet, training_colours
from uni_x.scenes.dice import pick, pick_weighted, shuffled
from uni_x.scenes.drawing import describe
from uni_x.scenes.questions import Choice, Question, compatible
from uni_x.scenes.world import CELLS, Scene, Thing

MOST_KINDS = 3
DESCRIBE = "what is in the picture?"

Look = tuple[str, str | None]  # an object and its colour

# The shares of scenes with so many like things, and of their count questions that ask for those.
_GROUPS = {1: 0.34, 2: 0.22, 3: 0.22, 4: 0.22}
_ASK_FOR_GROUP = 0.8
_ROWS_OF_YES_NO = 0.62
_DESCRIBED_FIRST = 0.33
_BY_LETTER = 0.05  # share of the other questions
_YES_NO_SHARES = {"exists": 0.5, "exists_coloured": 0.5}
_OPEN_SHARES = {"colour": 0.36, "count": 0.25, "coloured": 0.29, "present": 0.1}
# Of a coloured object that is not there, the object is there in another colour, the colour on another object, or
# neither has to be: those are easy, and without them looking is learned late.
_WAYS_TO_DENY = {"same object": 0.4, "same colour": 0.2, "neither": 0.4}


class Turn(NamedTuple):
    """A question and its answer; `kind` is yes_no, open, letter or description."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class LookingSample:
    """A scene and questions about it, the first or the last one for all that is in it."""

    scene: Scene
    turns: tuple[Turn, ...]


def looking_sample(rng: np.random.Generator, turns: int = 7) -> LookingSample:
    """One training sample: so many questions, and a description.

    Somewhat more than half of the samples ask for yes or no alone; the others ask open questions, some of them
    with options to be answered by letter. A question may come again, and a third of the samples begin with the
    description: finding a thing in the words is the first step to finding it in the picture. In the others the
    description comes last, so that no answer can be read off it. Without all this a small model learns to look
    several times more slowly.
    """
    scene = looking_scene(rng)
    ask = _yes_no_turn if rng.random() < _ROWS_OF_YES_NO else _open_turn
    asked: list[Turn] = []
    while len(asked) < turns:
        turn = ask(rng, scene)
        if turn is not None:
            asked.append(turn)
    description = Turn(DESCRIBE, describe(scene), "description")
    return LookingSample(scene, (description, *asked) if rng.random() < _DESCRIBED_FIRST else (*asked, description))


def looking_samples(count: int, seed: int, turns: int = 7) -> Iterator[LookingSample]:
    """Training samples, the same ones for the same seed on every machine."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield looking_sample(rng, turns)


def looking_scene(rng: np.random.Generator, required: Sequence[str | Look] = (), absent: Sequence[str] = ()) -> Scene:
    """A scene of one to three kinds of things, one of them up to four times; all colours and pairs from training.

    `required` lists things that must be there, as an object or an object with its colour, `absent` objects that must
    not. Without them one object may be there several times, all alike.
    """
    looks = [item if isinstance(item, tuple) else _look(rng, item) for item in required]
    if not looks:
        looks = [_look(rng, _another(rng, [], absent))] * pick_weighted(rng, _GROUPS)
    names = list(dict.fromkeys(name for name, _ in looks))
    for _ in range(int(rng.integers(len(names), MOST_KINDS + 1)) - len(names)):
        names.append(_another(rng, names, absent))
        looks.append(_look(rng, names[-1]))
    cells = rng.permutation(CELLS * CELLS)[: len(looks)].tolist()
    return Scene(tuple(Thing(*look, *divmod(cell, CELLS)) for look, cell in zip(looks, cells, strict=True)))


def yes_no_question(rng: np.random.Generator, scene: Scene, topic: str, answer: str) -> Question | None:
    """A question that has the answer in the scene; None where the topic does not fit.

    A no is often hard: the object is there in another colour, or the colour on another object. Objects of held-out
    pairs with what is there are not asked for.
    """
    if topic == "exists":
        return Question(topic, pick(rng, scene.objects) if answer == "yes" else _absent(rng, scene, tuple(KINDS)))
    shown = _distinct_looks(scene)
    if not shown:
        return None
    name, colour = pick(rng, shown)
    if answer == "yes":
        return Question(topic, name, colour)
    way = pick_weighted(rng, _WAYS_TO_DENY)
    if way == "same object":
        others = [c for c in training_colours(name) if (name, c) not in shown]
        return Question(topic, name, pick(rng, others))
    if way == "neither":
        name = _absent(rng, scene, COLOURABLE)
        return Question(topic, name, pick(rng, training_colours(name)))
    wearers = tuple(name for name in COLOURABLE if (name, colour) not in HELD_OUT_COLOURS)
    return Question(topic, _absent(rng, scene, wearers), colour)


def open_question(rng: np.random.Generator, scene: Scene, topic: str) -> Question | None:
    """An open question with at least one true answer in the scene; None where the topic does not fit."""
    if topic == "present":
        return Question(topic)
    shown = _distinct_looks(scene)
    if topic == "coloured":
        question = Question(topic, colour=pick(rng, shown)[1]) if shown else None
    elif topic == "colour":
        question = Question(topic, pick(rng, shown)[0]) if shown else None
    else:
        groups = [name for name in scene.objects if len(scene.all_of(name)) > 1]
        question = Question(topic, pick(rng, groups if groups and rng.random() < _ASK_FOR_GROUP else scene.objects))
    return question if question and question.answers(scene) else None


def choice(rng: np.random.Generator, scene: Scene, question: Question) -> Choice | None:
    """The question with four options in random order, of which one alone is true; None where there are too few."""
    answers = question.answers(scene)
    if not answers:
        return None
    options = [pick(rng, answers)]
    for candidate in shuffled(rng, question.candidates()):
        fits = candidate not in KINDS or candidate in scene.objects or may_meet(candidate, *scene.objects)
        if fits and candidate not in answers and compatible(options, candidate):
            options.append(candidate)
        if len(options) == 4:
            order = shuffled(rng, options)
            return Choice(question, tuple(order), order.index(options[0]))
    return None


def _yes_no_turn(rng: np.random.Generator, scene: Scene) -> Turn | None:
    """A turn, or none: yes and no stay as frequent because a question of either kind must be possible."""
    topic = pick_weighted(rng, _YES_NO_SHARES)
    questions = {answer: yes_no_question(rng, scene, topic, answer) for answer in ("yes", "no")}
    if None in questions.values():
        return None
    answer = pick(rng, ("yes", "no"))
    question = questions[answer]
    return Turn(question.text, answer, "yes_no") if question else None


def _open_turn(rng: np.random.Generator, scene: Scene) -> Turn | None:
    question = open_question(rng, scene, pick_weighted(rng, _OPEN_SHARES))
    if question is None:
        return None
    if rng.random() < _BY_LETTER:
        closed = choice(rng, scene, question)
        return Turn(closed.prompt, closed.letter, "letter") if closed else None
    answers = question.answers(scene)
    return Turn(question.text, answers[0], "open") if len(answers) == 1 else None


def _distinct_looks(scene: Scene) -> list[tuple[str, str]]:
    return list(dict.fromkeys((thing.object, thing.colour) for thing in scene.things if thing.colour))


def _look(rng: np.random.Generator, name: str) -> Look:
    return name, pick(rng, training_colours(name)) if KINDS[name].colourable else None


def _another(rng: np.random.Generator, names: Sequence[str], absent: Sequence[str]) -> str:
    """An object that is not there yet and may meet those that are."""
    return _absent_from(rng, tuple(KINDS), (*names, *absent), names)


def _absent(rng: np.random.Generator, scene: Scene, among: Sequence[str]) -> str:
    return _absent_from(rng, among, scene.objects, scene.objects)


def _absent_from(rng: np.random.Generator, among: Sequence[str], taken: Sequence[str], met: Sequence[str]) -> str:
    return pick(rng, [name for name in among if name not in taken and may_meet(name, *met)])
