"""Host memory while two processes load one model under ZeRO-3, beside what they hold once it is loaded.

    python benchmarks/loading.py

Makes a model of 600 MB, starts two processes that load it as `uni-x train` does, and samples the memory of both
together (their proportional set size, which counts a page that both use once).
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16}
SAMPLE_SECONDS = 0.02
HELD_SECONDS = 3.0


def make_model(folder: Path) -> int:
    """Writes a model folder; returns the bytes of its weights."""
    from uni_x.data.text_tokenizer import train_text_tokenizer
    from uni_x.images import load_image_tokenizer
    from uni_x.model import UniXConfig, UniXForCausalLM
    from uni_x.model_folder import ModelFolder, save_model_folder

    image_tokenizer = load_image_tokenizer("scenes")
    text_tokenizer = train_text_tokenizer(["a red heart left of a blue car"] * 5, vocab_size=400)
    offset, codes = len(text_tokenizer), image_tokenizer.codebook_size
    torch.manual_seed(0)
    config = UniXConfig(
        **SIZES,
        vocab_size=offset + codes,
        image_token_offset=offset,
        image_codebook_size=codes,
        image_grid=list(image_tokenizer.grid),
        preset="uni-x",
        preset_arguments={"first": 2, "last": 1},
    )
    model = UniXForCausalLM(config)
    save_model_folder(ModelFolder(model, text_tokenizer, image_tokenizer), folder)
    return sum(weight.nbytes for weight in model.parameters())


def load(folder: str) -> None:
    """One of the processes: loads, has DeepSpeed take the weights apart, and holds them for a while."""
    from transformers import Trainer

    from uni_x.recipe import TrainRecipe
    from uni_x.train.arguments import training_arguments
    from uni_x.train.start import make_start

    zero = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    recipe = TrainRecipe.model_validate(
        {
            "run": f"{folder}/run",
            "model": {"base": f"{folder}/model"},
            "data": {"sources": [{"path": "none"}]},
            "trainer": {"max_steps": 1, "deepspeed": zero},
            "device": "cpu",
        }
    )
    arguments = training_arguments(recipe)
    Path(folder, f"begun-{arguments.process_index}").touch()
    start = make_start(recipe, arguments)
    Trainer(model=start.model, args=arguments)
    assert all(weight.ds_tensor.numel() < weight.ds_numel for weight in start.model.parameters())
    Path(folder, f"loaded-{arguments.process_index}").touch()
    time.sleep(HELD_SECONDS)


def held_together(process: psutil.Process) -> int:
    """Bytes of all processes that a launcher has started."""
    total = 0
    for child in process.children(recursive=True):
        try:
            total += child.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def measure(folder: Path) -> tuple[int, int, int]:
    """Bytes before loading, at the most while loading, and afterwards."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(folder)]
    launcher = subprocess.Popen([sys.executable, *words])
    samples: list[tuple[float, int]] = []
    ended = threading.Event()

    def sample() -> None:
        process = psutil.Process(launcher.pid)
        while not ended.is_set():
            samples.append((time.time(), held_together(process)))
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=sample)
    thread.start()
    code = launcher.wait()
    ended.set()
    thread.join()
    if code:
        raise SystemExit(code)
    begun = max((folder / f"begun-{rank}").stat().st_mtime for rank in (0, 1))
    loaded = max((folder / f"loaded-{rank}").stat().st_mtime for rank in (0, 1))
    before = [size for moment, size in samples if moment < begun][-1]
    most = max(size for moment, size in samples if begun <= moment <= loaded)
    after = [size for moment, size in samples if loaded + 0.5 < moment < loaded + HELD_SECONDS - 1]
    return before, most, sorted(after)[len(after) // 2]


def main() -> None:
    """Makes the model, measures, and prints."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "model")
        before, most, after = measure(folder)
    print(f"the model {size / 1e6:.0f} MB; both processes before {before / 1e6:.0f}, after {after / 1e6:.0f} MB")
    print(f"at the most {most / 1e6:.0f} MB while loading: {(most - after) / size:.2f} models beyond after")


if __name__ == "__main__":
    load(sys.argv[1]) if len(sys.argv) > 1 else main()
