"""Checkpoints of a training run: whole or not there, and where every process stood in the data."""

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from uni_x.data.dataset import StreamPosition
from uni_x.errors import RecipeError, RunError

logger = logging.getLogger(__name__)

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
    """The newest whole checkpoint, None where there is none. What the Trainer writes last is its state."""
    whole = []
    for file in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # cut off while it was written
        whole.append(Checkpoint(file.parent, state["global_step"], state["max_steps"]))
    return max(whole, key=lambda checkpoint: checkpoint.step, default=None)


def remove_halves(folder: Path) -> int:
    """Removes checkpoints that were not written to their end; returns the bytes of what stays."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def optimizer_file(run: str) -> Path:
    """The state of the optimizer in the last checkpoint of a run folder.

    Raises:
        RecipeError: for a run that has kept none, or has it in pieces.
    """
    checkpoint = last_whole_checkpoint(Path(run) / "checkpoints")
    if checkpoint is None:
        raise RecipeError(f"optimizer.state_from: {run} has no checkpoint; `keep_checkpoint: true` keeps the last one")
    file = checkpoint.path / OPTIMIZER_NAME
    if not file.is_file():
        raise RecipeError(f"optimizer.state_from: {checkpoint.path} has its optimizer in pieces, for several processes")
    return file


def retried(write: Callable[[], None], waits: tuple[float, ...] = WAITS) -> None:
    """Calls `write` again, after a while, where storage fails in a way that may pass; a full disk is no such way."""
    for wait in waits:
        try:
            return write()
        except OSError as error:
            if error.errno not in FLAKY:
                raise
            logger.warning("a checkpoint could not be written (%s); trying again in %g s", error.strerror, wait)
            time.sleep(wait)
    return write()


@dataclass(frozen=True)
class Standing:
    """Where the processes of a run stood when a checkpoint was written.

    Attributes:
        positions: of each process in the data.
        data: fingerprint of the stream in which they are positions.
        tokenizers: fingerprint of what ids mean.
        tokens_seen: text and image tokens that all processes together had trained on.
    """

    positions: list[StreamPosition]
    data: str
    tokenizers: str
    tokens_seen: tuple[int, int]


def write_standing(checkpoint: Path, rank: int, processes: int, standing: Standing) -> None:
    """Writes where this process, of which alone `standing` tells, stands."""
    (position,) = standing.positions
    content = {
        "processes": processes,
        "data": standing.data,
        "tokenizers": standing.tokenizers,
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
        return Standing(positions, contents[0]["data"], contents[0]["tokenizers"], (text, image))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise RunError(
            f"{checkpoint}: does not say where every process stood in the data; delete it to go on from an earlier one"
        ) from None
