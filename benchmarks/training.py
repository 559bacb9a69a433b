"""Training throughput and memory beside transformers' Qwen3, forward and backward, no optimizer.

    python benchmarks/training.py [--hidden 256 512] [--dtype float32] [--repetitions 5]

The same documents (300 to 1,100 tokens, three quarters image codes, 4,096 tokens in all) go to both: to Qwen3 one by
one without padding, summed into one backward; to ours as one packed row. Ratios are those of rounds in which both ran.
Memory is the peak of a step above weights and gradients, each model in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import MARKER, REAL_VOCABULARY, backbone, make_dense, make_ours, ratio, settle, side_by_side

from uni_x.model import UniXConfig
from uni_x.model.size import count_operations

LENGTHS = (1100, 900, 760, 600, 436, 300)
IMAGE_SHARE = 0.75
Documents = list[torch.Tensor]


def make_documents(vocabulary: tuple[int, int]) -> Documents:
    generator = torch.Generator().manual_seed(0)
    words, codes = vocabulary
    documents = []
    for length in LENGTHS:
        text = torch.randint(10, words, (length - round(IMAGE_SHARE * length) - 1,), generator=generator)
        image = torch.randint(words, words + codes, (round(IMAGE_SHARE * length),), generator=generator)
        documents.append(torch.cat((text, torch.tensor([MARKER]), image)))
    return documents


def train_dense(model: torch.nn.Module, documents: Documents) -> None:
    targets = sum(len(document) - 1 for document in documents)
    total = torch.zeros(())
    for document in documents:
        total = total + model(document[None], labels=document[None], num_items_in_batch=targets).loss
    total.backward()


def train_ours(model: torch.nn.Module, documents: Documents) -> None:
    ids = torch.cat(documents)[None]
    numbers = torch.cat([torch.full_like(document, number) for number, document in enumerate(documents)])[None]
    labels = torch.cat([torch.cat((torch.tensor([-100]), document[1:])) for document in documents])[None]
    model(ids, document_ids=numbers, labels=labels).loss.backward()


def measure_memory(name: str, hidden: int, dtype: str) -> int:
    """Peak of a step above weights and gradients, in bytes, in a process of its own."""
    command = [sys.executable, __file__, "--hidden", str(hidden), "--dtype", dtype, "--memory-of", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def print_memory(name: str, hidden: int, dtype: torch.dtype) -> None:
    model = make(name, hidden, dtype)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    step = train_dense if name == "dense" else train_ours
    step(model, [document[:40] for document in make_documents(REAL_VOCABULARY)])  # what libraries allocate once
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step(model, make_documents(REAL_VOCABULARY))
    print(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def make(name: str, hidden: int, dtype: torch.dtype) -> torch.nn.Module:
    if name == "dense":
        return make_dense(hidden, REAL_VOCABULARY, dtype).train()
    return make_ours(hidden, REAL_VOCABULARY, dtype, name).train()


def dense_operations(hidden: int, length: int) -> float:
    """Of a forward pass, for each token: those of our model where nothing is separate."""
    words, codes = REAL_VOCABULARY
    config = UniXConfig(**backbone(hidden, REAL_VOCABULARY), image_token_offset=words, image_codebook_size=codes)
    return count_operations(config, length, IMAGE_SHARE).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512], choices=[256, 512])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory-of", choices=["dense", "full", "by_modality"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.memory_of:
        print_memory(options.memory_of, options.hidden[0], dtype)
        return
    settle()
    for hidden in options.hidden:
        compare(hidden, options.dtype, options.repetitions)


def compare(hidden: int, dtype: str, repetitions: int) -> None:
    documents = make_documents(REAL_VOCABULARY)
    tokens = sum(map(len, documents))
    models = {name: make(name, hidden, getattr(torch, dtype)) for name in ("dense", "full", "by_modality")}
    steps = {
        name: (lambda m=model, run=train_dense if name == "dense" else train_ours: run(m, documents))
        for name, model in models.items()
    }
    seconds = side_by_side(steps, repetitions)
    config = models["full"].config
    length = round(sum(n * n for n in LENGTHS) / tokens)  # of the document that a token is in, on average
    dense = dense_operations(hidden, length)
    ours = count_operations(config, length, IMAGE_SHARE).mean
    words, codes = REAL_VOCABULARY
    saved = 2 * hidden * (words + codes) - 2 * hidden * ((1 - IMAGE_SHARE) * words + IMAGE_SHARE * codes)
    allowed = {"full": dense / ours, "by_modality": dense / (ours - saved)}
    print(f"\nhidden {hidden}, {dtype}: {tokens} tokens a step")
    print(f"  Qwen3         {tokens / statistics.median(seconds['dense']):8,.0f} tokens/s")
    for name in ("full", "by_modality"):
        rate = tokens / statistics.median(seconds[name])
        print(
            f"  {name:<12}  {rate:8,.0f} tokens/s   {ratio(seconds[name], seconds['dense'])} times; "
            f"operations allow {allowed[name]:.2f}"
        )
    del models, steps
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        peaks = {name: measure_memory(name, hidden, dtype) for name in ("dense", "full", "by_modality")}
        for name, peak in peaks.items():
            print(
                f"  memory above weights and gradients, {name:<12} {peak / 1e6:8,.0f} MB   {peak / peaks['dense']:.2f}"
            )


if __name__ == "__main__":
    main()
