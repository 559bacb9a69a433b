"""Conversation templates in Jinja, by name, from a file, or the text tokenizer's own.

A template is rendered with stand-ins for what people say, and cut at these: what the template itself says may hold
special tokens, what people say never does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from uni_x.data.schema import Message
from uni_x.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = ("chatml", "gemma", "plain", "vicuna")
OWN = "tokenizer"
_STAND_IN = "\ue000{}\ue001"
_STAND_INS = re.compile("\ue000(\\d+)\ue001")

Piece: TypeAlias = "str | int"
"""What the template says, or the number of the message whose content stands here."""


def load_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The Jinja text of a template.

    Args:
        name: `chatml`, `gemma`, `plain` or `vicuna`; `tokenizer` for that of the text tokenizer; a file; or Jinja.
        tokenizer: the text tokenizer.

    Raises:
        ConfigError: for a file that is missing, and a tokenizer without a template.
    """
    if "{{" in name or "{%" in name:
        return name
    if name in SHIPPED:
        return (files("uni_x.data.templates") / f"{name}.jinja").read_text(encoding="utf-8")
    if name == OWN:
        own = getattr(tokenizer, "chat_template", None)
        if not isinstance(own, str):
            raise ConfigError(f"template: the text tokenizer has none of its own; take one of {', '.join(SHIPPED)}")
        return own
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"template: {name} is none of {', '.join(SHIPPED)} and {OWN}, and no file that can be read"
        ) from None


def render_template(
    template: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: bool
) -> list[Piece]:
    """A conversation as the template has it; `prompt` ends it where the assistant's next turn begins.

    Raises:
        DataError: where the template refuses the conversation, or loses, repeats or reorders its messages.
    """
    from jinja2 import TemplateError

    stand_ins = [{"role": m.role, "content": _STAND_IN.format(number)} for number, m in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(
            stand_ins, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"messages: the template refuses them ({' '.join(str(error).split())})") from None
    parts = _STAND_INS.split(str(text))  # pieces and numbers in turn
    numbers = [int(number) for number in parts[1::2]]
    if numbers != list(range(len(messages))):
        raise DataError("messages: the template loses, repeats or reorders them")
    pieces: list[Piece] = [int(part) if index % 2 else part for index, part in enumerate(parts)]
    return [piece for piece in pieces if piece != ""]
