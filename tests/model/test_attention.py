"""The backend for CUDA, whose kernel needs a GPU: a plain function with its documented meaning stands in for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from uni_x.model import UniXForCausalLM, attention, layout

MakeModel = Callable[..., UniXForCausalLM]
Batch = tuple[torch.Tensor, torch.Tensor]


def stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    assert window_size == (-1, 0)
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    counts = cu_seq_q.diff().tolist()
    assert max(counts) == max_q == max_k
    outputs = []
    for q, k, v in zip(*(x.transpose(0, 1).split(counts, dim=1) for x in (query, key, value)), strict=True):
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def test_segments_give_what_blocks_give(
    make_model: MakeModel, plan: dict[str, Any], mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, mask) = make_model(**plan), mixed
    documents = torch.zeros_like(ids)
    documents[:, 9:] = 1
    with torch.no_grad():
        expected = model(ids, mask, document_ids=documents).logits
        cached = model(ids, mask, use_cache=True)
        monkeypatch.setattr(layout, "SEGMENT_DEVICES", {"cpu"})
        monkeypatch.setattr(attention, "VARLEN_DTYPES", (torch.float32,))
        calls = []
        monkeypatch.setattr(attention, "varlen_kernel", lambda: lambda *a, **k: calls.append(1) or stand_in(*a, **k))
        torch.testing.assert_close(model(ids, mask, document_ids=documents).logits, expected, rtol=0, atol=5e-5)
        again = model(ids, mask, use_cache=True)
        torch.testing.assert_close(again.logits, cached.logits, rtol=0, atol=5e-5)
        following = torch.full((3, 1), 5)
        torch.testing.assert_close(
            model(following, cache=again.cache).logits, model(following, cache=cached.cache).logits, rtol=0, atol=5e-5
        )
    assert calls


def test_this_torch_has_the_kernel_with_the_options_that_are_used() -> None:
    assert attention.varlen_kernel() is not None


def test_images_alone_leave_the_text_stream_without_segments(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SEGMENT_DEVICES", {"cpu"})
    built = layout.build_layout(make_model().config, torch.full((1, 4), 130))
    assert built.text.segments is None
    assert built.image.segments is not None
    assert built.image.segments.boundaries.tolist() == [0, 4]
