"""Causal attention over one stream of tokens, with and without a cache.

Without a cache there are two backends, chosen by what is there: on CUDA in half precision torch's flash attention for
segments of any length (`torch.nn.attention.varlen`), everywhere else SDPA on blocks of segments of similar length.
Neither makes a mask of length squared.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from uni_x.model.cache import Store
from uni_x.model.layout import AttentionBlocks, CacheStep, Segments, Stream

VARLEN_DTYPES = (torch.bfloat16, torch.float16)
CAUSAL = (-1, 0)  # window: everything before, nothing behind


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, stream: Stream, store: Store | None
) -> torch.Tensor:
    """Attention of each token over the tokens of its stream that come before it in its document, and itself.

    Args:
        queries: `(tokens, heads, head_dim)`.
        keys, values: `(tokens, kv_heads, head_dim)`.
        stream: how the tokens are cut into segments.
        store: what earlier calls have left, None where no cache is in use.

    Returns:
        `(tokens, heads * head_dim)`.
    """
    if queries.shape[0] == 0:
        # keeps every weight in the graph, so that gradients exist (as zeros) on ranks without such tokens
        return (queries + (keys.sum() + values.sum())).flatten(1)
    step = stream.cache_step
    if store is not None and step is not None:
        store.append(keys, values, step)
        if not step.prefill:
            return _attend_store(queries, store, step)
    if stream.segments is not None and queries.dtype in VARLEN_DTYPES and (kernel := varlen_kernel()) is not None:
        return _attend_segments(queries, keys, values, stream.segments, kernel)
    return _attend_blocks(queries, keys, values, stream.blocks)


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """torch's attention over segments of any length; None where this torch lacks it, or lacks grouped queries in it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _attend_segments(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segments: Segments,
    kernel: Callable[..., Any],
) -> torch.Tensor:
    grouped = queries.shape[1] != keys.shape[1]
    if segments.order is not None:
        queries, keys, values = (x.index_select(0, segments.order) for x in (queries, keys, values))
    bounds, longest = segments.boundaries, segments.longest
    output = kernel(
        queries, keys, values, bounds, bounds, longest, longest, window_size=CAUSAL, enable_gqa=grouped
    ).flatten(1)
    return output if segments.inverse is None else output.index_select(0, segments.inverse)


def _attend_blocks(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: AttentionBlocks
) -> torch.Tensor:
    grouped = queries.shape[1] != keys.shape[1]
    if blocks.gather is not None:
        queries, keys, values = (x.index_select(0, blocks.gather) for x in (queries, keys, values))
    counts = [segments * length for segments, length in blocks.shapes]
    outputs = []
    for shape, q, k, v in zip(
        blocks.shapes, queries.split(counts), keys.split(counts), values.split(counts), strict=True
    ):
        # (segments * length, heads, head_dim) -> (segments, heads, length, head_dim)
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if blocks.scatter is None else output.index_select(0, blocks.scatter)


def _attend_store(queries: torch.Tensor, store: Store, step: CacheStep) -> torch.Tensor:
    keys, values = store.read(step)
    grouped = queries.shape[1] != keys.shape[1]
    if step.query_gather is not None:
        queries = queries.index_select(0, step.query_gather)
    if step.queries == 1:
        # heads that share keys are as good as queries of one head, and need no copies of the keys
        q = queries.unflatten(1, (keys.shape[1], -1))  # (n, kv_heads, heads / kv_heads, head_dim)
        output = _attend_by_products(q, keys, values, step.mask).flatten(1)
        return output if step.query_scatter is None else output.index_select(0, step.query_scatter)
    q = queries.unflatten(0, (-1, step.queries)).transpose(1, 2)  # (n, heads, queries, head_dim)
    output = scaled_dot_product_attention(q, keys, values, attn_mask=step.mask, enable_gqa=grouped)
    output = output.transpose(1, 2).flatten(2).flatten(0, 1)
    return output if step.query_scatter is None else output.index_select(0, step.query_scatter)


def _attend_by_products(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of a few queries a head; on CPUs two plain products take two thirds of the time of SDPA's kernel."""
    if queries.device.type != "cpu" or torch.is_grad_enabled():
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ values
