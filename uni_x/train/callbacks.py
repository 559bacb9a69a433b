"""What happens around a training step: stopping cleanly, the log and the progress line."""

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uni_x.generation.pipeline import UniXPipeline
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.model_folder import ModelFolder
from uni_x.recipe import DrawingsSection
from uni_x.runs import write_atomically
from uni_x.stopping import StopSignals
from uni_x.train.trainer import UniXTrainer

logger = logging.getLogger(__name__)


class StopOnSignal(StopSignals, TrainerCallback):
    """On Ctrl-C or SIGTERM to any process, all finish the step, save a checkpoint and stop.

    It has the signals while it is used as a context; set `trainer` before that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainer: UniXTrainer | None = None

    @property
    def stopped(self) -> bool:
        """Whether training has ended before its time."""
        return self.trainer is not None and self.trainer.stop_agreed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes SIGCHLD from torch, which raises for a dead worker wherever the process is, be it in the log.

        The loader finds the worker missing when it waits for the next batch.
        """
        if self._previous and args.dataloader_num_workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks the Trainer to save and to stop."""
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def _note(self, number: int, frame: Any) -> None:
        super()._note(number, frame)
        if self.trainer is None:
            raise KeyboardInterrupt
        self.trainer.stop_requested = True


class StepsAsTheRecipeSays(TrainerCallback):
    """A run that goes on saves, logs and validates as often as its recipe says now, not as when it was begun."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settles this anew."""
        state.compute_steps(args, state.max_steps)


class Metrics(TrainerCallback):
    """Writes each log entry to `metrics.jsonl` and tells `progress` about every step.

    Args:
        file: where the entries go, and those of validation to `validation.jsonl` beside it; what a run had logged
            beyond the step that it resumes from is dropped.
        progress: called with the step, the number of steps and the newest losses.
    """

    def __init__(self, file: Path, progress: Callable[[int, int, dict[str, float]], None] | None = None):
        self.file = file
        self.validation_file = file.with_name("validation.jsonl")
        self.progress = progress
        self._newest: dict[str, float] = {}
        self._since = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops what a run that was stopped had logged beyond its checkpoint."""
        if state.is_world_process_zero:
            for file in (self.file, self.validation_file):
                kept = [entry for entry in read_metrics(file) if entry["step"] <= state.global_step]
                if kept or file.exists():
                    file.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one line, of training or of validation."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & set(logs):
            return
        entry = {"step": state.global_step, **logs}
        if "loss" in logs:
            now = time.perf_counter()
            entry["seconds"], self._since = now - self._since, now
            self._newest = entry
        with (self.file if "loss" in logs else self.validation_file).open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        losses = ", ".join(f"{name} {value:.4f}" for name, value in entry.items() if "loss_" in name)
        logger.info("step %d of %d: %s", state.global_step, state.max_steps, losses)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the progress line on."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self._newest)


class Drawings(TrainerCallback):
    """Draws pictures every so many steps, into a folder of their own for each of these steps.

    Args:
        section: what is drawn, and when.
        folder: the model that is trained, with its tokenizers.
        trainer: who trains it; where processes share out the weights, a whole copy draws.
        out: where the folders go.
        seed: of the first picture; those after it follow.
    """

    def __init__(self, section: DrawingsSection, folder: ModelFolder, trainer: UniXTrainer, out: Path, seed: int):
        self.section = section
        self.folder = folder
        self.trainer = trainer
        self.out = out
        self.seed = seed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draws in the first process."""
        if state.global_step % self.section.every and state.global_step != state.max_steps:
            return
        weights = self.trainer.whole_weights()
        if state.is_world_process_zero:
            model = self.folder.model if weights is None else _copy_with(self.folder.model.config, weights, args.device)
            self._draw(replace(self.folder, model=model), self.out / f"step-{state.global_step:06}")

    def _draw(self, drawing: ModelFolder, folder: Path) -> None:
        training = drawing.model.training
        drawing.model.eval()
        with torch.no_grad():
            pictures = UniXPipeline(drawing).draw(self.section.prompts, seed=self.seed)
        drawing.model.train(training)
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures, start=1):
            picture.save(folder / f"{number}.png")
        write_atomically(folder / "prompts.txt", "\n".join(self.section.prompts) + "\n")


def _copy_with(config: UniXConfig, weights: dict[str, torch.Tensor], device: torch.device) -> UniXForCausalLM:
    """A model of these weights, which become its own; those that are tied may be there once."""
    with torch.device("meta"):
        model = UniXForCausalLM(config)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model.to(device)  # type: ignore[arg-type]


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The entries of a `metrics.jsonl`, without a last line that was cut off."""
    if not file.exists():
        return []
    entries = []
    for line in file.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
