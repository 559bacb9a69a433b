"""From the fields of a foreign row to a source row: which kind of row it is, told by the fields that it has."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from uni_x.data.readers.parts import describe, to_unicode
from uni_x.data.schema import IMAGE_PLACEHOLDER, CodeGrid, Message, Rejection, SourceRow
from uni_x.errors import DataError
from uni_x.pictures import Picture

Resolve: TypeAlias = Callable[[str], Path]
"""Finds the file that a row names; raises `DataError` where it is missing or must not be read."""

_IDS = ("id", "uid", "key", "__key__")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN_SPLIT, _PAIR_SPLIT = "^^^turn_split^^^", "^^^pair_split^^^"
_CAPTION_TYPES = ("image_text", "t2i")
_CONVERSATION_TYPES = ("i2t", "i2t_multi", "i2t_reverse")
_REVERSE_PROMPT = "The caption of this image is:"


def row_from_fields(fields: Mapping[str, Any], row_id: str, source: str, resolve: Resolve | None) -> SourceRow:
    """The row that `fields` stand for.

    Known are captions (`image` or `images` with `caption` or `text`), documents (`text`, `content`), conversations
    (`messages`, `conversations`, FineVision's `texts`, the fields of Alpaca and OpenOrca) and the rows with
    `data_type` and `vqcode_512` of the published research code. Fields of None count as missing. A row's own `id`
    (or `uid`, `key`, `__key__`) takes the place of `row_id`, its `source` that of `source`. `resolve` finds files
    that the row names; without it none may be named.

    Raises `DataError` with the reason where the fields fit no kind. Whether texts and pictures fit each other is left
    to `schema.check_content`.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    images = _images(fields, resolve)
    own_source = fields.get("source")
    return SourceRow(
        id=_own_id(fields) or row_id,
        images=images,
        source=own_source if isinstance(own_source, str) and own_source else source,
        **_content(fields, len(images)),
    )


def load_fields(
    read: Callable[[], Mapping[str, Any]], row_id: str, source: str, resolve: Resolve | None
) -> SourceRow | Rejection:
    """Reads fields and gives their row, or a `Rejection` where `read` or the fields raise `DataError` or `OSError`."""
    try:
        fields = read()
        row_id = _own_id(fields) or row_id
        return row_from_fields(fields, row_id, source, resolve)
    except (DataError, OSError) as error:
        return Rejection(row_id, to_unicode(describe(error)))


def _own_id(fields: Mapping[str, Any]) -> str | None:
    for name in _IDS:
        value = fields.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return to_unicode(str(value))
    return None


def _content(fields: Mapping[str, Any], images: int) -> dict[str, Any]:
    data_type = fields.get("data_type")
    if data_type in _CAPTION_TYPES:
        return {"caption": _published_text(fields)}
    if data_type in _CONVERSATION_TYPES:
        return {"messages": _published_messages(fields, data_type)}
    if "messages" in fields:
        return {"messages": _turns(fields, "messages")}
    if "conversations" in fields:
        return {"messages": _turns(fields, "conversations")}
    if "texts" in fields:
        return {"messages": _pairs(fields)}
    if "instruction" in fields and "output" in fields:
        question = "\n".join(text for text in (_text(fields, "instruction"), _text(fields, "input", "")) if text)
        return {"messages": (Message("user", question), Message("assistant", _text(fields, "output")))}
    if "question" in fields and "response" in fields:
        system = _text(fields, "system_prompt", "")
        turns = (Message("user", _text(fields, "question")), Message("assistant", _text(fields, "response")))
        return {"messages": (Message("system", system), *turns) if system else turns}
    return _plain_content(fields, images)


def _plain_content(fields: Mapping[str, Any], images: int) -> dict[str, Any]:
    if "data_type" in fields and ("vqcode_512" in fields or not images):
        return {"text": _published_text(fields)}
    if "caption" in fields:
        return {"caption": _text(fields, "caption")}
    for name in ("text", "content"):
        if name in fields:
            text = _text(fields, name)
            is_caption = images == 1 and IMAGE_PLACEHOLDER not in text
            return {"caption" if is_caption else "text": text}
    _refuse_input_ids(fields)
    found = ", ".join(to_unicode(str(name)) for name in fields) or "none"
    raise DataError(f"no caption, messages or text in it, nor fields of another known kind (its fields: {found})")


def _text(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise DataError(f"{name}: a text is needed, not {type(value).__name__}")
    return value


def _refuse_input_ids(fields: Mapping[str, Any]) -> None:
    if "input_ids" in fields:
        raise DataError("input_ids: ids of a tokenizer that is not known here; the row needs its text")


def _published_text(fields: Mapping[str, Any]) -> str:
    for name in ("text", "caption"):
        if name in fields:
            return _text(fields, name)
    _refuse_input_ids(fields)
    raise DataError("neither text nor caption is given")


def _published_messages(fields: Mapping[str, Any], data_type: str) -> tuple[Message, ...]:
    if "conversations" in fields:
        messages = _turns(fields, "conversations")
    else:
        text = _published_text(fields)
        if _TURN_SPLIT in text:
            messages = _split_pairs(text)
        elif data_type == "i2t_reverse":
            messages = (Message("user", _REVERSE_PROMPT), Message("assistant", text))
        else:
            raise DataError(f"text: user and assistant are not told apart by {_TURN_SPLIT}")
    if data_type == "i2t_multi" and "width" in fields and "height" in fields:
        return _with_image_size(messages, fields["width"], fields["height"])
    return messages


def _split_pairs(text: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    for number, pair in enumerate(text.split(_PAIR_SPLIT)):
        turns = pair.split(_TURN_SPLIT)
        if len(turns) != 2:
            raise DataError(f"text: {len(turns)} turns in pair {number}, where user and assistant make two")
        messages += [Message("user", turns[0]), Message("assistant", turns[1])]
    return tuple(messages)


def _with_image_size(messages: tuple[Message, ...], width: object, height: object) -> tuple[Message, ...]:
    for number, message in enumerate(messages):
        if message.role == "user":
            led = Message("user", f"Image Size: Width is {width} Height is {height}. {message.content}")
            return (*messages[:number], led, *messages[number + 1 :])
    return messages


def _turns(fields: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    messages = []
    for number, turn in enumerate(_list(fields[name], name)):
        where = f"{name}[{number}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: an object is needed, not {type(turn).__name__}")
        role_name, content_name = ("from", "value") if turn.get("from") is not None else ("role", "content")
        role = turn.get(role_name)
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{where}.{role_name}: {to_unicode(repr(role))} is none of {', '.join(_ROLES)}")
        messages.append(Message(_ROLES[role], _turn_text(turn.get(content_name), f"{where}.{content_name}")))
    return tuple(messages)


def _turn_text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}: a text is needed, not {type(content).__name__}")
    texts = []
    for number, piece in enumerate(content):
        kind = piece.get("type") if isinstance(piece, Mapping) else None
        text = piece.get("text") if isinstance(piece, Mapping) else None
        if kind == "text" and isinstance(text, str):
            texts.append(text)
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_PLACEHOLDER)
        else:
            raise DataError(f"{where}[{number}]: neither a text nor an image")
    return "".join(texts)


def _pairs(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = []
    for number, pair in enumerate(_list(fields["texts"], "texts")):
        for role in ("user", "assistant"):
            text = pair.get(role) if isinstance(pair, Mapping) else None
            if not isinstance(text, str):
                raise DataError(f"texts[{number}].{role}: a text is needed, not {type(text).__name__}")
            messages.append(Message(role, text))
    return tuple(messages)


def _list(value: object, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: a list is needed, not {type(value).__name__}")
    return value


def _images(fields: Mapping[str, Any], resolve: Resolve | None) -> tuple[Picture | CodeGrid, ...]:
    if "vqcode_512" in fields:
        return tuple(_code_grids(fields["vqcode_512"]))
    name = "images" if "images" in fields else "image"
    value = fields.get(name, [])
    if isinstance(value, list | tuple):
        return tuple(_picture(element, f"{name}[{number}]", resolve) for number, element in enumerate(value))
    return (_picture(value, name, resolve),)


def _picture(value: object, where: str, resolve: Resolve | None) -> Picture:
    if isinstance(value, Mapping):  # as Hugging Face's datasets write pictures
        content, path = value.get("bytes"), value.get("path")
        value = content if content else path
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise DataError(f"{where}: a picture is needed, not {type(value).__name__}")
    if resolve is None:
        raise DataError(f"{where}: the picture itself is needed, not the name of a file")
    return resolve(value)


def _code_grids(value: object) -> Iterable[CodeGrid]:
    value = _parse_codes(value)
    several = bool(value) and isinstance(value[0], str | list | tuple)
    for number, codes in enumerate(value if several else [value] if value else []):
        yield _code_grid(_parse_codes(codes), f"vqcode_512[{number}]" if several else "vqcode_512")


def _parse_codes(value: object) -> list[Any] | tuple[Any, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise DataError("vqcode_512: not a JSON list") from None
    return _list([] if value is None else value, "vqcode_512")


def _code_grid(values: list[Any] | tuple[Any, ...], where: str) -> CodeGrid:
    try:
        codes = np.asarray(values)
    except ValueError:  # lists of several lengths
        codes = np.empty(0)
    if codes.ndim != 1 or codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= 2**32:
        raise DataError(f"{where}: a flat list of codes from 0 on is needed")
    side = round(len(codes) ** 0.5)
    if side * side != len(codes):
        raise DataError(f"{where}: {len(codes)} codes do not fill a square grid")
    return CodeGrid(codes.astype(np.uint16 if codes.max() < 2**16 else np.uint32), side, side)
