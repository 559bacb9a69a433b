"""What the small world is made of, as data: twenty objects, eight colours, and what training never sees.

Knows nothing of pixels: a colour here is a word and its RGB value, an object its words and the code point of
its picture in OpenMoji.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One of the twenty kinds of object.

    `emoji` is the English name in the package `emoji` that the short `name` stands for, `code` the code point
    that names the OpenMoji picture. `fills` lists the fills of that picture which a colour replaces, none
    where the object keeps its natural look; `looks` lists the colour words a natural look would answer to.
    """

    name: str
    plural: str
    code: str
    emoji: str
    category: str
    fills: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()

    @property
    def colourable(self) -> bool:
        """Whether the object comes in all the colours."""
        return bool(self.fills)


# Far enough apart to be told through the blur of a small image tokenizer.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 36),
    "orange": (255, 140, 20),
    "yellow": (255, 228, 40),
    "green": (60, 180, 75),
    "blue": (40, 110, 230),
    "purple": (145, 60, 200),
    "pink": (255, 150, 205),
    "brown": (135, 80, 40),
}

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("heart", "hearts", "2764", "red heart", "shape", ("#d22f27",)),
        Kind("star", "stars", "2B50", "star", "shape", ("#fcea2b",)),
        Kind("car", "cars", "1F697", "automobile", "machine", ("#ea5a47",)),
        Kind("shirt", "shirts", "1F455", "t-shirt", "clothing", ("#92d3f5", "#61b2e4")),
        Kind("lock", "locks", "1F512", "locked", "tool", ("#fcea2b", "#f1b31c")),
        Kind("bell", "bells", "1F514", "bell", "tool", ("#fcea2b", "#f1b31c")),
        Kind("book", "books", "1F4D5", "closed book", "tool", ("#d22f27",)),
        Kind("butterfly", "butterflies", "1F98B", "butterfly", "animal", ("#92d3f5",)),
        Kind("dress", "dresses", "1F457", "dress", "clothing", ("#61b2e4",)),
        Kind("crown", "crowns", "1F451", "crown", "clothing", ("#fcea2b", "#f1b31c")),
        Kind("balloon", "balloons", "1F388", "balloon", "toy", ("#ea5a47", "#d22f27")),
        Kind("mushroom", "mushrooms", "1F344", "mushroom", "food", ("#ea5a47", "#d22f27")),
        Kind("tree", "trees", "1F333", "deciduous tree", "plant", looks=("green",)),
        Kind("cactus", "cactuses", "1F335", "cactus", "plant", looks=("green",)),
        Kind("robot", "robots", "1F916", "robot", "machine"),
        Kind("penguin", "penguins", "1F427", "penguin", "animal"),
        Kind("duck", "ducks", "1F986", "duck", "animal", looks=("brown", "green", "yellow")),
        Kind("cat", "cats", "1F408", "cat", "animal", looks=("orange",)),
        Kind("ball", "balls", "26BD", "soccer ball", "toy"),
        Kind("banana", "bananas", "1F34C", "banana", "food", looks=("yellow",)),
    )
}

COLOURABLE = tuple(name for name, kind in KINDS.items() if kind.colourable)
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Each colour is held out with one object, and each object from one other: so no word is rarer in training than
# another of its sort, and a question's words alone say nothing about its answer.
HELD_OUT_COLOURS = frozenset(
    {
        ("heart", "brown"),
        ("star", "pink"),
        ("car", "purple"),
        ("shirt", "yellow"),
        ("lock", "green"),
        ("bell", "blue"),
        ("book", "orange"),
        ("crown", "red"),
    }
)
HELD_OUT_PAIRS = frozenset(
    frozenset(pair)
    for pair in (
        ("heart", "ball"),
        ("star", "cat"),
        ("car", "dress"),
        ("shirt", "mushroom"),
        ("lock", "duck"),
        ("bell", "crown"),
        ("book", "robot"),
        ("butterfly", "tree"),
        ("balloon", "banana"),
        ("cactus", "penguin"),
    )
)

_TRAINING_COLOURS: dict[str, tuple[str, ...]] = {
    name: tuple(colour for colour in COLOURS if kind.colourable and (name, colour) not in HELD_OUT_COLOURS)
    for name, kind in KINDS.items()
}
_PARTNER = {a: b for pair in HELD_OUT_PAIRS for a, b in (tuple(pair), tuple(pair)[::-1])}


def training_colours(name: str) -> tuple[str, ...]:
    """The colours in which training shows an object; none for one that keeps its natural look."""
    return _TRAINING_COLOURS[name]


def may_meet(name: str, *others: str) -> bool:
    """Whether training may show (or name) the object together with all the others."""
    return _PARTNER[name] not in others


def with_article(phrase: str) -> str:
    """`a heart`, `an orange heart`."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
