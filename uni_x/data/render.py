"""Renders samples as ids and labels, and prompts as ids: training and inference share this code.

Texts are tokenised segment by segment, special tokens spelled in them as plain characters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uni_x.data.layouts import HouseLayout, Markers, PublishedLayout, Segment, TemplateLayout
from uni_x.data.schema import IMAGE_PLACEHOLDER, CodeGrid, Message, Sample
from uni_x.data.templates import Template, load_template
from uni_x.data.text_tokenizer import tokenize
from uni_x.errors import ConfigError, DataError, InputError
from uni_x.recipe import RenderOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
UNCONDITIONAL = "<unconditional>"
_IDS_KEPT = 5_000_000  # 40 MB of tokenised texts

MOST_NEWLINES = 3  # in front of a turn of the published layout

Stage = Literal["pretrain", "sft"]


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
    image_tokens: int  # how many of the ids are image codes or their separators
    sample_id: str = ""
    folder: int = 0  # which of the folders that are mixed it comes from

    @property
    def can_be_cut(self) -> bool:
        """Whether it is text and nothing else, which may become several sequences."""
        return self.kind == "text" and not self.image_tokens


class Renderer:
    """Renders samples and prompts for one model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        options: RenderOptions | None = None,
        stage: Stage = "sft",
    ):
        """`stage` says what `t2i_ratio` counts: in `pretrain` all samples with one image, in `sft` captions.

        Raises `ConfigError` where the tokenizer has ids beyond the text's part of the vocabulary, or lacks a token or
        the template that the options name.
        """
        if len(tokenizer) > vocabulary.image_token_offset:
            raise ConfigError(
                f"the text tokenizer has {len(tokenizer)} tokens, but image codes begin at id "
                f"{vocabulary.image_token_offset}"
            )
        self.vocabulary = vocabulary
        self.options = options or RenderOptions()
        self.stage = stage
        self._tokenizer = tokenizer
        self._layout = self._make_layout()
        self._texts: dict[tuple[str, bool], np.ndarray] = {}
        self._ids_kept = 0

    @property
    def separator(self) -> tuple[int, int] | None:
        """The id that stands behind every so many codes of an image, and how many; None where none does."""
        return separator_of(self._tokenizer, self.options)

    def _make_layout(self) -> HouseLayout:
        options, vocabulary = self.options, self.vocabulary
        start, end, eos = (
            np.array([id_])
            for id_ in (vocabulary.vision_start_token_id, vocabulary.vision_end_token_id, vocabulary.eos_token_id)
        )
        separator, every = self.separator or (None, 0)
        markers = Markers(
            start, end, eos, vocabulary.image_token_offset, vocabulary.image_codebook_size, separator, every
        )
        trains_instructions = not options.ignore_instruction
        if options.layout == "published":
            return PublishedLayout(markers, trains_instructions, sft=self.stage == "sft")
        if options.template is None:
            return HouseLayout(markers, trains_instructions)
        template = Template(load_template(options.template, self._tokenizer), self._tokenizer)
        eos_token = self._tokenizer.convert_ids_to_tokens(vocabulary.eos_token_id)
        return TemplateLayout(markers, trains_instructions, template, str(eos_token))

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
            _assemble(kind, segments, texts, sample, self._layout.markers)
            for (kind, segments), sample in zip(layouts, samples, strict=True)
        ]

    def try_all(self, samples: Sequence[Sample], rng: np.random.Generator) -> list[Rendered | DataError]:
        """Renders samples; in the place of one that layout or template refuse is the error."""
        try:
            return list(self.render_all(samples, rng))
        except DataError:
            return [self._try(sample, rng) for sample in samples]

    def _try(self, sample: Sample, rng: np.random.Generator) -> Rendered | DataError:
        try:
            return self.render(sample, rng)
        except DataError as error:
            return error

    def draw_prompt(self, caption: str, instruction: str | None = None) -> list[int]:
        """Ids after which the model draws `caption`; the instruction is by default the first of the options'."""
        instruction = _first(self.options.draw_instructions) if instruction is None else instruction
        return self._ids(self._layout.drawing_prompt(caption + instruction))

    def unconditional_prompt(self) -> list[int]:
        """Ids after which the model draws anything: the other side of classifier-free guidance."""
        return self._ids(self._layout.drawing_prompt(UNCONDITIONAL))

    def describe_prompt(self, image: CodeGrid, instruction: str | None = None) -> list[int]:
        """Ids after which the model describes `image`; the instruction is by default the first of the options'."""
        instruction = _first(self.options.describe_instructions) if instruction is None else instruction
        return self._ids(self._layout.description_prompt(image, instruction, itertools.repeat(1)))

    def chat_prompt(self, messages: Sequence[Message], images: Sequence[CodeGrid] = ()) -> list[int]:
        """Ids after which the assistant answers. Images stand at their `<image>`, or first where there is none.

        Raises `InputError` where the last message is not the user's, or the images do not fit the placeholders.
        """
        if not messages or messages[-1].role == "assistant":
            raise InputError("messages: the last one must be the user's, for the model to answer")
        try:
            return self._ids(self._layout.conversation(messages, images, itertools.repeat(1), prompt=True))
        except DataError as error:
            raise InputError(str(error)) from None

    def encode_text(self, text: str) -> list[int]:
        """The ids that `text` has as a segment of its own: an answer, a caption, a document."""
        return self._ids([Segment(text, True)])

    def _lay_out(self, sample: Sample, rng: np.random.Generator) -> tuple[str, list[Segment]]:
        try:
            caption = self._caption_of(sample)
            if caption is not None:
                if len(sample.images) != 1:
                    raise DataError(f"caption: it goes with exactly one image, found {len(sample.images)}")
                return self._lay_out_caption(caption, sample.images[0], rng)
            if sample.messages is not None:
                return "converse", self._lay_out_messages(sample.messages, sample.images, rng)
            if sample.text is not None:
                return "text", self._layout.document(sample.text, sample.images)
        except DataError as error:
            raise DataError(f"sample {sample.id!r}, {error}") from None
        raise DataError(f"sample {sample.id!r}: one of caption, messages and text must be given")

    def _caption_of(self, sample: Sample) -> str | None:
        """What stands for a sample's image in words: in pretraining all that is said about it."""
        if sample.caption is not None or self.stage == "sft" or len(sample.images) != 1 or sample.messages is None:
            return sample.caption
        if any(IMAGE_PLACEHOLDER in message.content for message in sample.messages if message.role == "assistant"):
            return None  # the image is an answer, not what is spoken about
        said = (message.content.replace(IMAGE_PLACEHOLDER, "").strip() for message in sample.messages)
        return "\n".join(text for text in said if text)

    def _lay_out_caption(self, caption: str, image: CodeGrid, rng: np.random.Generator) -> tuple[str, list[Segment]]:
        options = self.options
        if rng.random() >= options.t2i_ratio:
            instruction = _choose(options.describe_instructions, rng)
            return "describe", self._layout.description(image, instruction, caption, _newlines(rng))
        if rng.random() < options.unconditional_share:
            return "draw", self._layout.drawing(UNCONDITIONAL, image)
        return "draw", self._layout.drawing(caption + _choose(options.draw_instructions, rng), image)

    def _lay_out_messages(
        self, messages: Sequence[Message], images: Sequence[CodeGrid], rng: np.random.Generator
    ) -> list[Segment]:
        single_question = [message.role for message in messages] == ["user", "assistant"] and not images
        if single_question and isinstance(self._layout, PublishedLayout):
            return self._layout.instruction(messages[0].content, messages[1].content, _newlines(rng))
        return self._layout.conversation(messages, images, _newlines(rng))

    def _ids(self, segments: list[Segment]) -> list[int]:
        return np.concatenate(_parts(segments, self._tokenize(segments))).tolist()

    def _tokenize(self, segments: Iterable[Segment]) -> dict[tuple[str, bool], np.ndarray]:
        """Ids of the segments' texts. Keeps those of earlier calls, since captions and questions repeat."""
        wanted = dict.fromkeys(key for segment in segments for key in _texts_of(segment))
        if self._ids_kept > _IDS_KEPT:
            # Another thread may still read the old ones, so they are replaced, not cleared.
            self._texts, self._ids_kept = {}, 0
        texts = self._texts
        for special in (False, True):
            missing = [key for key in wanted if key[1] == special and key not in texts]
            if not missing:
                continue
            encoded = tokenize(self._tokenizer, [text for text, _ in missing], special)
            texts.update((key, np.array(ids, dtype=np.int64)) for key, ids in zip(missing, encoded, strict=True))
            self._ids_kept += sum(map(len, encoded))
        return texts


def separator_of(tokenizer: PreTrainedTokenizerBase, options: RenderOptions) -> tuple[int, int] | None:
    """The id of the separator that the options ask for, and behind how many codes it stands.

    Raises `ConfigError` where the tokenizer does not have it as one token.
    """
    if options.vis_sep is None:
        return None
    known = tokenizer.get_vocab()
    if options.vis_sep.token not in known:
        raise ConfigError(
            f"vis_sep.token: the text tokenizer has no token {options.vis_sep.token}; name one that it has, or add it "
            "to a plain LLM with `uni-x init --separator`"
        )
    return known[options.vis_sep.token], options.vis_sep.every


def _texts_of(segment: Segment) -> Iterator[tuple[str, bool]]:
    if isinstance(segment.content, str):
        yield segment.content, segment.special
        if segment.after:
            yield segment.after, segment.special


def _assemble(
    kind: str, segments: list[Segment], texts: dict[tuple[str, bool], np.ndarray], sample: Sample, markers: Markers
) -> Rendered:
    parts = _parts(segments, texts)
    input_ids = np.concatenate(parts)
    trained = np.array([segment.trained for segment in segments]).repeat([len(part) for part in parts])
    for number, segment in enumerate(segments):
        if segment.after:
            start = sum(map(len, parts[:number]))
            trained[start : start + len(texts[segment.after, segment.special]) + 1] = False
    labels = np.where(trained, input_ids, IGNORED)
    image_tokens = sum(map(markers.length, sample.images))
    return Rendered(input_ids, labels, kind, sample.source, image_tokens, sample.id)


def _parts(segments: list[Segment], texts: dict[tuple[str, bool], np.ndarray]) -> list[np.ndarray]:
    return [
        texts[segment.content, segment.special] if isinstance(segment.content, str) else segment.content
        for segment in segments
    ]


def _newlines(rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield int(rng.integers(1, MOST_NEWLINES + 1))


def _choose(instructions: Sequence[str], rng: np.random.Generator) -> str:
    return instructions[int(rng.integers(len(instructions)))] if instructions else ""


def _first(instructions: Sequence[str]) -> str:
    return instructions[0] if instructions else ""
