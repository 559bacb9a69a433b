"""The state of an optimizer taken over from an earlier run, whichever engines the two of them run on."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import unwrap_model
from transformers.trainer import OPTIMIZER_NAME

from uni_x.errors import RecipeError
from uni_x.train.checkpoints import Checkpoint
from uni_x.train.universal import ADAM_MOMENTS, is_of_deepspeed, read_universal, universal_checkpoint

UNREADABLE = (OSError, pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError)


@dataclass(frozen=True)
class SavedOptimizer:
    """The state of an optimizer on disk, by the names of parameters.

    Attributes:
        path: where it is.
        read: what there is for the parameter of a name, its step and tensors of its size, which may be flat; a
            `KeyError` for a name without any.
    """

    path: Path
    read: Callable[[str], dict[str, Any]]

    def of(self, name: str, shape: torch.Size) -> dict[str, Any]:
        """The state of the parameter of that name and shape.

        Raises:
            RecipeError: where there is none, or none that fits.
        """
        try:
            state = self.read(name)
        except UNREADABLE:
            state = {}
        moments = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim}
        if not moments:
            raise RecipeError(
                f"optimizer.state_from: {self.path} has no state for {name}, which was not trained there (trainable, "
                "lora) or is of another model; train what was trained there, or take state_from out"
            )
        if any(moment.shape not in (shape, (shape.numel(),)) for moment in moments.values()):
            raise self.refusal(name)
        return state | {key: moment.reshape(shape) for key, moment in moments.items()}

    def refusal(self, name: str) -> RecipeError:
        """What is said where the state of a parameter is another optimizer's, or has another size."""
        return RecipeError(
            f"optimizer.state_from: {self.path} has no state of this kind for {name}, but of another optimizer "
            "(optimizer.name, trainer.optim) or model; take the same ones, or take state_from out"
        )


def open_optimizer(checkpoint: Checkpoint, arguments: TrainingArguments) -> SavedOptimizer:
    """The optimizer of a checkpoint; every process calls it, and the first one puts together what is in pieces.

    Raises:
        RecipeError: for a checkpoint without one that can be read.
    """
    if is_of_deepspeed(checkpoint):
        folder = universal_checkpoint(checkpoint, arguments)
        return SavedOptimizer(folder, read_universal(folder))
    file = checkpoint.path / OPTIMIZER_NAME
    try:
        saved = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        numbers = {
            name: number
            for group in saved["param_groups"]
            for name, number in zip(group["param_names"], group["params"], strict=True)
        }
        return SavedOptimizer(file, lambda name: saved["state"][numbers[name]])
    except UNREADABLE:
        raise RecipeError(f"optimizer.state_from: {file} holds no state of an optimizer") from None


class TakeOver(TrainerCallback):
    """Gives the optimizer of a new run the state of `saved`; its own settings stay."""

    def __init__(self, saved: SavedOptimizer):
        self.saved = saved

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes it over, in whatever form the engine of `args` has the optimizer."""
        optimizer = kwargs["optimizer"].optimizer  # accelerate's is around it
        if args.deepspeed_plugin is None:
            take_over(optimizer, self.saved)
        else:
            take_over_under_zero(optimizer, dict(unwrap_model(kwargs["model"]).named_parameters()), self.saved)


def take_over(optimizer: torch.optim.Optimizer, saved: SavedOptimizer) -> None:
    """Gives an optimizer, whose groups name their parameters, the state of a saved one.

    Raises:
        RecipeError: for a state of other parameters, or of another kind of optimizer.
    """
    taken = optimizer.state_dict()
    for ours, group in zip(optimizer.param_groups, taken["param_groups"], strict=True):
        for name, number, parameter in zip(group["param_names"], group["params"], ours["params"], strict=True):
            state = saved.of(name, parameter.shape)
            if not _moments(optimizer, group) <= state.keys():
                raise saved.refusal(name)
            taken["state"][number] = state
    optimizer.load_state_dict(taken)


def take_over_under_zero(optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: SavedOptimizer) -> None:
    """The same for DeepSpeed's optimizer, of which each process has a part; all count the largest step there is.

    Args:
        optimizer: DeepSpeed's, for ZeRO-1 to ZeRO-3.
        parameters: of the model, by name.
        saved: what it takes over.

    Raises:
        RecipeError: for a state of other parameters, or of another kind of optimizer than Adam.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    inner = optimizer.optimizer
    of_zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flats = optimizer.fp32_partitioned_groups_flat if of_zero3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:  # they have no state yet, as DeepSpeed makes it in the first step
        for kind in ADAM_MOMENTS:
            inner.state[flat].setdefault(kind, torch.zeros_like(flat))
    if not of_zero3:
        optimizer._lazy_init_hp_params_optimizer_state()
    last = 0.0
    for name in (name for group in inner.param_groups for name in group["param_names"]):
        parameter = parameters[name]
        state = saved.of(name, getattr(parameter, "ds_shape", parameter.shape))
        if not state.keys() >= ADAM_MOMENTS:
            raise saved.refusal(name)
        for kind in ADAM_MOMENTS:
            safe_set_full_optimizer_state(parameter, state[kind].to(flats[0].device), kind)
        last = max(last, float(state["step"]))
    counts_in_tensors = isinstance(inner, torch.optim.Adam)
    for flat in flats:
        inner.state[flat]["step"] = torch.tensor(last, device=flat.device) if counts_in_tensors else int(last)


def _moments(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> set[str]:
    """What the state of a parameter cannot do without; nothing for optimizers that this package does not know."""
    if group.get("kind") == "muon":
        return {"momentum"}
    return ADAM_MOMENTS if group.get("kind") == "adamw" or isinstance(optimizer, torch.optim.Adam) else set()
