"""The engine: a batch of requests in, tokens out.

It knows ids and the model, and nothing of text, pictures or HTTP: a request is a list of ids with what to generate
after it. Guided requests run twice, with their prompt and with the unconditional one, as two rows of one batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from uni_x.errors import InputError
from uni_x.generation.packed import PackedWeights
from uni_x.generation.sampling import Sampling, draw, filtered_probabilities, guide
from uni_x.model.cache import UniXCache
from uni_x.model.causal_lm import UniXForCausalLM
from uni_x.model.layout import image_tokens


@dataclass(frozen=True)
class Request:
    """What to generate after a prompt.

    Attributes:
        prompt: ids.
        max_new_tokens: at most so many tokens of text, or exactly so many image codes.
        image: generate image codes alone, else text alone.
        sampling: how to draw them.
        unconditional_prompt: ids of the prompt that guidance starts from; needed where guidance_scale is not 1.
        stop_ids: text ids that end the answer; they are not part of it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    image: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    unconditional_prompt: Sequence[int] = ()
    stop_ids: frozenset[int] = frozenset()

    @property
    def is_guided(self) -> bool:
        """Whether the request needs a second row."""
        return self.sampling.guidance_scale != 1.0


@dataclass(frozen=True)
class Completion:
    """The ids that were generated, and whether a stop id (or a whole picture) ended them."""

    ids: list[int]
    finished: bool


class _Sequence:
    """One request while it runs."""

    def __init__(self, request: Request):
        self.request = request
        self.ids: list[int] = []
        self.finished = False
        generator = torch.Generator().manual_seed(request.sampling.seed)
        self.uniform = torch.rand(request.max_new_tokens, generator=generator)

    @property
    def is_done(self) -> bool:
        return self.finished or len(self.ids) == self.request.max_new_tokens

    def append(self, token: int) -> None:
        if token in self.request.stop_ids:
            self.finished = True
            return
        self.ids.append(token)
        if self.request.image and self.is_done:
            self.finished = True


class Engine:
    """Runs requests through a model, up to `max_rows` rows at a time (a guided request takes two).

    The model is used as it is: the caller has put it on its device, in its dtype and into eval mode. Where it was
    trained with one, `separator` is the id that stands behind every so many codes, and their number: it is put in
    there, not drawn, and is no part of the completions.
    """

    def __init__(self, model: UniXForCausalLM, max_rows: int = 512, separator: tuple[int, int] | None = None):
        if max_rows < 2:
            raise InputError(f"max_rows is 2 or more, not {max_rows}")
        self.model = model
        self.max_rows = max_rows
        self.separator = separator
        self.packed = PackedWeights(model)

    @property
    def codes(self) -> tuple[int, int]:
        """First image id and the one after the last."""
        first = self.model.config.image_token_offset
        return first, first + self.model.config.image_codebook_size

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """Answers each request; `progress` is told how many more are done.

        Raises:
            InputError: for an empty prompt, a guided request without an unconditional prompt, or ids out of range.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        completions: list[Completion | None] = [None] * len(requests)
        for kind in (True, False):
            # requests of similar length run together, so that little is padded
            indices = [index for index, request in enumerate(requests) if request.image == kind]
            indices.sort(key=lambda index: len(requests[index].prompt))
            for batch in self._batches(indices, requests):
                for index, completion in zip(batch, self._run([requests[i] for i in batch], kind), strict=True):
                    completions[index] = completion
                if progress is not None:
                    progress(len(batch))
        return [completion for completion in completions if completion is not None]

    @torch.inference_mode()
    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Log-probability, in nats, of each continuation after its prompt, over the whole vocabulary."""
        for index, (prompt, continuation) in enumerate(pairs):
            if not prompt or not continuation:
                raise InputError(f"pair {index}: prompt and continuation hold one id or more each")
        results = [0.0] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
        for start in range(0, len(order), self.max_rows):
            batch = order[start : start + self.max_rows]
            sequences = [[*pairs[index][0], *pairs[index][1]] for index in batch]
            longest = max(len(pairs[index][1]) for index in batch)
            ids, mask = self._pad(sequences)
            logits = self.model(ids, mask, logits_to_keep=longest + 1).logits
            log_probabilities = logits[:, :-1].float().log_softmax(dim=-1)
            of_token = log_probabilities.gather(2, ids[:, -longest:, None]).squeeze(2)
            for row, index in enumerate(batch):
                results[index] = float(of_token[row, longest - len(pairs[index][1]) :].sum())
        return results

    def _check(self, index: int, request: Request) -> None:
        if not request.prompt:
            raise InputError(f"request {index}: the prompt is empty")
        if request.max_new_tokens < 1:
            raise InputError(f"request {index}: max_new_tokens is 1 or more, not {request.max_new_tokens}")
        if request.is_guided and not request.unconditional_prompt:
            raise InputError(f"request {index}: guidance needs an unconditional prompt")
        if request.image and not self.model.config.image_codebook_size:
            raise InputError(f"request {index}: this model has no image codes")

    def _batches(self, indices: list[int], requests: Sequence[Request]) -> Iterable[list[int]]:
        batch: list[int] = []
        rows = 0
        for index in indices:
            needed = 2 if requests[index].is_guided else 1
            if rows + needed > self.max_rows:
                yield batch
                batch, rows = [], 0
            batch.append(index)
            rows += needed
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, requests: list[Request], image: bool) -> list[Completion]:
        allowed = self.codes if image else (0, self.codes[0])
        sequences = [_Sequence(request) for request in requests]
        guided = [i for i, request in enumerate(requests) if request.is_guided]
        prompts = [request.prompt for request in requests] + [requests[i].unconditional_prompt for i in guided]
        ids, mask = self._pad(prompts)
        new_tokens = max(request.max_new_tokens for request in requests)
        texts, images = self._longest(prompts)
        separator = self.separator if image else None
        fed = new_tokens - 1  # the last new token is never fed back
        if separator is not None:
            fed += fed // separator[1]
        cache = UniXCache(
            self.model.config, len(prompts), texts + (0 if image else fed), images + (fed if image else 0)
        )
        running = _Running(sequences, guided, self.model.device)
        attention_mask: torch.Tensor | None = mask
        with self.packed.in_use():
            while True:
                output = self.model(ids, attention_mask, cache=cache, logits_to_keep=1, vocabulary_range=allowed)
                tokens = running.sample(output.logits[:, -1]) + allowed[0]
                kept = running.advance(tokens.tolist())
                if not running.sequences:
                    break
                if kept is not None:
                    cache.select(kept)
                    tokens = tokens[running.last_kept]
                ids = torch.cat((tokens, tokens[running.guided]))[:, None]
                if separator is not None and running.step % separator[1] == 0:
                    ids = torch.cat((ids, torch.full_like(ids, separator[0])), dim=1)
                attention_mask = None
        return [Completion(sequence.ids, sequence.finished) for sequence in sequences]

    def _longest(self, prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Text tokens of the prompt that has most of them, and image tokens of the one that has most of those."""
        images = [int(image_tokens(self.model.config, np.asarray(ids)).sum()) for ids in prompts]
        texts = [len(ids) - count for ids, count in zip(prompts, images, strict=True)]
        return max(texts), max(images)

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `(rows, longest)`, padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        return ids.to(device), mask.to(device)


class _Running:
    """The sequences of a batch that are not done yet, with their settings as tensors; rows are sequences, then the
    unconditional rows of the guided ones."""

    def __init__(self, sequences: list[_Sequence], guided: list[int], device: torch.device):
        self.sequences = sequences
        self.device = device
        self.guided = torch.tensor(guided, dtype=torch.long, device=device)
        self.last_kept = torch.arange(len(sequences), device=device)
        self.step = 0
        self._load_settings()

    def _load_settings(self) -> None:
        samplings = [sequence.request.sampling for sequence in self.sequences]
        self.temperature = torch.tensor([s.temperature for s in samplings], device=self.device)
        self.top_k = torch.tensor([s.top_k for s in samplings], device=self.device)
        self.top_p = torch.tensor([s.top_p for s in samplings], device=self.device)
        self.scale = torch.tensor([s.guidance_scale for s in samplings], device=self.device)
        longest = max(len(sequence.uniform) for sequence in self.sequences)
        self.uniform = torch.zeros(len(self.sequences), longest)
        for row, sequence in enumerate(self.sequences):
            self.uniform[row, : len(sequence.uniform)] = sequence.uniform
        self.uniform = self.uniform.to(self.device)

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Next token of each sequence from logits `(rows, allowed ids)`."""
        count = len(self.sequences)
        conditional, unconditional = logits[:count].float(), logits[count:].float()
        if self.guided.numel():
            guided = guide(conditional[self.guided], unconditional, self.scale[self.guided])
            conditional = conditional.index_copy(0, self.guided, guided)
        probabilities = filtered_probabilities(conditional, self.temperature, self.top_k, self.top_p)
        uniform = self.uniform[:, min(self.step, self.uniform.shape[1] - 1)]
        self.step += 1
        return draw(probabilities, uniform)

    def advance(self, tokens: list[int]) -> torch.Tensor | None:
        """Hands out the tokens. Where sequences ended, returns the rows of the cache that go on."""
        for sequence, token in zip(self.sequences, tokens, strict=True):
            sequence.append(token)
        going = [index for index, sequence in enumerate(self.sequences) if not sequence.is_done]
        if len(going) == len(self.sequences):
            return None
        count = len(self.sequences)
        new_place = {old: new for new, old in enumerate(going)}
        kept_guided = [(place, row) for place, row in enumerate(self.guided.tolist()) if row in new_place]
        self.last_kept = torch.tensor(going, dtype=torch.long, device=self.device)
        self.guided = torch.tensor([new_place[row] for _, row in kept_guided], dtype=torch.long, device=self.device)
        self.sequences = [self.sequences[index] for index in going]
        if self.sequences:
            self._load_settings()
        return torch.tensor(going + [count + place for place, _ in kept_guided], dtype=torch.long)
