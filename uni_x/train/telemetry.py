"""What a training run tells of itself: losses by modality and by folder, tokens, speed and memory."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import psutil
import torch

from uni_x.data.dataset import BatchNotes
from uni_x.model import UniXConfig
from uni_x.model.causal_lm import IGNORED, UniXOutput
from uni_x.model.size import count_operations

# dense bfloat16 operations a second, from the makers' data sheets, by a part of the device's name
PEAK_OPERATIONS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PASSES = 3  # a training step takes three times the operations of a forward pass

COUNTS = ("text_tokens", "image_tokens", "places", "documents", "left_out", "split")
LOSSES = ("loss_text", "loss_image", "targets_text", "targets_image")


class Telemetry:
    """Adds up what batches tell between two log entries, and makes figures of it.

    Args:
        config: of the model that is trained.
        folders: names of the mixed folders.
        device: of this process.
        processes: how many train together.
        tokens_seen: text and image tokens that all processes together had trained on before.
        reduce: adds a tensor up over all processes.
    """

    def __init__(
        self,
        config: UniXConfig,
        folders: Sequence[str],
        device: torch.device,
        processes: int,
        tokens_seen: tuple[int, int],
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ):
        self._config = config
        self._folders = folders
        self._device = device
        self._processes = processes
        self._reduce = reduce
        self._seen = np.array(tokens_seen, dtype=np.float64)
        self._begin()

    def _begin(self) -> None:
        self._counts = np.zeros(len(COUNTS))
        self._losses = torch.zeros(len(LOSSES), device=self._device)
        self._by_folder = torch.zeros(2, len(self._folders) + 1, device=self._device)
        self._since = time.perf_counter()

    def add(self, labels: torch.Tensor, notes: BatchNotes, outputs: UniXOutput) -> None:
        """Takes a batch, by its `labels` `(batch, length)` and notes, and what the model said of it."""
        self._losses += losses_of(outputs)
        documents = sum(map(len, notes.sample_ids))
        self._counts += (*notes.tokens, notes.folders.size, documents, notes.left_out, notes.split)
        if outputs.target_losses is not None:
            folders = torch.from_numpy(notes.folders).to(self._device, torch.int64)[:, :-1]
            place = folders.remainder(self._by_folder.shape[1]).flatten()  # padding, -1, is the last column
            has_target = (labels[:, 1:] != IGNORED).float()
            self._by_folder[0].index_add_(0, place, outputs.target_losses[:, :-1].flatten())
            self._by_folder[1].index_add_(0, place, has_target.flatten())

    def figures(self) -> dict[str, float]:
        """Means and counts since the last call, over all processes; begins anew."""
        seconds = time.perf_counter() - self._since
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        parts = (self._losses, torch.from_numpy(self._counts), self._by_folder[:, :-1].flatten())
        totals = self._reduce(torch.cat([part.to(self._device, dtype) for part in parts])).tolist()
        sums = dict(zip((*LOSSES, *COUNTS), totals, strict=False))
        self._begin()
        if not sums["documents"]:
            return {}
        return {
            **means("loss_{}", ("text", "image"), [sums[name] for name in LOSSES]),
            **means("loss/{}", self._folders, totals[len(sums) :]),
            **self._tokens(sums, seconds),
            **self._memory(),
        }

    def _tokens(self, sums: dict[str, float], seconds: float) -> dict[str, float]:
        kinds = np.array([sums["text_tokens"], sums["image_tokens"]])
        tokens = float(kinds.sum())
        self._seen += kinds
        cost = count_operations(self._config, round(tokens / sums["documents"]), kinds[1] / tokens)
        speed = PASSES * tokens * cost.mean / seconds / self._processes
        figures = {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "text_tokens_seen": float(self._seen[0]),
            "image_tokens_seen": float(self._seen[1]),
            "padding": 1 - tokens / sums["places"],
            "tflops": speed / 1e12,
        }
        figures |= {name: sums[name] for name in ("left_out", "split") if sums[name]}
        if (peak := peak_operations(self._device)) is not None:
            figures["mfu"] = speed / peak
        return figures

    def _memory(self) -> dict[str, float]:
        """The most that this process has held on its device so far; on a CPU what it holds now."""
        if self._device.type == "cuda":
            return {"memory_gb": torch.cuda.max_memory_allocated(self._device) / 1e9}
        return {"memory_gb": psutil.Process().memory_info().rss / 1e9}


def peak_operations(device: torch.device) -> float | None:
    """What a device can do at the most in bfloat16, in operations a second; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_OPERATIONS.items() if part in name), None)


def losses_of(outputs: UniXOutput) -> torch.Tensor:
    """`LOSSES` of a batch, as `(4,)` float32."""
    return torch.stack([getattr(outputs, name).detach().float() for name in LOSSES])


def means(key: str, names: Sequence[str], sums_and_counts: Sequence[float]) -> dict[str, float]:
    """A mean for each name that has a count, from the sums of all followed by the counts of all."""
    sums, counts = sums_and_counts[: len(names)], sums_and_counts[len(names) :]
    return {key.format(name): sum_ / count for name, sum_, count in zip(names, sums, counts, strict=True) if count}
