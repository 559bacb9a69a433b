"""What a model takes: parameters, floating-point operations a token, memory to train and to serve it.

The formulas count what this package's own layers do and keep (`tests/model/test_size.py` compares them with the
parameters, operations and saved activations of real models).
"""

from dataclasses import dataclass

import torch
from torch import nn

from uni_x.model.causal_lm import UniXForCausalLM
from uni_x.model.config import UniXConfig
from uni_x.model.layers import DecoderLayer
from uni_x.model.loss import CHUNK_BYTES
from uni_x.model.plan import LayerSpec

MOMENT_BYTES = 8  # of AdamW, for each parameter
MASTER_BYTES = 4  # a float32 copy of each weight, where weights are of another type


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


@dataclass(frozen=True)
class TokenOperations:
    """Floating-point operations of a forward pass, a mean over the tokens of a document; training takes three times.

    Attributes:
        text, image: a token of that modality, everything included.
        mean: over all tokens of the document.
    """

    text: float
    image: float
    mean: float


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each device while it trains; `activations` is what layers keep for the backward pass."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


@dataclass(frozen=True)
class ServingMemory:
    """Bytes that weights take, and the cache of all rows."""

    weights: float
    cache: float

    @property
    def total(self) -> float:
        """Both."""
        return self.weights + self.cache


def measure_size(config: UniXConfig) -> ModelSize:
    """Counts the parameters of a configuration without allocating them."""
    with torch.device("meta"):
        model = UniXForCausalLM(config)
    embedding = _count(model.model.embed_tokens)
    head = 0 if config.tie_word_embeddings else _count(model.lm_head)
    layers = tuple(_layer_size(layer) for layer in model.model.layers)
    total = embedding + head + _count(model.model.norm) + sum(la.shared + la.text + la.image for la in layers)
    return ModelSize(total, embedding, head, layers)


def count_operations(config: UniXConfig, length: int, image_share: float = 0.75) -> TokenOperations:
    """Multiplications and additions of the matrix products, in documents of `length` tokens.

    Args:
        config: of the model.
        length: tokens of a document; a token sees half of those that its layer lets it see, on average.
        image_share: share of the tokens that are image tokens, which says how much the ends see.
    """
    head = 2 * config.hidden_size * config.vocab_size
    shares = {"text": 1 - image_share, "image": image_share}
    by_modality = {}
    for modality, share in shares.items():
        operations = float(head)
        for spec in config.layer_specs:
            seen = (length + 1) / 2 if spec.sees == "all" else (length * share + 1) / 2
            operations += 2 * _weights_passed(config, spec, modality)
            operations += 4 * config.num_attention_heads * config.head_dim * seen
        by_modality[modality] = operations
    mean = sum(share * by_modality[modality] for modality, share in shares.items())
    return TokenOperations(by_modality["text"], by_modality["image"], mean)


def training_memory(
    config: UniXConfig,
    tokens: int,
    weight_bytes: int = 4,
    zero_stage: int = 0,
    devices: int = 1,
    checkpointing: bool = False,
    image_share: float = 0.75,
) -> TrainingMemory:
    """Memory on each device with AdamW.

    Args:
        config: of the model.
        tokens: in a forward pass on one device, padding left out.
        weight_bytes: 4 for float32; 2 for bfloat16, where the optimizer keeps float32 weights beside its moments, as
            DeepSpeed does in any case.
        zero_stage: 0; from 1 up the optimizer's state, from 2 up gradients, at 3 weights are divided by `devices`.
        devices: over which they are divided.
        checkpointing: whether layers keep their input alone and run again in the backward pass.
        image_share: share of the tokens that are image tokens, which may have FFNs of another width.
    """
    parameters = measure_size(config).total
    master = 0 if weight_bytes == 4 and not zero_stage else MASTER_BYTES
    kept = [weight_bytes * tokens * _kept_values(config, spec, image_share) for spec in config.layer_specs]
    activations = sum(kept)
    if checkpointing:
        activations = weight_bytes * tokens * config.hidden_size * len(kept) + max(kept)
    # a chunk of logits, and the gradients that the loss hands on
    chunk = min(CHUNK_BYTES, 4 * tokens * config.vocab_size)
    head = chunk + 4 * config.hidden_size * config.vocab_size + weight_bytes * tokens * config.hidden_size * 3
    return TrainingMemory(
        weights=parameters * weight_bytes / (devices if zero_stage >= 3 else 1),
        gradients=parameters * weight_bytes / (devices if zero_stage >= 2 else 1),
        optimizer=parameters * (MOMENT_BYTES + master) / (devices if zero_stage >= 1 else 1),
        activations=activations,
        head=head,
    )


def serving_memory(config: UniXConfig, tokens: int, rows: int, weight_bytes: int = 4) -> ServingMemory:
    """Memory with `rows` sequences of `tokens` tokens in the cache; a guided drawing takes two rows."""
    a_token = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return ServingMemory(measure_size(config).total * weight_bytes, float(weight_bytes * a_token * tokens * rows))


def _weights_passed(config: UniXConfig, spec: LayerSpec, modality: str) -> int:
    """Weights of the matrices that a token of a modality is multiplied with in a layer."""
    width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * width + 2 * kv_width + 3 * sum(_ffn_sizes(config, spec, modality)))


def _ffn_sizes(config: UniXConfig, spec: LayerSpec, modality: str) -> tuple[int, int]:
    """Widths of a token's own FFN and of the one beside it that all tokens pass."""
    own = config.intermediate_size
    if modality == "image" and spec.image_ffn_size is not None:
        own = spec.image_ffn_size
    return own, spec.shared_ffn_size


def _kept_values(config: UniXConfig, spec: LayerSpec, image_share: float) -> float:
    """Numbers that a layer keeps for the backward pass, for each token on average."""
    width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 4 * config.hidden_size + (width + kv_width if config.qk_norm else 0)
    attention = 3 * width + 2 * kv_width  # queries, keys, values, what comes out, and that in the tokens' order
    text, image = (4 * sum(_ffn_sizes(config, spec, modality)) for modality in ("text", "image"))
    ffn = (1 - image_share) * text + image_share * image
    return norms + attention + ffn


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
