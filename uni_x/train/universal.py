"""DeepSpeed's universal checkpoints: what lets other processes than have written one read it."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainingArguments

from uni_x.errors import RunError
from uni_x.runs import write_atomically
from uni_x.train.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

PIECES = "*zero_pp_rank_*_optim_states.pt"
LATEST = "latest_universal"  # written last, and what DeepSpeed looks for
UNCONVERTED = "the pieces that processes have written cannot be put together"
ADAM_MOMENTS = {"exp_avg", "exp_avg_sq"}


def is_of_deepspeed(checkpoint: Checkpoint) -> bool:
    """Whether DeepSpeed has written it."""
    return _pieces(checkpoint).is_dir()


def fit_to_launch(checkpoint: Checkpoint, arguments: TrainingArguments) -> None:
    """Lets this launch load the checkpoint; every process calls it, and the first one converts where that is needed.

    Raises:
        RunError: for a checkpoint of DeepSpeed without it, or the other way round, or that cannot be converted.
    """
    plugin = arguments.deepspeed_plugin
    if is_of_deepspeed(checkpoint) != (plugin is not None):
        others = ("without DeepSpeed", "under DeepSpeed")[is_of_deepspeed(checkpoint)]
        raise RunError(
            f"{checkpoint.path}: was written {others}, go on so; or begin a new run (run=…) from its weights "
            f"(model.base={checkpoint.path})"
        )
    if plugin is None or len(list(_pieces(checkpoint).glob(PIECES))) == arguments.world_size:
        return
    universal_checkpoint(checkpoint, arguments)
    plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}


def universal_checkpoint(checkpoint: Checkpoint, arguments: TrainingArguments) -> Path:
    """The universal form of a checkpoint of DeepSpeed; every process calls it, and the first one converts.

    DeepSpeed writes what each process has of the optimizer, which only as many processes can read again. Its universal
    checkpoint holds each parameter whole; it is written beside, and takes as much room again.

    Raises:
        RunError: for one that cannot be converted.
    """
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            _convert(checkpoint)
    return _universal(checkpoint)


def read_universal(folder: Path) -> Callable[[str], dict[str, Any]]:
    """What reads the state of the parameter of a name from a universal checkpoint.

    ZeRO-3 leaves tensors flat, and the step, which all share, elsewhere.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum]):
        common = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=True, map_location="cpu", mmap=True)
    shared: dict[str, Any] = next(iter(common.get("optimizer_state_dict", {}).get("state", {}).values()), {})

    def read(name: str) -> dict[str, Any]:
        state = {"step": shared["step"].clone()} if "step" in shared else {}  # each parameter counts in its own
        for kind in (*ADAM_MOMENTS, "step"):
            file = folder / "zero" / name / f"{kind}.pt"
            if file.is_file():
                value = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
                state[kind] = value["param"] if isinstance(value, dict) else value
        return state

    return read


def loads_universal(plugin: Any) -> bool:
    """Whether accelerate's DeepSpeed plugin is told to load a universal checkpoint."""
    return bool(plugin.hf_ds_config.config.get("checkpoint", {}).get("load_universal"))


def mend_loaded(
    optimizer: torch.optim.Optimizer, settings: Sequence[Mapping[str, Any]], rates: Sequence[float]
) -> None:
    """Puts right what DeepSpeed 0.19 gets wrong where ZeRO-3 loads a universal checkpoint.

    It gives all groups the settings of the first one, and all parameters one step counter, which each then counts up.

    Args:
        optimizer: torch's, inside of DeepSpeed's.
        settings: of each group, as they were made.
        rates: learning rate of each group at this step.
    """
    for group, made, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group |= {**made, "lr": rate}
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _pieces(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / f"global_step{checkpoint.step}"


def _universal(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / f"global_step{checkpoint.step}_universal"


def _convert(checkpoint: Checkpoint) -> None:
    """Writes the universal form under a name of its own first, as several runs may take over from one."""
    folder, universal = checkpoint.path, _universal(checkpoint)
    if (folder / LATEST).is_file():
        return
    logger.info("putting %s together from the pieces that processes have written", folder)
    try:
        with TemporaryDirectory(prefix="converting-", dir=folder) as scratch:
            _run_conversion(checkpoint, Path(scratch) / universal.name)
            shutil.rmtree(universal, ignore_errors=True)
            (Path(scratch) / universal.name).rename(universal)
        write_atomically(folder / LATEST, universal.name)
    except OSError as error:
        if not (folder / LATEST).is_file():  # by another run, meanwhile
            raise RunError(f"{folder}: {UNCONVERTED} ({error.strerror})") from None


def _run_conversion(checkpoint: Checkpoint, out: Path) -> None:
    words = ["--input_folder", str(_pieces(checkpoint)), "--output_folder", str(out), "--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.with_name(LATEST).is_file():
        why = (done.stderr.strip() or "it says nothing").splitlines()[-1]
        raise RunError(f"{checkpoint.path}: {UNCONVERTED} ({why})")
