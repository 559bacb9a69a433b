from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from tests.model.conftest import CODES, MARKER, TEXT
from uni_x.generation.engine import Engine, Request
from uni_x.generation.packed import MAX_ROWS, PackedWeights
from uni_x.generation.sampling import Sampling
from uni_x.model import UniXConfig, UniXForCausalLM

MakeModel = Callable[..., UniXForCausalLM]
RANGE = (TEXT, TEXT + CODES)


@pytest.fixture
def model() -> UniXForCausalLM:
    torch.manual_seed(0)
    config = UniXConfig(
        vocab_size=TEXT + CODES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
        attention_bias=True,
        preset="uni-x",
        preset_arguments={"first": 1, "last": 1},
        image_token_offset=TEXT,
        image_codebook_size=CODES,
        vision_start_token_id=MARKER,
    )
    model = UniXForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def step_logits(model: UniXForCausalLM, rows: int, first: int, last: int) -> torch.Tensor:
    """Logits of two steps after a prompt, each of tokens from a range of ids."""
    generator = torch.Generator().manual_seed(rows)
    steps = [torch.randint(first, last, (rows, 1), generator=generator) for _ in range(2)]
    prompt = torch.tensor([[3, 4, MARKER, TEXT]]).expand(rows, -1)
    cache = model(prompt, use_cache=True).cache
    return torch.stack([model(ids, cache=cache, vocabulary_range=RANGE).logits for ids in steps])


@pytest.mark.parametrize(("first", "last"), [(10, TEXT), (TEXT, TEXT + CODES)], ids=["text", "image"])
@pytest.mark.parametrize("rows", [1, 8, MAX_ROWS, MAX_ROWS + 1])
def test_packed_weights_give_the_same_logits(model: UniXForCausalLM, rows: int, first: int, last: int) -> None:
    packed = PackedWeights(model)
    if not packed.is_possible:
        pytest.skip("this torch has no packed product for this CPU")
    with torch.inference_mode():
        expected = step_logits(model, rows, first, last)
        with packed.in_use():
            assert "forward" in vars(model.lm_head)
            assert "forward" in vars(model.model.layers[0])
            ours = step_logits(model, rows, first, last)
            assert model(torch.tensor([[3]])).logits.shape[-1] == TEXT + CODES
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_every_plan_decodes_on_packed_weights(make_model: MakeModel, plan: dict[str, Any]) -> None:
    model = make_model(**plan)
    packed = PackedWeights(model)
    if not packed.is_possible:
        pytest.skip("this torch has no packed product for this CPU")
    with torch.inference_mode():
        for first, last in ((10, TEXT), (TEXT, TEXT + CODES)):
            expected = step_logits(model, 3, first, last)
            with packed.in_use():
                torch.testing.assert_close(step_logits(model, 3, first, last), expected, rtol=1e-5, atol=2e-5)
    assert all(dense is not None for dense in packed._layers.values())
    assert len(packed._layers) == 2 * model.config.num_hidden_layers


def test_weights_that_have_changed_are_packed_anew(model: UniXForCausalLM) -> None:
    engine = Engine(model)
    request = Request([3, 4, MARKER], 12, image=True, sampling=Sampling(temperature=0.0))
    before = engine.generate([request])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.tensor([[3, 4, MARKER, *range(TEXT, TEXT + 12)]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = engine.generate([request])
    assert after != before
    assert after == Engine(model).generate([request])


def test_weights_changed_behind_autograds_back_are_seen(model: UniXForCausalLM) -> None:
    engine = Engine(model)
    request = Request([3, 4, MARKER], 12, image=True, sampling=Sampling(temperature=0.0))
    before = engine.generate([request])
    projection = model.model.layers[0].image.self_attn.q_proj.weight
    projection.data += torch.randn_like(projection)
    model.lm_head.weight.data[TEXT : TEXT + CODES] = torch.randn(CODES, 32)
    after = engine.generate([request])
    assert after != before
    assert after == Engine(model).generate([request])


def test_hooks_of_other_libraries_are_left_alone(model: UniXForCausalLM) -> None:
    add_hook_to_module(model.lm_head, ModelHook())
    hooked = vars(model.lm_head)["forward"]
    Engine(model).generate([Request([3, 4, MARKER], 2, image=True, sampling=Sampling(temperature=0.0))])
    assert vars(model.lm_head)["forward"] is hooked


def test_other_dtypes_are_left_alone(model: UniXForCausalLM) -> None:
    packed = PackedWeights(model.to(torch.bfloat16))
    assert not packed.is_possible
    with packed.in_use():
        assert not any("forward" in vars(module) for module in model.modules())
