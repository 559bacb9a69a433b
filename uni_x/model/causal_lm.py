"""`UniXModel` and `UniXForCausalLM`: the one model of every plan, native to transformers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from uni_x.errors import InputError
from uni_x.model.cache import UniXCache
from uni_x.model.config import UniXConfig
from uni_x.model.layers import DecoderLayer, RMSNorm, RotaryEmbedding
from uni_x.model.layout import TokenLayout, build_layout
from uni_x.model.loss import LanguageModelHead, LossOptions, Targets, apply_head

IGNORED = -100


@dataclass
class UniXOutput(CausalLMOutputWithPast):
    """Output of `UniXForCausalLM`.

    Attributes:
        loss: the weighted losses of text and image, divided by the number of targets (or `num_items_in_batch`).
        logits: `(batch, length, vocab_size)`; None where labels were given, zeros at padding.
        cache: where `use_cache`.
        loss_text, loss_image: sums of cross entropy over the text targets and over the image codes, in nats.
        targets_text, targets_image: how many there are of each.
        target_losses: `(batch, length)` cross entropy at each position that has a target, 0 elsewhere; None where
            Liger's kernel computes the loss, which gives sums alone.
    """

    cache: UniXCache | None = None  # type: ignore[assignment]
    loss_text: torch.Tensor | None = None
    loss_image: torch.Tensor | None = None
    targets_text: torch.Tensor | None = None
    targets_image: torch.Tensor | None = None
    target_losses: torch.Tensor | None = None


class UniXPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the model."""

    config: UniXConfig
    config_class = UniXConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _supports_sdpa = True


class UniXModel(UniXPreTrainedModel):
    """Embedding, decoder layers and final norm, over the flat tokens of a layout."""

    def __init__(self, config: UniXConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, spec) for spec in config.layer_specs])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, token_ids: torch.Tensor, layout: TokenLayout, cache: UniXCache | None = None) -> torch.Tensor:
        """`(tokens,)` ids in the order of the layout to hidden states `(tokens, hidden_size)`."""
        x = self.embed_tokens(token_ids)
        rotary = self.rotary(layout.positions, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, layout, rotary, cache.layers[index] if cache is not None else None)
        return self.norm(x)


class UniXForCausalLM(UniXPreTrainedModel, GenerationMixin):
    """A unified model of text and images: `UniXModel` with a head over the whole vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: UniXConfig):
        super().__init__(config)
        self.model = UniXModel(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: UniXCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        vocabulary_range: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> UniXOutput:
        """Logits, or losses where labels are given.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 0 for padding on either side; with a cache it may cover the past too.
            position_ids: `(batch, length)`; counted within each document where missing.
            document_ids: `(batch, length)`, not decreasing along a row: tokens see their own document alone.
            labels: `(batch, length)` as input_ids, -100 where there is no target; shifted by one in here.
            cache: what an earlier call returned. `past_key_values` is taken as its old name.
            use_cache: whether to fill a cache, a new one where none is given.
            logits_to_keep: logits of the last so many positions, 0 for all, or the positions themselves.
            num_items_in_batch: number of targets that the loss is divided by, over all ranks and accumulation steps.
            vocabulary_range: first id, and the one after the last, of the logits that are wanted; None for all.

        Raises:
            InputError: for ids, masks, labels or documents that do not fit.
        """
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        if use_cache and cache is None:
            cache = UniXCache(self.config, input_ids.shape[0])
        if cache is not None and not isinstance(cache, UniXCache):
            raise InputError(f"this model keeps its own cache: pass a UniXCache, not a {type(cache).__name__}")
        if cache is not None and cache.rows != input_ids.shape[0]:
            raise InputError(f"the cache holds {cache.rows} rows, input_ids {input_ids.shape[0]}")
        layout = build_layout(
            self.config, input_ids, attention_mask, position_ids, document_ids, cache.lengths if cache else None
        )
        targets = None if labels is None else self._targets(labels, layout)
        hidden = self.model(layout.flatten(input_ids), layout, cache)
        if cache is not None:
            cache.advance(layout)
        if targets is not None:
            return self._losses(hidden, targets, layout, num_items_in_batch, cache)
        logits = self._logits(hidden, layout, logits_to_keep, vocabulary_range)
        return UniXOutput(logits=logits, cache=cache)

    def _logits(
        self,
        hidden: torch.Tensor,
        layout: TokenLayout,
        keep: int | torch.Tensor,
        vocabulary_range: tuple[int, int] | None,
    ) -> torch.Tensor:
        if isinstance(keep, int) and keep == 0:
            return layout.unflatten(self._run_head(hidden, vocabulary_range=vocabulary_range))
        kept = layout.unflatten(hidden)
        kept = kept[:, -keep:] if isinstance(keep, int) else kept[:, keep]
        return self._run_head(kept, vocabulary_range=vocabulary_range)

    def _run_head(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        head = self.lm_head
        if hasattr(head, "lora_A"):
            raise InputError("LoRA on lm_head is not supported; train its image rows by trainable_token_indices")
        if type(head) is nn.Linear or hasattr(head, "token_adapter"):
            # resized by transformers, or given rows to train by PEFT: these know logits alone, but have their weight
            return apply_head(hidden, head.weight, *arguments, **options)
        return head(hidden, *arguments, **options)

    def _losses(
        self,
        hidden: torch.Tensor,
        targets: Targets,
        layout: TokenLayout,
        items: torch.Tensor | int | None,
        cache: UniXCache | None,
    ) -> UniXOutput:
        config = self.config
        first = config.image_token_offset
        options = LossOptions(
            codes=(first, first + config.image_codebook_size),
            by_modality=config.head == "by_modality",
            text_weight=config.text_loss_weight,
            image_weight=config.image_loss_weight,
            z_loss=config.z_loss,
        )
        total, loss_text, loss_image, losses = self._run_head(hidden, targets, options)
        counts = [torch.tensor(size, device=total.device) for size in targets.sizes]
        divisor = max(1, sum(targets.sizes)) if items is None else torch.as_tensor(items).clamp(min=1)
        return UniXOutput(
            loss=total / divisor,
            cache=cache,
            loss_text=loss_text,
            loss_image=loss_image,
            targets_text=counts[0],
            targets_image=counts[1],
            target_losses=None if losses.shape != targets.ids.shape else _in_place(losses, targets, layout),
        )

    @torch.compiler.disable
    def _targets(self, labels: torch.Tensor, layout: TokenLayout) -> Targets:
        """The positions with a target, in the order of the layout, those with a text target first."""
        if tuple(labels.shape) != layout.shape:
            raise InputError(f"labels has the shape {tuple(labels.shape)}, input_ids {layout.shape}")
        host = labels.detach().cpu().numpy()
        following = np.full_like(host, IGNORED)
        following[:, :-1] = host[:, 1:]
        ids = following.reshape(-1)[layout.order.cpu().numpy()]
        rows = np.flatnonzero(ids != IGNORED)
        ids = ids[rows]
        if ids.size and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise InputError(
                f"labels holds ids from {ids.min()} to {ids.max()}, vocab_size is {self.config.vocab_size}"
            )
        first = self.config.image_token_offset
        is_code = (ids >= first) & (ids < first + self.config.image_codebook_size)
        if self.config.head == "by_modality" and ((ids >= first) & ~is_code).any():
            raise InputError("labels holds ids behind the last image code, which the head by_modality cannot predict")
        order = np.argsort(is_code, kind="stable")
        codes = int(is_code.sum())
        rows_and_ids = torch.from_numpy(np.stack((rows[order], ids[order]))).to(labels.device)
        return Targets(rows_and_ids[0], rows_and_ids[1], (ids.size - codes, codes))

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """`generate()` asks for its cache here; ours is made by the first forward."""
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["use_cache"] = True


def _in_place(losses: torch.Tensor, targets: Targets, layout: TokenLayout) -> torch.Tensor:
    """`(targets,)` losses to `(batch, length)`, each where its target is predicted."""
    of_tokens = losses.new_zeros(layout.order.shape[0])
    return layout.unflatten(of_tokens.index_copy(0, targets.rows, losses))
