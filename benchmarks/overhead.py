"""What the Trainer and the data cost: steps of `uni-x train` beside a bare loop over the same model and batches.

    python benchmarks/overhead.py

Both take turns. The bare loop has its batches in memory, and does forward, backward, clipping, AdamW and the schedule;
the Trainer logs every tenth step, as a recipe would, and reads shards with one worker. Waiting is the time in which the
Trainer asks for a batch and has none.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import settle
from transformers import get_linear_schedule_with_warmup

from uni_x.data.dataset import NOTES
from uni_x.recipe import TrainRecipe, load_recipe
from uni_x.train.arguments import training_arguments
from uni_x.train.batches import make_renderer, make_stream
from uni_x.train.run import train
from uni_x.train.start import make_start
from uni_x.train.trainer import UniXTrainer
from uni_x.workflows.quickstart import load_quickstart_recipe
from uni_x.workflows.sources import encode_scenes

ROUNDS, STEPS, WARM = 3, 40, 5
SECTIONS = """
model: {preset: uni-x, preset_arguments: {first: 2, last: 1}, hidden_size: 192, intermediate_size: 576,
        num_hidden_layers: 6, num_attention_heads: 8, max_position_embeddings: 512}
text_tokenizer: {vocab_size: 2048}
optimizer: {learning_rate: 1.0e-4}
device: cpu
"""


def make_recipe(folder: Path) -> TrainRecipe:
    """A recipe on scenes, whose steps take about 0.3 s on a laptop's core."""
    from uni_x.images import load_image_tokenizer

    recipe = load_quickstart_recipe()
    encode_scenes(recipe.scenes.at_most(1500), 0, folder / "data", load_image_tokenizer("scenes"))
    sources = "".join(f"{{path: {folder}/data/{kind}}}, " for kind in ("drawing", "looking", "text"))
    file = folder / "recipe.yaml"
    file.write_text(
        f"{SECTIONS}\ndata: {{sources: [{sources}], max_length: 512}}\n"
        f"trainer: {{max_steps: {STEPS}, logging_steps: 10, save_strategy: 'no', dataloader_num_workers: 1, "
        "per_device_train_batch_size: 2}"
    )
    return load_recipe(file, TrainRecipe)


def bare_loop(recipe: TrainRecipe) -> list[float]:
    """Seconds of each step."""
    arguments = training_arguments(
        recipe.model_copy(update={"trainer": recipe.trainer | {"dataloader_num_workers": 0}})
    )
    start = make_start(recipe)
    stream = make_stream(recipe.model_copy(), arguments, make_renderer(recipe, start))
    batches = list(islice(stream, STEPS))
    model = start.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=recipe.optimizer.betas, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    moments = [time.perf_counter()]
    for batch in batches:
        targets = (batch["labels"][:, 1:] != -100).sum()
        inputs = {name: value for name, value in batch.items() if name != NOTES}
        model(**inputs, num_items_in_batch=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        moments.append(time.perf_counter())
    return [after - before for before, after in pairwise(moments)]


def trainer(recipe: TrainRecipe, run: Path) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of those the seconds of waiting for its batch."""
    moments: list[float] = []
    waits: list[float] = []
    make_loader = UniXTrainer.get_train_dataloader

    class Watched:
        """A loader that notes how long each batch is waited for."""

        def __init__(self, loader: Any):
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            batches = iter(self.loader)
            while True:
                asked = time.perf_counter()
                batch = next(batches)
                waits.append(time.perf_counter() - asked)
                yield batch

        def __getattr__(self, name: str) -> Any:
            return getattr(self.loader, name)

    with mock.patch.object(UniXTrainer, "get_train_dataloader", lambda self: Watched(make_loader(self))):
        train(recipe.model_copy(update={"run": str(run)}), lambda *progress: moments.append(time.perf_counter()))
    return [after - before for before, after in pairwise(moments)], waits[1:]


def main() -> None:
    """Takes turns, and prints medians over the steps of all rounds."""
    settle()
    bare, ours, waited = [], [], []
    with tempfile.TemporaryDirectory() as name:
        recipe = make_recipe(Path(name))
        for number in range(ROUNDS):
            bare.append(statistics.median(bare_loop(recipe)[WARM:]))
            steps, waits = trainer(recipe, Path(name) / f"run-{number}")
            ours.append(statistics.median(steps[WARM:]))
            waited.append(sum(waits[WARM:]) / sum(steps[WARM:]))
    ratios = [our / their for our, their in zip(ours, bare, strict=True)]
    print(f"a step: bare {statistics.median(bare):.3f} s, trainer {statistics.median(ours):.3f} s")
    print(f"trainer / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(
        f"waiting for data: {100 * statistics.median(waited):.2f}% of the time (at the most {100 * max(waited):.2f}%)"
    )


if __name__ == "__main__":
    main()
