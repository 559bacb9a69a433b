"""Plain sentences about the small world: what its objects are, which colours they have, how relations turn round."""

from collections.abc import Iterator

import numpy as np

from uni_x.scenes.catalogue import COLOURABLE, COLOURS, KINDS, NUMBERS, OPPOSITE, RELATIONS, may_meet, training_colours
from uni_x.scenes.catalogue import with_article as a
from uni_x.scenes.dice import pick

_FACTS = ("category", "colours", "coloured", "colour word", "more", "fewer", "turned", "beside", "apart")


def sentence(rng: np.random.Generator) -> str:
    """One true sentence in lower case; held-out combinations are not named."""
    name = pick(rng, tuple(KINDS))
    other = pick(rng, [item for item in KINDS if item != name and may_meet(item, name)])
    painted = pick(rng, COLOURABLE)
    colour = pick(rng, training_colours(painted))
    low, high = sorted(rng.permutation(4)[:2].tolist())
    less, more = NUMBERS[low + 1], NUMBERS[high + 1]
    relation = pick(rng, RELATIONS)
    match pick(rng, _FACTS):
        case "category":
            return f"{a(name)} is {a(KINDS[name].category)}."
        case "colours":
            return f"{a(painted)} can be {colour}."
        case "coloured":
            return f"{a(f'{colour} {painted}')} is {a(painted)}, and it is {colour}."
        case "colour word":
            return f"{pick(rng, tuple(COLOURS))} is a colour."
        case "more":
            return f"{more} {KINDS[name].plural} are more than {less}."
        case "fewer":
            return f"{less} is less than {more}."
        case "turned":
            return f"if the {name} is {relation} the {other}, the {other} is {OPPOSITE[relation]} the {name}."
        case "beside":
            return f"{a(name)} and {a(other)} are two objects."
        case _:
            return f"{a(name)} is not {a(other)}."


def sentences(count: int, seed: int) -> Iterator[str]:
    """Sentences, the same ones for the same seed on every machine."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield sentence(rng)
