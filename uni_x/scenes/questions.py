"""Questions about a scene, and every true answer to them.

Yes/no questions are POPE's kind of question, the others are MMBench's: open here, and closed by options elsewhere.
"""

from dataclasses import dataclass

from uni_x.scenes.catalogue import (
    COLOURABLE,
    HELD_OUT_COLOURS,
    KINDS,
    NUMBERS,
    may_meet,
    training_colours,
    with_article,
)
from uni_x.scenes.world import Scene

YES_NO_TOPICS = ("exists", "exists_coloured")
OPEN_TOPICS = ("colour", "count", "coloured", "present")


@dataclass(frozen=True)
class Question:
    """A question on one topic; `object` and `colour` are what it mentions.

    Topics with a yes or no: `exists`, `exists_coloured`; open ones: `colour`, `count`, `coloured` (what object is red),
    `present` (what object is there).
    """

    topic: str
    object: str = ""
    colour: str = ""

    @property
    def text(self) -> str:
        """The question in words."""
        match self.topic:
            case "exists":
                return f"is there {with_article(self.object)}?"
            case "exists_coloured":
                return f"is there {with_article(f'{self.colour} {self.object}')}?"
            case "colour":
                return f"what colour is the {self.object}?"
            case "count":
                return f"how many {KINDS[self.object].plural} are there?"
            case "coloured":
                return f"what object is {self.colour}?"
            case _:
                return "what object is in the picture?"

    def answers(self, scene: Scene) -> tuple[str, ...]:
        """All the true one-word answers; none where the question does not fit the scene.

        A question fits if what it speaks of is there once (`the heart`). With several true answers a question needs
        options of which one alone is true.
        """
        match self.topic:
            case "exists":
                return ("yes",) if scene.all_of(self.object) else ("no",)
            case "exists_coloured":
                colours = {thing.colour for thing in scene.all_of(self.object)}
                return ("yes",) if self.colour in colours else ("no",)
            case "colour":
                things = scene.all_of(self.object)
                return (things[0].colour,) if len(things) == 1 and things[0].colour else ()
            case "count":
                count = len(scene.all_of(self.object))
                return (NUMBERS[count],) if 0 < count < len(NUMBERS) else ()
            case "coloured":
                if any(self.colour in KINDS[name].looks for name in scene.objects):
                    return ()
                return tuple(dict.fromkeys(thing.object for thing in scene.things if thing.colour == self.colour))
            case _:
                return scene.objects

    def candidates(self) -> tuple[str, ...]:
        """What an open question may have for an answer, held-out combinations left out."""
        match self.topic:
            case "colour":
                return training_colours(self.object)
            case "count":
                return NUMBERS[1:]
            case "coloured":
                return tuple(name for name in COLOURABLE if (name, self.colour) not in HELD_OUT_COLOURS)
            case "present":
                return tuple(KINDS)
        return ("yes", "no")


@dataclass(frozen=True)
class Choice:
    """An open question with four options, one of them true; `answer` is its index."""

    question: Question
    options: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The question with its options: `what colour is the heart? A. red B. blue C. pink D. green`."""
        listed = (f"{letter}. {option}" for letter, option in zip("ABCD", self.options, strict=True))
        return f"{self.question.text} {' '.join(listed)}"

    @property
    def letter(self) -> str:
        """The letter of the true option."""
        return "ABCD"[self.answer]


def compatible(options: list[str], candidate: str) -> bool:
    """Whether an option may stand beside others: no word twice, and no held-out pair of objects."""
    return candidate not in options and (candidate not in KINDS or may_meet(candidate, *options))
