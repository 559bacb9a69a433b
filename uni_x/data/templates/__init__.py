"""Conversation templates in Jinja, by name, from a file, or the text tokenizer's own.

A template is rendered with stand-ins for what people say, and cut at these: what the template itself says may hold
special tokens, what people say never does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from uni_x.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = ("chatml", "gemma", "plain", "vicuna")
OWN = "tokenizer"
_STAND_IN = "\ue000{}\ue001"
_STAND_INS = re.compile("\ue000(\\d+)\ue001")


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


class Template:
    """A template with the text tokenizer whose special tokens it names."""

    def __init__(self, jinja: str, tokenizer: PreTrainedTokenizerBase):
        self._jinja = jinja
        self._tokenizer = tokenizer
        self._rendered: dict[tuple[str, ...], list[str]] = {}

    def frame(self, roles: Sequence[str]) -> list[str]:
        """What the template says around messages of these roles: before the first, between each two, behind the last.

        All up to an answer is what the template says where that answer is the last message. Some templates lay out
        earlier answers otherwise, but so the frame of a conversation begins with those of all prompts on the way.

        Raises:
            DataError: where the template refuses the conversation, or loses, repeats or reorders its messages.
        """
        said: list[str] = []
        for end, role in enumerate(roles, 1):
            if role == "assistant":
                said += self._render(tuple(roles[:end]))[len(said) : end]
        return said + self._render(tuple(roles))[len(said) :]

    def _render(self, roles: tuple[str, ...]) -> list[str]:
        if roles not in self._rendered:
            self._rendered[roles] = self._render_anew(roles)
        return self._rendered[roles]

    def _render_anew(self, roles: tuple[str, ...]) -> list[str]:
        from jinja2 import TemplateError

        stand_ins = [{"role": role, "content": _STAND_IN.format(number)} for number, role in enumerate(roles)]
        try:
            text = self._tokenizer.apply_chat_template(stand_ins, chat_template=self._jinja, tokenize=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"messages: the template refuses them ({one_line(error)})") from None
        parts = _STAND_INS.split(str(text))  # what the template says and numbers, in turn
        if [int(number) for number in parts[1::2]] != list(range(len(roles))):
            raise DataError("messages: the template loses, repeats or reorders them")
        return parts[::2]
