"""What happens around a training step: stopping cleanly, finding whole checkpoints, the log and the progress line."""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the Trainer that was written to its end."""

    path: Path
    step: int
    max_steps: int


def last_whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None where there is none. What the Trainer writes last is its state."""
    whole = []
    for file in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # cut off while it was written
        whole.append(Checkpoint(file.parent, state["global_step"], state["max_steps"]))
    return max(whole, key=lambda checkpoint: checkpoint.step, default=None)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes over the signals, in the main thread, where alone that is possible."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request_stop)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks the Trainer to save and to stop."""
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request_stop(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True


class Metrics(TrainerCallback):
    """Writes each log entry to `metrics.jsonl` and tells `progress` about every step.

    Args:
        file: where the entries go; those of steps after the one that a run resumes from are dropped.
        progress: called with the step, the number of steps and the newest losses.
    """

    def __init__(self, file: Path, progress: Callable[[int, int, dict[str, float]], None] | None = None):
        self.file = file
        self.progress = progress
        self._newest: dict[str, float] = {}
        self._since = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops what a run that was stopped had logged beyond its checkpoint."""
        kept = [entry for entry in read_metrics(self.file) if entry["step"] <= state.global_step]
        if state.is_world_process_zero:
            self.file.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        entry = {"step": state.global_step, "seconds": seconds, **logs}
        entry["tokens_per_second"] = logs.get("tokens", 0.0) / seconds
        self._newest = entry
        with self.file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        losses = ", ".join(f"{name} {entry[name]:.4f}" for name in ("loss_text", "loss_image") if name in entry)
        logger.info("step %d of %d: %s", state.global_step, state.max_steps, losses)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the progress line on."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self._newest)


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
