"""What each section of a training recipe does, on a tiny model."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer

from uni_x.data import dataset, shards
from uni_x.data.schema import Message, Sample
from uni_x.errors import RecipeError, RunError
from uni_x.model_folder import load_model_folder, save_model_folder
from uni_x.recipe import TrainRecipe
from uni_x.train.callbacks import read_metrics
from uni_x.train.checkpoints import last_whole_checkpoint, read_standing
from uni_x.train.run import train
from uni_x.train.start import make_start

UNI_X = {"preset": "uni-x", "preset_arguments": {"first": 1, "last": 0}}


def changed(recipe: TrainRecipe) -> dict[str, float]:
    """How much each parameter has moved from where the recipe's seed begins."""
    before = {name: weight.detach().clone() for name, weight in make_start(recipe).model.named_parameters()}
    after = load_file(train(recipe).model_dir / "model.safetensors")
    return {name: (after[name] - weight).abs().max().item() for name, weight in before.items()}


def test_what_the_patterns_do_not_name_stays(make_recipe: Any) -> None:
    moved = changed(make_recipe("run", {"model": UNI_X, "trainable": ["*.image.*", "!*norm*"]}))
    assert {name for name, by in moved.items() if by} == {
        name for name in moved if ".image." in name and "norm" not in name
    }
    with pytest.raises(RecipeError, match=r"trainable: '\*.picture.\*' names no parameter"):
        train(make_recipe("other", {"model": UNI_X, "trainable": ["*.picture.*"]}))


def test_images_have_a_learning_rate_of_their_own(make_recipe: Any) -> None:
    optimizer = {"learning_rate": 1e-3, "vision_learning_rate": 1e-5}
    options = {"max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    moved = changed(make_recipe("run", {"model": UNI_X, "optimizer": optimizer}, **options))
    for name, by in moved.items():
        assert by == pytest.approx(1e-5 if ".image." in name else 1e-3, rel=0.1), name
    muon = changed(make_recipe("muon", {"model": UNI_X, "optimizer": optimizer | {"name": "muon"}}, **options))
    theirs, ours = (muon[f"model.layers.0.{kind}mlp.up_proj.weight"] for kind in ("image.", ""))
    assert theirs < 0.05 * ours


def test_adapters_are_merged_and_resumed(make_recipe: Any) -> None:
    pytest.importorskip("peft")
    sections = {"model": UNI_X, "lora": {"r": 4, "alpha": 8, "image_rows": True}}
    recipe = make_recipe("run", sections)
    moved = changed(recipe)
    assert all(by for name, by in moved.items() if name.endswith("_proj.weight"))
    assert not any(by for name, by in moved.items() if "norm" in name)
    start = make_start(recipe)
    first = start.model.config.image_token_offset
    rows = load_file(Path(recipe.run) / "model" / "model.safetensors")["model.embed_tokens.weight"]
    same = (rows == start.model.model.embed_tokens.weight).all(dim=1)
    assert same[10:first].all()
    assert not same[first:].all()

    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(make_recipe("cut", sections), stop)
    train(make_recipe("cut", sections))
    whole, cut = (Path(recipe.run).with_name(name) / "model" / "model.safetensors" for name in ("run", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_held_out_losses_are_those_of_the_model(
    make_recipe: Any, encoded_folder: Any, samples: Any, tmp_path: Path, caplog: Any
) -> None:
    held_out, trained_on = encoded_folder(samples[:16], "held-out"), tmp_path / "link"
    trained_on.symlink_to(tmp_path / "encoded")
    recipe = make_recipe("run", {"validation": {"sources": [str(held_out)], "samples": 12, "every": 4}})
    train(recipe)
    assert "held-out data" not in caplog.text
    train(make_recipe("other", {"validation": {"sources": [str(held_out), str(trained_on)]}}, max_steps=1))
    assert caplog.text.count("held-out data") == 1
    assert f"{trained_on} is trained on too" in caplog.text
    entries = read_metrics(Path(recipe.run) / "validation.jsonl")
    assert [entry["step"] for entry in entries] == [4, 8, 9]
    assert all(math.isfinite(entry[f"eval_loss_{kind}"]) for entry in entries for kind in ("text", "image"))
    assert entries[1]["eval_loss"] < entries[0]["eval_loss"]
    results = json.loads((Path(recipe.run) / "results.json").read_text())
    assert results["validation"] == entries[2]


def test_pictures_are_drawn_on_the_way(make_recipe: Any) -> None:
    recipe = make_recipe("run", {"drawings": {"prompts": ["a red heart", "a car"], "every": 4}})
    plain = make_recipe("plain")
    train(recipe)
    train(plain)
    folder = Path(recipe.run) / "drawings"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000008", "step-000009"]
    assert (folder / "step-000008" / "prompts.txt").read_text().split("\n")[:2] == ["a red heart", "a car"]
    assert Image.open(folder / "step-000008" / "2.png").size == (16, 16)
    # drawing takes nothing from the training
    weights = [Path(each.run) / "model" / "model.safetensors" for each in (recipe, plain)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_second_training_takes_over_the_optimizers_state(make_recipe: Any) -> None:
    first = make_recipe("first", {"keep_checkpoint": True}, lr_scheduler_type="constant", max_grad_norm=0.0)
    train(first)
    base = {"model": {"base": f"{first.run}/model"}, "seed": 5}
    options = {"max_steps": 1, "max_grad_norm": 0.0}
    fresh = make_recipe("fresh", base, **options)
    taken = make_recipe("taken", base | {"optimizer": {"state_from": first.run}, "keep_checkpoint": True}, **options)
    assert changed(fresh) != changed(taken)
    state = torch.load(Path(taken.run) / "checkpoints" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert {int(values["step"]) for values in state["state"].values()} == {10}
    frozen = make_recipe("frozen", {"trainable": ["*", "!*norm*"], "keep_checkpoint": True}, max_steps=1)
    train(frozen)
    for earlier, model in ((first, {"num_hidden_layers": 3}), (frozen, {})):
        with pytest.raises(RecipeError, match=r"no state for model\.\S+, which was not trained there .* another model"):
            train(make_recipe("other", {"optimizer": {"state_from": earlier.run}, "model": model}))
    by_muon = make_recipe("muon", {"optimizer": {"name": "muon"}, "keep_checkpoint": True}, max_steps=1)
    train(by_muon)
    for earlier, name in ((first, "muon"), (by_muon, "adamw")):
        section = {"optimizer": {"name": name, "state_from": earlier.run}}
        with pytest.raises(RecipeError, match=r"has no state of this kind for \S+, but of another optimizer"):
            train(make_recipe(f"to-{name}", base | section, **options))
    with pytest.raises(RecipeError, match=r"fresh has no whole checkpoint"):
        train(make_recipe("none", {"optimizer": {"state_from": fresh.run}}))
    with pytest.raises(RecipeError, match=r"optimizer\.state_from: absent: no such folder"):
        train(make_recipe("none", {"optimizer": {"state_from": "absent"}}))
    # a checkpoint is a model to go on from, as a finished one is, and has its optimizer's state
    checkpoint = f"{first.run}/checkpoints/checkpoint-9"
    from_checkpoint = {"model": {"base": checkpoint}, "optimizer": {"state_from": checkpoint}}
    assert changed(make_recipe("again", base | from_checkpoint, **options)) == changed(taken)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_loss_that_is_no_number_ends_the_run(make_recipe: Any, batches: int) -> None:
    options = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": batches}
    recipe = make_recipe("run", {"optimizer": {"learning_rate": 1e30}}, **options)
    with pytest.raises(RunError, match=r"the loss is nan, in a batch of the samples '\w+-\d+', '") as caught:
        train(recipe)
    step = int(str(caught.value).removeprefix("step ").split(":")[0])
    checkpoint = Path(recipe.run) / "checkpoints" / f"checkpoint-{step - 1}"
    assert f"the weights before it are in {checkpoint}" in str(caught.value)
    assert load_model_folder(checkpoint).model.num_parameters() > 0
    entries = read_metrics(Path(recipe.run) / "metrics.jsonl")
    assert len(entries) == step - 1 > 0
    standing = read_standing(checkpoint)
    assert standing.positions[0].batches == batches * (step - 1)
    assert standing.tokens_seen == (entries[-1]["text_tokens_seen"], entries[-1]["image_tokens_seen"])


def test_weights_that_are_no_numbers_take_no_checkpoints_place(make_recipe: Any) -> None:
    recipe = make_recipe("run", {"optimizer": {"learning_rate": 1e38, "weight_decay": 10.0}}, save_steps=1)
    with pytest.raises(RunError, match=r"step 1: weights are no longer numbers, .* none were saved before"):
        train(recipe)
    assert not list(Path(recipe.run).glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize(
    ("damaged", "error"),
    [
        ("_save", OSError(errno.EIO, "Input/output error")),
        ("_save", SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")),
        ("_save_optimizer_and_scheduler", RuntimeError("PytorchStreamWriter failed writing file data/3")),
    ],
)
def test_a_checkpoint_is_tried_again_where_storage_fails(
    make_recipe: Any, monkeypatch: Any, damaged: str, error: Exception
) -> None:
    save, failures = getattr(Trainer, damaged), [error]

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return save(*args, **kwargs)

    monkeypatch.setattr(Trainer, damaged, fail_once)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    recipe = make_recipe("run", {"keep_checkpoint": True})
    train(recipe)
    assert not failures
    checkpoint = last_whole_checkpoint(Path(recipe.run) / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 9


@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors", "trainer_state.json", "data_position_0.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_checkpoint_is_not_taken_for_whole(make_recipe: Any, file: str, damage: str) -> None:
    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 8:
            raise InterruptedError

    recipe = make_recipe("run", save_steps=3, save_total_limit=2)
    with pytest.raises(InterruptedError):
        train(recipe, stop)
    damaged = Path(recipe.run) / "checkpoints" / "checkpoint-6" / file
    if damage == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:-3])
    resumed = train(recipe)
    assert "going on from checkpoint-3" in (Path(recipe.run) / "log.txt").read_text()
    assert losses(resumed.metrics) == losses(train(make_recipe("whole", save_steps=3)).metrics)


def test_a_run_whose_base_has_another_plan_now_is_not_gone_on_with(make_recipe: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            raise InterruptedError

    for preset in ("uni-x", "mot"):
        start = make_start(make_recipe("none", {"model": UNI_X if preset == "uni-x" else {"preset": "mot"}}))
        save_model_folder(start, tmp_path / "base")
        recipe = make_recipe("run", {"model": {"base": str(tmp_path / "base")}})
        expected = InterruptedError if preset == "uni-x" else RunError
        with pytest.raises(expected, match=None if preset == "uni-x" else "the plan of this run changed"):
            train(recipe, stop)


@pytest.mark.parametrize("what", ["data", "tokenizers"])
def test_a_run_on_other_ground_is_not_gone_on_with(make_recipe: Any, image_tokenizer: Any, what: str) -> None:
    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            raise InterruptedError

    recipe = make_recipe("run")
    shard = Path(recipe.data.sources[0].path) / "part-00000.parquet"
    table = pq.read_table(shard)
    pq.write_table(table, shard, compression="none")
    size = shard.stat().st_size
    with pytest.raises(InterruptedError):
        train(recipe, stop)
    if what == "data":
        captions = pc.replace_substring(table["caption"], "heart 1", "heard 1")
        other = table.set_column(table.schema.get_field_index("caption"), "caption", captions)
        pq.write_table(other, shard, compression="none")
        assert shard.stat().st_size == size
    else:
        for weight in image_tokenizer.network.parameters():
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        image_tokenizer.save_pretrained(recipe.image_tokenizer)
    with pytest.raises(RunError, match=f"the {what} of this run changed since its last checkpoint"):
        train(recipe)
    with pytest.raises(RunError, match=r"was made by another recipe \(other model.preset"):
        train(make_recipe("run", {"model": {"preset": "mot"}}))


def test_reporters_write_into_the_run_folder(make_recipe: Any, monkeypatch: Any) -> None:
    pytest.importorskip("wandb")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_PROJECT", "WANDB_TAGS", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            raise InterruptedError

    recipe = make_recipe("run", {"model": UNI_X, "tags": ["tiny", "first"]}, report_to=["tensorboard", "wandb"])
    with pytest.raises(InterruptedError):
        train(recipe, stop)
    import wandb

    wandb.finish()
    train(recipe)
    wandb.finish()
    assert not {"WANDB_RUN_ID", "TENSORBOARD_LOGGING_DIR"} & os.environ.keys()
    run = Path(recipe.run)
    log = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    log.Reload()
    tags = log.Tags()["scalars"]
    assert {"train/loss_text", "train/loss_image", "train/tokens_per_second", "train/padding"} <= set(tags)
    assert {"train/loss/encoded", "train/grad_norm_text", "train/grad_norm_image"} <= set(tags)
    kept = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem for file in kept} == {f"run-{(run / 'wandb-id.txt').read_text().strip()}"}
    card = (run / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["tags"][-2:] == ["tiny", "first"]
    assert "| 0 | separate | " in card
    assert "image tokens seen" in card


def test_weights_and_biases_without_a_login_is_told_in_one_line(make_recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    content = make_recipe("run", report_to="wandb").model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "uni_x", "train", str(tmp_path / "recipe.yaml")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert "error: trainer.report_to: wandb: " in done.stderr
    assert "or set WANDB_MODE=offline, or take another reporter" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_dead_worker_and_a_bad_shard_are_told_in_one_line(make_recipe: Any, tmp_path: Path) -> None:
    content = make_recipe("run", dataloader_num_workers=1, max_steps=100_000).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "uni_x", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 5:
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        assert time.monotonic() < end
        time.sleep(0.05)
    psutil.Process(process.pid).children()[0].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("error: a worker of the data loader has died")
    assert "Traceback" not in said
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_read_is_named(make_recipe: Any, monkeypatch: Any, workers: int) -> None:
    monkeypatch.setattr(shards, "_SHUFFLED_TOGETHER", 10)
    monkeypatch.setattr(dataset, "_MOST_ROWS", 8)
    recipe = make_recipe("run", dataloader_num_workers=workers, max_steps=200)
    shard = Path(recipe.data.sources[0].path) / "part-00002.parquet"

    def cut(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 2:
            file = pq.ParquetFile(shard)
            rows = file.read()
            broken = rows.set_column(rows.schema.get_field_index("id"), "id", pa.nulls(len(rows), pa.string()))
            pq.write_table(broken, shard)

    with pytest.raises(RunError, match=r"part-00002\.parquet") as caught:
        train(recipe, cut)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_told_on_the_terminal(make_recipe: Any, encoded_folder: Any, tmp_path: Path) -> None:
    turns = (Message("user", "Hi"), Message("assistant", "Hello"))
    odd = (Message("system", "Be short."), *turns)
    chats = [Sample(f"odd-{number}" if number < 8 else f"{number}", messages=odd if number < 8 else turns)
             for number in range(40)]  # fmt: skip
    chats.append(Sample("long", messages=(Message("user", "Hi"), Message("assistant", "Hello " * 200))))
    chats.append(Sample("text", text="Hello " * 200))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ raise_exception('no system') if messages[0].role == 'system' }}"
        "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    )
    data = {"sources": [{"path": str(encoded_folder(chats, "said"))}], "render": {"template": str(template)}}
    content = make_recipe("run", {"data": data}, max_steps=2).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "uni_x", "train", str(tmp_path / "recipe.yaml")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert len([line for line in told if line.startswith("warning: left out: sample 'odd-")]) == 5
    assert any("are longer than max_length (128) and left out" in line for line in told)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[0]["left_out"] > metrics[0]["split"] > 0  # nine samples of 42, and one
    log = (tmp_path / "run" / "log.txt").read_text()
    assert sorted(set(re.findall(r"left out: sample '(odd-\d)'", log))) == [f"odd-{number}" for number in range(8)]
    assert len(re.findall(r"left out: sample", log)) == 8


def test_padding_is_told(make_recipe: Any) -> None:
    packed, loose = (
        train(make_recipe(name, {"data": {"packing": packing}})).metrics
        for name, packing in (("packed", "sft"), ("loose", "none"))
    )
    for entries in (packed, loose):
        assert all(0 <= entry["padding"] < 1 for entry in entries)
        seen = np.array([[entry["text_tokens_seen"], entry["image_tokens_seen"]] for entry in entries])
        assert (np.diff(seen, axis=0) >= 0).all()
        assert seen[-1].sum() == sum(entry["tokens"] for entry in entries)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(make_recipe: Any, small_disk: Path) -> None:
    recipe = make_recipe("disk/run", {"model": {"hidden_size": 64, "intermediate_size": 512}})
    whole = train(make_recipe("whole", {"model": {"hidden_size": 64, "intermediate_size": 512}}))
    filler = small_disk / "filler"

    def fill(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(free - 1_000_000))

    with pytest.raises(RunError, match=f"{recipe.run}: .*disk is full"):
        train(recipe, fill)
    filler.unlink()
    assert losses(train(recipe).metrics) == losses(whole.metrics)
    assert "going on from checkpoint-4" in (small_disk / "run" / "log.txt").read_text()


def losses(entries: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in entries]
