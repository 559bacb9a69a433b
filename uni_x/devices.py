"""The one rule for devices and dtypes, and what a CPU needs to train at full speed."""

import ctypes
import platform
import sys

import torch

from uni_x import launch
from uni_x.errors import RunError, one_line

# glibc's mallopt parameters; blocks above the threshold are mapped and unmapped at every use
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 2**30


def choose_device(wanted: str | None = None) -> torch.device:
    """CUDA, then MPS, then CPU, or what the user says. Raises `RunError` for a device that is not there."""
    if wanted is not None and wanted != "auto":
        try:
            device = torch.device(wanted)
        except RuntimeError:
            raise RunError(f"device '{wanted}': it is one of cpu, cuda, cuda:1, mps and auto") from None
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise RunError(f"device '{wanted}' cannot be used here: {one_line(error).split('. ')[0]}") from None
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_own_device(wanted: str | None = None) -> torch.device:
    """`choose_device` for one of several processes that share nothing but a machine: each takes a GPU of its own."""
    return device_of_process(choose_device(wanted), launch.local_rank(), torch.cuda.device_count())


def device_of_process(device: torch.device, local_rank: int, gpus: int) -> torch.device:
    """Of `gpus` devices of CUDA, the one for the process `local_rank` of a machine, counted from 0.

    Processes go round where there are more of them than GPUs. A device of another kind, or with a number, stays.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", local_rank % gpus)


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it fast; float32 on MPS and on every CPU, which may only emulate it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks: mapping the same activations at every step costs a tenth of a CPU's time."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


def bfloat16_is_fast() -> bool:
    """Whether this CPU has instructions for bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
