"""Where TensorBoard and Weights & Biases put a run: into its folder, and on with it when it goes on."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from transformers import TrainingArguments

from uni_x.runs import write_atomically


@contextmanager
def reporters_at(run: Path, arguments: TrainingArguments, tags: Sequence[str]) -> Iterator[None]:
    """Sets, as long as the context lasts, what the reporters read from the environment and the user has not set.

    Args:
        run: the run folder, which remembers the id that Weights & Biases knows the run by.
        arguments: which reporters there are.
        tags: for Weights & Biases.
    """
    wanted = {"TENSORBOARD_LOGGING_DIR": str(run / "tensorboard")}
    if "wandb" in (arguments.report_to or ()):
        wanted |= {
            "WANDB_RUN_ID": _remembered_id(run / "wandb-id.txt"),
            "WANDB_RESUME": "allow",
            "WANDB_DIR": str(run),
            "WANDB_PROJECT": "uni-x",
            **({"WANDB_TAGS": ",".join(tags)} if tags else {}),
        }
    ours = wanted.keys() - os.environ.keys()
    os.environ |= {name: wanted[name] for name in ours}
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _remembered_id(file: Path) -> str:
    if not file.exists():
        write_atomically(file, uuid4().hex[:8])
    return file.read_text().strip()
