"""How many parameters a model has, and how many of them a token of each modality passes."""

from dataclasses import dataclass

import torch
from torch import nn

from uni_x.model.causal_lm import UniXForCausalLM
from uni_x.model.config import UniXConfig
from uni_x.model.layers import DecoderLayer


@dataclass(frozen=True)
class LayerSize:
    """Parameters of one layer: what both modalities use, and what each has of its own."""

    shared: int
    text: int
    image: int


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model. `active_*` leaves out what the other modality has of its own."""

    total: int
    embedding: int
    head: int
    layers: tuple[LayerSize, ...]

    @property
    def active_text(self) -> int:
        """Parameters that a text token passes, embedding and head included."""
        return self.total - sum(layer.image for layer in self.layers)

    @property
    def active_image(self) -> int:
        """Parameters that an image token passes, embedding and head included."""
        return self.total - sum(layer.text for layer in self.layers)


def measure_size(config: UniXConfig) -> ModelSize:
    """Counts the parameters of a configuration without allocating them."""
    with torch.device("meta"):
        model = UniXForCausalLM(config)
    embedding = _count(model.model.embed_tokens)
    head = 0 if config.tie_word_embeddings else _count(model.lm_head)
    layers = tuple(_layer_size(layer) for layer in model.model.layers)
    total = embedding + head + _count(model.model.norm) + sum(la.shared + la.text + la.image for la in layers)
    return ModelSize(total, embedding, head, layers)


def _layer_size(layer: DecoderLayer) -> LayerSize:
    own = dict(layer.image.named_parameters()) if layer.image is not None else {}
    separate_ffn = layer.spec.ffn == "separate"
    text = sum(
        parameter.numel()
        for name, parameter in layer.named_parameters()
        if name in own or (separate_ffn and name.startswith("mlp."))
    )
    image = sum(parameter.numel() for parameter in own.values())
    return LayerSize(_count(layer) - text - image, text, image)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
