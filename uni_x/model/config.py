"""`UniXConfig`: the sizes of the backbone, its plan, and how the vocabulary is divided."""

from typing import Any, Literal

from transformers import PreTrainedConfig

from uni_x.errors import ConfigError
from uni_x.model.plan import Plan, build_plan, plan_from_dicts, plan_to_dicts


class UniXConfig(PreTrainedConfig):
    """Configuration of a `UniXForCausalLM`.

    The backbone is that of Qwen2/2.5 (`attention_bias`), Qwen3 (`qk_norm`) and Llama (neither). Text ids lie below
    `image_token_offset`; image code c has the id `image_token_offset + c`, for c below `image_codebook_size`.

    Args:
        plan: one mapping a layer (see `uni_x.model.plan.LayerSpec`), or mappings for ranges of layers, which are
            spelled out. Built from `preset` where it is missing.
        preset: name of a preset plan, and `preset_arguments` its arguments; kept for people to read.
        attention_bias: biases on the query, key and value projections.
        qk_norm: RMS norms on queries and keys, per head.
        image_token_offset: id of image code 0; None puts the codes behind a text-only vocabulary.
        image_codebook_size: number of image codes; 0 is a model of text alone.
        image_marker_ids: text ids that travel with the image tokens, `vision_start_token_id` among them.
        image_grid: rows and columns of codes in a picture.
        head: the softmax of the loss runs over the `full` vocabulary or, `by_modality`, over that of the target.
        text_loss_weight, image_loss_weight: weights of the two losses in their sum.
        z_loss: weight of the squared log-partition (PaLM, section 5), 0 for none.
        rendering: how samples were laid out in training (see `uni_x.recipe.RenderOptions`), for prompts to match.
        image_sampling: how pictures are drawn where the caller does not say (see `uni_x.recipe.ImageSampling`).
    """

    model_type = "uni_x"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012

    # a None that is typed otherwise is settled in __post_init__
    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    qk_norm: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True
    plan: list[dict[str, Any]] = None  # type: ignore[assignment]
    preset: str | None = None
    preset_arguments: dict[str, Any] | None = None
    image_token_offset: int = None  # type: ignore[assignment]
    image_codebook_size: int = 0
    image_marker_ids: list[int] = None  # type: ignore[assignment]
    image_grid: list[int] | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    head: Literal["full", "by_modality"] = "full"
    text_loss_weight: float = 1.0
    image_loss_weight: float = 1.0
    z_loss: float = 0.0
    rendering: dict[str, Any] | None = None
    image_sampling: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}, and there is no head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim is {self.head_dim} (hidden_size {self.hidden_size} over {self.num_attention_heads} heads); "
                "rotary embeddings need an even one"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ConfigError(f"rope_type {kind} changes with the length of a sequence, which is not built here")
        self._settle_plan()
        self._settle_vocabulary()
        super().__post_init__(**kwargs)

    @property
    def layer_specs(self) -> Plan:
        """The plan as layer specs."""
        return plan_from_dicts(self.plan, self.num_hidden_layers)

    def _settle_plan(self) -> None:
        if self.plan is None:
            self.preset = self.preset or "shared"
            self.plan = plan_to_dicts(build_plan(self.preset, self.num_hidden_layers, self.preset_arguments))
        self.plan = plan_to_dicts(plan_from_dicts(self.plan, self.num_hidden_layers))

    def _settle_vocabulary(self) -> None:
        if self.image_token_offset is None:
            self.image_token_offset = self.vocab_size
        for name in ("image_token_offset", "image_codebook_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be 0 or more")
        if self.image_token_offset + self.image_codebook_size > self.vocab_size:
            raise ConfigError(
                f"image codes end at id {self.image_token_offset + self.image_codebook_size}, "
                f"vocab_size is {self.vocab_size}"
            )
        if self.image_marker_ids is None:
            start = self.vision_start_token_id
            self.image_marker_ids = [] if start is None else [start]
        for marker in self.image_marker_ids:
            if not 0 <= marker < self.image_token_offset:
                raise ConfigError(f"image marker {marker} is not a text id (below {self.image_token_offset})")
        if self.head not in ("full", "by_modality"):
            raise ConfigError(f"head is full or by_modality, not {self.head!r}")
