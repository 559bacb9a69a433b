"""From the fields of a foreign row to a source row: which kind of row it is, told by the fields that it has."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from uni_x.data.readers.parts import Resolve, describe, to_unicode
from uni_x.data.schema import IMAGE_PLACEHOLDER, CodeGrid, Message, Rejection, SourceRow, check_text
from uni_x.errors import DataError
from uni_x.pictures import EMPTY_PICTURE, Picture, is_picture_name

_IDS = ("id", "uid", "key", "__key__")
_IMAGES = (
    *("images", "image", "image_path", "image_paths", "image_file", "image_url", "img", "img_path"),
    *("jpg", "jpeg", "png", "webp"),  # as the library datasets names the members of tars
)
_FILES = ("file_name", "filename", "file", "path")  # pictures where they are named like one
_UNREAD = ("video", "videos", "audio", "audios")
_PLAIN = ("caption", "captions", "text", "content", "txt")
_ALTERNATIVES = (*_PLAIN, "messages", "conversations", "texts", "input_ids")
_CONTENTS = (*_ALTERNATIVES, "output", "response")
KNOWN_FIELDS = frozenset(
    {
        *(*_IDS, *_IMAGES, *_FILES, *_UNREAD, *_CONTENTS, "source"),
        *("instruction", "input", "system_prompt", "question"),
        *("data_type", "vqcode_512", "width", "height"),
    }
)
"""All that is looked at in a row; other fields may hold anything."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN_SPLIT, _PAIR_SPLIT = "^^^turn_split^^^", "^^^pair_split^^^"
_CAPTION_TYPES = ("image_text", "t2i")
_CONVERSATION_TYPES = ("i2t", "i2t_multi", "i2t_reverse")
_REVERSE_PROMPT = "The caption of this image is:"


def row_from_fields(fields: Mapping[str, Any], row_id: str, source: str, resolve: Resolve | None) -> SourceRow:
    """The row that `fields` stand for.

    Known are captions (`image` or `images` with `caption` or `text`), documents (`text`, `content`), conversations
    (`messages`, `conversations`, FineVision's `texts`, the fields of Alpaca and OpenOrca), ready `input_ids`, and the
    rows with `data_type` and `vqcode_512` of the published research code. Of several fields for pictures the first that
    is not empty counts, and so it is with captions, texts and conversations; fields of None count as missing. A row's
    own `id` (or `uid`, `key`, `__key__`) takes the place of `row_id`, its `source` that of `source`. `resolve` finds
    files that the row names; without it none may be named.

    Raises `DataError` with the reason where the fields fit no kind, or hold a video or sound. Whether texts and
    pictures fit each other is left to `schema.check_content`.
    """
    given = _without_empty_alternatives({name: value for name, value in fields.items() if value is not None})
    images = _images(given, resolve)
    content = _content(given, len(images)) or _refuse_content(fields)
    if content.kind == "caption" and not images and (empty := next((name for name in _IMAGES if name in fields), None)):
        raise DataError(f"{empty}: {EMPTY_PICTURE}")
    if unread := next((name for name in _UNREAD if not _is_empty(given.get(name))), None):
        raise DataError(f"{unread}: texts and pictures are read, videos and sound are not")
    own_source = given.get("source")
    return SourceRow(
        id=_own_id(given) or row_id,
        images=images,
        source=to_unicode(own_source) if isinstance(own_source, str) and own_source else source,
        content_field=content.field,
        **{content.kind: content.value},
    )


@dataclass(frozen=True, slots=True)
class _Content:
    """What a row says: as a caption, messages, a text or ready ids, and the field that it stands in."""

    kind: str
    value: Any  # a text, messages or ids
    field: str


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


def _is_empty(value: object) -> bool:
    if isinstance(value, Mapping):  # as Hugging Face's datasets write pictures
        return not (value.get("bytes") or value.get("path"))
    return not (value.strip() if isinstance(value, str) else value)


def _without_empty_alternatives(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out empty captions, texts and conversations where another of them says something."""
    empty = {name for name in _ALTERNATIVES if name in fields and _is_empty(fields[name])}
    if not any(name in fields and name not in empty for name in _ALTERNATIVES):
        return dict(fields)
    return {name: value for name, value in fields.items() if name not in empty}


def _own_id(fields: Mapping[str, Any]) -> str | None:
    for name in _IDS:
        value = fields.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return to_unicode(str(value))
    return None


def _content(fields: Mapping[str, Any], images: int) -> _Content | None:
    """None where the fields are of no known kind."""
    data_type = fields.get("data_type")
    if data_type in _CAPTION_TYPES:
        name = _published_field(fields)
        return _Content("caption", _text(fields, name), name)
    if data_type in _CONVERSATION_TYPES:
        return _published_messages(fields, data_type)
    for name in ("messages", "conversations"):
        if name in fields:
            return _Content("messages", _turns(fields, name), name)
    if "texts" in fields:
        return _Content("messages", _pairs(fields), "texts")
    if "instruction" in fields and "output" in fields:
        return _Content("messages", _instruction(fields), "instruction")
    if "question" in fields and "response" in fields:
        return _Content("messages", _question(fields), "question")
    return _plain_content(fields, images)


def _instruction(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    parts = [_text(fields, name, optional=True) for name in ("instruction", "input")]
    question = "\n".join(part for part in parts if part)
    check_text(question, "instruction")
    return (Message("user", question), Message("assistant", _text(fields, "output")))


def _question(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    system = _text(fields, "system_prompt", optional=True)
    turns = (Message("user", _text(fields, "question")), Message("assistant", _text(fields, "response")))
    return (Message("system", system), *turns) if system else turns


def _plain_content(fields: Mapping[str, Any], images: int) -> _Content | None:
    if "input_ids" in fields and not any(name in fields for name in _PLAIN):
        return _Content("input_ids", _ready_ids(fields, images), "input_ids")
    if "data_type" in fields and ("vqcode_512" in fields or not images):
        name = _published_field(fields)
        return _Content("text", _text(fields, name), name)
    for name in _PLAIN:
        if name in fields:
            is_choice = images > 0 and isinstance(fields[name], list | tuple)
            text = first_caption(fields[name], name) if is_choice else _text(fields, name)
            has_place = images > 0 and IMAGE_PLACEHOLDER in text
            is_caption = not has_place and (images == 1 or name in ("caption", "captions"))
            return _Content("caption" if is_caption else "text", text, name)
    return None


def first_caption(captions: Iterable[object], name: str) -> str:
    """The first of several captions that is not empty. Raises `DataError`, which names the field, where all are."""
    for caption in captions:
        if isinstance(caption, str) and caption.strip():
            check_text(caption, name)
            return caption.strip()
    raise DataError(f"{name}: it is empty")


def _refuse_content(fields: Mapping[str, Any]) -> NoReturn:
    empty = next((name for name in _CONTENTS if name in fields and fields[name] is None), None)
    if empty is not None:
        raise DataError(f"{empty}: it is empty")
    found = ", ".join(to_unicode(str(name)) for name in fields) or "none"
    raise DataError(f"no caption, messages or text in it, nor fields of another known kind (its fields: {found})")


def _text(fields: Mapping[str, Any], name: str, optional: bool = False) -> str:
    value = fields.get(name, "" if optional else None)
    if not isinstance(value, str):
        raise DataError(f"{name}: a text is needed, not {type(value).__name__}")
    if value or not optional:
        check_text(value, name)
    return value


def _ready_ids(fields: Mapping[str, Any], images: int) -> tuple[int, ...]:
    if images:
        raise DataError("input_ids: ready ids are read in rows of text alone; rows with pictures need their text")
    ids = _list(fields["input_ids"], "input_ids")
    for number, id_ in enumerate(ids):
        if type(id_) is not int:
            raise DataError(f"input_ids[{number}]: a whole number is needed, not {type(id_).__name__}")
    return tuple(ids)


def _published_field(fields: Mapping[str, Any]) -> str:
    for name in ("text", "caption"):
        if name in fields:
            return name
    raise DataError("neither text nor caption is given")


def _published_messages(fields: Mapping[str, Any], data_type: str) -> _Content:
    if "conversations" in fields:
        name = "conversations"
        messages = _turns(fields, name)
    else:
        name = _published_field(fields)
        text = _text(fields, name)
        if _TURN_SPLIT in text:
            messages = _split_pairs(text, name)
        elif data_type == "i2t_reverse":
            messages = (Message("user", _REVERSE_PROMPT), Message("assistant", text))
        else:
            raise DataError(f"{name}: user and assistant are not told apart by {_TURN_SPLIT}")
    if data_type == "i2t_multi" and "width" in fields and "height" in fields:
        messages = _with_image_size(messages, fields["width"], fields["height"])
    return _Content("messages", messages, name)


def _split_pairs(text: str, name: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    for number, pair in enumerate(text.split(_PAIR_SPLIT)):
        turns = pair.split(_TURN_SPLIT)
        if len(turns) != 2:
            raise DataError(f"{name}: {len(turns)} turns in pair {number}, where user and assistant make two")
        for turn in turns:
            check_text(turn, f"{name}, pair {number}")
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
        text = _turn_text(turn.get(content_name), f"{where}.{content_name}")
        if role == "system" and not text.strip():
            continue
        check_text(text, f"{where}.{content_name}")
        messages.append(Message(_ROLES[role], text))
    return tuple(messages)


def _turn_text(content: object, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
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
            check_text(text, f"texts[{number}].{role}")
            messages.append(Message(role, text))
    return tuple(messages)


def _list(value: object, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: a list is needed, not {type(value).__name__}")
    return value


def _images(fields: Mapping[str, Any], resolve: Resolve | None) -> tuple[Picture | CodeGrid, ...]:
    if "vqcode_512" in fields:
        return tuple(_code_grids(fields["vqcode_512"]))
    named = [name for name in _IMAGES if name in fields]
    name = next((name for name in named if not _is_empty(fields[name])), None) or _file_name(fields)
    name = name or next(iter(named), "image")
    value = fields.get(name, [])
    if isinstance(value, list | tuple):
        return tuple(_picture(element, f"{name}[{number}]", resolve) for number, element in enumerate(value))
    return (_picture(value, name, resolve),)


def _file_name(fields: Mapping[str, Any]) -> str | None:
    """The field that names a picture's file; in rows of documents the same names are those of other files."""
    return next((name for name in _FILES if isinstance(fields.get(name), str) and is_picture_name(fields[name])), None)


def _picture(value: object, where: str, resolve: Resolve | None) -> Picture:
    if isinstance(value, Mapping):  # as Hugging Face's datasets write pictures
        content, path = value.get("bytes"), value.get("path")
        value = content or path
    if value is None or value == "" or value == b"":
        raise DataError(f"{where}: {EMPTY_PICTURE}")
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
