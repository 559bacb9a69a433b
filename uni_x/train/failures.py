"""What goes wrong while a run is under way, told in one line."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uni_x.errors import DataError, ProcessError, RecipeError, RunError, UniXError, one_line

logger = logging.getLogger(__name__)

# what gloo and NCCL say where the process at the other end is gone
CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Socket Timeout")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turns what goes wrong on the way into errors of ours, and notes them in the log."""
    try:
        with _translated():
            yield
    except UniXError as error:
        logger.error("%s", error)
        raise


@contextmanager
def _translated() -> Iterator[None]:
    """What loader workers, DeepSpeed, Weights & Biases and missing packages raise; that another process is gone."""
    try:
        yield
    except DataError as error:
        message = str(error)
        if message.startswith("Caught "):  # torch puts a worker's traceback in front
            message = message.rstrip().splitlines()[-1].partition(": ")[2]
        raise ProcessError(message) from None
    except (ConnectionError, EOFError) as error:
        if not _comes_from(error, "dataloader.py"):
            raise
        raise _worker_died() from None
    except (ValueError, AssertionError) as error:
        if not _comes_from(error, "config.py", "config_utils.py", "deepspeed.py", folder="deepspeed"):
            raise
        raise RecipeError(f"trainer.deepspeed: {one_line(error)}") from None
    except ImportError as error:
        raise RecipeError(f"trainer: {one_line(error)}") from None
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise _worker_died() from None
        if any(words in str(error) for words in CUT_OFF):
            raise RunError(
                "another process has ended; if none says why, it was killed, most likely because memory ran out. Run "
                "the same command again to go on from the last checkpoint"
            ) from None
        raise
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        raise RecipeError(
            f"trainer.report_to: wandb: {one_line(error).rstrip('.')}; or set WANDB_MODE=offline, or take another "
            "reporter (trainer.report_to=tensorboard, or none)"
        ) from None


def _comes_from(error: Exception, *files: str, folder: str = "") -> bool:
    """Whether an error was raised below one of these files, of a package whose path has `folder` in it."""
    paths = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(path.name in files and folder in str(path) for path in paths)


def _worker_died() -> ProcessError:
    return ProcessError(
        "a worker of the data loader has died, most likely because memory ran out; lower "
        "trainer.dataloader_num_workers, and run the same command again to go on from the last checkpoint"
    )
