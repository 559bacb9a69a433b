"""Adapters by PEFT: on text layers, image layers or both, with the image rows of embedding and head beside them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.model.conftest import CODES, TEXT
from uni_x.errors import InputError
from uni_x.generation.engine import Engine, Request
from uni_x.model import UniXForCausalLM

MakeModel = Callable[..., UniXForCausalLM]
Batch = tuple[torch.Tensor, torch.Tensor]
TARGETS = {
    "text": r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    "image": r".*layers\.\d+\.image\.(self_attn|mlp)\.\w+_proj",
    "both": r".*layers\.\d+\.(image\.)?(self_attn|mlp)\.\w+_proj",
}
ROWS = list(range(TEXT, TEXT + CODES))
UNI_X = {"preset": "uni-x", "preset_arguments": {"first": 1, "last": 1}, "initializer_range": 0.1}


def adapted(model: UniXForCausalLM, part: str) -> PeftModel:
    rows = {"embed_tokens": ROWS} if model.config.tie_word_embeddings else {"embed_tokens": ROWS, "lm_head": ROWS}
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[part], trainable_token_indices=rows))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", TARGETS)
def test_an_adapter_trains_its_part_alone(
    make_model: MakeModel, mixed: Batch, tmp_path: Path, part: str, tied: bool
) -> None:
    ids, mask = mixed
    labels = ids.masked_fill(mask == 0, -100)
    base = make_model(**UNI_X, tie_word_embeddings=tied)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = adapted(base, part).train()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any("lora" in name for name in trained)
    assert all(re.search(TARGETS[part], name.split(".lora")[0]) for name in trained if "lora" in name)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    model.eval()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make_model(**UNI_X, tie_word_embeddings=tied), tmp_path).eval()
        torch.testing.assert_close(again(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-6)
        request = Request(prompt=ids[0, :5].tolist(), max_new_tokens=4, image=True)
        drawn = Engine(model.base_model.model).generate([request])
        merged = model.merge_and_unload()
        assert isinstance(merged, UniXForCausalLM)
        torch.testing.assert_close(merged(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-4)
        assert Engine(merged).generate([request]) == drawn
    assert set(merged.state_dict()) == set(before)
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
    projections = {name for name in before if re.fullmatch(TARGETS[part] + r"\.weight", name)}
    assert changed == projections | {"model.embed_tokens.weight", "lm_head.weight"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = (merged.state_dict()[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert set(rows) <= set(ROWS)


def test_modules_can_be_trained_whole(make_model: MakeModel, mixed: Batch) -> None:
    ids, mask = mixed
    config = LoraConfig(r=4, target_modules=TARGETS["both"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(make_model(**UNI_X), config).train()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    expected = model.eval()(ids, attention_mask=mask).logits
    torch.testing.assert_close(model.merge_and_unload()(ids, mask).logits, expected, rtol=0, atol=1e-4)


def test_lora_on_the_head_is_refused(make_model: MakeModel) -> None:
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(InputError, match="LoRA on lm_head is not supported"):
        model(torch.tensor([[1, 2]]))


def test_a_vocabulary_resized_by_transformers_still_gives_losses(make_model: MakeModel) -> None:
    model = make_model()
    ids = torch.tensor([[1, 2, TEXT, TEXT + 1]])
    expected = model(ids, labels=ids)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    logits = model(ids).logits
    assert logits.shape[-1] == TEXT + CODES + 12
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, loss)
    assert output.targets_image == expected.targets_image
