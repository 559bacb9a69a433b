"""Prompts in, text and pictures out: the engine together with the two tokenizers of a model folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from uni_x.data.render import Renderer, Vocabulary
from uni_x.data.schema import CodeGrid, Message
from uni_x.data.shards import codes_dtype
from uni_x.generation.engine import Engine, Request
from uni_x.generation.sampling import Sampling
from uni_x.model_folder import ModelFolder, load_model_folder
from uni_x.recipe import ImageSampling, RenderOptions, check_recipe


@dataclass(frozen=True)
class Question:
    """A question about pictures, and the answers to choose from."""

    text: str
    images: tuple[CodeGrid, ...]
    options: tuple[str, ...]


class UniXPipeline:
    """Draws, answers and chooses, with the prompts that the model was trained on.

    Args:
        folder: a model with its tokenizers.
        max_rows: rows that the engine runs at a time.
    """

    def __init__(self, folder: ModelFolder, max_rows: int = 512):
        config = folder.model.config
        self.folder = folder
        self.renderer = Renderer(
            folder.text_tokenizer,
            Vocabulary.from_config(config),
            check_recipe(config.rendering or {}, RenderOptions, "the model's config.json, rendering"),
        )
        self.engine = Engine(folder.model, max_rows, self.renderer.separator)
        sampling = check_recipe(config.image_sampling or {}, ImageSampling, "the model's config.json, image_sampling")
        self.image_sampling = Sampling(**sampling.model_dump())

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "UniXPipeline":
        """Reads a complete model folder. Raises `DataError` where something is missing."""
        return cls(load_model_folder(path, device, dtype))

    def draw(
        self,
        captions: Sequence[str],
        sampling: Sampling | None = None,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """One picture a caption; picture i is drawn with seed + i, whatever else is in the batch."""
        return self.folder.image_tokenizer.decode(self.draw_codes(captions, sampling, seed, progress))

    def draw_codes(
        self,
        captions: Sequence[str],
        sampling: Sampling | None = None,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """As `draw`, but codes `(captions, height, width)`."""
        sampling = sampling or self.image_sampling
        height, width = self.folder.image_tokenizer.grid
        unconditional = self.renderer.unconditional_prompt() if sampling.guidance_scale != 1.0 else ()
        requests = [
            Request(
                prompt=self.renderer.draw_prompt(caption),
                max_new_tokens=height * width,
                image=True,
                sampling=replace(sampling, seed=seed + index),
                unconditional_prompt=unconditional,
            )
            for index, caption in enumerate(captions)
        ]
        completions = self.engine.generate(requests, progress)
        first, _ = self.engine.codes
        return torch.tensor([completion.ids for completion in completions]).view(-1, height, width) - first

    def encode(self, images: Sequence[Image.Image]) -> list[CodeGrid]:
        """Pictures as the codes that the model looks at."""
        codes = self.folder.image_tokenizer.encode(list(images)).numpy()
        dtype = codes_dtype(self.folder.image_tokenizer.codebook_size)
        height, width = codes.shape[1:]
        return [CodeGrid(grid.reshape(-1).astype(dtype), height, width) for grid in codes]

    def ask(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[CodeGrid]],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Answers a question about its pictures each, by default with the most likely tokens.

        With a temperature, answer i is drawn with the seed + i.
        """
        sampling = sampling or Sampling(temperature=0.0)
        requests = [
            self._text_request(
                self._question_prompt(question, grids), max_new_tokens, replace(sampling, seed=sampling.seed + index)
            )
            for index, (question, grids) in enumerate(zip(questions, images, strict=True))
        ]
        return [self.decode_text(completion.ids) for completion in self.engine.generate(requests)]

    def describe(self, images: Sequence[CodeGrid], max_new_tokens: int = 64) -> list[str]:
        """A caption for each picture."""
        sampling = Sampling(temperature=0.0)
        requests = [
            self._text_request(self.renderer.describe_prompt(grid), max_new_tokens, sampling) for grid in images
        ]
        return [self.decode_text(completion.ids) for completion in self.engine.generate(requests)]

    def choose(self, questions: Sequence[Question]) -> list[int]:
        """For each question the index of the option that the model finds most likely as the whole answer."""
        end = [self.renderer.vocabulary.eos_token_id]
        pairs = [
            (prompt, self.renderer.encode_text(option) + end)
            for question in questions
            for prompt in [self._question_prompt(question.text, question.images)]
            for option in question.options
        ]
        scores = iter(self.engine.log_likelihoods(pairs))
        return [int(np.argmax([next(scores) for _ in question.options])) for question in questions]

    def continue_text(
        self, texts: Sequence[str], max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> list[str]:
        """Each text with what the model writes after it, by default the most likely tokens."""
        sampling = sampling or Sampling(temperature=0.0)
        prompts = [self.renderer.encode_text(text) for text in texts]
        completions = self.engine.generate([self._text_request(prompt, max_new_tokens, sampling) for prompt in prompts])
        return [
            self.decode_text(prompt + completion.ids) for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def _question_prompt(self, question: str, images: Sequence[CodeGrid]) -> list[int]:
        return self.renderer.chat_prompt([Message("user", question)], images)

    def _text_request(self, prompt: list[int], max_new_tokens: int, sampling: Sampling) -> Request:
        return Request(prompt, max_new_tokens, False, sampling, (), frozenset({self.renderer.vocabulary.eos_token_id}))

    def decode_text(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        return str(self.folder.text_tokenizer.decode(list(ids), skip_special_tokens=True))
