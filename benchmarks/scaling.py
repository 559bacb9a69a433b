"""Memory and time of training by the formulas of `uni-x info --memory`, and the formulas beside measured small runs.

python benchmarks/scaling.py           # the tables of docs/scaling.md
python benchmarks/scaling.py --check   # a small model, measured, on CPUs: one process, and two under ZeRO
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from uni_x.model import UniXConfig
from uni_x.model.size import count_operations, measure_size, training_memory

# Qwen2.5's sizes: hidden size, FFN, layers, heads, kv heads, tied embeddings; and layers apart at both ends
MODELS: dict[str, tuple[int, int, int, int, int, bool, tuple[int, int]]] = {
    "0.5B": (896, 4864, 24, 14, 2, True, (8, 4)),
    "1.5B": (1536, 8960, 28, 12, 2, True, (9, 5)),
    "3B": (2048, 11008, 36, 16, 2, True, (12, 6)),
    "7B": (3584, 18944, 28, 28, 4, False, (9, 5)),
}
TEXT, CODES = 151_665, 8_192
ROW, IMAGE_SHARE = 20_480, 0.75
DOCUMENT = 1_100  # tokens, about a picture of 1,024 codes with its caption
TOKENS = 10_000_000_000
PEAK, SHARE_OF_PEAK = 989e12, 0.4  # an H100's dense bfloat16 operations a second, and an assumption

SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
ENGINES = Path(__file__).parents[1] / "recipes" / "accelerate"
SMALL_ROW = 2048


def config_of(name: str) -> UniXConfig:
    """The Uni-X that `uni-x init` makes of the Qwen2.5 of that size."""
    hidden, ffn, layers, heads, kv_heads, tied, (first, last) = MODELS[name]
    return UniXConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        attention_bias=True,
        qk_norm=False,
        tie_word_embeddings=tied,
        vocab_size=TEXT + CODES,
        image_token_offset=TEXT,
        image_codebook_size=CODES,
        preset="uni-x",
        preset_arguments={"first": first, "last": last},
    )


def tables() -> None:
    """Prints memory on each GPU and days for ten billion tokens, in Markdown."""
    print("| LLM | plan | parameters | a text token passes | an image token passes | FLOPs a token, forward |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in MODELS:
        config = config_of(name)
        size, cost = measure_size(config), count_operations(config, DOCUMENT, IMAGE_SHARE)
        first, last = MODELS[name][-1]
        counts = (size.total, size.active_text, size.active_image)
        billions = " | ".join(f"{count / 1e9:.2f}B" for count in counts)
        print(f"| {name} | uni-x({first}, {last}) | {billions} | {cost.mean / 1e9:.1f}G |")
    gpus = (1, 8, 16, 32, 64)
    for stage in (2, 3):
        print(f"\n**ZeRO-{stage}**, GB on each GPU\n")
        print(f"| LLM | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in gpus)} |")
        print("| --- |" + " --- |" * len(gpus))
        for name in MODELS:
            cells = [training_memory(config_of(name), ROW, 2, stage, n, True, IMAGE_SHARE).total / 1e9 for n in gpus]
            print(f"| {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
    print(f"\n**Days for {TOKENS / 1e9:.0f} billion tokens**\n")
    print(f"| LLM | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in gpus)} |")
    print("| --- |" + " --- |" * len(gpus))
    for name in MODELS:
        # a forward pass, two for the backward one, and one more for the layers that run again
        operations = 4 * count_operations(config_of(name), DOCUMENT, IMAGE_SHARE).mean * TOKENS
        days = [operations / (n * PEAK * SHARE_OF_PEAK) / 86400 for n in gpus]
        print(f"| {name} | {' | '.join(f'{day:.1f}' for day in days)} |")


def small_recipe(folder: Path, zero: int, checkpointing: bool, sizes: dict[str, int]) -> Any:
    """A recipe of a model of these sizes, one row a step."""
    from uni_x.recipe import TrainRecipe

    trainer: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 1}
    trainer |= {"activation_checkpointing": checkpointing, "logging_steps": 1}
    if zero:
        trainer["deepspeed"] = str(ENGINES / f"zero{zero}.json")
    return TrainRecipe.model_validate(
        {
            "run": str(folder / f"run-{zero}-{checkpointing}-{sizes['hidden_size']}"),
            "model": sizes
            | {"preset": "uni-x", "preset_arguments": {"first": 2, "last": 2}, "max_position_embeddings": SMALL_ROW},
            "data": {
                "sources": [{"path": str(folder / "data" / kind)} for kind in ("drawing", "looking")],
                "max_length": SMALL_ROW,
            },
            "trainer": trainer,
            "device": "cpu",
        }
    )


def measured(folder: Path, zero: int, checkpointing: bool, sizes: dict[str, int]) -> None:
    """One process of a small training: prints what it held at the most beyond what it held before, and the formula."""
    from uni_x.train.arguments import training_arguments
    from uni_x.train.run import train
    from uni_x.train.start import make_start

    recipe = small_recipe(folder, zero, checkpointing, sizes)
    arguments = training_arguments(recipe)
    config = make_start(recipe).model.config
    if zero:
        import deepspeed  # noqa: F401
    process = psutil.Process()
    before = most = process.memory_full_info().uss
    ended = threading.Event()

    def sample() -> None:
        nonlocal most
        while not ended.wait(0.01):
            most = max(most, process.memory_full_info().uss)

    thread = threading.Thread(target=sample)
    thread.start()
    metrics = train(recipe).metrics
    ended.set()
    thread.join()
    if arguments.process_index == 0:
        seen = metrics[-1]
        share = seen["image_tokens_seen"] / (seen["image_tokens_seen"] + seen["text_tokens_seen"])
        formula = training_memory(config, SMALL_ROW, 4, zero, arguments.world_size, checkpointing, share)
        print(json.dumps({"measured": (most - before) / 1e6, "formula": formula.total / 1e6}), flush=True)


def check() -> None:
    """Prints measured and forecast memory of each process, in MB.

    What a tiny model holds in the same setting is taken off: libraries and buffers, which do not grow with a model.
    """
    from uni_x.images import load_image_tokenizer
    from uni_x.workflows.quickstart import load_quickstart_recipe
    from uni_x.workflows.sources import encode_scenes

    with tempfile.TemporaryDirectory() as name:
        scenes = load_quickstart_recipe().scenes.at_most(1500)
        encode_scenes(scenes, 0, Path(name) / "data", load_image_tokenizer("scenes"))
        for zero, processes in ((0, 1), (2, 2), (3, 2)):
            for checkpointing in (False, True):
                small, tiny = (run_in(name, processes, zero, checkpointing, size) for size in ("small", "tiny"))
                held, formula = (small[key] - tiny[key] for key in ("measured", "formula"))
                how = ", checkpointed" if checkpointing else ""
                print(f"{processes} process(es), ZeRO-{zero}{how}: {held:.0f} MB, formula {formula:.0f} MB", flush=True)


def run_in(folder: str, processes: int, zero: int, checkpointing: bool, size: str) -> dict[str, float]:
    """What `measured` prints, in processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [__file__, folder, str(zero), str(int(checkpointing)), size]
    command = [sys.executable, *(launcher if processes > 1 else []), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


if __name__ == "__main__":
    if len(sys.argv) == 5:
        measured(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", SMALL if sys.argv[4] == "small" else TINY)
    elif sys.argv[1:] == ["--check"]:
        check()
    else:
        tables()
