"""Which of the processes this is that torchrun, accelerate or srun started together; alone, it is the first of one."""

import os
import socket


def rank() -> int:
    """Number of this process among all, counted from 0."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many were started together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number of this process among those of its machine, counted from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first_of_machine() -> bool:
    """Whether this is the first process of its machine."""
    return local_rank() == 0


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
