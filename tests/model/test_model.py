from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model.conftest import CODES, MARKER, TEXT
from uni_x.errors import ConfigError, InputError
from uni_x.model import UniXCache, UniXConfig, UniXForCausalLM
from uni_x.model.layout import build_layout

Batch = tuple[torch.Tensor, torch.Tensor]
MakeModel = Callable[..., UniXForCausalLM]


def alone(model: UniXForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each row run by itself, without padding."""
    return [model(row[kept == 1][None]).logits[0] for row, kept in zip(ids, mask, strict=True)]


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(make_model: MakeModel, plan: dict[str, Any], mixed: Batch) -> None:
    model, (ids, mask) = make_model(**plan), mixed
    together = model(ids, mask).logits
    for row, expected in enumerate(alone(model, ids, mask)):
        torch.testing.assert_close(together[row][mask[row] == 1], expected, rtol=0, atol=5e-5)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(make_model: MakeModel, plan: dict[str, Any], mixed: Batch) -> None:
    model, (ids, mask) = make_model(**plan, initializer_range=0.1), mixed
    documents = [row[kept == 1] for row, kept in zip(ids, mask, strict=True)]
    document_ids = torch.cat([torch.full_like(document, number) for number, document in enumerate(documents)])
    packed = model(torch.cat(documents)[None], document_ids=document_ids[None]).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone(model, ids, mask)), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(4, *range(5, 21)), (1, 2, 20), (7, 9, 14, 15, 20)])
def test_a_cache_gives_the_logits_of_one_full_forward(
    make_model: MakeModel, plan: dict[str, Any], mixed: Batch, cuts: tuple[int, ...]
) -> None:
    model, (ids, mask) = make_model(**plan), mixed
    full = model(ids, mask).logits
    cache, start, parts = UniXCache(model.config, 3), 0, []
    for end in cuts:
        if mask[:, start:end].any():
            parts.append(model(ids[:, start:end], mask[:, :end], cache=cache).logits)
        start = end
    difference = (torch.cat(parts, dim=1) - full) * mask[..., None]
    assert difference.abs().max() < 5e-5


@torch.no_grad()
def test_the_old_name_of_the_cache_is_taken(make_model: MakeModel, mixed: Batch) -> None:
    model, (ids, _) = make_model(), mixed
    first = model(ids[:, :19], use_cache=True)
    last = model(ids[:, 19:], past_key_values=first.cache).logits[:, 0]
    torch.testing.assert_close(last, model(ids).logits[:, -1], rtol=0, atol=5e-5)


def test_a_token_is_stored_once_a_layer(make_model: MakeModel) -> None:
    model = make_model(preset="uni-x", preset_arguments={"first": 2, "last": 1})
    ids = torch.cat((torch.full((1, 6), 5), torch.full((1, 10), TEXT)), dim=1)
    cache = model(ids, use_cache=True).cache
    per_token = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert cache.bytes() == 16 * per_token * model.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["text", "images"])
def test_one_modality_alone_still_gives_every_weight_a_gradient(
    make_model: MakeModel, plan: dict[str, Any], kind: str
) -> None:
    model = make_model(**plan).train()
    ids = torch.randint(1, MARKER, (2, 7)) if kind == "text" else torch.randint(TEXT, TEXT + CODES, (2, 7))
    model(ids, labels=ids).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_ends_do_not_see_the_other_modality(make_model: MakeModel) -> None:
    model = make_model(preset="uni-x", preset_arguments={"first": 3, "last": 2})
    ids = torch.tensor([[5, 6, MARKER, TEXT, TEXT + 1, 7]])
    changed = ids.clone()
    changed[0, 3:5] = TEXT + 9
    with torch.no_grad():
        before, after = model(ids).logits[0], model(changed).logits[0]
    assert torch.equal(before[[0, 1, 5]], after[[0, 1, 5]])
    assert not torch.equal(before[3:5], after[3:5])


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_by_the_auto_class(make_model: MakeModel, tmp_path: Path, mixed: Batch, tied: bool) -> None:
    model = make_model(preset="uni-x", preset_arguments={"first": 1, "last": 1}, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, UniXForCausalLM)
    assert loaded.config.plan == model.config.plan
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(loaded(*mixed).logits, model(*mixed).logits)
    assert AutoConfig.from_pretrained(tmp_path).preset == "uni-x"


def test_saved_in_shards_and_loaded_in_another_dtype(make_model: MakeModel, tmp_path: Path, mixed: Batch) -> None:
    model = make_model(preset="uni-x", preset_arguments={"first": 1, "last": 1})
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(*mixed).logits, model(*mixed).logits)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
        assert half(*mixed).logits.dtype == torch.bfloat16


def test_spread_by_a_device_map(make_model: MakeModel, tmp_path: Path, mixed: Batch) -> None:
    """Layers left on the disk are fetched when they run; accelerate moves what they are given."""
    model = make_model(preset="uni-x", preset_arguments={"first": 2, "last": 1})
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{index}": ("cpu", "disk")[index % 2] for index in range(5)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert torch.equal(spread(*mixed).logits, model(*mixed).logits)
        torch.testing.assert_close(spread(*mixed, labels=mixed[0]).loss, model(*mixed, labels=mixed[0]).loss)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(spread.generate(*mixed[:1], **settings), model.generate(*mixed[:1], **settings))


def test_a_layout_moves_as_a_whole(make_model: MakeModel, mixed: Batch) -> None:
    config = make_model().config
    layout = build_layout(config, *mixed, cache_lengths=UniXCache(config, 3).lengths).to("meta")
    tensors = [layout.order, layout.positions, layout.everything.blocks.gather, layout.image.cache_step.rows]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_compiled_it_computes_the_same(make_model: MakeModel, mixed: Batch) -> None:
    model, (ids, mask) = (
        make_model(preset="uni-x", preset_arguments={"first": 1, "last": 1}, num_hidden_layers=3),
        mixed,
    )
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, mask).logits, model(ids, mask).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_agrees_with_and_without_the_cache(
    make_model: MakeModel, plan: dict[str, Any], mixed: Batch, beams: int
) -> None:
    model, (ids, mask) = make_model(**plan), mixed
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    cached = model.generate(ids[:, :8], attention_mask=mask[:, :8], **settings)
    plain = model.generate(ids[:, :8], attention_mask=mask[:, :8], use_cache=False, **settings)
    assert torch.equal(cached, plain)


def test_generate_samples_the_same_with_and_without_the_cache(make_model: MakeModel, mixed: Batch) -> None:
    model, (ids, mask) = make_model(preset="uni-x", preset_arguments={"first": 2, "last": 1}), mixed
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(
            model.generate(
                ids[:, :8], attention_mask=mask[:, :8], do_sample=True, top_k=20, max_new_tokens=6, use_cache=use_cache
            )
        )
    assert torch.equal(*drawn)


def test_gradient_checkpointing_gives_the_same_gradients(make_model: MakeModel, mixed: Batch) -> None:
    model, (ids, mask) = make_model(preset="uni-x", preset_arguments={"first": 2, "last": 1}).train(), mixed
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, mask, labels=labels).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, mask, labels=labels).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=0, atol=1e-6)


def test_plans_share_the_names_of_a_plain_llm(make_model: MakeModel) -> None:
    plain = set(make_model(preset="shared").state_dict())
    split = set(make_model(preset="uni-x", preset_arguments={"first": 1, "last": 1}).state_dict())
    assert plain < split
    assert all(".image." in name for name in split - plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, TEXT + CODES + 4]])}, "vocab_size is 188"),
        ({"input_ids": torch.tensor([[1, -1]])}, "ids from -1"),
        ({"input_ids": torch.tensor([1, 2])}, "not (batch, length)"),
        (
            {"input_ids": torch.ones(3, 2, dtype=torch.long), "attention_mask": torch.tensor([[1, 1], [0, 0], [0, 1]])},
            "attention_mask hides every token of row 1",
        ),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.zeros(1, 2), "use_cache": True},
            "attention_mask hides every token of the batch",
        ),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 1)}, "attention_mask has the shape"),
        ({"input_ids": torch.tensor([[1, 2]]), "labels": torch.ones(1, 3)}, "labels has the shape"),
        ({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 500]])}, "labels holds ids"),
        ({"input_ids": torch.tensor([[1, 2]]), "document_ids": torch.tensor([[2, 1]])}, "document_ids decrease"),
        ({"input_ids": torch.tensor([[1, 2]]), "document_ids": torch.tensor([2, 1])}, "document_ids has the shape"),
    ],
)
def test_wrong_input_is_named_before_any_computation(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, torch.Tensor], message: str
) -> None:
    model = make_model()
    monkeypatch.setattr(model.model, "forward", lambda *_: pytest.fail("the layers ran"))
    with pytest.raises(InputError) as caught:
        model(**arguments)
    assert message in str(caught.value)


def test_a_cache_of_another_batch_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(InputError, match="the cache holds 2 rows, input_ids 1"):
        model(torch.tensor([[1]]), cache=UniXCache(model.config, 2))


def test_a_configuration_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="image codes end at id 200"):
        UniXConfig(vocab_size=150, image_token_offset=100, image_codebook_size=100)
    with pytest.raises(ValueError, match="image marker 100 is not a text id"):
        UniXConfig(vocab_size=150, image_token_offset=100, image_codebook_size=50, vision_start_token_id=100)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 65}, "hidden_size 65 is not a multiple of num_attention_heads 4, and there is no head_dim"),
        ({"hidden_size": 36}, "head_dim is 9 .* rotary embeddings need an even one"),
    ],
)
def test_sizes_that_heads_cannot_share_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UniXConfig(num_attention_heads=4, **sizes)
    assert UniXConfig(num_attention_heads=4, head_dim=8, **sizes).head_dim == 8
