"""Renders samples as ids and labels, and prompts as ids: training and inference share this code.

A sample is first laid out as segments, each a text or ready ids, with a flag whether it is trained. The prompt of a
task is laid out by the same functions, so that it is an exact prefix of what training renders:

- draw: `{caption}{instruction}<|vision_start|>{codes}<|vision_end|>{eos}`
- describe: `<|vision_start|>{codes}<|vision_end|>{instruction}{caption}{eos}`
- converse: a newline ends each turn of the user; each answer ends in eos, and a newline leads on to the next turn
- text: `{text}{eos}`

Texts are tokenised segment by segment, special tokens spelled in them as plain characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from uni_x.data.schema import IMAGE_PLACEHOLDER, CodeGrid, Message, Sample
from uni_x.errors import ConfigError, DataError, InputError
from uni_x.recipe import RenderOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
UNCONDITIONAL = "<unconditional>"
_IDS_KEPT = 5_000_000  # 40 MB of tokenised texts

Segment: TypeAlias = "tuple[str | np.ndarray, bool]"
"""A text or ready ids, and whether they are trained."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids that rendering needs; image code c has the id `image_token_offset + c`."""

    image_token_offset: int
    image_codebook_size: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int
    pad_token_id: int

    @classmethod
    def from_config(cls, config: Any) -> Vocabulary:
        """Takes the ids from a model's configuration; of several end tokens the first.

        Raises `ConfigError` that names the first one missing.
        """
        ids: dict[str, int] = {}
        for name in cls.__dataclass_fields__:
            value: Any = getattr(config, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if value is None:
                raise ConfigError(f"the model's configuration lacks {name}")
            ids[name] = value
        return cls(**ids)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence. `labels` are the ids themselves, not shifted, and -100 where nothing is to be learned."""

    input_ids: np.ndarray  # (length,) int64
    labels: np.ndarray  # (length,) int64
    kind: str  # draw, describe, converse or text
    source: str
    image_tokens: int  # how many of the ids are image codes


class Renderer:
    """Renders samples and prompts for one model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        options: RenderOptions | None = None,
    ):
        """Raises `ConfigError` where the tokenizer has ids beyond the text's part of the vocabulary."""
        if len(tokenizer) > vocabulary.image_token_offset:
            raise ConfigError(
                f"the text tokenizer has {len(tokenizer)} tokens, but image codes begin at id "
                f"{vocabulary.image_token_offset}"
            )
        self.vocabulary = vocabulary
        self.options = options or RenderOptions()
        self._trains_instructions = not self.options.ignore_instruction
        self._tokenizer = tokenizer
        self._vision_start = np.array([vocabulary.vision_start_token_id])
        self._vision_end = np.array([vocabulary.vision_end_token_id])
        self._end: Segment = (np.array([vocabulary.eos_token_id]), True)
        self._texts: dict[str, np.ndarray] = {}
        self._ids_kept = 0

    def render(self, sample: Sample, rng: np.random.Generator) -> Rendered:
        """Renders one sample; `rng` decides between drawing and describing, on the instruction, on leaving out text.

        Raises `DataError` that names the sample where its images do not fit its content or the vocabulary.
        """
        return self.render_all([sample], rng)[0]

    def render_all(self, samples: Sequence[Sample], rng: np.random.Generator) -> list[Rendered]:
        """Renders samples as `render` does one after the other, faster."""
        layouts = [self._lay_out(sample, rng) for sample in samples]
        texts = self._tokenize(segment for _, segments in layouts for segment in segments)
        return [
            _assemble(kind, segments, texts, sample) for (kind, segments), sample in zip(layouts, samples, strict=True)
        ]

    def draw_prompt(self, caption: str, instruction: str | None = None) -> list[int]:
        """Ids after which the model draws `caption`; the instruction is by default the first of the options'."""
        instruction = _first(self.options.draw_instructions) if instruction is None else instruction
        return self._ids(self._drawing_text(caption + instruction))

    def unconditional_prompt(self) -> list[int]:
        """Ids after which the model draws anything: the other side of classifier-free guidance."""
        return self._ids(self._drawing_text(UNCONDITIONAL))

    def describe_prompt(self, image: CodeGrid, instruction: str | None = None) -> list[int]:
        """Ids after which the model describes `image`; the instruction is by default the first of the options'."""
        instruction = _first(self.options.describe_instructions) if instruction is None else instruction
        return self._ids(self._image_with_instruction(image, instruction))

    def chat_prompt(self, messages: Sequence[Message], images: Sequence[CodeGrid] = ()) -> list[int]:
        """Ids after which the assistant answers. Images stand at their `<image>`, or first where there is none.

        Raises `InputError` where the last message is not the user's, or the images do not fit the placeholders.
        """
        if not messages or messages[-1].role == "assistant":
            raise InputError("messages: the last one must be the user's, for the model to answer")
        try:
            return self._ids(self._conversation(messages, images))
        except DataError as error:
            raise InputError(str(error)) from None

    def encode_text(self, text: str) -> list[int]:
        """The ids that `text` has as a segment of its own: an answer, a caption, a document."""
        return self._ids([(text, True)])

    def _lay_out(self, sample: Sample, rng: np.random.Generator) -> tuple[str, list[Segment]]:
        try:
            if sample.caption is not None:
                if len(sample.images) != 1:
                    raise DataError(f"caption: it goes with exactly one image, found {len(sample.images)}")
                if rng.random() < self.options.t2i_ratio:
                    return "draw", self._drawing(sample.images[0], sample.caption, rng)
                return "describe", self._description(sample.images[0], sample.caption, rng)
            if sample.messages is not None:
                return "converse", self._conversation(sample.messages, sample.images)
            if sample.text is not None:
                return "text", self._document(sample.text, sample.images)
        except DataError as error:
            raise DataError(f"sample {sample.id!r}, {error}") from None
        raise DataError(f"sample {sample.id!r}: one of caption, messages and text must be given")

    def _drawing(self, image: CodeGrid, caption: str, rng: np.random.Generator) -> list[Segment]:
        if rng.random() < self.options.unconditional_share:
            text = UNCONDITIONAL
        else:
            text = caption + _choose(self.options.draw_instructions, rng)
        return [*self._drawing_text(text), (self._image_ids(image), True), (self._vision_end, True), self._end]

    def _drawing_text(self, text: str) -> list[Segment]:
        return [(text, self._trains_instructions), (self._vision_start, self._trains_instructions)]

    def _description(self, image: CodeGrid, caption: str, rng: np.random.Generator) -> list[Segment]:
        instruction = _choose(self.options.describe_instructions, rng)
        return [*self._image_with_instruction(image, instruction), (caption, True), self._end]

    def _image_with_instruction(self, image: CodeGrid, instruction: str) -> list[Segment]:
        return [*self._image(image, False), (instruction, self._trains_instructions)]

    def _conversation(self, messages: Sequence[Message], images: Sequence[CodeGrid]) -> list[Segment]:
        remaining = iter(images)
        newline: Segment = ("\n", self._trains_instructions)
        segments: list[Segment] = []
        if not any(IMAGE_PLACEHOLDER in message.content for message in messages):
            segments += (segment for image in remaining for segment in self._image(image, False))
        after_answer = False
        for number, message in enumerate(messages):
            if after_answer:
                segments.append(newline)
            answers = message.role == "assistant"
            trained = answers or self._trains_instructions
            segments += self._content(f"messages[{number}].content", message.content, remaining, trained, answers)
            segments.append(self._end if answers else newline)
            after_answer = answers
        _check_used_up(remaining, "messages")
        return segments

    def _document(self, text: str, images: Sequence[CodeGrid]) -> list[Segment]:
        remaining = iter(images)
        segments = [*self._content("text", text, remaining, True, True), self._end]
        _check_used_up(remaining, "text")
        return segments

    def _content(
        self, field: str, content: str, images: Iterator[CodeGrid], text_trained: bool, images_trained: bool
    ) -> list[Segment]:
        """A text with images at their placeholders; `field` names it in errors."""
        if IMAGE_PLACEHOLDER not in content:
            return [(content, text_trained)]
        first, *rest = content.split(IMAGE_PLACEHOLDER)
        segments: list[Segment] = [(first, text_trained)]
        for text in rest:
            image = next(images, None)
            if image is None:
                raise DataError(f"{field}: more {IMAGE_PLACEHOLDER} than images")
            segments += [*self._image(image, images_trained), (text, text_trained)]
        return segments

    def _image(self, image: CodeGrid, trained: bool) -> list[Segment]:
        return [(self._vision_start, trained), (self._image_ids(image), trained), (self._vision_end, trained)]

    def _image_ids(self, image: CodeGrid) -> np.ndarray:
        if image.codes.max() >= self.vocabulary.image_codebook_size:
            raise DataError(
                f"images.codes: code {image.codes.max()} is not in the model's codebook of "
                f"{self.vocabulary.image_codebook_size}"
            )
        return np.add(image.codes, self.vocabulary.image_token_offset, dtype=np.int64)

    def _ids(self, segments: list[Segment]) -> list[int]:
        return np.concatenate(_parts(segments, self._tokenize(segments))).tolist()

    def _tokenize(self, segments: Iterable[Segment]) -> dict[str, np.ndarray]:
        """Ids of the segments' texts. Keeps those of earlier calls, since captions and questions repeat."""
        wanted = dict.fromkeys(content for content, _ in segments if isinstance(content, str))
        if self._ids_kept > _IDS_KEPT:
            # Another thread may still read the old ones, so they are replaced, not cleared.
            self._texts, self._ids_kept = {}, 0
        texts = self._texts
        missing = [text for text in wanted if text not in texts]
        if missing:
            encoded = self._tokenizer(
                missing, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
            )["input_ids"]
            texts.update((text, np.array(ids, dtype=np.int64)) for text, ids in zip(missing, encoded, strict=True))
            self._ids_kept += sum(map(len, encoded))
        return texts


def _assemble(kind: str, segments: list[Segment], texts: dict[str, np.ndarray], sample: Sample) -> Rendered:
    parts = _parts(segments, texts)
    input_ids = np.concatenate(parts)
    trained = np.array([trained for _, trained in segments]).repeat([len(part) for part in parts])
    labels = np.where(trained, input_ids, IGNORED)
    image_tokens = sum(len(image.codes) for image in sample.images)
    return Rendered(input_ids, labels, kind, sample.source, image_tokens)


def _parts(segments: list[Segment], texts: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [texts[content] if isinstance(content, str) else content for content, _ in segments]


def _check_used_up(images: Iterator[CodeGrid], field: str) -> None:
    if next(images, None) is not None:
        raise DataError(f"{field}: fewer {IMAGE_PLACEHOLDER} than images")


def _choose(instructions: Sequence[str], rng: np.random.Generator) -> str:
    return instructions[int(rng.integers(len(instructions)))] if instructions else ""


def _first(instructions: Sequence[str]) -> str:
    return instructions[0] if instructions else ""
