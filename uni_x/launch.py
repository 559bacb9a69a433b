"""Which of the processes this is that torchrun, accelerate or srun started together; alone, it is the first of one."""

import os


def rank() -> int:
    """Number of this process among all, counted from 0."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many were started together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_of_machine() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0
