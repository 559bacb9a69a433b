"""Which of the processes this is that torchrun, accelerate or srun started together; alone, it is the first of one.

Raises `UsageError` for variables of the environment that a launcher cannot have set.
"""

import os
import socket
import sys

from uni_x.errors import UsageError


def rank() -> int:
    """Number of this process among all, counted from 0."""
    number = _number("RANK", 0)
    if number >= processes():
        raise UsageError(f"RANK={number}: processes count from 0, and by WORLD_SIZE there are {processes()}; set both")
    return number


def processes() -> int:
    """How many were started together, on all machines."""
    return _number("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """Number of this process among those of its machine, counted from 0."""
    return _number("LOCAL_RANK", 0)


def _number(variable: str, default: int, least: int = 0) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{variable}={text}: not a whole number from {least} on; mend or unset this variable")
    return int(text)


def is_first_of_machine() -> bool:
    """Whether this is the first process of its machine."""
    return local_rank() == 0


def leave() -> None:
    """Ends the process group, where there is one, before Python ends.

    A thread of gloo that then still lets go of a tensor aborts the process, and a launcher takes that for a failure.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def settle_for_one() -> None:
    """Sets what a launcher would have set, where there is none: DeepSpeed looks for MPI otherwise."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
