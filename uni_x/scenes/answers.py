"""Reads an answer out of a model's free text, in the manner of VLMEvalKit without a judge model."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

_STRIPPED = re.compile(r"[.()\[\],:;!*#{}?]")
_ANSWER_IS = re.compile(r"answer is\s*(?:\*\*)?\s*([A-Z])\b", re.IGNORECASE)


def read_yes_no(text: str) -> str | None:
    """`yes` or `no`, whichever word alone occurs in a text; None where neither does, or both."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    said = words & {"yes", "no"}
    return said.pop() if len(said) == 1 else None


def read_choice(text: str, options: Sequence[str]) -> int | None:
    """The index of the option that a text chooses by its letter or by its words; None where that is not clear.

    The rules of `can_infer` in VLMEvalKit: the only capital letter of an option, if it stands among the last
    four words; else `answer is X`; else the only option whose words occur in an answer that is not
    more than twice as long as all the options. Unlike there, words count as a whole: `ball` is not in `balloon`.
    """
    letters = ascii_uppercase[: len(options)]
    words = _STRIPPED.sub(" ", text).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - 4:
        return letters.index(named[0])
    stated = _ANSWER_IS.search(text)
    if stated and stated[1].upper() in letters:
        return letters.index(stated[1].upper())
    if len(text) > 2 * sum(map(len, options)):
        return None
    contained = [index for index, option in enumerate(options) if _says(text, option)]
    return contained[0] if len(contained) == 1 else None


def _says(text: str, option: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE) is not None
