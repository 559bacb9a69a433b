"""The Trainer of transformers, with losses apart by modality and rows in the order that the data decides."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer

from uni_x.recipe import OptimizerSection
from uni_x.train.optimizers import MuonWithAdamW


class UniXTrainer(Trainer):
    """Trainer for `UniXForCausalLM` on packed rows.

    Args:
        optimizer_section: which optimizer to make.
        **kwargs: as for transformers' Trainer.
    """

    def __init__(self, optimizer_section: OptimizerSection, **kwargs: Any):
        self.optimizer_section = optimizer_section
        self._sums: dict[str, torch.Tensor] = {}
        super().__init__(**kwargs)

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
        """As transformers', and adds up the losses of text and image for the log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in ("loss_text", "loss_image", "targets_text", "targets_image"):
            value = outputs[name].detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        tokens = inputs["attention_mask"].sum().float()
        self._sums["tokens"] = self._sums["tokens"] + tokens if "tokens" in self._sums else tokens
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean losses by modality and the tokens since the last log, over all ranks."""
        if "loss" in logs and self._sums:
            names = list(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
            totals = dict(zip(names, sums, strict=True))
            for kind in ("text", "image"):
                if totals[f"targets_{kind}"]:
                    logs[f"loss_{kind}"] = totals[f"loss_{kind}"] / totals[f"targets_{kind}"]
            logs["tokens"] = totals["tokens"]
            self._sums = {}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # the data set has shuffled its rows already, the same way in every process
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)
