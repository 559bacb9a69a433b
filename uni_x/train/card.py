"""The card of a trained model: what it is, what it was trained on and how, and its figures."""

from collections.abc import Iterator, Mapping
from itertools import groupby

import yaml

from uni_x.model import UniXConfig
from uni_x.model.size import measure_size
from uni_x.recipe import TrainRecipe
from uni_x.runs import provenance

FIGURES = {
    "step": "steps",
    "loss_text": "text loss, in nats a token",
    "loss_image": "image loss, in nats a code",
    "text_tokens_seen": "text tokens seen",
    "image_tokens_seen": "image tokens seen",
}


def model_card(recipe: TrainRecipe, config: UniXConfig, figures: Mapping[str, float]) -> str:
    """The card in Markdown, with the head that the hub reads; `figures` are those of the last log entry."""
    tags = ["uni-x", "text-to-image", "image-to-text", *recipe.tags]
    head = {"library_name": "transformers", "pipeline_tag": "any-to-any", "tags": tags}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {recipe.trainer.get('run_name') or recipe.run.rstrip('/').rpartition('/')[2]}",
            "",
            "A unified model of text and images, trained with [Uni-X](https://pypi.org/project/uni-x): it draws, looks "
            "and writes.",
            "",
            *_plan(config),
            "",
            *_data(recipe),
            "",
            *_figures(figures),
            "",
            "## Recipe",
            "",
            "```yaml",
            yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
        ]
    )


def _plan(config: UniXConfig) -> Iterator[str]:
    arguments = ", ".join(f"{key}={value}" for key, value in (config.preset_arguments or {}).items())
    name = f"{config.preset}({arguments})" if config.preset else "a plan of its own"
    yield "## Architecture"
    yield ""
    yield f"{name}: {config.num_hidden_layers} layers, {measure_size(config).total:,} parameters."
    yield ""
    yield "| layers | norms | q/k/v | output | ffn | a token sees |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for spec, run in groupby(enumerate(config.layer_specs), key=lambda item: item[1]):
        indices = [index for index, _ in run]
        layers = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
        sees = "its own modality" if spec.sees == "own" else "all"
        yield f"| {layers} | {spec.norms} | {spec.qkv} | {spec.output} | {spec.ffn} | {sees} |"


def _data(recipe: TrainRecipe) -> Iterator[str]:
    yield "## Data"
    yield ""
    yield "| folder | weight | fraction |"
    yield "| --- | --- | --- |"
    for source in recipe.data.sources:
        yield f"| {source.path} | {source.weight:g} | {source.fraction:g} |"


def _figures(figures: Mapping[str, float]) -> Iterator[str]:
    yield "## Figures"
    yield ""
    for name, words in FIGURES.items():
        if name in figures:
            value = figures[name]
            yield f"- {words}: {value:,.0f}" if value == int(value) else f"- {words}: {value:.4f}"
    found = provenance()
    yield f"- command: `{found['command']}`"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in found['versions'].items())}"
