"""Causal attention over one stream of tokens, with and without a cache."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from uni_x.model.cache import Store
from uni_x.model.layout import AttentionBlocks, CacheStep, Stream


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
    if store is None or step is None:
        return _attend_blocks(queries, keys, values, stream.blocks)
    store.append(keys, values, step)
    if step.prefill:
        return _attend_blocks(queries, keys, values, stream.blocks)
    return _attend_store(queries, store, step)


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
    q = queries.unflatten(0, (-1, step.queries)).transpose(1, 2)  # (n, heads, queries, head_dim)
    output = scaled_dot_product_attention(q, keys, values, attn_mask=step.mask, enable_gqa=grouped)
    output = output.transpose(1, 2).flatten(2).flatten(0, 1)
    return output if step.query_scatter is None else output.index_select(0, step.query_scatter)
