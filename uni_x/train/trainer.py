"""The Trainer of transformers, with losses apart by modality and data that goes on where it was."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.modeling_utils import unwrap_model
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from uni_x.data.dataset import NOTES, Batch, BatchNotes, TrainingStream
from uni_x.errors import ProcessError, RecipeError, RunError, one_line
from uni_x.recipe import OptimizerSection
from uni_x.train.arguments import shards_weights
from uni_x.train.checkpoints import (
    Checkpoint,
    Standing,
    last_whole_checkpoint,
    reading,
    retried,
    seal,
    write_standing,
)
from uni_x.train.optimizers import MuonWithAdamW, gradients_by_modality, is_of_images, name_parameters
from uni_x.train.telemetry import LOSSES, Telemetry, losses_of, means
from uni_x.train.universal import loads_universal, mend_loaded

logger = logging.getLogger(__name__)

IDS_SHOWN = 5


class UniXTrainer(Trainer):
    """Trainer for `UniXForCausalLM` on a `TrainingStream`.

    Args:
        optimizer_section: which optimizer to make.
        stream: this process's data.
        ground: what checkpoints note of data, tokenizers and plan; see `Standing`.
        folders: names of the mixed folders, for the log.
        held_out: batches to validate on, the same in every process; each takes its share of them.
        tokens_seen: text and image tokens that all processes together had trained on before.
        **kwargs: as for transformers' Trainer.
    """

    def __init__(
        self,
        optimizer_section: OptimizerSection,
        stream: TrainingStream,
        ground: dict[str, str],
        folders: Sequence[str],
        held_out: Sequence[Batch] = (),
        tokens_seen: tuple[int, int] = (0, 0),
        **kwargs: Any,
    ):
        self.optimizer_section = optimizer_section
        self.stop_requested = False  # by a signal that this process got
        self.stop_agreed = False  # by all processes, so that they stop at the same step
        super().__init__(train_dataset=stream, eval_dataset=held_out or None, **kwargs)
        self._stream = stream
        seen = tokens_seen if self.args.process_index == 0 else (0, 0)
        self._standing = self._standing_before = Standing([stream.position], ground, seen)
        self._losses: list[tuple[torch.Tensor, BatchNotes]] = []  # of the batches of this step
        self._finished: Path | None = None  # a checkpoint of the last step, where there is nothing left to do
        self._grad_norms: dict[str, float] = {}
        self._telemetry = Telemetry(
            self.bare_model.config,
            folders,
            self.args.device,
            self.args.world_size,
            tokens_seen,
            self._sum,
        )

    @property
    def bare_model(self) -> Any:
        """The model without what engines have put around it."""
        model: Any = self.model
        return unwrap_model(model)

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Trains to the end, from a checkpoint where there is one."""
        if checkpoint is not None and checkpoint.step >= checkpoint.max_steps:
            self.state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))
            self._finished = self._best or checkpoint.path
            if not shards_weights(self.args):
                self._load_from_checkpoint(str(self._finished))
            return
        if checkpoint is not None:
            logger.info("going on from %s", checkpoint.path.name)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))

    @property
    def model_step(self) -> int:
        """The step that the finished model is of: the last one, or the best, where that is asked for."""
        return int(self._best.name.rpartition("-")[2]) if self._best else self.state.global_step

    @property
    def _best(self) -> Path | None:
        """The checkpoint of the best weights, where these are asked for."""
        best = Path(self.state.best_model_checkpoint or "")
        return best if self.args.load_best_model_at_end and best.name and best.is_dir() else None

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights, by name, where no process has them all; every process has to call it. None elsewhere."""
        if not shards_weights(self.args):
            return None
        if self._finished is None:
            return self.accelerator.get_state_dict(self.model_wrapped)
        files = sorted(self._finished.glob("*.safetensors"))
        if not files:
            raise RunError(f"{self._finished}: has no whole weights; fsdp_state_dict_type must be FULL_STATE_DICT")
        if self.args.process_index:
            return {}
        return {name: weight for file in files for name, weight in load_file(file).items()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe, with a learning rate of its own for what images have of their own."""
        section = self.optimizer_section
        nn_model: Any = model or self.model
        if self.optimizer is not None:
            return self.optimizer
        if section.name == "muon":
            self.optimizer = MuonWithAdamW(
                nn_model,
                muon_lr=section.muon_learning_rate,
                lr=section.learning_rate,
                betas=section.betas,
                weight_decay=section.weight_decay,
            )
        try:
            optimizer = super().create_optimizer(model)
        except ValueError as error:  # of a package that is missing, which others tell by an ImportError
            raise RecipeError(f"trainer.optim: {one_line(error)}") from None
        if section.vision_learning_rate is not None:
            _split_off_images(optimizer, nn_model, section.vision_learning_rate / section.learning_rate)
        name_parameters(optimizer, nn_model)
        self._group_settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers' does, and mends what DeepSpeed leaves behind."""
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        plugin = self.args.deepspeed_plugin
        if checkpoint is not None and plugin is not None and loads_universal(plugin) and plugin.zero_stage == 3:
            of_deepspeed: Any = self.optimizer
            schedule: Any = self.lr_scheduler
            mend_loaded(of_deepspeed.optimizer.optimizer, self._group_settings, schedule.get_last_lr())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As transformers' does, follows the stream, and lets all processes agree on whether to go on.

        Raises:
            RunError: in every process, once a checkpoint is saved, where the loss of one is not a number.
        """
        notes: BatchNotes = inputs.pop(NOTES)
        if not self._losses:
            self._standing_before = self._standing
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._losses.append((loss.detach(), notes))
        self._standing = self._standing.after(notes)
        self._telemetry.add(labels, notes, outputs)
        if self.accelerator.sync_gradients:  # the last batch of the step
            self._agree_to_go_on()
        return (loss, outputs) if return_outputs else loss

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` added up over all processes."""
        total: Any = self.accelerator.reduce(values, "sum")
        return total

    def _agree_to_go_on(self) -> None:
        """Settles whether all stop after this step, or before it where a loss of any process is not a number."""
        batches, self._losses = self._losses, []
        is_odd = ~torch.isfinite(torch.stack([loss for loss, _ in batches]))
        flags = torch.stack([is_odd.any(), is_odd.new_tensor(self.stop_requested)]).int()
        odd, stopping = (self._sum(flags) if self.args.world_size > 1 else flags).tolist()
        self.stop_agreed = self.stop_agreed or bool(stopping)
        if odd:
            own = (batch for batch, flag in zip(batches, is_odd.tolist(), strict=True) if flag)
            self._stop_for_an_odd_loss(next(own, None))

    def _stop_for_an_odd_loss(self, batch: tuple[torch.Tensor, BatchNotes] | None) -> None:
        """Saves what was there before this step, whose gradients are not used, and says where the loss came from."""
        self._standing = self._standing_before
        step = self.state.global_step
        path = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._agree_on_checkpoint(path):
            self.args.save_total_limit = None  # those before it may be the better ones
            self._save_checkpoint(self.model_wrapped, trial=None)
        if batch is None:
            raise RunError(f"step {step + 1}: another process had a loss that is not a number, and says more")
        loss, notes = batch
        ids = [name for row in notes.sample_ids for name in row]
        more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
        raise ProcessError(
            f"step {step + 1}: the loss is {loss.item()}, in a batch of the samples "
            f"{', '.join(map(repr, ids[:IDS_SHOWN]))}{more}; the weights before it are in {path}, and older ones "
            f"beside it where there were some. Look at these samples, or begin a new run{self._from_there} with a "
            "lower learning rate (optimizer.learning_rate) or smaller gradients (trainer.max_grad_norm)"
        )

    @property
    def _from_there(self) -> str:
        """What to add to "begin a new run" where its checkpoints are models; those of adapters are not."""
        return "" if hasattr(self.bare_model, "peft_config") else " from there (model.base)"

    def _agree_on_checkpoint(self, path: Path) -> bool:
        """Whether a checkpoint is still to be written, as the first process sees it."""
        saved = last_whole_checkpoint(path.parent)
        is_missing = self.args.process_index == 0 and (saved is None or saved.path != path)
        return bool(self._sum(torch.tensor([float(is_missing)], device=self.args.device)).item())

    def _refuse_odd_weights(self) -> None:
        """Raises `RunError` in every process where weights are not numbers: no checkpoint must go for these."""
        parts = (getattr(weight, "ds_tensor", weight).detach() for weight in self.bare_model.parameters())
        odd = sum(float(not torch.isfinite(part).all()) for part in parts)
        if self._sum(torch.tensor([odd], device=self.args.device)).item():
            saved = last_whole_checkpoint(Path(str(self.args.output_dir)))
            raise RunError(
                f"step {self.state.global_step}: weights are no longer numbers, after gradients that were too large; "
                f"{f'the last good ones are in {saved.path}' if saved else 'none were saved before'}. Begin a new run"
                f"{self._from_there} with a lower learning rate (optimizer.learning_rate) or smaller gradients "
                "(trainer.max_grad_norm)"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As transformers' does, and notes the norms of what text and images have of their own, before clipping.

        Not where processes share the gradients out: no one has the whole of them.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        is_logged = (self.state.global_step + 1) % max(1, self.state.logging_steps) == 0
        if is_logged and not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            most = self.args.max_grad_norm
            clipped = min(1.0, most / (float(norm) + 1e-6)) if most > 0 else 1.0
            for kind, gradients in gradients_by_modality(self.bare_model).items():
                self._grad_norms[f"grad_norm_{kind}"] = get_total_norm(gradients).item() / clipped
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what this package tells of a run; see `Telemetry`."""
        if "loss" in logs:
            logs.update(self._grad_norms | self._telemetry.figures())
            self._grad_norms = {}
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of the stream as they come: each process has a stream of its own, which settles the order."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self._stream,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses on the held-out batches, weighed as in training, all in nats a target."""
        batches: Any = eval_dataset or self.eval_dataset or ()
        processes, rank = self.args.world_size, self.args.process_index
        self.model_wrapped.eval()
        sums = torch.zeros(len(LOSSES), device=self.args.device)
        for start in range(0, len(batches), processes):
            # every process runs the same number of times, on a batch that does not count where there are too few
            own = start + rank
            inputs = {name: value for name, value in batches[min(own, len(batches) - 1)].items() if name != NOTES}
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model_wrapped(**self._prepare_inputs(inputs))
            if own < len(batches):
                sums += losses_of(outputs)
        metrics = self._held_out_losses(sums, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_losses(self, sums: torch.Tensor, prefix: str) -> dict[str, float]:
        config = self.bare_model.config
        totals = self._sum(sums).tolist()
        text, image, texts, images = totals
        weighted = config.text_loss_weight * text + config.image_loss_weight * image
        return {
            f"{prefix}_loss": weighted / max(1.0, texts + images),
            **means(f"{prefix}_loss_{{}}", ("text", "image"), totals),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers' does, unless weights are not numbers; its parts are tried again where storage fails."""
        self._refuse_odd_weights()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        retried(lambda: super(UniXTrainer, self)._save(output_dir, state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save = partial(super()._save_optimizer_and_scheduler, output_dir)
        if self.is_deepspeed_enabled:  # its processes wait for each other on the way, so each tries its own files again
            engine: Any = self.deepspeed
            writer = engine.checkpoint_engine
            write = type(writer).save
            writer.save = lambda *content, **more: retried(partial(write, writer, *content, **more))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            save()
        else:
            retried(save)

    def _save_rng_state(self, output_dir: str) -> None:
        """Writes where this process stands beside its random state, and seals the checkpoint once all have done so."""
        retried(lambda: super(UniXTrainer, self)._save_rng_state(output_dir))
        rank, processes = self.args.process_index, self.args.world_size
        retried(lambda: write_standing(Path(output_dir), rank, processes, self._standing))
        self.accelerator.wait_for_everyone()
        if rank == 0:
            retried(lambda: seal(Path(output_dir)))


def _split_off_images(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Gives the parameters that images have of their own groups of their own, with `factor` times the learning rate."""
    own = {parameter for name, parameter in model.named_parameters() if is_of_images(name)}
    if not own:
        raise RecipeError("optimizer.vision_learning_rate: nothing in this plan is for image tokens alone; take it out")
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for is_own, times in ((False, 1.0), (True, factor)):
            if parameters := [parameter for parameter in group["params"] if (parameter in own) == is_own]:
                optimizer.param_groups.append({**group, "params": parameters, "lr": group["lr"] * times})
