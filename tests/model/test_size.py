from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.model.conftest import MARKER, TEXT
from uni_x.model import UniXForCausalLM
from uni_x.model.layout import build_layout
from uni_x.model.size import count_operations, measure_size, serving_memory, training_memory

MakeModel = Callable[..., UniXForCausalLM]
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "initializer_range": 0.02}


def document(text: int, codes: int) -> torch.Tensor:
    return torch.cat((torch.full((1, text), 5), torch.full((1, codes), TEXT + 3)), dim=1)


def test_parameters_are_those_of_the_model(make_model: MakeModel, plan: dict[str, Any]) -> None:
    model = make_model(**plan)
    size = measure_size(model.config)
    assert size.total == model.num_parameters()
    own = sum(weight.numel() for name, weight in model.named_parameters() if ".image." in name)
    assert size.active_text == size.total - own


@torch.no_grad()
def test_operations_are_those_that_torch_counts(make_model: MakeModel, plan: dict[str, Any]) -> None:
    """With plain matrix products attention computes the whole square of a stream, and torch's counter sees it."""
    model = make_model(**plan, **SIZES)
    text, codes = 40, 24
    config, length = model.config, text + codes
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(document(text, codes))
    counted = counter.get_total_flops()
    ours = count_operations(config, length, codes / length)
    unseen = 0.0
    for spec in config.layer_specs:
        streams = [length] if spec.sees == "all" else [text, codes]
        unseen += sum(4 * config.num_attention_heads * config.head_dim * n * (n - (n + 1) / 2) for n in streams)
    assert ours.mean * length == pytest.approx(counted - unseen, rel=1e-9)
    assert ours.mean * length == pytest.approx(text * ours.text + codes * ours.image, rel=1e-9)


def test_activations_are_those_that_autograd_keeps(make_model: MakeModel, plan: dict[str, Any]) -> None:
    model = make_model(**plan, **SIZES).train()
    ids = document(160, 96)
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layout = build_layout(model.config, ids)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model(layout.flatten(ids), layout)
    expected = training_memory(model.config, ids.numel(), image_share=96 / 256).activations
    assert sum(kept.values()) == pytest.approx(expected, rel=0.05)


def test_memory_is_divided_as_zero_does(make_model: MakeModel) -> None:
    config = make_model(preset="uni-x", preset_arguments={"first": 1, "last": 1}).config
    parameters = measure_size(config).total
    whole = training_memory(config, 100, weight_bytes=2)
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * parameters, 2 * parameters, 12 * parameters)
    second, third = (training_memory(config, 100, 2, zero_stage=stage, devices=4) for stage in (2, 3))
    assert (second.weights, second.gradients, second.optimizer) == (2 * parameters, parameters / 2, 3 * parameters)
    assert third.weights == parameters / 2
    assert training_memory(config, 100, checkpointing=True).activations < training_memory(config, 100).activations


def test_serving_counts_the_cache_that_a_model_fills(make_model: MakeModel, plan: dict[str, Any]) -> None:
    model = make_model(**plan)
    ids = torch.cat((document(6, 10), torch.tensor([[MARKER]])), dim=1)
    cache = model(ids, use_cache=True).cache
    memory = serving_memory(model.config, tokens=17, rows=1)
    assert memory.cache == cache.bytes()
    assert memory.weights == 4 * model.num_parameters()
