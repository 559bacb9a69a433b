"""Going on from a DeepSpeed checkpoint with another number of processes, through DeepSpeed's universal checkpoints."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from uni_x.errors import RunError
from uni_x.train.checkpoints import Checkpoint

logger = logging.getLogger(__name__)


def fit_to_launch(checkpoint: Checkpoint, arguments: TrainingArguments) -> None:
    """Lets this launch load the checkpoint; every process calls it, and the first one converts where that is needed.

    DeepSpeed writes what each process has of the optimizer, which only as many processes can read again. Its universal
    checkpoint holds each parameter whole; it is written beside, and takes as much room again.

    Raises:
        RunError: for a checkpoint of DeepSpeed without it, or the other way round, or that cannot be converted.
    """
    saved = checkpoint.path / f"global_step{checkpoint.step}"
    plugin = arguments.deepspeed_plugin
    if saved.is_dir() != (plugin is not None):
        others = ("without DeepSpeed", "under DeepSpeed")[saved.is_dir()]
        raise RunError(
            f"{checkpoint.path}: was written {others}, go on so; or begin a new run (run=…) from its weights "
            f"(model.base={checkpoint.path})"
        )
    if plugin is None or len(list(saved.glob("*zero_pp_rank_*_optim_states.pt"))) == arguments.world_size:
        return
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            _convert(checkpoint)
    plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}


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


def _convert(checkpoint: Checkpoint) -> None:
    folder = checkpoint.path
    universal = folder / f"global_step{checkpoint.step}_universal"
    latest = folder / "latest_universal"  # written last, and what DeepSpeed looks for
    if latest.is_file():
        return
    shutil.rmtree(universal, ignore_errors=True)
    logger.info("converting %s for another number of processes", folder.name)
    words = ["--input_folder", str(folder / f"global_step{checkpoint.step}"), "--output_folder", str(universal)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not latest.is_file():
        why = (done.stderr.strip() or "it says nothing").splitlines()[-1]
        raise RunError(f"{folder}: cannot be made ready for another number of processes ({why})")
