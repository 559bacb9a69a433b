"""The Trainer of transformers, with losses apart by modality and data that goes on where it was."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from uni_x.data.dataset import LEFT_OUT, StreamPosition, TrainingStream
from uni_x.errors import RunError
from uni_x.recipe import OptimizerSection
from uni_x.train.optimizers import MuonWithAdamW

POSITION_FILE = "data_position_{rank}.json"


class UniXTrainer(Trainer):
    """Trainer for `UniXForCausalLM` on a `TrainingStream`.

    Args:
        optimizer_section: which optimizer to make.
        stream: this process's data.
        **kwargs: as for transformers' Trainer.
    """

    def __init__(self, optimizer_section: OptimizerSection, stream: TrainingStream, **kwargs: Any):
        self.optimizer_section = optimizer_section
        self._position = stream.position
        self._left_out = 0  # samples, since the last log
        self._sums: dict[str, torch.Tensor] = {}
        super().__init__(train_dataset=stream, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe; transformers' own where the recipe says adamw."""
        section = self.optimizer_section
        nn_model: Any = model or self.model
        if self.optimizer is None and section.name == "muon":
            self.optimizer = MuonWithAdamW(
                nn_model,
                muon_lr=section.muon_learning_rate,
                lr=section.learning_rate,
                betas=section.betas,
                weight_decay=section.weight_decay,
            )
        return super().create_optimizer(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As transformers', adds up the losses of text and image for the log, and follows the stream."""
        self._position = self._position.after(inputs)
        self._left_out += inputs.pop(LEFT_OUT)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in ("loss_text", "loss_image", "targets_text", "targets_image"):
            value = outputs[name].detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        tokens = inputs["attention_mask"].sum().float()
        self._sums["tokens"] = self._sums["tokens"] + tokens if "tokens" in self._sums else tokens
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds mean losses by modality, and tokens and samples left out since the last log, over all ranks."""
        if "loss" in logs and self._sums:
            self._sums["left_out"] = torch.tensor(float(self._left_out), device=self.args.device)
            names = list(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
            totals = dict(zip(names, sums, strict=True))
            for kind in ("text", "image"):
                if totals[f"targets_{kind}"]:
                    logs[f"loss_{kind}"] = totals[f"loss_{kind}"] / totals[f"targets_{kind}"]
            logs["tokens"] = totals["tokens"]
            if totals["left_out"]:
                logs["left_out"] = totals["left_out"]
            self._sums, self._left_out = {}, 0
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of the stream as they come: each process has a stream of its own, which settles the order."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Writes where this process stands in the data beside its random state, before a checkpoint counts as whole."""
        super()._save_rng_state(output_dir)
        stream: Any = self.train_dataset
        content = {"processes": self.args.world_size, "data": stream.fingerprint, **self._position.to_json()}
        (Path(output_dir) / POSITION_FILE.format(rank=self.args.process_index)).write_text(json.dumps(content))


def read_positions(checkpoint: Path) -> tuple[list[StreamPosition], str]:
    """Where the processes of a run stood when a checkpoint was written, in their order, and in which stream.

    The stream is given by its fingerprint.

    Raises:
        RunError: for a checkpoint without them.
    """
    try:
        contents = [json.loads((checkpoint / POSITION_FILE.format(rank=0)).read_text())]
        for rank in range(1, contents[0]["processes"]):
            contents.append(json.loads((checkpoint / POSITION_FILE.format(rank=rank)).read_text()))
        return [StreamPosition.from_json(content) for content in contents], contents[0]["data"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{checkpoint}: does not say where every process stood in the data; delete it to go on from an earlier one"
        ) from None
