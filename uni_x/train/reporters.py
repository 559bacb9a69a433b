"""Where TensorBoard and Weights & Biases put a run: into its folder, and on with it when it goes on."""

import os
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from transformers import TrainingArguments

from uni_x.runs import write_atomically


def settle_reporters(arguments: TrainingArguments, run: Path, tags: Sequence[str]) -> None:
    """Sets what the reporters read from the environment, unless the user has set it.

    Args:
        arguments: which reporters there are.
        run: the run folder, which remembers the id that Weights & Biases knows the run by.
        tags: for Weights & Biases.
    """
    if arguments.process_index:
        return
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run / "tensorboard"))
    if "wandb" in (arguments.report_to or ()):
        remembered = run / "wandb-id.txt"
        if not remembered.exists():
            write_atomically(remembered, uuid4().hex[:8])
        os.environ.setdefault("WANDB_RUN_ID", remembered.read_text().strip())
        os.environ.setdefault("WANDB_RESUME", "allow")
        os.environ.setdefault("WANDB_DIR", str(run))
        os.environ.setdefault("WANDB_PROJECT", "uni-x")
        if tags:
            os.environ.setdefault("WANDB_TAGS", ",".join(tags))
