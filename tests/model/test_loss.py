from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.model.conftest import CODES, TEXT
from uni_x.model import UniXForCausalLM, loss

Batch = tuple[torch.Tensor, torch.Tensor]
MakeModel = Callable[..., UniXForCausalLM]


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100  # nothing predicts the first token of a row
    return labels


def gradients(model: UniXForCausalLM, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


class LigerStandIn:
    """Liger's kernel needs a GPU; this has its documented meaning: sums, with the z-loss inside and apart."""

    def __init__(self, reduction: str, lse_square_scale: float, return_z_loss: bool, accum_dtype: torch.dtype):
        assert (reduction, return_z_loss, accum_dtype) == ("sum", True, torch.float32)
        self.scale = lse_square_scale

    def __call__(self, lin_weight: torch.Tensor, _input: torch.Tensor, target: torch.Tensor) -> SimpleNamespace:
        logits = _input @ lin_weight.t()
        z_loss = self.scale * logits.logsumexp(-1).square().sum()
        return SimpleNamespace(loss=cross_entropy(logits, target, reduction="sum") + z_loss, z_loss=z_loss)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26, "liger"])
@pytest.mark.parametrize("head", ["full", "by_modality"])
def test_chunks_give_the_loss_and_gradients_of_plain_cross_entropy(
    make_model: MakeModel, mixed: Batch, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int | str, head: str
) -> None:
    if chunk_bytes == "liger":
        monkeypatch.setattr(loss, "LIGER_DEVICES", {"cpu"})
        monkeypatch.setattr(loss, "liger_loss", lambda: LigerStandIn)
    else:
        monkeypatch.setattr(loss, "CHUNK_BYTES", chunk_bytes)
    model = make_model(
        preset="uni-x",
        preset_arguments={"first": 1, "last": 1},
        head=head,
        text_loss_weight=1.5,
        image_loss_weight=0.5,
        z_loss=0.01,
    ).train()
    ids, mask = mixed
    labels = labels_of(ids, mask)
    output = model(ids, mask, labels=labels)

    targets = labels[:, 1:]
    logits, targets = model(ids, mask).logits[:, :-1][targets != -100], targets[targets != -100]
    is_code = (targets >= TEXT) & (targets < TEXT + CODES)
    total, sums = torch.zeros(()), {}
    for name, chosen, weight, (first, last) in (
        ("text", ~is_code, 1.5, (0, TEXT)),
        ("image", is_code, 0.5, (TEXT, TEXT + CODES)),
    ):
        first, last = (first, last) if head == "by_modality" else (0, model.config.vocab_size)
        part = logits[chosen][:, first:last]
        sums[name] = cross_entropy(part, targets[chosen] - first, reduction="sum")
        total = total + weight * (sums[name] + 0.01 * part.logsumexp(-1).square().sum())
    expected = total / len(targets)

    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.loss_text, sums["text"])
    torch.testing.assert_close(output.loss_image, sums["image"])
    assert (output.targets_text, output.targets_image) == (int((~is_code).sum()), int(is_code.sum()))
    ours, plain = gradients(model, output.loss), gradients(model, expected)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_the_divisor_can_be_the_count_of_all_ranks(make_model: MakeModel, mixed: Batch) -> None:
    model, (ids, mask) = make_model().train(), mixed
    labels = labels_of(ids, mask)
    plain, divided = model(ids, mask, labels=labels), model(ids, mask, labels=labels, num_items_in_batch=7)
    count = plain.targets_text + plain.targets_image
    torch.testing.assert_close(divided.loss * 7, plain.loss * count)


def test_no_target_at_all_is_a_loss_of_zero(make_model: MakeModel) -> None:
    model = make_model().train()
    output = model(torch.tensor([[1, 2, TEXT]]), labels=torch.full((1, 3), -100))
    output.loss.backward()
    assert output.loss == 0
    assert all(not weight.grad.any() for weight in model.parameters())


def test_no_gradient_is_worked_out_where_none_is_asked_for(
    make_model: MakeModel, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model().train()
    expected = model(*mixed, labels=mixed[0]).loss
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        torch.testing.assert_close(model(*mixed, labels=mixed[0]).loss, expected.detach())


def test_a_second_backward_is_refused_instead_of_wrong(make_model: MakeModel, mixed: Batch) -> None:
    total = make_model().train()(*mixed, labels=mixed[0]).loss
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs through it once"):
        total.backward()


def test_a_range_of_the_vocabulary_is_a_part_of_all_logits(make_model: MakeModel, mixed: Batch) -> None:
    model = make_model()
    with torch.no_grad():
        part = model(*mixed, vocabulary_range=(TEXT, TEXT + CODES), logits_to_keep=2).logits
        full = model(*mixed).logits
    torch.testing.assert_close(part, full[:, -2:, TEXT : TEXT + CODES])
