"""The key-value cache of every way to run the model: `generate()`, the engine, a plain forward with `use_cache`.

Rows may differ in length: padding is never stored. In a layer whose tokens see all others there is one store; where
they see their own modality alone there are two, so that a token is kept once a layer and attention reads no key that
it would have to mask by modality. Stores are allocated once where the length is known and grow by doubling elsewhere.
"""

import numpy as np
import torch

from uni_x.model.config import UniXConfig
from uni_x.model.layout import CacheLengths, CacheStep, TokenLayout

STREAMS = {"all": ("everything",), "own": ("text", "image")}


class Store:
    """Keys and values of one stream in one layer, `(rows, kv_heads, capacity, head_dim)` each."""

    def __init__(self, rows: int, capacity: int):
        self.rows = rows
        self.capacity = capacity
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor, step: CacheStep) -> None:
        """Stores `(tokens, kv_heads, head_dim)` at the rows and slots of the step."""
        self._make_room(keys, step.length)
        assert self.keys is not None
        assert self.values is not None
        if step.slot is not None:
            self.keys[:, :, step.slot], self.values[:, :, step.slot] = keys, values
            return
        self.keys[step.rows, :, step.slots] = keys.to(self.keys.dtype)
        self.values[step.rows, :, step.slots] = values.to(self.values.dtype)

    def read(self, step: CacheStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(n, kv_heads, length, head_dim)` of the rows that the step asks about."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[:, :, : step.length], self.values[:, :, : step.length]
        if step.query_rows is None:
            return keys, values
        return keys.index_select(0, step.query_rows), values.index_select(0, step.query_rows)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows, in that order."""
        self.rows = rows.numel()
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def _make_room(self, like: torch.Tensor, length: int) -> None:
        if self.keys is not None and length <= self.keys.shape[2]:
            return
        held = 0 if self.keys is None else self.keys.shape[2]
        self.capacity = max(self.capacity, length if held == 0 else max(length, 2 * held))
        shape = (self.rows, like.shape[1], self.capacity, like.shape[2])
        grown = like.new_zeros(shape), like.new_zeros(shape)
        if self.keys is not None and self.values is not None:
            grown[0][:, :, :held], grown[1][:, :, :held] = self.keys, self.values
        self.keys, self.values = grown


class UniXCache:
    """Cache of a whole model for a batch of rows.

    Args:
        config: of the model; its plan says which layers keep the modalities apart.
        rows: batch size.
        text_capacity, image_capacity: tokens of each kind that a row will hold at the most, where that is known.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, config: UniXConfig, rows: int, text_capacity: int = 0, image_capacity: int = 0):
        self.lengths = CacheLengths.zeros(rows)
        self.columns = 0
        capacity = {"everything": text_capacity + image_capacity, "text": text_capacity, "image": image_capacity}
        self.layers = [
            {name: Store(rows, capacity[name]) for name in STREAMS[spec.sees]} for spec in config.layer_specs
        ]

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.lengths.total.size

    @property
    def is_linear(self) -> list[bool]:
        """For transformers: no layer is a linear-attention layer."""
        return [False] * len(self.layers)

    def advance(self, layout: TokenLayout) -> None:
        """Counts the tokens of a forward, once all of its layers have stored them."""
        self.lengths += layout.new_tokens
        self.columns += layout.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ids seen, padding included: what `generate()` counts."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows without a limit."""
        return -1

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows, in that order; a row may be named several times."""
        self.lengths = self.lengths.select(np.asarray(rows.cpu()))
        for stores in self.layers:
            for store in stores.values():
                store.select(rows if store.keys is None else rows.to(store.keys.device))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """For beam search."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """For transformers' decoding methods."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row, for transformers' decoding methods."""
        self.select(torch.arange(self.rows).repeat_interleave(repeats))

    def bytes(self) -> int:
        """Memory that is allocated for keys and values, in bytes."""
        tensors = [t for stores in self.layers for s in stores.values() for t in (s.keys, s.values) if t is not None]
        return sum(t.nbytes for t in tensors)
