"""Guided drawing beside transformers' Qwen3, with the key-value cache.

    python benchmarks/decoding.py [--hidden 256 512] [--dtype float32] [--repetitions 3]

Four prompts are drawn with guidance, 256 codes each, eight rows at a time: by our engine; by a plain loop over Qwen3
(one forward of eight rows a step, logits of the last position, words masked, sampled); and by Qwen3's `generate()` with
transformers' guidance processor. Ratios are those of rounds in which all ran. What the bytes allow counts the weights
that a step reads, each once, and the keys and values of the cache.
"""

import argparse
import statistics

import torch
from common import (
    MARKER,
    REAL_VOCABULARY,
    SMALL_VOCABULARY,
    make_dense,
    make_ours,
    ratio,
    settle,
    side_by_side,
)
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from uni_x.generation.engine import Engine, Request
from uni_x.generation.sampling import Sampling
from uni_x.model import UniXCache, UniXForCausalLM

PROMPTS, PROMPT_LENGTH, CODES, SCALE = 4, 32, 256, 3.0


def make_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts `(4, 32)` and the unconditional one `(32,)`, both ending in the marker of an image."""
    ids = torch.randint(10, 8000, (PROMPTS + 1, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = MARKER
    return ids[:-1], ids[-1]


def draw_ours(engine: Engine) -> None:
    prompts, unconditional = make_prompts()
    requests = [
        Request(
            prompt.tolist(),
            CODES,
            image=True,
            sampling=Sampling(guidance_scale=SCALE, seed=seed),
            unconditional_prompt=unconditional.tolist(),
        )
        for seed, prompt in enumerate(prompts)
    ]
    assert sum(len(completion.ids) for completion in engine.generate(requests)) == PROMPTS * CODES


@torch.inference_mode()
def draw_dense(model: torch.nn.Module, words: int) -> DynamicCache:
    prompts, unconditional = make_prompts()
    ids = torch.cat((prompts, unconditional.expand_as(prompts)))
    cache = DynamicCache(config=model.config)
    for _ in range(CODES):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        conditional, plain = logits.chunk(2)
        guided = plain + SCALE * (conditional - plain)
        guided[:, :words] = -torch.inf
        tokens = torch.multinomial(guided.softmax(dim=-1), 1)
        ids = torch.cat((tokens, tokens))
    return cache


class CodesAlone(LogitsProcessor):
    """Masks the words."""

    def __init__(self, words: int):
        self.words = words

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(rows, vocabulary)`, changed in place."""
        scores[:, : self.words] = -torch.inf
        return scores


@torch.inference_mode()
def draw_by_generate(model: torch.nn.Module, words: int) -> None:
    prompts, unconditional = make_prompts()
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model, unconditional.expand_as(prompts))
    drawn = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        logits_processor=LogitsProcessorList([guidance, CodesAlone(words)]),
        do_sample=True,
        top_k=0,
        max_new_tokens=CODES,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert drawn.shape[1] == PROMPT_LENGTH + CODES


def bytes_allow(ours: UniXForCausalLM, dense: torch.nn.Module) -> float:
    """Bytes that a step of the dense model reads, over those of ours; all numbers are of one size."""
    config = ours.config
    layers = sum(weight.numel() for weight in dense.model.layers.parameters())
    cache = 2 * PROMPTS * (PROMPT_LENGTH + CODES / 2) * 2 * config.num_key_value_heads * config.head_dim
    own = sum(spec.splits_completely for spec in config.layer_specs)
    image_share = (CODES / 2) / (PROMPT_LENGTH + CODES / 2)
    dense_read = layers + dense.lm_head.weight.numel() + cache * config.num_hidden_layers
    our_cache = cache * (config.num_hidden_layers - own + own * image_share)
    our_read = layers + config.image_codebook_size * config.hidden_size + our_cache
    return dense_read / our_read


@torch.inference_mode()
def our_cache_bytes(model: UniXForCausalLM) -> int:
    """What is allocated for the rows of a drawing, as the engine does it."""
    prompts, unconditional = make_prompts()
    cache = UniXCache(model.config, 2 * PROMPTS, PROMPT_LENGTH - 1, CODES)  # the marker goes with the image
    ids = torch.cat((prompts, unconditional.expand_as(prompts)))
    for _ in range(CODES):
        logits = model(ids, cache=cache, logits_to_keep=1).logits
        ids = torch.full((2 * PROMPTS, 1), logits.shape[-1] - 1)
    return cache.bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512], choices=[256, 512])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    settle()
    for hidden in options.hidden:
        for vocabulary in (REAL_VOCABULARY, SMALL_VOCABULARY):
            compare(hidden, vocabulary, options.dtype, options.repetitions)


def compare(hidden: int, vocabulary: tuple[int, int], dtype: str, repetitions: int) -> None:
    words = vocabulary[0]
    dense = make_dense(hidden, vocabulary, getattr(torch, dtype)).eval()
    ours = make_ours(hidden, vocabulary, getattr(torch, dtype)).eval()
    engine = Engine(ours)
    runs = {
        "engine": lambda: draw_ours(engine),
        "plain loop": lambda: draw_dense(dense, words),
        "generate()": lambda: draw_by_generate(dense, words),
    }
    seconds = side_by_side(runs, repetitions)
    print(f"\nhidden {hidden}, {dtype}, {words:,} words and {vocabulary[1]:,} codes, {2 * PROMPTS} rows")
    for name, times in seconds.items():
        rate = PROMPTS * CODES / statistics.median(times)
        beside = "" if name == "engine" else f"   the engine is {ratio(seconds['engine'], times)} times as fast"
        print(f"  {name:<12} {rate:8,.0f} codes/s{beside}")
    print(f"  bytes read allow {bytes_allow(ours, dense):.1f} times over the plain loop")
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in draw_dense(dense, words).layers)
    print(f"  cache: ours {our_cache_bytes(ours) / 1e6:.1f} MB, Qwen3's {held / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
