"""Checkpoints of a training run: whole or not there, and where every process stood in the data."""

import errno
import json
import logging
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from uni_x.data.dataset import BatchNotes, StreamPosition
from uni_x.errors import RecipeError, RunError, one_line
from uni_x.runs import write_atomically

logger = logging.getLogger(__name__)

SEAL_FILE = "files.json"
POSITION_FILE = "data_position_{rank}.json"
FLAKY = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN, errno.EREMOTEIO}
WAITS = (1.0, 5.0, 20.0)  # seconds before each new try to write


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the Trainer that was written to its end."""

    path: Path
    step: int
    max_steps: int


def last_whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None where there is none."""
    whole = filter(None, map(_read_checkpoint, folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")))
    return max(whole, key=lambda checkpoint: checkpoint.step, default=None)


def _read_checkpoint(folder: Path) -> Checkpoint | None:
    """A checkpoint that was written to its end and has been left alone since; None for any other."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # what the Trainer writes last
        sizes = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return Checkpoint(folder, state["global_step"], state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def seal(checkpoint: Path) -> None:
    """Puts what is in a checkpoint safely on the disk, and notes the sizes, before the file that makes it count."""
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in files}
    write_atomically(checkpoint / SEAL_FILE, json.dumps(sizes))


def retried(write: Callable[[], None], waits: tuple[float, ...] = WAITS) -> None:
    """Calls `write` again, after a while, where storage fails in a way that may pass; a full disk is no such way."""
    for wait in waits:
        try:
            return write()
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _may_pass(error):
                raise
            logger.warning("a checkpoint could not be written (%s); trying again in %g s", error, wait)
            time.sleep(wait)
    return write()


@contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Turns what libraries say of a checkpoint whose content is damaged into a `RunError`."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError, OSError) as error:
        raise RunError(
            f"{checkpoint}: is damaged ({one_line(error, 100)}); delete it, and run the same command again to go on "
            "from the one before"
        ) from None


def _may_pass(error: Exception) -> bool:
    """Whether an error of Python, safetensors or torch's file writer is one of storage that fails for a moment."""
    if isinstance(error, OSError):
        return error.errno in FLAKY
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) in FLAKY if told else "PytorchStreamWriter" in str(error)


def remove_halves(folder: Path) -> int:
    """Removes checkpoints that are not whole; returns the bytes of what stays."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _read_checkpoint(checkpoint) is None:
            logger.warning("%s is not whole, and is removed", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def kept_checkpoint(run: str) -> Checkpoint:
    """The checkpoint whose optimizer another run takes over: the last one of a run folder, or one by its own folder.

    Raises:
        RecipeError: for a folder that is not there, and a run that has kept none.
    """
    checkpoint = _read_checkpoint(Path(run)) or last_whole_checkpoint(Path(run) / "checkpoints")
    if checkpoint is not None:
        return checkpoint
    if not Path(run).is_dir():
        raise RecipeError(f"optimizer.state_from: {run}: no such folder")
    raise RecipeError(f"optimizer.state_from: {run} has no whole checkpoint; `keep_checkpoint: true` keeps the last")


@dataclass(frozen=True)
class Standing:
    """Where the processes of a run stood when a checkpoint was written.

    Attributes:
        positions: of each process in the data, or of one of them.
        ground: fingerprints of what a run cannot go on without: `data`, `tokenizers` and `plan`.
        tokens_seen: text and image tokens that all processes together had trained on; the first one counts what was
            before it, the others their own.
    """

    positions: list[StreamPosition]
    ground: dict[str, str]
    tokens_seen: tuple[int, int]

    def after(self, batch: BatchNotes) -> Self:
        """Where the one process of which this tells stands once a batch is used up."""
        (position,) = self.positions
        text, image = (seen + new for seen, new in zip(self.tokens_seen, batch.tokens, strict=True))
        return replace(self, positions=[position.after(batch)], tokens_seen=(text, image))


def write_standing(checkpoint: Path, rank: int, processes: int, standing: Standing) -> None:
    """Writes where this process, of which alone `standing` tells, stands."""
    (position,) = standing.positions
    content = {
        "processes": processes,
        "ground": standing.ground,
        "tokens_seen": standing.tokens_seen,
        **position.to_json(),
    }
    (checkpoint / POSITION_FILE.format(rank=rank)).write_text(json.dumps(content))


def read_standing(checkpoint: Path) -> Standing:
    """What all processes wrote into a checkpoint.

    Raises:
        RunError: for a checkpoint that lacks it.
    """
    try:
        contents = [json.loads((checkpoint / POSITION_FILE.format(rank=0)).read_text())]
        for rank in range(1, contents[0]["processes"]):
            contents.append(json.loads((checkpoint / POSITION_FILE.format(rank=rank)).read_text()))
        text, image = (sum(content["tokens_seen"][kind] for content in contents) for kind in (0, 1))
        positions = [StreamPosition.from_json(content) for content in contents]
        return Standing(positions, contents[0]["ground"], (text, image))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise RunError(
            f"{checkpoint}: does not say where every process stood in the data; delete it to go on from an earlier one"
        ) from None
