"""What the measurements share: the models that are compared, their inputs, and timing side by side."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping

# before torch is loaded: for both sides, or whatever else runs slows them tenfold
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from uni_x.devices import keep_freed_memory
from uni_x.model import UniXConfig, UniXForCausalLM

# hidden size: layers, heads, kv heads, FFN, and the first and last layers that uni-x separates
SIZES = {256: (8, 8, 4, 768, (3, 2)), 512: (12, 8, 4, 1536, (4, 3))}
REAL_VOCABULARY, SMALL_VOCABULARY = (151936, 8192), (8192, 2048)  # words and image codes
MARKER = 7


def backbone(hidden: int, vocabulary: tuple[int, int]) -> dict[str, int]:
    """Sizes that both models have."""
    layers, heads, kv_heads, ffn, _ = SIZES[hidden]
    return {
        "vocab_size": sum(vocabulary),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
    }


def make_dense(hidden: int, vocabulary: tuple[int, int], dtype: torch.dtype) -> Qwen3ForCausalLM:
    """transformers' Qwen3, with SDPA."""
    torch.manual_seed(0)
    config = Qwen3Config(**backbone(hidden, vocabulary), tie_word_embeddings=False, attn_implementation="sdpa")
    return Qwen3ForCausalLM._from_config(config, dtype=dtype)


def make_ours(hidden: int, vocabulary: tuple[int, int], dtype: torch.dtype, head: str = "full") -> UniXForCausalLM:
    """uni-x with the same backbone."""
    torch.manual_seed(0)
    first, last = SIZES[hidden][4]
    config = UniXConfig(
        **backbone(hidden, vocabulary),
        preset="uni-x",
        preset_arguments={"first": first, "last": last},
        image_token_offset=vocabulary[0],
        image_codebook_size=vocabulary[1],
        vision_start_token_id=MARKER,
        head=head,
    )
    return UniXForCausalLM._from_config(config, dtype=dtype)


def side_by_side(runs: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each run, all of them in turn so that what disturbs the machine disturbs all; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            gc.collect()
            started = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> str:
    """How many times faster the first is: the median over the rounds, with the lowest and the highest."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def gigaflops() -> float:
    """What this machine does in float32 matrix products."""
    a = torch.randn(1536, 1536)
    return 2 * 1536**3 / _seconds(lambda: a @ a) / 1e9


def gigabytes_a_second() -> float:
    """What this machine reads from memory."""
    a = torch.ones(2**27)
    return a.nbytes / _seconds(a.sum) / 1e9


def _seconds(run: Callable[[], object]) -> float:
    return statistics.median(side_by_side({"run": run}, 9)["run"])


def settle() -> None:
    """What the package's own commands do before they compute."""
    keep_freed_memory()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {gigaflops():.0f} GFLOP/s float32, "
        f"{gigabytes_a_second():.1f} GB/s"
    )
