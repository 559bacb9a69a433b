"""Routing by modality, worked out once for a batch.

The model runs on a flat list of tokens: padding is left out, text tokens come first and image tokens after them, so
that handing each modality to its own weights is a slice and not a gather. A `TokenLayout` holds that order, the
positions, and for each of the three things a token can attend to (all tokens, text alone, images alone) how the tokens
are gathered into blocks of similar length. It is built from ids on the host with NumPy, before the layers run, and
passed down as one value: nothing is recomputed in a layer, and no layer waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from uni_x.errors import InputError
from uni_x.model.config import UniXConfig

SEGMENT_DEVICES = {"cuda"}  # that may have a kernel for segments of any length
BLOCK_FILL = 0.8  # a block takes segments down to this share of its longest


@dataclass(frozen=True)
class AttentionBlocks:
    """How one stream of tokens is cut into blocks for causal attention.

    A segment is what one document (or one row) holds of the stream. Segments of similar length are stacked to a block
    `(segments, length)`, padded at the end, where causality makes padding invisible.

    Attributes:
        shapes: (segments, length) of each block.
        gather: for each place in the blocks, one after the other, the index of its token; None where the stream
            already has that order.
        scatter: for each token of the stream its place in the blocks; None likewise.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: torch.Tensor | None
    scatter: torch.Tensor | None


NO_BLOCKS = AttentionBlocks((), None, None)


@dataclass(frozen=True)
class Segments:
    """How one stream of tokens is cut for kernels that take segments of any length one after the other.

    Attributes:
        order: for each place, segment by segment, the index of its token; None where the stream has that order.
        inverse: for each token of the stream its place; None likewise.
        boundaries: `(segments + 1,)` int32, where segments begin, and the end.
        longest: tokens of the longest segment.
    """

    order: torch.Tensor | None
    inverse: torch.Tensor | None
    boundaries: torch.Tensor
    longest: int


@dataclass(frozen=True)
class CacheStep:
    """What attention over one stream does with the cache: where tokens are stored and what their queries see.

    Attributes:
        rows, slots: `(tokens,)` row of the cache and place in it for each token of the stream.
        length: number of places in use in the longest row, new tokens included.
        prefill: the cache was empty before, so that the new tokens see each other alone.
        query_rows: `(n,)` rows that have new tokens; None if all have.
        query_gather, query_scatter: token index for each place of `(n, queries)` and back; None for the identity.
        queries: new tokens of the row that has most.
        slot: where every row, in their order, stores one token at the same place, that place.
        mask: `(n, 1, queries, length)` bool, True where a query sees a key; None where all see all.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    length: int
    prefill: bool
    query_rows: torch.Tensor | None = None
    query_gather: torch.Tensor | None = None
    query_scatter: torch.Tensor | None = None
    queries: int = 0
    slot: int | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """One set of tokens that see each other: everything, text alone or images alone.

    `segments` is there where a kernel for them may be (on CUDA), `cache_step` where a cache is in use.
    """

    blocks: AttentionBlocks
    cache_step: CacheStep | None = None
    segments: Segments | None = None


@dataclass(frozen=True)
class TokenLayout:
    """The order in which a batch runs through the layers, and what its tokens see.

    Attributes:
        shape: (batch, length) of the ids.
        order: `(tokens,)` flat index into `(batch * length)` of each token, text first, padding left out.
        sizes: number of text tokens and of image tokens.
        positions: `(tokens,)` place in the document, for the rotary embedding.
        everything, text, image: the streams.
        new_tokens: how many tokens of each kind each row has.
    """

    shape: tuple[int, int]
    order: torch.Tensor
    sizes: tuple[int, int]
    positions: torch.Tensor
    everything: Stream
    text: Stream
    image: Stream
    new_tokens: "CacheLengths"

    def to(self, device: torch.device | str, **options: Any) -> "TokenLayout":
        """The same on another device; accelerate calls it where a model is spread over several."""
        return _move(self, device, options)

    def flatten(self, values: torch.Tensor) -> torch.Tensor:
        """`(batch, length, ...)` to `(tokens, ...)` in the order of the layers."""
        return values.flatten(0, 1).index_select(0, self.order.to(values.device))

    def unflatten(self, values: torch.Tensor) -> torch.Tensor:
        """`(tokens, ...)` back to `(batch, length, ...)`, zeros where there is padding."""
        batch, length = self.shape
        full = values.new_zeros((batch * length, *values.shape[1:]))
        return full.index_copy(0, self.order.to(values.device), values).unflatten(0, (batch, length))


@dataclass(frozen=True)
class CacheLengths:
    """Number of tokens of each row, in all and by modality, `(rows,)` each, counted on the host."""

    total: np.ndarray
    text: np.ndarray
    image: np.ndarray

    @classmethod
    def zeros(cls, rows: int) -> "CacheLengths":
        """No tokens yet."""
        return cls(*(np.zeros(rows, dtype=np.int64) for _ in range(3)))

    def __add__(self, other: "CacheLengths") -> "CacheLengths":
        return CacheLengths(self.total + other.total, self.text + other.text, self.image + other.image)

    def select(self, rows: np.ndarray) -> "CacheLengths":
        """The given rows, in that order."""
        return CacheLengths(self.total[rows], self.text[rows], self.image[rows])


@torch.compiler.disable
def build_layout(
    config: UniXConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    cache_lengths: CacheLengths | None = None,
) -> TokenLayout:
    """Works out the layout of a batch.

    Args:
        config: says which ids are image tokens.
        input_ids: `(batch, length)`.
        attention_mask: `(batch, length)` or longer on the left (the cached part is cut off), 0 for padding.
        position_ids: `(batch, length)`; counted within each document where missing.
        document_ids: `(batch, length)` not decreasing along a row.
        cache_lengths: what the cache holds already, where one is in use.

    Raises:
        InputError: for shapes that do not fit, ids outside the vocabulary, a mask that hides everything, or without a
            cache a whole row, document ids that decrease, or documents together with a cache.
    """
    device = input_ids.device
    if input_ids.ndim != 2:
        raise InputError(f"input_ids has the shape {tuple(input_ids.shape)}, not (batch, length)")
    batch, length = input_ids.shape
    ids = _host(input_ids)
    if ids.size and (ids.min() < 0 or ids.max() >= config.vocab_size):
        raise InputError(f"input_ids holds ids from {ids.min()} to {ids.max()}, vocab_size is {config.vocab_size}")
    plain = attention_mask is None and position_ids is None and document_ids is None
    if plain and cache_lengths is not None and length == 1:
        layout = _layout_of_next_tokens(image_tokens(config, ids[:, 0]), cache_lengths, device)
        if layout is not None:
            return layout
    valid = _valid_tokens(attention_mask, batch, length)
    if valid is not None and cache_lengths is None and not valid.any(axis=1).all():
        raise InputError(f"attention_mask hides every token of row {int(valid.any(axis=1).argmin())}")
    if cache_lengths is not None and document_ids is not None:
        raise InputError("document_ids cannot be used together with a cache")

    flat = np.flatnonzero(valid) if valid is not None else np.arange(batch * length)
    if not flat.size:
        raise InputError("attention_mask hides every token of the batch")
    rows = flat // length
    segments = _segments(rows, document_ids, flat, (batch, length))
    is_image = image_tokens(config, ids.reshape(-1)[flat])
    past = cache_lengths.total[rows] if cache_lengths is not None else 0
    if position_ids is None:
        positions = _counts_within(segments) + past
    else:
        # a single row of positions serves the whole batch
        if tuple(position_ids.shape) not in ((batch, length), (1, length), (length,)):
            raise InputError(f"position_ids has the shape {tuple(position_ids.shape)}, not {(batch, length)}")
        positions = np.broadcast_to(_host(position_ids), (batch, length)).reshape(-1)[flat]

    text_ranks, image_ranks = np.flatnonzero(~is_image), np.flatnonzero(is_image)
    ranks = np.concatenate((text_ranks, image_ranks))
    place = np.empty_like(ranks)
    place[ranks] = np.arange(ranks.size)  # place of each token of the row-major order in the layers' order

    def stream(selected: np.ndarray | None, lengths: np.ndarray | None) -> Stream:
        within = segments if selected is None else segments[selected]
        tokens = place if selected is None else np.arange(selected.size)
        step = None
        if lengths is not None:
            step = _cache_step(rows if selected is None else rows[selected], tokens, lengths, device)
            if step is not None and not step.prefill:
                return Stream(NO_BLOCKS, step)  # queries look into the cache alone
        cut = _cut(within, tokens, device) if device.type in SEGMENT_DEVICES else None
        return Stream(_blocks(within, tokens, device), step, cut)

    lengths = (cache_lengths.total, cache_lengths.text, cache_lengths.image) if cache_lengths else (None,) * 3
    return TokenLayout(
        shape=(batch, length),
        order=_tensor(flat[ranks], device),
        sizes=(text_ranks.size, image_ranks.size),
        positions=_tensor(np.asarray(positions)[ranks], device),
        everything=stream(None, lengths[0]),
        text=stream(text_ranks, lengths[1]),
        image=stream(image_ranks, lengths[2]),
        new_tokens=CacheLengths(
            *(np.bincount(rows[part], minlength=batch) for part in (slice(None), text_ranks, image_ranks))
        ),
    )


def _layout_of_next_tokens(is_image: np.ndarray, lengths: CacheLengths, device: torch.device) -> TokenLayout | None:
    """The layout of one more token a row, `is_image` `(rows,)`: most steps of decoding, where what any batch needs
    would cost more than a layer does. None where the modalities differ, or where nothing of theirs is cached."""
    images = int(np.count_nonzero(is_image))
    own = lengths.image if images else lengths.text
    if images not in (0, is_image.size) or not own.any():
        return None
    rows, none = np.arange(is_image.size), np.zeros_like(lengths.total)
    order, positions = _tensor(rows, device), _tensor(lengths.total.copy(), device)

    def step(held: np.ndarray, slots: torch.Tensor) -> CacheStep:
        shortest, longest = int(held.min()), int(held.max())
        mask = None if shortest == longest else np.arange(longest + 1) <= held[:, None, None, None]
        return CacheStep(
            order,
            slots,
            longest + 1,
            prefill=False,
            queries=1,
            slot=longest if mask is None else None,
            mask=None if mask is None else torch.from_numpy(mask).to(device),
        )

    stream = Stream(NO_BLOCKS, step(own, _tensor(own.copy(), device)))
    empty = Stream(NO_BLOCKS)
    new = np.ones_like(lengths.total)
    return TokenLayout(
        shape=(is_image.size, 1),
        order=order,
        sizes=(is_image.size - images, images),
        positions=positions,
        everything=Stream(NO_BLOCKS, step(lengths.total, positions)),
        text=empty if images else stream,
        image=stream if images else empty,
        new_tokens=CacheLengths(new, none, new) if images else CacheLengths(new, new, none),
    )


def _valid_tokens(attention_mask: torch.Tensor | None, batch: int, length: int) -> np.ndarray | None:
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise InputError(f"attention_mask has the shape {tuple(attention_mask.shape)}, not {(batch, length)}")
    valid = _host(attention_mask)[:, -length:] != 0
    return None if valid.all() else valid


def _segments(rows: np.ndarray, document_ids: torch.Tensor | None, flat: np.ndarray, shape: tuple) -> np.ndarray:
    """A number for each token that starts at 0 and steps up with every new row or document."""
    if document_ids is None:
        changes = np.diff(rows) != 0
    else:
        if tuple(document_ids.shape) != shape:
            raise InputError(f"document_ids has the shape {tuple(document_ids.shape)}, not {shape}")
        documents = _host(document_ids).reshape(-1)[flat]
        new_row, step = np.diff(rows) != 0, np.diff(documents)
        if ((step < 0) & ~new_row).any():
            raise InputError("document_ids decrease along a row; number the documents of a row in their order")
        changes = new_row | (step != 0)
    return np.concatenate(([0], np.cumsum(changes)))


def image_tokens(config: UniXConfig, ids: np.ndarray) -> np.ndarray:
    """Which of the ids are image tokens in the layers, as a mask of their shape."""
    is_image = ids >= config.image_token_offset
    for marker in config.image_marker_ids:
        is_image |= ids == marker
    return is_image


def _counts_within(segments: np.ndarray) -> np.ndarray:
    """Place of each token in its segment; `segments` is sorted."""
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    return np.arange(segments.size) - np.repeat(starts, np.diff(np.append(starts, segments.size)))


def _blocks(segments: np.ndarray, tokens: np.ndarray, device: torch.device) -> AttentionBlocks:
    """Stacks segments of similar length; `tokens` is the index in the stream of each token, segment by segment."""
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    lengths = np.diff(np.append(starts, segments.size))
    shapes: list[tuple[int, int]] = []
    gathers: list[np.ndarray] = []
    scatter = np.empty(segments.size, dtype=np.int64)
    offset = 0
    for members in _similar(lengths):
        longest = int(lengths[members].max())
        columns = np.arange(longest)
        last = lengths[members, None] - 1
        gather = tokens[starts[members, None] + np.minimum(columns, last)]
        real = columns <= last
        scatter[gather[real]] = offset + np.flatnonzero(real)
        shapes.append((members.size, longest))
        gathers.append(gather.reshape(-1))
        offset += gather.size
    gather = np.concatenate(gathers) if gathers else np.empty(0, dtype=np.int64)
    if gather.size == segments.size and np.array_equal(gather, np.arange(gather.size)):
        return AttentionBlocks(tuple(shapes), None, None)
    return AttentionBlocks(tuple(shapes), _tensor(gather, device), _tensor(scatter, device))


def _cut(segments: np.ndarray, tokens: np.ndarray, device: torch.device) -> Segments | None:
    """The stream segment by segment; `tokens` is the index in the stream of each token, segment by segment."""
    if not segments.size:
        return None
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    boundaries = np.append(starts, segments.size).astype(np.int32)
    longest = int(np.diff(boundaries).max())
    if np.array_equal(tokens, np.arange(tokens.size)):
        return Segments(None, None, _tensor(boundaries, device), longest)
    inverse = np.argsort(tokens, kind="stable")
    return Segments(_tensor(tokens, device), _tensor(inverse, device), _tensor(boundaries, device), longest)


def _similar(lengths: np.ndarray) -> Sequence[np.ndarray]:
    """Splits segments into sets whose lengths differ by no more than `BLOCK_FILL` allows."""
    if not lengths.size:
        return []
    if lengths.min() >= BLOCK_FILL * lengths.max():
        return [np.arange(lengths.size)]
    by_length = np.argsort(-lengths, kind="stable")
    descending = lengths[by_length]
    sets, start = [], 0
    while start < descending.size:
        end = int(np.searchsorted(-descending, -BLOCK_FILL * descending[start], side="right"))
        sets.append(np.sort(by_length[start:end]))
        start = end
    return sets


def _cache_step(rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, device: torch.device) -> CacheStep | None:
    """Where the tokens of one stream go in the cache; `rows` is sorted, `lengths` what each row holds before."""
    if not rows.size:
        return None
    within = _counts_within(rows)
    slots = lengths[rows] + within
    present, counts = np.unique(rows, return_counts=True)
    in_stream = np.argsort(tokens, kind="stable")  # from stream order to row-major order
    stored_rows, stored_slots = _tensor(rows[in_stream], device), _tensor(slots[in_stream], device)
    length = int(slots.max()) + 1
    if not lengths.any():
        return CacheStep(stored_rows, stored_slots, length, prefill=True)
    queries = int(counts.max())
    starts = np.cumsum(counts) - counts
    columns = np.minimum(np.arange(queries), counts[:, None] - 1)
    gather = tokens[starts[:, None] + columns]
    seen = lengths[present, None] + columns + 1  # (n, queries) keys that a query sees
    mask = np.arange(length) < seen[..., None]
    scatter = np.empty(rows.size, dtype=np.int64)
    real = np.arange(queries) < counts[:, None]
    scatter[gather[real]] = np.flatnonzero(real)
    identity = gather.size == rows.size and np.array_equal(gather.reshape(-1), np.arange(gather.size))
    return CacheStep(
        stored_rows,
        stored_slots,
        length,
        prefill=False,
        query_rows=None if present.size == lengths.size else _tensor(present, device),
        query_gather=None if identity else _tensor(gather.reshape(-1), device),
        query_scatter=None if identity else _tensor(scatter, device),
        queries=queries,
        slot=int(slots[0]) if identity and rows.size == lengths.size and slots.min() == slots.max() else None,
        mask=None if mask.all() else torch.from_numpy(mask[:, None]).to(device),
    )


def _move(part: Any, device: torch.device | str, options: dict[str, Any]) -> Any:
    if isinstance(part, torch.Tensor):
        return part.to(device, **options)
    if not is_dataclass(part) or isinstance(part, CacheLengths):
        return part
    return replace(part, **{f.name: _move(getattr(part, f.name), device, options) for f in fields(part)})  # type: ignore


def _host(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
