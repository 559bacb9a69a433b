"""transformers' own Trainer on a tiny model, in one process or as one of two; prints its losses as a line of JSON.

Started with the engine's name: `one`, `ddp` or `zero3`. A global batch is two rows: of the ten pairs some have a row of
text alone or of an image alone, and no two rows have the same number of targets.
"""

import json
import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from tests.distributed.worker import CODES, MARKER, TEXT, leave, make_model

STEPS, LENGTH = 10, 24


class Rows(Dataset):
    """Twenty rows of ids with labels, all of one length."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for index in range(2 * STEPS):
            ids = torch.randint(1, MARKER, (LENGTH,), generator=generator)
            codes = torch.randint(TEXT, TEXT + CODES, (LENGTH,), generator=generator)
            step, rank = divmod(index, 2)
            if rank == 0 or step % 3 == 2:  # the other rank has no image in two steps of three
                ids[8:20] = codes[8:20]
                ids[7] = MARKER
            if rank == 1 and step % 5 == 4:
                ids = codes
            labels = ids.clone()
            labels[: 2 + (5 * index) % 17] = -100
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class Recorder(Trainer):
    """Takes the rows in their order and keeps the loss of each step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def _get_train_sampler(self, *args: Any) -> Sampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(self.accelerator.gather(loss).mean().item())
        return loss


def main(engine: str) -> None:
    zero: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            ddp_backend="gloo" if engine == "ddp" else None,
            deepspeed=zero if engine == "zero3" else None,
            per_device_train_batch_size=2 if engine == "one" else 1,
            max_steps=STEPS,
            learning_rate=1e-4,
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            log_level="error",
        )
        trainer = Recorder(model=make_model(), args=arguments, train_dataset=Rows())
        trainer.train()
        assert arguments.world_size == (1 if engine == "one" else 2)
        if engine == "zero3":
            assert all(weight.ds_tensor.numel() < weight.ds_numel for weight in trainer.model.parameters())
        if arguments.process_index == 0:
            print(json.dumps(trainer.losses))


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
