"""What must stand in a translation as it stands in the text: markers of pictures, special tokens, fields, addresses."""

import re
from collections import Counter

_KEPT = re.compile(
    r"""
    (?:https?|ftp)://[A-Za-z0-9\-._~:/?\#\[\]@!$&()*+,;=%]*[A-Za-z0-9\-_~/\#&=+%]  # ends before punctuation
    | <[|｜][^|｜\n]+[|｜]>               # <|vision_start|> and its kin
    | </?[A-Za-z][\w.:-]*\s*/?>           # <image>, <br/>, </b>
    | \^\^\^\w+\^\^\^                     # ^^^turn_split^^^
    | \{\{[^{}\n]*\}\} | \{%[^{}\n]*%\}   # {{ name }}, {% if it %}
    | \{[\w.\[\]]*(?:![rsa])?(?::[^{}\s]*)?\}  # {}, {name}, {item[0]:.2f}
    """,
    re.VERBOSE,
)


def kept_parts(text: str) -> Counter[str]:
    """What must stand in the translation as it stands in the text, and how often: `<image>`, `<|...|>` and other tags,
    `{name}`, `^^^turn_split^^^` and URLs."""
    return Counter(_KEPT.findall(text))


def is_translatable(text: str) -> bool:
    """Whether there are letters outside what must be kept."""
    return any(character.isalpha() for character in _KEPT.sub("", text))


def fault(text: str, answer: str, one_line: bool = False) -> str:
    """What makes an answer no translation of the text, as far as that can be told; empty for a good one."""
    wanted, found = kept_parts(text), kept_parts(answer)
    if lost := wanted - found:
        return f"it lost {', '.join(lost)}"
    if invented := found - wanted:
        return f"it invented {', '.join(invented)}"
    return "it has a line break" if one_line and re.search(r"[\r\n]", answer) else ""
