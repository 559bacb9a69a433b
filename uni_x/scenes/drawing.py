"""What is asked of a drawing: GenEval's six tasks as training pairs and as test prompts.

A request is a tuple of clauses, which is GenEval's include list. Its caption, the scenes that hold exactly what it
asks for, and the metadata by which a drawing is judged all follow from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations, product
from typing import Any

import numpy as np

from uni_x.errors import InputError
from uni_x.scenes.catalogue import (
    COLOURABLE,
    COLOURS,
    HELD_OUT_COLOURS,
    KINDS,
    NUMBERS,
    RELATIONS,
    may_meet,
    training_colours,
    with_article,
)
from uni_x.scenes.dice import pick, pick_weighted, shuffled
from uni_x.scenes.world import CELLS, Scene, Thing

# Each task with its share of the training pairs: the more a task asks for at once, the more it is practised.
TASK_WEIGHTS: dict[str, float] = {
    "single_object": 0.06,
    "two_object": 0.12,
    "counting": 0.16,
    "colors": 0.08,
    "position": 0.29,
    "color_attr": 0.29,
}
TASKS = tuple(TASK_WEIGHTS)

# What a held-out prompt of a task combines as training never did.
HELD_OUT_KINDS = {
    "two_object": "held_out_pair",
    "position": "held_out_pair",
    "colors": "held_out_colour",
    "color_attr": "held_out_colour",
}

_COLOURED_COUNTING = 0.4  # share of "three red hearts"
_COLOURED_POSITION = 0.4  # share of positions in which colours are named
_NAMED_COLOUR = 0.75  # share of objects whose colour is named in those


@dataclass(frozen=True)
class Clause:
    """One entry of GenEval's include or exclude list.

    `position` is a relation and the index of the clause to which it holds.
    """

    object: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None

    @property
    def phrase(self) -> str:
        """`a heart`, `an orange heart`, `three red hearts`."""
        kind = KINDS[self.object]
        noun = kind.name if self.count == 1 else kind.plural
        if self.colour:
            noun = f"{self.colour} {noun}"
        return with_article(noun) if self.count == 1 else f"{NUMBERS[self.count]} {noun}"

    def metadata(self) -> dict[str, Any]:
        """The clause as GenEval writes it: class, count, color, position."""
        entry: dict[str, Any] = {"class": self.object, "count": self.count}
        if self.colour:
            entry["color"] = self.colour
        if self.position:
            entry["position"] = list(self.position)
        return entry


Request = tuple[Clause, ...]


@dataclass(frozen=True)
class DrawingSample:
    """A scene that holds exactly what its caption says."""

    scene: Scene
    caption: str
    task: str


@dataclass(frozen=True)
class DrawingPrompt:
    """A test prompt and what a picture must and must not hold.

    `held_out` is `held_out_colour` or `held_out_pair` where the prompt combines what training never combined.
    """

    task: str
    text: str
    include: Request
    exclude: Request = ()
    held_out: str | None = None

    def metadata(self) -> dict[str, Any]:
        """The prompt as a row of GenEval's metadata: tag, include, exclude, prompt."""
        return {
            "tag": self.task,
            "include": [clause.metadata() for clause in self.include],
            "exclude": [clause.metadata() for clause in self.exclude],
            "prompt": self.text,
        }


def caption(request: Request) -> str:
    """The plain words of a request: `three hearts`, `a heart left of a car`, `a red heart and a blue car`."""
    first, *rest = request
    if not rest:
        return first.phrase
    (second,) = rest
    if second.position:
        return f"{second.phrase} {second.position[0]} {first.phrase}"
    return f"{first.phrase} and {second.phrase}"


def describe(scene: Scene) -> str:
    """Every thing of a scene, in reading order: `a red heart, two blue cars and a tree`."""
    counts: dict[tuple[str, str | None], int] = {}
    for thing in sorted(scene.things, key=lambda thing: (thing.row, thing.column)):
        key = thing.object, thing.colour
        counts[key] = counts.get(key, 0) + 1
    *most, last = (Clause(name, count, colour).phrase for (name, colour), count in counts.items())
    return f"{', '.join(most)} and {last}" if most else last


def drawing_sample(rng: np.random.Generator, weights: Mapping[str, float] = TASK_WEIGHTS) -> DrawingSample:
    """One training pair; `weights` are the tasks' shares."""
    task = pick_weighted(rng, weights)
    request = _with_colours(rng, task, pick(rng, requests(task)))
    return DrawingSample(lay_out(request, rng), caption(request), task)


def drawing_samples(count: int, seed: int, weights: Mapping[str, float] = TASK_WEIGHTS) -> Iterator[DrawingSample]:
    """Training pairs, the same ones for the same seed on every machine."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield drawing_sample(rng, weights)


def drawing_prompts(task: str, count: int, seed: int, held_out: bool = False) -> list[DrawingPrompt]:
    """Test prompts of a task in plain form, distinct until all there are have been used, then again.

    Training sees all the captions that are not held out, each with other pictures; `held_out` asks for prompts
    that combine an object with a colour, or two objects, which no training sample combines.

    Raises:
        InputError: no such task, or one without held-out combinations.
    """
    kind = None
    if held_out:
        kind = HELD_OUT_KINDS.get(task)
        if kind is None:
            raise InputError(f"no held-out prompts for {task!r}: it must be one of {', '.join(HELD_OUT_KINDS)}")
    order = shuffled(np.random.default_rng(seed), requests(task, kind))
    return [_prompt(task, order[index % len(order)], kind) for index in range(count)]


def lay_out(request: Request, rng: np.random.Generator) -> Scene:
    """A scene with exactly what is asked for, in random cells; colours that are not named are random.

    A relation holds along a row or a column. Things of one clause look alike.
    """
    relation = request[-1].position
    total = sum(clause.count for clause in request)
    cells = _cells_in_line(rng, relation[0]) if relation else _cells(rng, total)
    things = []
    for clause in request:
        colour = clause.colour
        if colour is None and KINDS[clause.object].colourable:
            colour = pick(rng, training_colours(clause.object))
        things += [Thing(clause.object, colour, *cells.pop(0)) for _ in range(clause.count)]
    return Scene(tuple(things))


@cache
def requests(task: str, held_out: str | None = None) -> tuple[Request, ...]:
    """All the plain requests of a task: those of training, or those with one kind of held-out combination.

    Raises:
        InputError: no such task.
    """
    return tuple(request for request in _all_requests(task) if _held_out(request) == held_out)


def _all_requests(task: str) -> Iterator[Request]:
    coloured = [Clause(name, colour=colour) for name, colour in product(COLOURABLE, COLOURS)]
    match task:
        case "single_object":
            yield from ((Clause(name),) for name in KINDS)
        case "two_object":
            yield from ((Clause(a), Clause(b)) for a, b in permutations(KINDS, 2))
        case "counting":
            yield from ((Clause(name, count),) for name, count in product(KINDS, (2, 3, 4)))
        case "colors":
            yield from ((clause,) for clause in coloured)
        case "position":
            for (a, b), relation in product(permutations(KINDS, 2), RELATIONS):
                yield Clause(a), Clause(b, position=(relation, 0))
        case "color_attr":
            yield from ((a, b) for a, b in permutations(coloured, 2) if a.object != b.object and a.colour != b.colour)
        case _:
            raise InputError(f"no drawing task {task!r}: it must be one of {', '.join(TASKS)}")


def _held_out(request: Request) -> str | None:
    """Which kind of held-out combination a request makes; `both` belongs to neither kind."""
    colour = any((clause.object, clause.colour) in HELD_OUT_COLOURS for clause in request)
    pair = any(not may_meet(a.object, b.object) for a, b in combinations(request, 2))
    if colour and pair:
        return "both"
    return "held_out_colour" if colour else "held_out_pair" if pair else None


def _prompt(task: str, request: Request, held_out: str | None) -> DrawingPrompt:
    exclude = tuple(Clause(clause.object, clause.count + 1) for clause in request) if task == "counting" else ()
    return DrawingPrompt(task, caption(request), request, exclude, held_out)


def _with_colours(rng: np.random.Generator, task: str, request: Request) -> Request:
    """Names colours in some requests of counting and position."""
    share, each = {"counting": (_COLOURED_COUNTING, 1.0), "position": (_COLOURED_POSITION, _NAMED_COLOUR)}.get(
        task, (0.0, 0.0)
    )
    if rng.random() >= share:
        return request
    return tuple(
        replace(clause, colour=pick(rng, training_colours(clause.object)))
        if KINDS[clause.object].colourable and rng.random() < each
        else clause
        for clause in request
    )


def _cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    return [divmod(cell, CELLS) for cell in rng.permutation(CELLS * CELLS)[:count].tolist()]


def _cells_in_line(rng: np.random.Generator, relation: str) -> list[tuple[int, int]]:
    """The cell of what is related to, then the cell of what stands in the relation to it."""
    line = int(rng.integers(CELLS))
    low, high = sorted(rng.permutation(CELLS)[:2].tolist())
    ends = (high, low) if relation in ("left of", "above") else (low, high)
    if relation in ("left of", "right of"):
        return [(line, end) for end in ends]
    return [(end, line) for end in ends]
