"""Each variable of the published training script has a place here, and changes something there.

The list of variables is the table in docs/published-script.md. For each a probe is run with two values; what it sees
has to differ.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from uni_x.data.dataset import NOTES
from uni_x.data.readers import open_source
from uni_x.data.readers.parts import SourceOptions
from uni_x.data.schema import Sample
from uni_x.data.text_tokenizer import train_text_tokenizer
from uni_x.images import ImageTokenizer
from uni_x.model.layers import DecoderLayer
from uni_x.model_folder import load_model_folder, read_model_config, save_model_folder
from uni_x.recipe import TrainRecipe
from uni_x.train.arguments import training_arguments
from uni_x.train.batches import make_renderer, make_stream
from uni_x.train.callbacks import read_metrics
from uni_x.train.run import train
from uni_x.train.start import make_start
from uni_x.workflows.convert import init

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "published-script.md").read_text()
VARIABLES = re.findall(r"^\| `(\w+)` \|", TABLE, flags=re.MULTILINE)
UNI_X = {"preset": "uni-x", "preset_arguments": {"first": 1, "last": 0}}
UNI_SHARE = {"preset": "uni-share", "preset_arguments": {"first": 0, "last": 0, "shared_ffn_size": 8}}

Make = Callable[..., TrainRecipe]
Probe = Callable[[int], Any]  # what is seen with the first or the second value
PROBES: dict[str, Callable[["Bench"], Probe]] = {}


class Bench:
    """What probes share: recipes of a tiny model, and what can be seen of them."""

    def __init__(self, make_recipe: Make, folder: Path, encode: Callable[..., Path], samples: list[Sample]):
        self.make_recipe = make_recipe
        self.folder = folder
        self.encode = encode
        self.samples = samples

    def recipe(self, number: int, *sections: dict[str, Any], **trainer: list[Any]) -> TrainRecipe:
        """Of two recipes the one of this number; a value for each in `sections` and `trainer`."""
        chosen = {name: values[number] for name, values in trainer.items()}
        return self.make_recipe(f"run-{number}", sections[number] if sections else None, **chosen)

    def metrics(self, recipe: TrainRecipe) -> list[dict[str, float]]:
        """What a training logs, without what depends on the clock or the machine."""
        clock = {"seconds", "tokens_per_second", "tflops", "memory_gb"}
        return [{k: v for k, v in entry.items() if k not in clock} for entry in train(recipe).metrics]

    def batches(self, recipe: TrainRecipe, count: int = 6) -> list[dict[str, Any]]:
        """The first batches that a recipe trains on."""
        stream = iter(make_stream(recipe, training_arguments(recipe), make_renderer(recipe, make_start(recipe))))
        return [next(stream) for _ in range(count)]

    def card(self, recipe: TrainRecipe) -> str:
        """The model card that a training writes."""
        return (train(recipe).model_dir / "README.md").read_text()


def sections(*values: dict[str, Any]) -> Callable[[Callable[[Bench, TrainRecipe], Any]], Callable[[Bench], Probe]]:
    """A probe that sees something of two recipes with these sections."""

    def make(see: Callable[[Bench, TrainRecipe], Any]) -> Callable[[Bench], Probe]:
        return lambda bench: lambda number: see(bench, bench.recipe(number, *values))

    return make


def trainer(**values: list[Any]) -> Callable[[Callable[[Bench, TrainRecipe], Any]], Callable[[Bench], Probe]]:
    """A probe that sees something of two recipes with these arguments of the Trainer."""

    def make(see: Callable[[Bench, TrainRecipe], Any]) -> Callable[[Bench], Probe]:
        return lambda bench: lambda number: see(bench, bench.recipe(number, **values))

    return make


def metrics(bench: Bench, recipe: TrainRecipe) -> Any:
    return bench.metrics(recipe)


def steps(bench: Bench, recipe: TrainRecipe) -> list[float]:
    return [entry["step"] for entry in bench.metrics(recipe)]


def tokens(bench: Bench, recipe: TrainRecipe) -> float:
    return bench.metrics(recipe)[0]["tokens"]


def rates(bench: Bench, recipe: TrainRecipe) -> list[float]:
    return [entry["learning_rate"] for entry in bench.metrics(recipe)]


def checkpoints(bench: Bench, recipe: TrainRecipe) -> list[str]:
    train(recipe.model_copy(update={"keep_checkpoint": True}))
    return sorted(path.name for path in Path(recipe.run).glob("checkpoints/checkpoint-*"))


def parameters(bench: Bench, recipe: TrainRecipe) -> list[tuple[str, torch.Size]]:
    return [(name, weight.shape) for name, weight in make_start(recipe).model.named_parameters()]


def ids(bench: Bench, recipe: TrainRecipe) -> list[Any]:
    return [batch["input_ids"].tolist() for batch in bench.batches(recipe)]


PROBES |= {
    "run_name": trainer(run_name=["first", "second"])(
        lambda bench, recipe: re.search(r"^# (.*)$", bench.card(recipe), re.MULTILINE)[1]  # type: ignore[index]
    ),
    "output_dir": sections({}, {})(lambda bench, recipe: train(recipe).model_dir),
    "extra_tags": sections({"tags": ["a"]}, {"tags": ["b"]})(
        lambda bench, recipe: yaml.safe_load(bench.card(recipe).split("---")[1])["tags"]
    ),
    "t2i_ratio": sections({"data": {"render": {"t2i_ratio": 0.0}}}, {"data": {"render": {"t2i_ratio": 1.0}}})(
        lambda bench, recipe: sum("loss_image" in entry for entry in bench.metrics(recipe))
    ),
    "shuffle_seed": sections({"seed": 0}, {"seed": 218})(
        lambda bench, recipe: [batch[NOTES].sample_ids for batch in bench.batches(recipe)]
    ),
    "model_version": sections(
        {"data": {"render": {"template": "gemma"}}}, {"data": {"render": {"template": "vicuna"}}}
    )(ids),
    "model_spec_module": sections({"model": UNI_X}, {"model": {"preset": "mot"}})(parameters),
    "vision_encode_layers": sections(
        {"model": UNI_X}, {"model": UNI_X | {"preset_arguments": {"first": 2, "last": 0}}}
    )(parameters),
    "vision_decode_layers": sections(
        {"model": UNI_X}, {"model": UNI_X | {"preset_arguments": {"first": 1, "last": 1}}}
    )(parameters),
    "all_modal_visible": sections(
        {"model": UNI_X}, {"model": UNI_X | {"preset_arguments": {"first": 1, "last": 0, "ends_see": "all"}}}
    )(metrics),
    "ffn_vision_size": sections(
        *({"model": UNI_SHARE | {"preset_arguments": UNI_SHARE["preset_arguments"] | {"image_ffn_size": size}}}  # type: ignore[operator]
          for size in (4, 12))
    )(parameters),
    "ffn_share_size": sections(
        *({"model": UNI_SHARE | {"preset_arguments": UNI_SHARE["preset_arguments"] | {"shared_ffn_size": size}}}  # type: ignore[operator]
          for size in (4, 12))
    )(parameters),
    "bf16": trainer(bf16=[False, True])(metrics),
    "learning_rate": sections({"optimizer": {"learning_rate": 1e-5}}, {"optimizer": {"learning_rate": 1e-3}})(metrics),
    "max_steps": trainer(max_steps=[5, 6])(steps),
    "train_batch_size": trainer(per_device_train_batch_size=[1, 2])(tokens),
    "model_max_length": sections({"data": {"max_length": 64}}, {"data": {"max_length": 128}})(
        lambda bench, recipe: max(batch["input_ids"].shape[1] for batch in bench.batches(recipe))
    ),
    "use_data_packing": sections({"data": {"packing": "none"}}, {"data": {"packing": "sft"}})(
        lambda bench, recipe: max(int(batch["document_ids"].max()) for batch in bench.batches(recipe))
    ),
    "grad_accum_steps": trainer(gradient_accumulation_steps=[1, 2])(tokens),
    "weight_decay": sections({"optimizer": {"weight_decay": 0.0}}, {"optimizer": {"weight_decay": 1.0}})(metrics),
    "warmup_ratio": trainer(warmup_steps=[0, 0.5])(rates),
    "lr_scheduler": trainer(lr_scheduler_type=["linear", "cosine"])(rates),
    "ignore_instruction": sections(
        {"data": {"render": {"ignore_instruction": True}}}, {"data": {"render": {"ignore_instruction": False}}}
    )(lambda bench, recipe: [int((batch["labels"] != -100).sum()) for batch in bench.batches(recipe)]),
    "save_steps": trainer(save_steps=[0.25, 0.5], save_total_limit=[9, 9], max_steps=[8, 8])(checkpoints),
    "save_total_limit": trainer(save_total_limit=[1, 2])(checkpoints),
    "logging_steps": trainer(logging_steps=[1, 3])(steps),
}  # fmt: skip


def launch(config: str, *words: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that accelerate makes for DeepSpeed."""
    given = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{config}.yaml"), *words, "-m", "uni_x", "train"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(given))[0]
    arguments.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(arguments)


def launched(option: str, becomes: str, *values: str) -> Callable[[Bench], Probe]:
    """A probe that sees what an option of accelerate becomes on DeepSpeed's command line."""

    def see(number: int) -> str:
        command, _ = launch("zero2-7-machines", option, values[number])
        return command[command.index(becomes) + 1]

    return lambda bench: see


def hostfiles(bench: Bench) -> Probe:
    files = [bench.folder / "seven", bench.folder / "three"]
    for file, machines in zip(files, (7, 3), strict=True):
        file.write_text("".join(f"10.0.0.{number} slots=8\n" for number in range(machines)))
    return launched("--deepspeed_hostfile", "--hostfile", *map(str, files))(bench)


def config_files(bench: Bench) -> Probe:
    return lambda number: launch(("zero2", "zero3")[number])[1]["ACCELERATE_DEEPSPEED_CONFIG_FILE"]


def bases(bench: Bench) -> Probe:
    """The weights that a training begins with."""
    for number in (0, 1):
        recipe = bench.make_recipe("none", {"seed": number})
        save_model_folder(make_start(recipe), bench.folder / f"base-{number}")

    def see(number: int) -> list[float]:
        recipe = bench.make_recipe("run", {"model": {"base": str(bench.folder / f"base-{number}")}})
        return make_start(recipe).model.lm_head.weight[0].tolist()

    return see


def folders(bench: Bench) -> Probe:
    """The folders whose losses are logged."""
    paths = [bench.encode(bench.samples[start::2], f"data-{start}") for start in (0, 1)]

    def see(number: int) -> set[str]:
        data = {"sources": [{"path": str(paths[number])}], "max_length": 128}
        entries = bench.metrics(bench.make_recipe(f"run-{number}", {"data": data}))
        return {name for entry in entries for name in entry if name.startswith("loss/")}

    return see


def fractions(bench: Bench) -> Probe:
    """How many different samples come by."""
    path = bench.make_recipe("none").data.sources[0].path

    def see(number: int) -> int:
        data = {"sources": [{"path": path, "fraction": (0.5, 1.0)[number]}], "max_length": 128}
        batches = bench.batches(bench.make_recipe("run", {"data": data}), 60)
        return len({name for batch in batches for row in batch[NOTES].sample_ids for name in row})

    return see


def streaming(bench: Bench) -> Probe:
    """How many parts a data set is read in: streamed, it has no rows to count."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [f"{n}" for n in range(20_500)]}).save_to_disk(bench.folder / "saved")
    return lambda number: len(open_source(str(bench.folder / "saved"), SourceOptions(streaming=bool(number))))


def resolutions(bench: Bench) -> Probe:
    """Codes of a picture."""

    def see(number: int) -> tuple[int, int]:
        config = ImageTokenizer.from_pretrained(bench.folder / "tokenizer").config
        made = ImageTokenizer(config.model_copy(update={"resolution": (16, 32)[number]}))
        made.save_pretrained(bench.folder / f"tokenizer-{number}")
        recipe = bench.make_recipe("run", {"image_tokenizer": str(bench.folder / f"tokenizer-{number}")})
        return make_start(recipe).model.config.image_grid

    return see


def llms(bench: Bench) -> Probe:
    """Whether the projections of queries, keys and values have biases, as in Qwen2 and not in Llama."""

    def see(number: int) -> bool:
        tokenizer = train_text_tokenizer(["a heart left of a car"] * 5, 300)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes["num_key_value_heads"] = 2
        kind = (Qwen2Config, LlamaConfig)[number]
        folder = bench.folder / f"llm-{number}"
        AutoModelForCausalLM.from_config(kind(**sizes, vocab_size=320, eos_token_id=0)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        init(str(folder), str(bench.folder / "tokenizer"), "uni-x(1, 0)", bench.folder / f"made-{number}")
        return read_model_config(bench.folder / f"made-{number}").attention_bias

    return see


def unfrozen(bench: Bench) -> Probe:
    """The parameters that move."""

    def see(number: int) -> set[str]:
        recipe = bench.make_recipe(f"run-{number}", {"model": UNI_X, "trainable": [("*", "*.image.*")[number]]})
        before = make_start(recipe).model.state_dict()
        after = load_model_folder(train(recipe).model_dir).model.state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}

    return see


def evaluations(bench: Bench) -> Probe:
    """Entries of held-out losses."""

    def see(number: int) -> int:
        held_out = {"sources": [bench.make_recipe("none").data.sources[0].path], "every": 4}
        recipe = bench.make_recipe(f"run-{number}", {"validation": held_out}, eval_strategy=("no", "steps")[number])
        train(recipe)
        return len(read_metrics(Path(recipe.run) / "validation.jsonl"))

    return see


def recomputed(bench: Bench) -> Probe:
    """How often a layer runs in a step: once more where its activations are not kept."""

    def see(number: int) -> int:
        calls = 0
        feed_forward = DecoderLayer._feed_forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return feed_forward(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecoderLayer, "_feed_forward", counted)
            train(bench.make_recipe(f"run-{number}", activation_checkpointing=bool(number), max_steps=2))
        return calls

    return see


def workers(bench: Bench) -> Probe:
    """Processes beside the one that trains."""

    def see(number: int) -> int:
        seen: list[int] = []
        recipe = bench.make_recipe(f"run-{number}", dataloader_num_workers=(0, 2)[number])
        train(recipe, lambda done, total, losses: seen.append(len(psutil.Process().children())))
        return max(seen)

    return see


def resumed(bench: Bench) -> Probe:
    """The first step that a second start makes: of the same run, or of another."""

    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(bench.make_recipe("run-0"), stop)

    def see(number: int) -> int:
        seen: list[int] = []
        train(bench.make_recipe(f"run-{number}"), lambda done, total, losses: seen.append(done))
        return seen[0]

    return see


PROBES |= {
    "main_port": launched("--main_process_port", "--master_port", "16374", "16375"),
    "main_ip": launched("--main_process_ip", "--master_addr", "10.54.0.1", "10.54.0.2"),
    "hostfile": hostfiles,
    "config_file": config_files,
    "model_path": bases,
    "data_path": folders,
    "data_percentage": fractions,
    "streaming_data": streaming,
    "vq_resolution": resolutions,
    "custom_cls": llms,
    "unfreeze_keys": unfrozen,
    "eval_strategy": evaluations,
    "gradient_checkpointing": recomputed,
    "dataloader_workers": workers,
    "resume_from_checkpoint": resumed,
}


def test_the_table_and_the_probes_name_the_same_variables() -> None:
    assert len(VARIABLES) == len(set(VARIABLES)) == 41
    assert set(VARIABLES) == set(PROBES)


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_makes_a_difference(
    variable: str, make_recipe: Make, tmp_path: Path, encoded_folder: Callable[..., Path], samples: list[Sample]
) -> None:
    see = PROBES[variable](Bench(make_recipe, tmp_path, encoded_folder, samples))
    first, second = see(0), see(1)
    assert first != second
