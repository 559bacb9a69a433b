"""The typed schema of a YAML recipe, and dotted overrides (`data.batch_size=8`) on the command line.

Every section is a pydantic model that refuses unknown keys and suggests the nearest known one. This module
knows nothing of torch, so that a recipe can be checked in a fraction of a second.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from uni_x.errors import RecipeError, UsageError, one_line
from uni_x.recipe_problems import describe_problem, first_problem, location
from uni_x.strict_yaml import load_yaml
from uni_x.words import count_of

DRAW_INSTRUCTIONS = (
    "\nDraw this.",
    "\nCreate an image that matches the text.",
    "\nTurn the text above into a picture.",
    "\nPlease illustrate the text above.",
)
DESCRIBE_INSTRUCTIONS = (
    "Describe this image.\n",
    "What does this picture show?\n",
    "Write a caption for this image.\n",
    "Tell me about this image.\n",
)

CHINESE_DRAW_INSTRUCTIONS = (
    "\n请画出来。",
    "\n请根据上面的文字画一张图。",
    "\n把这段话变成一幅画吧。",
    "\n为上述文字配一张图片。",
)
CHINESE_DESCRIBE_INSTRUCTIONS = (
    "描述一下这张图片。\n",
    "这张图里有什么？\n",
    "请为这张图片写一句说明。\n",
    "说说你在图中看到了什么。\n",
)
LANGUAGES = ("english", "chinese", "both")

LOSS_KEYS = ("head", "text_loss_weight", "image_loss_weight", "z_loss")
"""Keys of a model that a base does not bring: they say how it is trained."""
TOKENIZER_KEYS = ("image_tokenizer", "text_tokenizer")
A_FILE_GIVES_WAY = "(what a file says of it gives way to model.base=DIR on the command line)"

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Part of a recipe: frozen, strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SectionType = TypeVar("SectionType", bound=Section)


def load_recipe(path: str | Path, schema: type[SectionType], overrides: list[str] | None = None) -> SectionType:
    """Reads a YAML recipe, applies `key.key=value` overrides (values are YAML) and checks it against `schema`.

    Raises `RecipeError` with one line that names the file or the override, the key and the nearest known key.
    """
    path = Path(path)
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML ({one_line(error)})") from None
    if tree is None:
        tree = {}
    if isinstance(tree, dict) and ("tokenizer" in tree) != ("tokenizer" in schema.model_fields):
        if "tokenizer" in tree and "data" in schema.model_fields:
            raise RecipeError(f"{path}: this is a recipe for `uni-x tokenizer train`")
        if "data" in tree and "training" in schema.model_fields:
            raise RecipeError(f"{path}: this is a recipe for `uni-x train`")
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this file holds a {type(tree).__name__}")
    return check_recipe(tree, schema, str(path), overrides or [])


def check_recipe(
    tree: dict[str, Any], schema: type[SectionType], where: str, overrides: Sequence[str] = ()
) -> SectionType:
    """Turns a mapping, changed by `key.key=value` overrides, into a recipe of `schema`.

    Raises `RecipeError` that names the override at fault, or else `where`, which is what the mapping comes from.
    """
    if any(map(_names_a_base, overrides)):
        _take_out_what_a_base_brings(tree)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error)
        name = ".".join(location(problem)) + "."
        blamed = [override for override in overrides if name.startswith(override.partition("=")[0] + ".")]
        where = f"'{blamed[-1]}'" if blamed else where
        raise RecipeError(f"{where}: {describe_problem(problem, schema)}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Puts one `key.key=value` into a recipe's mapping, where a number is a place in a list, counted from 0.

    Raises `UsageError` where it has another form, and `RecipeError` for a value that is not YAML or a place that is not
    there.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"'{override}': an override has the form key=value or section.key=value")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        reason = one_line(getattr(error, "problem", None) or error)
        raise RecipeError(f"'{override}': the value is not valid YAML ({reason})") from None
    *parents, last = key.split(".")
    node: Any = tree
    for depth, parent in enumerate(parents):
        place = _place_in(node, parent, override, ".".join(parents[:depth]))
        node = node.setdefault(place, {}) if isinstance(node, dict) else node[place]
    node[_place_in(node, last, override, ".".join(parents))] = value


def _names_a_base(override: str) -> bool:
    key, _, value = override.partition("=")
    return key == "model.base" and value.strip() not in ("", "null", "~")


def _take_out_what_a_base_brings(tree: dict[str, Any]) -> None:
    """A base on the command line takes the place of the model that a recipe makes, with its tokenizers."""
    if isinstance(section := tree.get("model"), dict):
        tree["model"] = {key: value for key, value in section.items() if key in ("base", *LOSS_KEYS)}
    for key in TOKENIZER_KEYS:
        tree.pop(key, None)


def _place_in(node: Any, name: str, override: str, path: str) -> str | int:
    """`name` as a key of the section at `path`, or as a place in the list there."""
    if isinstance(node, dict):
        if name.isdecimal() and name not in node and path:
            raise RecipeError(f"'{override}': the recipe has no list {path} to change; give all of it ({path}=[…])")
        return name
    if not isinstance(node, list):
        raise RecipeError(f"'{override}': {path} is not a section")
    if not name.isdecimal() or int(name) >= len(node):
        raise RecipeError(
            f"'{override}': {path} has no entry {name}; it has {count_of(len(node), 'place')}, counted from 0"
        )
    return int(name)


class VQGANNetwork(Section):
    """The convolutional VQGAN of taming-transformers and Chameleon, its sizes by the names of their `ddconfig`."""

    kind: Literal["vqgan"] = "vqgan"
    ch: PositiveInt = 64
    ch_mult: tuple[PositiveInt, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1)
    num_res_blocks: PositiveInt = 2
    attn_resolutions: tuple[PositiveInt, ...] = ()
    z_channels: PositiveInt = 128
    embed_dim: PositiveInt = 128
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    patch_size: PositiveInt = 1
    """Side of the squares of pixels that become channels first: 2 or 4 makes small pictures several times cheaper."""

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    @model_validator(mode="after")
    def _channels_fit_the_groups(self) -> "VQGANNetwork":
        if self.ch % 32:
            raise ValueError(f"ch is {self.ch}; its group norms have 32 groups, so it must be a multiple of 32")
        return self


class PatchNetwork(Section):
    """An autoencoder that takes each square patch on its own: for small pictures of a world of tiles."""

    kind: Literal["patch"] = "patch"
    patch_size: PositiveInt = 32
    embed_dim: PositiveInt = 32
    encoder_sizes: tuple[PositiveInt, ...] = (128,)
    decoder_sizes: tuple[PositiveInt, ...] = (256,)

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return self.patch_size


class SquarePictures(Section):
    """What all image tokenizers have: square pictures, cut into squares of one code each."""

    resolution: int = Field(ge=16)

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a picture in codes."""
        side = self.resolution // self.pixels_per_code
        return side, side

    @model_validator(mode="after")
    def _pictures_divide_into_codes(self) -> Self:
        if self.resolution % self.pixels_per_code:
            raise ValueError(
                f"resolution is {self.resolution}, which must be a multiple of the "
                f"{self.pixels_per_code} pixels of one code"
            )
        return self


class TokenizerConfig(SquarePictures):
    """What an image tokenizer is, apart from its weights; `config.json` in its folder holds just this."""

    codebook_size: int = Field(ge=2)
    network: Annotated[VQGANNetwork | PatchNetwork, Field(discriminator="kind")]

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return self.network.pixels_per_code


class TokenizerTraining(Section):
    """How an image tokenizer is trained; steps count batches."""

    steps: PositiveInt
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-3
    loss: Literal["mse", "l1"] = "mse"
    continuous_steps: NonNegativeInt = 200
    """Steps at the start without quantisation, from whose latents k-means takes the first codebook."""
    commitment_weight: float = Field(default=0.25, ge=0.0)
    codebook_decay: float = Field(default=0.99, gt=0.0, lt=1.0)
    restart_every: PositiveInt = 50
    """Steps between two rounds in which codes out of use move to where the error is largest."""
    checkpoint_every: PositiveInt = 200

    @model_validator(mode="after")
    def _codes_are_trained(self) -> "TokenizerTraining":
        if self.continuous_steps >= self.steps:
            raise ValueError(f"continuous_steps is {self.continuous_steps}, which must be below steps ({self.steps})")
        return self


class TokenizerRecipe(Section):
    """The recipe of `uni-x tokenizer train`."""

    source: str
    """`scenes`, or the path of a folder of pictures."""
    pictures: PositiveInt | None = None
    """How many scenes to train on, or at most how many pictures of the folder (left out: all)."""
    eval_pictures: PositiveInt = 200
    """How many pictures are held out and measured."""
    tokenizer: TokenizerConfig
    training: TokenizerTraining
    seed: NonNegativeInt = 0
    stored_as: Literal["float32", "float16"] = "float32"
    """How the weights' numbers are written; they are float32 again once read."""


def _instructions(english: tuple[str, ...], chinese: tuple[str, ...]) -> BeforeValidator:
    """Lets a list of instructions be named by its language."""
    by_language = dict(zip(LANGUAGES, (english, chinese, english + chinese), strict=True))

    def expand(value: Any) -> Any:
        if isinstance(value, str) and value not in by_language:
            raise ValueError(f"a list of instructions, or one of {', '.join(LANGUAGES)}")
        return by_language[value] if isinstance(value, str) else value

    return BeforeValidator(expand)


class SeparatorSection(Section):
    """A token that stands behind every so many codes of an image, such as at the end of each line of its grid."""

    every: PositiveInt
    token: str = "<|vision_pad|>"


class RenderOptions(Section):
    """How samples become sequences; kept with a model, since its prompts must look like its training data."""

    layout: Literal["uni-x", "published"] = "uni-x"
    """`published` is what the published checkpoints were trained on, where answers do not end."""
    template: str | None = None
    """Of conversations: chatml, gemma, plain, vicuna, `tokenizer` for that of the text tokenizer, or a Jinja file.

    What holds `{{` or `{%` is no name, but Jinja itself."""
    vis_sep: SeparatorSection | None = None

    ignore_instruction: bool = True
    """Trains answers alone: drawings, descriptions and the assistant's turns. Otherwise all text is trained."""
    t2i_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of captioned pictures that are drawn; the others are described."""
    unconditional_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the drawings in which `<unconditional>` stands for the text."""
    draw_instructions: Annotated[tuple[str, ...], _instructions(DRAW_INSTRUCTIONS, CHINESE_DRAW_INSTRUCTIONS)] = (
        DRAW_INSTRUCTIONS
    )
    """A list, or `english`, `chinese` or `both` for those that come with the package."""
    describe_instructions: Annotated[
        tuple[str, ...], _instructions(DESCRIBE_INSTRUCTIONS, CHINESE_DESCRIBE_INSTRUCTIONS)
    ] = DESCRIBE_INSTRUCTIONS

    @model_validator(mode="after")
    def _published_conversations_have_no_template(self) -> "RenderOptions":
        if self.layout == "published" and self.template is not None:
            raise ValueError("the layout published has turns of its own; take template out")
        return self


class ModelSection(Section):
    """A model to make, or a model folder to go on from (`base`), whose sizes then count."""

    base: str | None = None
    preset: str = "shared"
    preset_arguments: dict[str, Any] = {}
    plan: list[dict[str, Any]] | None = None
    """A plan in place of the preset: one mapping a layer, or mappings that say their layers (`layers: 0-11`)."""
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt = 4096
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-6
    initializer_range: PositiveFloat = 0.02
    attention_bias: bool = False
    qk_norm: bool = True
    tie_word_embeddings: bool = False
    head: Literal["full", "by_modality"] = "full"
    text_loss_weight: NonNegativeFloat = 1.0
    image_loss_weight: NonNegativeFloat = 1.0
    z_loss: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _a_base_brings_its_sizes(self) -> "ModelSection":
        if self.base is not None and (others := sorted(self.model_fields_set - {"base", *LOSS_KEYS})):
            they = "it" if len(others) == 1 else "them"
            raise ValueError(f"base brings its own {', '.join(others)}; take {they} out {A_FILE_GIVES_WAY}")
        return self


class TextTokenizerSection(Section):
    """A text tokenizer to load (`path`), or one to train on the texts of the sources."""

    path: str | None = None
    vocab_size: PositiveInt = 4096
    """Size of the one that is trained, special tokens included."""


class SourceSection(Section):
    """A folder that `uni-x encode` wrote, and its share of the sequences."""

    path: str
    weight: NonNegativeFloat = 1.0
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much of the folder is used at all: the same samples in every pass and with every seed."""


class DataSection(Section):
    """What is trained on, and how it is laid out."""

    sources: Annotated[list[SourceSection], Field(min_length=1)]
    max_length: PositiveInt = 1024
    """Tokens in a row."""
    packing: Literal["none", "pretrain", "sft"] = "sft"
    """Rows of whole sequences, or batches of single ones of similar length (`none`). In `pretrain` every sample with
    one image is drawn or described, in `sft` those with a caption are, and conversations stay what they are."""
    long_texts: Literal["split", "drop"] = "split"
    """What becomes of texts that are longer than a row. Longer sequences with images or answers are left out."""
    render: RenderOptions = RenderOptions()

    @property
    def stage(self) -> Literal["pretrain", "sft"]:
        """What `render.t2i_ratio` counts: all samples with one image, or captions."""
        return "pretrain" if self.packing == "pretrain" else "sft"


class OptimizerSection(Section):
    """`adamw`, or `muon`: Muon for the matrices of the layers and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 3e-4
    muon_learning_rate: PositiveFloat = 0.02
    vision_learning_rate: PositiveFloat | None = None
    """Of what image tokens have of their own, in place of `learning_rate`; Muon's changes in proportion."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    state_from: str | None = None
    """The run folder of an earlier training of the same model, which kept its checkpoint, or the checkpoint itself."""


class LoraSection(Section):
    """Low-rank adapters in place of training the weights (Hu et al., 2021); the saved model has them merged."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"
    """Names that the matrices' names end in, or `all-linear` for all but the head."""
    image_rows: bool = True
    """Whether the embeddings of image codes and markers, and their rows of the head, are trained in full."""


class ValidationSection(Section):
    """Held-out data, of which the losses are worked out now and then."""

    sources: Annotated[list[str], Field(min_length=1)]
    """Folders that `uni-x encode` wrote."""
    samples: PositiveInt = 512
    """At most so many of each, the first."""
    every: PositiveInt = 500
    """Steps."""


class DrawingsSection(Section):
    """Pictures drawn during training, into the folder `drawings` of the run."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=64)]
    every: PositiveInt = 500
    """Steps."""


class ImageSampling(Section):
    """How pictures are drawn where the caller does not say."""

    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    guidance_scale: NonNegativeFloat = 2.0


class TrainRecipe(Section):
    """The recipe of `uni-x train`."""

    run: str = "runs/train"
    """The run folder."""
    image_tokenizer: str = "scenes"
    """A folder, or `scenes` for the one inside the package."""
    text_tokenizer: TextTokenizerSection = TextTokenizerSection()
    model: ModelSection = ModelSection()
    data: DataSection
    trainable: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Patterns of the names of parameters that are trained, as `*.image.*`; one led by ! takes names out again."""
    lora: LoraSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    validation: ValidationSection | None = None
    drawings: DrawingsSection | None = None
    image_sampling: ImageSampling = ImageSampling()
    keep_checkpoint: bool = False
    """Whether the last checkpoint, with the optimizer's state, stays once training is done."""
    tags: tuple[str, ...] = ()
    """Words to find the run by, in the model card and in Weights & Biases."""
    trainer: dict[str, Any] = {}
    """Any argument of transformers' TrainingArguments; `max_steps` among them."""
    device: str = "auto"
    seed: Seed = 0

    @property
    def folders(self) -> list[str]:
        """What is trained on, and what is held out."""
        return [*(source.path for source in self.data.sources), *self.held_out_folders]

    @property
    def held_out_folders(self) -> list[str]:
        """What is validated on; none without such a section."""
        return [] if self.validation is None else self.validation.sources

    @model_validator(mode="after")
    def _keys_that_would_be_ignored(self) -> "TrainRecipe":
        if self.model.base is not None:
            for key in TOKENIZER_KEYS:
                if key in self.model_fields_set:
                    raise ValueError(f"{key}: model.base brings its own; take it out {A_FILE_GIVES_WAY}")
        if self.lora is not None and self.trainable != ("*",):
            raise ValueError("trainable: with lora the adapters alone are trained; take one of the two out")
        return self


class ScenesSection(Section):
    """How much of the scenes' world is made into training data."""

    drawings: PositiveInt
    """Pictures with captions."""
    looking: PositiveInt
    """Pictures with questions and answers."""
    texts: PositiveInt
    """Sentences without a picture."""

    def at_most(self, limit: int | None) -> "ScenesSection":
        """The same with no more than `limit` of each."""
        if limit is None:
            return self
        return ScenesSection(**{name: min(count, limit) for name, count in self.model_dump().items()})


class ScenesEvaluationSection(Section):
    """How the quickstart's model is tested."""

    prompts_per_task: PositiveInt = 50
    pictures_per_prompt: PositiveInt = 4
    questions: Annotated[PositiveInt, Field(multiple_of=2)] = 1000
    """Yes/no questions, and as many multiple-choice ones."""
    seed: NonNegativeInt = 2026


class QuickstartRecipe(Section):
    """The recipe of `uni-x quickstart`; the sources of `train` are folders below the run's own."""

    seed: Seed = 0
    scenes: ScenesSection
    train: TrainRecipe
    evaluation: ScenesEvaluationSection = ScenesEvaluationSection()

    @model_validator(mode="after")
    def _has_one_seed_and_one_folder(self) -> "QuickstartRecipe":
        for key, instead in (("seed", "seed=N"), ("run", "--out DIR")):
            if key in self.train.model_fields_set:
                raise ValueError(f"train.{key} follows from the quickstart's own; say {instead} instead")
        return self
