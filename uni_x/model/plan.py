"""An architecture is data: a plan is a list of layer specs, one a layer.

A layer spec says which parts of a decoder layer are shared by text and image tokens, which exist once for each
modality, and what a token sees. The presets at the end of this file are functions that return plans; a recipe can
also spell a plan out, layer by layer or by ranges of layers. Nothing else in the package asks which architecture it
runs.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from uni_x.errors import ConfigError

Sharing = Literal["shared", "separate"]
Sight = Literal["all", "own"]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"layer spec: {name} is one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer is made of.

    Attributes:
        norms: the two layer norms.
        qkv: query, key and value projections together with the query and key norms.
        output: the attention's output projection.
        ffn: the feed-forward network.
        sees: `all` tokens before it in its document, or only those of its `own` modality.
        image_ffn_size: width of the image tokens' own FFN where `ffn` is separate; None is the text FFN's width,
            0 leaves it out.
        shared_ffn_size: width of an FFN that every token passes beside its own, added to it; 0 leaves it out.
    """

    norms: Sharing = "shared"
    qkv: Sharing = "shared"
    output: Sharing = "shared"
    ffn: Sharing = "shared"
    sees: Sight = "all"
    image_ffn_size: int | None = None
    shared_ffn_size: int = 0

    def __post_init__(self) -> None:
        for name in ("norms", "qkv", "output", "ffn"):
            _check_choice(name, getattr(self, name), get_args(Sharing))
        _check_choice("sees", self.sees, get_args(Sight))
        for name in ("image_ffn_size", "shared_ffn_size"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or size < 0):
                raise ConfigError(f"layer spec: {name} is a width of 0 or more, not {size!r}")
        if self.image_ffn_size is not None and self.ffn == "shared":
            raise ConfigError("layer spec: image_ffn_size needs ffn: separate")
        if self.image_ffn_size == 0 and self.shared_ffn_size == 0:
            raise ConfigError("layer spec: image_ffn_size and shared_ffn_size cannot both be 0")

    @property
    def parts(self) -> tuple[Sharing, ...]:
        """How norms, q/k/v, output projection and FFN are shared, in this order."""
        return (self.norms, self.qkv, self.output, self.ffn)

    @property
    def splits_completely(self) -> bool:
        """Whether text and image tokens never meet in this layer, so that it runs as two streams."""
        return self.sees == "own" and set(self.parts) == {"separate"} and self.shared_ffn_size == 0

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from a plain shared layer, for JSON."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


SHARED = LayerSpec()
SEPARATE = LayerSpec(norms="separate", qkv="separate", output="separate", ffn="separate")

Plan = tuple[LayerSpec, ...]


def shared(num_hidden_layers: int) -> Plan:
    """The dense baseline: every layer is shared by both modalities."""
    return (SHARED,) * num_hidden_layers


def uni_x(num_hidden_layers: int, first: int, last: int, ends_see: Sight = "own") -> Plan:
    """The X shape: the `first` and `last` layers exist once for each modality, the middle is shared."""
    return _with_ends(num_hidden_layers, first, last, ends_see, SHARED)


def moe(num_hidden_layers: int, step: int = 1) -> Plan:
    """Hard mixture of experts: an FFN for each modality in every layer where (index + 1) % step == 0."""
    if step < 1:
        raise ConfigError(f"plan moe: step is 1 or more, not {step}")
    expert = LayerSpec(ffn="separate")
    return tuple(expert if (index + 1) % step == 0 else SHARED for index in range(num_hidden_layers))


def mot(num_hidden_layers: int, image_ffn_size: int | None = None) -> Plan:
    """Mixture of transformers: every weight of a layer is separate, attention sees both modalities."""
    return (replace(SEPARATE, image_ffn_size=image_ffn_size),) * num_hidden_layers


def uni_share(
    num_hidden_layers: int,
    first: int,
    last: int,
    image_ffn_size: int | None = None,
    shared_ffn_size: int = 0,
    ends_see: Sight = "own",
) -> Plan:
    """As `uni-x`, with an FFN for each modality plus one for both in the middle layers."""
    middle = LayerSpec(ffn="separate", image_ffn_size=image_ffn_size, shared_ffn_size=shared_ffn_size)
    return _with_ends(num_hidden_layers, first, last, ends_see, middle)


PRESETS: dict[str, Callable[..., Plan]] = {
    "shared": shared,
    "uni-x": uni_x,
    "moe": moe,
    "mot": mot,
    "uni-share": uni_share,
}


def build_plan(preset: str, num_hidden_layers: int, arguments: dict[str, Any] | None = None) -> Plan:
    """The plan of a preset. Raises `ConfigError` for an unknown preset or arguments that it does not take."""
    if preset not in PRESETS:
        nearest = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown plan '{preset}'; the nearest known one is '{nearest}' (all: {', '.join(PRESETS)})")
    try:
        return PRESETS[preset](num_hidden_layers, **(arguments or {}))
    except TypeError as error:
        taken = list(inspect.signature(PRESETS[preset]).parameters)[1:]
        raise ConfigError(
            f"plan {preset}: {str(error).split('() ')[-1]}; it takes {', '.join(taken) or 'no arguments'}"
        ) from None


def read_preset(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a preset as one writes it: `shared`, `uni-x(12, 6)`, `moe(step=2)`.

    Raises:
        ConfigError: for what cannot be read so, an unknown preset, or arguments that it does not take.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    try:
        call = ast.parse(f"preset({match[2] or ''})" if match else text, mode="eval").body
        assert match is not None
        assert isinstance(call, ast.Call)
        values = [ast.literal_eval(value) for value in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, AssertionError):
        raise ConfigError(f"'{text}' is not a plan; write it as uni-x(12, 6) or moe(step=2)") from None
    preset = match[1]
    if preset not in PRESETS:
        build_plan(preset, 1)  # says which is the nearest
    names = list(inspect.signature(PRESETS[preset]).parameters)[1:]
    if len(values) > len(names):
        raise ConfigError(f"plan {preset}: {len(values)} arguments are too many; it takes {', '.join(names) or 'none'}")
    return preset, dict(zip(names, values, strict=False)) | named


def plan_from_dicts(entries: list[dict[str, Any]], num_hidden_layers: int) -> Plan:
    """A plan from its JSON form, whose mappings hold what differs from a plain shared layer.

    Either one mapping a layer, or mappings with `layers: 3` or `layers: 0-11` (both ends included) for the layers that
    they are about; a layer that none names is shared.

    Raises:
        ConfigError: for an unknown key, a layer that is not there or is named twice, or a wrong number of layers.
    """
    if any("layers" in entry for entry in entries):
        entries = _by_layer(entries, num_hidden_layers)
    if len(entries) != num_hidden_layers:
        raise ConfigError(f"the plan has {len(entries)} layers, num_hidden_layers is {num_hidden_layers}")
    known = {field.name for field in fields(LayerSpec)}
    for index, layer in enumerate(entries):
        if unknown := sorted(set(layer) - known, key=str):
            nearest = difflib.get_close_matches(str(unknown[0]), known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"plan, layer {index}: unknown key '{unknown[0]}'; the nearest known one is '{nearest}'")
    return tuple(LayerSpec(**layer) for layer in entries)


def _by_layer(entries: list[dict[str, Any]], num_hidden_layers: int) -> list[dict[str, Any]]:
    layers: list[dict[str, Any] | None] = [None] * num_hidden_layers
    for entry in entries:
        if "layers" not in entry:
            raise ConfigError("plan: either every entry says its layers (layers: 0-11), or none does")
        written = str(entry["layers"])
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", written)
        if match is None:
            raise ConfigError(f"plan: layers is a number or a range such as 0-11, not '{written}'")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_hidden_layers:
            raise ConfigError(f"plan: layers {written} do not lie within 0-{num_hidden_layers - 1}")
        for index in range(first, last + 1):
            if layers[index] is not None:
                raise ConfigError(f"plan: layer {index} is named twice, the second time by layers {written}")
            layers[index] = {key: value for key, value in entry.items() if key != "layers"}
    return [layer or {} for layer in layers]


def plan_to_dicts(plan: Plan) -> list[dict[str, Any]]:
    """The JSON form of a plan."""
    return [spec.to_dict() for spec in plan]


def _with_ends(num_hidden_layers: int, first: int, last: int, ends_see: Sight, middle: LayerSpec) -> Plan:
    if first < 0 or last < 0 or first + last > num_hidden_layers:
        raise ConfigError(f"{first} first and {last} last layers do not fit into {num_hidden_layers}")
    end = replace(SEPARATE, sees=ends_see)
    return (end,) * first + (middle,) * (num_hidden_layers - first - last) + (end,) * last
