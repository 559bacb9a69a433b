"""The texts in a value of a column, and how they are replaced."""

from collections.abc import Callable, Iterator
from typing import Any

from uni_x.errors import DataError

_TURNS = (("role", "content"), ("from", "value"), ("user", "assistant"))
_TEXTS_OF_TURNS = (("content",), ("value",), ("system", "user", "assistant"))


def texts_of(value: Any) -> list[str]:
    """The texts in a value: a string, a list of strings, or a list of turns of a conversation.

    A turn is {role, content}, {from, value} or {user, assistant}, perhaps with more keys, which are left alone. Numbers
    and nulls hold no text. Raises `DataError`, which says what was found, for anything else.
    """
    texts: list[str] = []

    def take(text: str) -> str:
        texts.append(text)
        return text

    _visit(value, take)
    return texts


def with_texts(value: Any, texts: Iterator[str]) -> Any:
    """The value with its texts replaced; takes as many from `texts`, in the same order, as `texts_of` gives."""
    return _visit(value, lambda text: next(texts))


def _visit(value: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return replace(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, list):
        return [_visit_turn(item, replace) if isinstance(item, dict) else _visit_item(item, replace) for item in value]
    raise DataError(
        f"{kind_of(value)} cannot be translated; a column holds a text, a list of texts or a list of "
        "{role, content}, {from, value} or {user, assistant}"
    )


def _visit_item(item: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(item, list):
        raise DataError("a list within a list cannot be translated")
    return _visit(item, replace)


def _visit_turn(turn: dict[str, Any], replace: Callable[[str], str]) -> dict[str, Any]:
    for needed, names in zip(_TURNS, _TEXTS_OF_TURNS, strict=True):
        if all(name in turn for name in needed):
            return {name: _turn_text(name, value, replace) if name in names else value for name, value in turn.items()}
    raise DataError(
        f"a mapping of {', '.join(map(repr, turn)) or 'nothing'} cannot be translated; a turn is {{role, content}}, "
        "{from, value} or {user, assistant}"
    )


def _turn_text(name: str, value: Any, replace: Callable[[str], str]) -> Any:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{name!r} of a turn holds {kind_of(value)}, not text")
    return replace(value)


def kind_of(value: Any) -> str:
    """What a value of JSON or Parquet is, in words that go into an error."""
    known = {dict: "a mapping", list: "a list", bytes: "bytes", bool: "a truth value", int: "a number"}
    return known.get(type(value), f"a value of type {type(value).__name__}")
