"""What is wrong with a recipe, in plain words: which key, what it takes, and what stands there."""

import difflib
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_WHOLE_NUMBER, _NUMBER, _YES_OR_NO = "a whole number is needed", "a number is needed", "true or false is needed"
_LIST, _SECTION = "a list is needed, as [a, b] or one line with a dash for each", "a section of keys is needed"
_IN_WORDS = {
    "tuple_type": _LIST,
    "list_type": _LIST,
    "dict_type": _SECTION,
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "string_type": "a text is needed",
    "int_type": _WHOLE_NUMBER,
    "int_parsing": _WHOLE_NUMBER,
    "int_from_float": _WHOLE_NUMBER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _YES_OR_NO,
    "bool_parsing": _YES_OR_NO,
    "literal_error": "it must be {expected}",
    "enum": "it must be {expected}",
    "greater_than": "it must be above {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be below {lt}",
    "less_than_equal": "it must be at most {le}",
    "multiple_of": "it must be a multiple of {multiple_of}",
    "too_short": "it has {actual_length} entries, at least {min_length} must be there",
    "too_long": "it has {actual_length} entries, at most {max_length} may be there",
    "union_tag_not_found": "the key {discriminator} is missing",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}",
}
"""By pydantic's names of errors; others, such as those of our own checks, say it themselves."""
_NOT_A_SECTION = ("model_type", "model_attributes_type")


def first_problem(error: ValidationError) -> ErrorDetails:
    """An unknown key before others: a misspelt one is the cause of another that is missing."""
    problems = error.errors()
    return next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])


def location(problem: ErrorDetails) -> list[str]:
    """The keys that lead to a problem."""
    parts = list(map(str, problem["loc"]))
    return [part for place, part in enumerate(parts) if not _is_choice(part, parts[place - 1] if place else "")]


def _is_choice(part: str, before: str) -> bool:
    """Whether pydantic names which of several a value was taken for, as if it were a key."""
    return (before == "network" and part in ("vqgan", "patch")) or "[" in part


def describe_problem(problem: ErrorDetails, schema: type[BaseModel]) -> str:
    """The key and what is wrong with it; for an unknown key the nearest one of `schema`."""
    keys = location(problem)
    name = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        places = (_places_below(name, schema) or _places_of_the_trainer(name, schema)) if len(keys) == 1 else []
        if places:
            return f"unknown key '{name}'; it is {' or '.join(map(repr, places))}"
        known = _keys_beside(schema, problem["loc"])
        nearest = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.0)
        hint = f"; the nearest known key is '{'.'.join((*keys[:-1], nearest[0]))}'" if nearest else ""
        return f"unknown key '{name}'{hint}"
    if problem["type"] == "missing":
        return f"the key '{name}' is missing"
    if name and problem["type"] in _NOT_A_SECTION:
        inside = dict.fromkeys(_keys_beside(schema, (*problem["loc"], "any of its keys")))
        return f"{name}: {in_words(problem)}; its keys are {', '.join(inside)}"
    return f"{name}: {in_words(problem)}" if name else _what_is_wrong(problem)


def in_words(problem: ErrorDetails) -> str:
    """What a value must be, and what it is, unless it is a section whose keys do not go together."""
    value = problem["input"]
    if problem["type"] == "value_error" and isinstance(value, dict):
        return _what_is_wrong(problem)
    return f"{_what_is_wrong(problem)} (got {'nothing' if value is None else repr(value)})"


def _what_is_wrong(problem: ErrorDetails) -> str:
    words = _IN_WORDS.get(problem["type"])
    return problem["msg"].removeprefix("Value error, ") if words is None else words.format(**problem.get("ctx", {}))


def _keys_beside(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section holding `location` knows; walks nested sections, lists, unions and mappings."""
    candidates: list[Any] = [schema]
    for part in location[:-1]:
        step: list[Any] = []
        for candidate in candidates:
            if isinstance(part, str) and part in candidate.model_fields:
                step += _sections_in(candidate.model_fields[part].annotation)
        candidates = step or candidates
    return [key for candidate in candidates for key in candidate.model_fields]


def _places_below(key: str, schema: type[BaseModel]) -> list[str]:
    """Where a key that stands at the top is known, among the sections that are not in lists."""
    places = []
    for name, field in schema.model_fields.items():
        if getattr(field.annotation, "__origin__", None) in (list, tuple):
            continue
        for section in _sections_in(field.annotation):
            own = [key] if key in section.model_fields else []
            places += [f"{name}.{place}" for place in (*own, *_places_below(key, section))]
    return places


def _places_of_the_trainer(key: str, schema: type[BaseModel]) -> list[str]:
    """The same for the arguments of transformers' Trainer, which no section lists."""
    places = ["trainer"] if "trainer" in schema.model_fields else _places_below("trainer", schema)
    if not places:
        return []
    from transformers import TrainingArguments  # takes seconds

    known = {field.name for field in fields(TrainingArguments)}
    return [f"{place}.{key}" for place in places if key in known]


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in _sections_in(argument)]
