"""How samples are laid out as sequences: segments of text and ready ids, each with a flag whether it is trained.

Training and prompts are laid out by the same functions, so that a prompt is an exact prefix of what training renders.

`HouseLayout`:

- draw: `{caption}{instruction}<|vision_start|>{codes}<|vision_end|>{eos}`
- describe: `<|vision_start|>{codes}<|vision_end|>{instruction}{caption}{eos}`
- converse: a newline ends each turn of the user; each answer ends in eos, and a newline leads on to the next turn
- text: `{text}{eos}`

`TemplateLayout` differs in conversations; `PublishedLayout`, which is that of the published checkpoints, in everything
but drawings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from uni_x.data.schema import IMAGE_PLACEHOLDER, CodeGrid, Message
from uni_x.data.templates import Template
from uni_x.errors import DataError

PUBLISHED_CAPTION = "The caption of this image is:"


class Segment(NamedTuple):
    """A part of a sequence.

    Attributes:
        content: a text, or ready ids.
        trained: whether it is a target.
        special: special tokens spelled in the text are those tokens, and not plain characters.
        after: of a trained text the part, at its beginning, that is not trained; nor is the token behind it.
    """

    content: str | np.ndarray
    trained: bool
    special: bool = False
    after: str = ""


class Markers(NamedTuple):
    """What stands around and between the codes of an image.

    Attributes:
        start, end, eos: one id each, as arrays.
        offset: id of code 0.
        codebook_size: codes are below it.
        separator: the id that stands behind every `separator_every` codes, None where none does.
    """

    start: np.ndarray
    end: np.ndarray
    eos: np.ndarray
    offset: int
    codebook_size: int
    separator: int | None = None
    separator_every: int = 0

    def image_ids(self, image: CodeGrid) -> np.ndarray:
        """Ids of the codes, with their separators. Raises `DataError` for codes outside the codebook."""
        if image.codes.max() >= self.codebook_size:
            raise DataError(
                f"images.codes: code {image.codes.max()} is not in the model's codebook of {self.codebook_size}"
            )
        ids = np.add(image.codes, self.offset, dtype=np.int64)
        if self.separator is None:
            return ids
        places = np.arange(self.separator_every, len(ids) + 1, self.separator_every)
        return np.insert(ids, places, self.separator)

    def length(self, image: CodeGrid) -> int:
        """How many ids the codes have with their separators."""
        return len(image.codes) + (0 if self.separator is None else len(image.codes) // self.separator_every)


@dataclass(frozen=True)
class Conversation:
    """What a conversation is laid out from.

    Attributes:
        messages: the turns.
        first: segments of images that have no place in the turns, and come first.
        images: those that have one.
        newlines: how many stand before each turn, for layouts that leave it to chance.
        is_prompt: the assistant's next turn is to follow.
    """

    messages: Sequence[Message]
    first: list[Segment]
    images: Iterator[CodeGrid]
    newlines: Iterator[int]
    is_prompt: bool


class HouseLayout:
    """The layout of this project.

    Args:
        markers: ids around images.
        trains_instructions: whether what the user says is trained too.
    """

    def __init__(self, markers: Markers, trains_instructions: bool):
        self.markers = markers
        self.trains_instructions = trains_instructions

    @property
    def end(self) -> Segment:
        """What ends an answer."""
        return Segment(self.markers.eos, True)

    def drawing(self, text: str, image: CodeGrid) -> list[Segment]:
        """An image drawn from a text."""
        ids = Segment(self.markers.image_ids(image), True)
        return [*self.drawing_prompt(text), ids, Segment(self.markers.end, True), self.end]

    def drawing_prompt(self, text: str) -> list[Segment]:
        """A drawing up to where the image begins."""
        return [Segment(text, self.trains_instructions), Segment(self.markers.start, self.trains_instructions)]

    def description(self, image: CodeGrid, instruction: str, caption: str, newlines: Iterator[int]) -> list[Segment]:
        """A caption for an image; `newlines` are for layouts that leave their number to chance."""
        return [*self.description_prompt(image, instruction, newlines), Segment(caption, True), self.end]

    def description_prompt(self, image: CodeGrid, instruction: str, newlines: Iterator[int]) -> list[Segment]:
        """A description up to where the caption begins."""
        return [*self._image(image, False), Segment(instruction, self.trains_instructions)]

    def conversation(
        self, messages: Sequence[Message], images: Sequence[CodeGrid], newlines: Iterator[int], prompt: bool = False
    ) -> list[Segment]:
        """A conversation, or one up to where the assistant's next turn begins. Images stand at their placeholders, or
        first where there is none. Raises `DataError` where they do not fit the placeholders."""
        remaining = iter(images)
        placed = any(IMAGE_PLACEHOLDER in message.content for message in messages)
        first = [] if placed else [segment for image in remaining for segment in self._image(image, False)]
        segments = self._turns(Conversation(messages, first, remaining, newlines, prompt))
        if next(remaining, None) is not None:
            raise DataError(f"messages: fewer {IMAGE_PLACEHOLDER} than images")
        return segments

    def document(self, text: str, images: Sequence[CodeGrid]) -> list[Segment]:
        """A text, trained whole. Raises `DataError` where images do not fit its placeholders."""
        remaining = iter(images)
        segments = [*self._content("text", text, remaining, True, True), self.end]
        if next(remaining, None) is not None:
            raise DataError(f"text: fewer {IMAGE_PLACEHOLDER} than images")
        return segments

    def _turns(self, said: Conversation) -> list[Segment]:
        newline = Segment("\n", self.trains_instructions)
        segments = list(said.first)
        after_answer = False
        for number, message in enumerate(said.messages):
            if after_answer:
                segments.append(newline)
            segments += self._message(number, message, said.images)
            after_answer = message.role == "assistant"
            segments.append(self.end if after_answer else newline)
        return segments

    def _message(self, number: int, message: Message, images: Iterator[CodeGrid]) -> list[Segment]:
        answers = message.role == "assistant"
        trained = answers or self.trains_instructions
        return self._content(f"messages[{number}].content", message.content, images, trained, answers)

    def _content(
        self, field: str, content: str, images: Iterator[CodeGrid], text_trained: bool, images_trained: bool
    ) -> list[Segment]:
        """A text with images at their placeholders; `field` names it in errors."""
        if IMAGE_PLACEHOLDER not in content:
            return [Segment(content, text_trained)]
        first, *rest = content.split(IMAGE_PLACEHOLDER)
        segments = [Segment(first, text_trained)]
        for text in rest:
            image = next(images, None)
            if image is None:
                raise DataError(f"{field}: more {IMAGE_PLACEHOLDER} than images")
            segments += [*self._image(image, images_trained), Segment(text, text_trained)]
        return segments

    def _image(self, image: CodeGrid, trained: bool) -> list[Segment]:
        markers = self.markers
        return [Segment(ids, trained) for ids in (markers.start, markers.image_ids(image), markers.end)]


class TemplateLayout(HouseLayout):
    """The layout of this project, with conversations as a template has them.

    Args:
        markers, trains_instructions: see `HouseLayout`.
        template: says what stands around the messages.
        eos_token: as the template spells it.
    """

    def __init__(self, markers: Markers, trains_instructions: bool, template: Template, eos_token: str):
        super().__init__(markers, trains_instructions)
        self._template = template
        self._eos_token = eos_token

    def _turns(self, said: Conversation) -> list[Segment]:
        first = list(said.first)
        roles = [message.role for message in said.messages]
        before, *behind_each = self._template.frame([*roles, "assistant"] if said.is_prompt else roles)
        segments, lead = self._opening(before)
        for number, (message, behind) in enumerate(zip(said.messages, behind_each, strict=False)):
            if message.role == "user":
                segments, first = segments + first, []
            segments += self._message(number, Message(message.role, lead + message.content), said.images)
            if message.role == "assistant":
                answer_end, behind = self._cut_behind_eos(behind)
                segments.append(answer_end)
            opening, lead = self._opening(behind)
            segments += opening
        return [*first, *segments]  # images that no question leads come first of all

    def _opening(self, text: str) -> tuple[list[Segment], str]:
        """What the template says before a message, and a space at its end, which belongs to the next word's token."""
        said = text.removesuffix(" ")
        return [Segment(said, self.trains_instructions, special=True)] if said else [], text[len(said) :]

    def _cut_behind_eos(self, text: str) -> tuple[Segment, str]:
        """What ends an answer, the template's own end or eos itself, and what the template says behind it."""
        head, found, rest = text.partition(self._eos_token)
        return (Segment(head + found, True, special=True), rest) if found else (self.end, text)


class PublishedLayout(HouseLayout):
    """What the published checkpoints were trained on, in their pretraining or, where `sft`, in their fine-tuning.

    Nothing but drawings and single questions ends in eos there, and the first token of a pretraining caption is no
    target. Text is tokenised together where it was there.
    """

    def __init__(self, markers: Markers, trains_instructions: bool, sft: bool):
        super().__init__(markers, trains_instructions)
        self.sft = sft

    def description(self, image: CodeGrid, instruction: str, caption: str, newlines: Iterator[int]) -> list[Segment]:
        """In pretraining a fixed sentence leads to the caption, in fine-tuning the instruction, as a turn."""
        if self.sft:
            messages = (Message("user", instruction.strip()), Message("assistant", caption))
            return self.conversation(messages, (image,), newlines)
        after = "" if self.trains_instructions else PUBLISHED_CAPTION
        return [*self._image(image, False), Segment(PUBLISHED_CAPTION + caption, True, after=after), self.end]

    def description_prompt(self, image: CodeGrid, instruction: str, newlines: Iterator[int]) -> list[Segment]:
        """A description up to where the caption begins."""
        if self.sft:
            return self.conversation((Message("user", instruction.strip()),), (image,), newlines, prompt=True)
        return [*self._image(image, False), Segment(PUBLISHED_CAPTION, False)]

    def document(self, text: str, images: Sequence[CodeGrid]) -> list[Segment]:
        """A text; in pretraining it has no end."""
        segments = super().document(text, images)
        return segments if self.sft else segments[:-1]

    def instruction(self, question: str, answer: str, newlines: Iterator[int]) -> list[Segment]:
        """A question without a picture and its answer, which ends."""
        return [
            Segment(question, self.trains_instructions),
            Segment("\n" * next(newlines) + answer, True),
            self.end,
        ]

    def _turns(self, said: Conversation) -> list[Segment]:
        segments = list(said.first)
        for number, message in enumerate(said.messages):
            led = Message(message.role, "\n" * next(said.newlines) + message.content)
            segments += self._message(number, led, said.images)
        return segments
