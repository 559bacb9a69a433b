"""What goes wrong while a run is under way, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from uni_x.errors import DataError, ProcessError, RunError

# what gloo and NCCL say where the process at the other end is gone
CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Socket Timeout")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turns what loader workers raise, or that one is gone, and that another process is gone, into errors of ours."""
    try:
        yield
    except DataError as error:
        message = str(error)
        if message.startswith("Caught "):  # torch puts a worker's traceback in front
            message = message.rstrip().splitlines()[-1].partition(": ")[2]
        raise ProcessError(message) from None
    except (ConnectionError, EOFError):  # while a batch was handed over
        raise _worker_died() from None
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise _worker_died() from None
        if any(words in str(error) for words in CUT_OFF):
            raise RunError(
                "another process has ended, and says why; run the same command again to go on from the last checkpoint"
            ) from None
        raise


def _worker_died() -> ProcessError:
    return ProcessError(
        "a worker of the data loader has died, most likely because memory ran out; lower "
        "trainer.dataloader_num_workers, and run the same command again to go on from the last checkpoint"
    )
