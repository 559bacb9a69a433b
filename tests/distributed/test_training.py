"""`uni-x train` as its users start it: in processes of their own, killed and started again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from PIL import Image

from uni_x.generation.pipeline import UniXPipeline
from uni_x.model_folder import load_model_folder
from uni_x.recipe import TrainRecipe, load_recipe
from uni_x.train.checkpoints import last_whole_checkpoint

STEPS = 60
LOSSES = ("loss", "loss_text", "loss_image", "loss/encoded")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# one process with two workers, whose batches it adds up, sees what two processes see
AS_TWO = ["trainer.gradient_accumulation_steps=2", "trainer.dataloader_num_workers=2"]


@pytest.fixture
def recipe(encoded_folder: Any, samples: Any, image_tokenizer: Any, tmp_path: Path) -> Path:
    folder = encoded_folder(samples)
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    content = {
        "image_tokenizer": str(tmp_path / "tokenizer"),
        "text_tokenizer": {"vocab_size": 400},
        "model": {
            "preset": "uni-x",
            "preset_arguments": {"first": 1, "last": 1},
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
        "data": {"sources": [{"path": str(folder)}], "max_length": 96},
        "optimizer": {"learning_rate": 1e-4, "vision_learning_rate": 3e-4, "weight_decay": 0.1},
        "trainer": {"max_steps": STEPS, "save_steps": 5, "logging_steps": 1},
        "device": "cpu",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def engine_words(engine: str, folder: Path) -> list[str]:
    if engine == "ddp":
        return []
    pytest.importorskip("deepspeed")
    zero = {
        "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zero.json").write_text(json.dumps(zero))
    return [f"trainer.deepspeed={folder / 'zero.json'}"]


def command(recipe: Path, run: str, *words: str, processes: int = 1) -> list[str]:
    launcher = LAUNCHER if processes == 2 else []
    return [sys.executable, *launcher, "-m", "uni_x", "train", str(recipe), f"run={recipe.parent / run}", *words]


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


def entries(run: Path) -> dict[float, dict[str, float]]:
    """What is logged of each step; a last line may be half written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return {entry["step"]: entry for entry in (json.loads(line) for line in lines if line.endswith("\n"))}


def stop_after(words: list[str], run: Path, step: int, stop: Callable[[subprocess.Popen[str]], None]) -> str:
    """Starts a command, calls `stop` once it has logged the step itself, and returns what it says."""
    earlier = max(entries(run), default=0)
    assert earlier < step
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    end = time.monotonic() + 200
    while step not in entries(run):
        assert process.poll() is None, process.stdout.read()[-3000:]  # type: ignore[union-attr]
        assert time.monotonic() < end
        time.sleep(0.01)
    stop(process)
    said, _ = process.communicate(timeout=100)
    return said


def kill(process: subprocess.Popen[str]) -> None:
    launcher = psutil.Process(process.pid)
    for each in [*launcher.children(recursive=True), launcher]:
        each.kill()


def worst(one: dict[float, dict[str, float]], other: dict[float, dict[str, float]]) -> float:
    """The largest difference of any loss at a step that both have logged."""
    both = sorted(one.keys() & other.keys())
    assert both
    assert all(one[step].keys() & set(LOSSES) == other[step].keys() & set(LOSSES) for step in both)
    return max(abs(one[step][name] - other[step][name]) for step in both for name in LOSSES if name in one[step])


@pytest.mark.parametrize(
    ("engine", "trainable"), [("ddp", "['*']"), ("zero2", "['*.image.*', 'lm_head.*', '!*norm*']"), ("zero3", "['*']")]
)
def test_two_processes_killed_then_one_stopped_then_two_train_as_one(recipe: Path, engine: str, trainable: str) -> None:
    """The losses of every step, through a checkpoint that other processes read than have written it, and drawings."""
    words = [*engine_words(engine, recipe.parent), "drawings={prompts: [a red heart], every: 20}"]
    content = yaml.safe_load(recipe.read_text()) | {"trainable": yaml.safe_load(trainable)}
    recipe.write_text(yaml.safe_dump(content))
    whole = finish(command(recipe, "whole", *AS_TWO))
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = entries(recipe.parent / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))

    run = recipe.parent / "run"
    stop_after(command(recipe, "run", *words, processes=2), run, 8, kill)
    before = entries(run)
    said = stop_after(command(recipe, "run", *words, *AS_TWO), run, 40, lambda process: process.terminate())
    assert "Stopped. Run the same command again to go on." in said
    assert "Traceback" not in said
    middle = entries(run)
    stopped_at = max(middle)
    assert stopped_at < STEPS
    last = finish(command(recipe, "run", *words, processes=2))
    assert last.returncode == 0, last.stderr[-3000:]
    assert last.stdout.splitlines()[-1] == f"Model: {run / 'model'}"  # said once
    after = entries(run)
    assert sorted(after) == sorted(expected)
    assert worst(before, middle) < 1e-6  # the steps that were done again
    assert worst(expected, after) < 1e-5
    log = (run / "log.txt").read_text()
    assert "going on from checkpoint-5" in log
    assert f"going on from checkpoint-{stopped_at}" in log
    folders = [load_model_folder(recipe.parent / name / "model") for name in ("whole", "run")]
    assert {path.name for path in (run / "drawings").iterdir()} == {"step-000020", "step-000040", "step-000060"}
    (drawn,) = UniXPipeline(folders[1]).draw(["a red heart"], seed=load_recipe(recipe, TrainRecipe).seed)
    assert Image.open(run / "drawings" / "step-000060" / "1.png").tobytes() == drawn.tobytes()
    weights = [folder.model.state_dict() for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])


def test_two_processes_stop_together_and_tell_once(recipe: Path) -> None:
    """SIGTERM to one of them; then a recipe that is wrong, and a loss that is not a number in both or in one."""
    run = recipe.parent / "run"

    def terminate_one(process: subprocess.Popen[str]) -> None:
        psutil.Process(process.pid).children()[-1].terminate()

    said = stop_after(command(recipe, "run", processes=2), run, 7, terminate_one)
    assert said.count("Stopped.") == 1
    last = max(entries(run))
    assert last < STEPS
    assert (run / "checkpoints" / f"checkpoint-{last}" / "trainer_state.json").is_file()

    wrong = finish(command(recipe, "run", "optimizer.lerning_rate=1", processes=2))
    assert wrong.returncode == 1
    assert wrong.stderr.count("unknown key 'optimizer.lerning_rate'") == 1

    odd = finish(command(recipe, "odd", "optimizer.learning_rate=1e30", "optimizer.weight_decay=0.0", processes=2))
    assert odd.returncode == 1
    lines = [line for line in odd.stderr.splitlines() if "the loss is" in line]
    assert lines, odd.stderr[-3000:]
    assert all(line.startswith("error") and "in a batch of the samples" in line for line in lines)


def test_accelerate_launches_by_the_configurations_that_come_along(recipe: Path) -> None:
    pytest.importorskip("deepspeed")
    root = Path(__file__).parents[2]
    config = ["--config_file", "recipes/accelerate/zero3.yaml", "--num_processes", "2"]
    words = ["-m", "uni_x", "train", str(recipe), f"run={recipe.parent / 'run'}", "trainer.max_steps=3"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((recipe.parent / "run" / "results.json").read_text())
    assert results["processes"] == 2
    assert results["final"]["step"] == 3


def test_a_process_tries_again_what_it_could_not_write_under_zero(recipe: Path) -> None:
    words = [*engine_words("zero2", recipe.parent), f"run={recipe.parent / 'run'}", "trainer.max_steps=6"]
    module = ["-m", "tests.distributed.flaky_worker", "train", str(recipe)]
    done = finish([sys.executable, *LAUNCHER, *module, *words, "keep_checkpoint=true"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("storage fails") == 1
    checkpoint = last_whole_checkpoint(recipe.parent / "run" / "checkpoints")
    assert checkpoint is not None
    assert len(list(checkpoint.path.glob("global_step6/*_optim_states.pt"))) == 2


def test_a_training_takes_over_the_optimizers_state_from_another_engine(recipe: Path) -> None:
    """One process from one, ZeRO-2 from it, ZeRO-3 from ZeRO-2, and one process from ZeRO-3 go on alike."""
    first = ["trainer.max_steps=6", "trainer.lr_scheduler_type=constant", "keep_checkpoint=true"]
    zero = {name: engine_words(name, recipe.parent / "engines" / name) for name in ("zero2", "zero3")}
    for run, words in (("one", AS_TWO), ("zero2", zero["zero2"]), ("zero3", zero["zero3"])):
        done = finish(command(recipe, run, *words, *first, processes=2 if run in zero else 1))
        assert done.returncode == 0, done.stderr[-3000:]

    def go_on(run: str, earlier: str, *words: str, processes: int = 1) -> dict[float, dict[str, float]]:
        content = yaml.safe_load(recipe.read_text())
        del content["image_tokenizer"], content["text_tokenizer"]
        content["model"] = {"base": str(recipe.parent / earlier / "model")}
        content["optimizer"]["state_from"] = str(recipe.parent / earlier)
        file = recipe.with_name(f"{run}.yaml")
        file.write_text(yaml.safe_dump(content))
        done = finish(command(file, run, *words, "trainer.max_steps=8", "seed=5", processes=processes))
        assert done.returncode == 0, done.stderr[-3000:]
        return entries(recipe.parent / run)

    expected = go_on("one-one", "one", *AS_TWO)
    fresh = go_on("fresh", "one", *AS_TWO, "optimizer.state_from=null")
    assert worst(expected, fresh) > 1e-4
    assert worst(expected, go_on("one-zero2", "one", *zero["zero2"], processes=2)) < 1e-5
    assert worst(expected, go_on("zero2-zero3", "zero2", *zero["zero3"], processes=2)) < 1e-5
    assert worst(expected, go_on("zero3-one", "zero3", *AS_TWO)) < 1e-5
