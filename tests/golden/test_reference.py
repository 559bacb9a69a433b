"""Checkpoints in the published layout give the published logits, losses and gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.conftest import GOLDEN, folders
from uni_x.convert.reference import load_reference, rename
from uni_x.errors import DataError
from uni_x.model import UniXForCausalLM

TOLERANCE = 1e-4
PREFILL = 5
TRAIN = GOLDEN / "published" / "train.json"


def incremental(model: UniXForCausalLM, ids: torch.Tensor, mask: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of a prefill and of one token at a time after it."""
    output = model(ids[:, :prefill], mask[:, :prefill], use_cache=True)
    parts = [output.logits]
    for end in range(prefill + 1, ids.shape[1] + 1):
        parts.append(model(ids[:, end - 1 : end], mask[:, :end], cache=output.cache).logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("folder", folders("reference"), ids=lambda folder: folder.name)
def test_full_and_cached_logits(folder: Path) -> None:
    model, golden = load_reference(folder), load_file(folder / "golden.safetensors")
    cases = [name.removesuffix(".ids") for name in golden if name.endswith(".ids")]
    assert cases
    for case in cases:
        ids = golden[f"{case}.ids"].long().reshape(1, -1)
        mask = torch.ones_like(ids)
        full = golden[f"{case}.logits"].reshape(1, ids.shape[1], -1)
        torch.testing.assert_close(model(ids).logits, full, rtol=0, atol=TOLERANCE)
        cached = golden[f"{case}.cached_logits"].reshape(1, -1, full.shape[-1])
        ours = incremental(model, ids, mask, PREFILL)[:, -cached.shape[1] :]
        torch.testing.assert_close(ours, cached, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("folder", folders("published"), ids=lambda folder: folder.name)
def test_batches_with_padding(folder: Path) -> None:
    model, golden = load_reference(folder), load_file(folder / "io.safetensors")
    cases = json.loads((folder / "cases.json").read_text())
    for case, facts in cases.items():
        if f"{case}.input_ids" not in golden:
            continue  # the published code refuses this one
        ids, mask = golden[f"{case}.input_ids"].long(), golden[f"{case}.attention_mask"].long()
        difference = (model(ids, mask).logits - golden[f"{case}.logits"]) * mask[..., None]
        assert difference.abs().max() < TOLERANCE, case
        start = facts["prefill"] - 1
        ours = incremental(model, ids, mask, facts["prefill"])[:, start:]
        difference = (ours - golden[f"{case}.inc_logits"]) * mask[:, start:, None]
        assert difference.abs().max() < TOLERANCE, case


def packed_results() -> dict[str, dict[str, Any]]:
    if not TRAIN.is_file():
        return {}
    results = json.loads(TRAIN.read_text())["results"]
    return {name: result["isolated"] for name, result in results.items() if "isolated" in result}


@pytest.mark.parametrize("name", packed_results())
def test_packed_documents_have_the_published_losses_and_gradients(name: str) -> None:
    model = load_reference(GOLDEN / "published" / name).train()
    golden, expected = load_file(TRAIN.with_suffix(".safetensors")), packed_results()[name]
    ids, labels, documents = (golden[part].long().reshape(1, -1) for part in ("input_ids", "labels", "attention_mask"))
    logits = golden[f"{name}.isolated.logits"].reshape(1, ids.shape[1], -1)
    torch.testing.assert_close(model(ids, document_ids=documents).logits, logits, rtol=0, atol=TOLERANCE)
    output = model(ids, document_ids=documents, labels=labels)
    assert output.loss.item() == pytest.approx(expected["loss"], abs=TOLERANCE)
    assert (output.loss_text + output.loss_image).item() == pytest.approx(expected["loss_sum"], abs=1e-3)
    divided = model(ids, document_ids=documents, labels=labels, num_items_in_batch=100).loss
    assert divided.item() == pytest.approx(expected["loss_num_items_100"], abs=TOLERANCE)
    output.loss.backward()
    norms = {rename(key, model.config): value for key, value in expected["grad_norms"].items()}
    for key, weight in model.named_parameters():
        assert weight.grad.norm().item() == pytest.approx(norms[key], abs=TOLERANCE), key


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a checkpoint holds"):
        load_reference(tmp_path)
