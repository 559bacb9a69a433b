"""`uni-x quickstart`: from pictures to a model that draws, looks and answers, and a report about it.

Each stage leaves a file when it is done, so that a run that was stopped goes on with the stage it was in, and within
it at the last shard or checkpoint.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image

from uni_x import scenes
from uni_x.devices import choose_device
from uni_x.evaluation.scenes import (
    Answer,
    Drawing,
    answer_multiple_choice,
    answer_scores,
    answer_yes_no,
    chance_scores,
    draw_scenes,
    drawing_scores,
)
from uni_x.generation.pipeline import UniXPipeline
from uni_x.images import load_image_tokenizer
from uni_x.recipe import (
    QuickstartRecipe,
    ScenesEvaluationSection,
    TrainRecipe,
    check_recipe,
)
from uni_x.runs import RunFolder, write_atomically, writing_into
from uni_x.train.callbacks import read_metrics
from uni_x.train.run import check_before, train
from uni_x.train.start import make_start
from uni_x.workflows.report import write_report
from uni_x.workflows.sources import encode_scenes

START_UP = "start-up"

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent
NEEDS_BYTES = 300 * 2**20
FOLDERS = {"trained": "samples", "untrained": "samples/untrained"}
PICTURES_SHOWN = 6  # pictures kept of the questions of each topic

Progress = Callable[[str, int, int, str], None]
"""Told the stage, how much of it is done, how much there is, and a word on it."""

Report = Callable[[int, int, str], None]
"""As `Progress`, of one stage."""


def load_quickstart_recipe(smoke: bool = False, overrides: Sequence[str] = ()) -> QuickstartRecipe:
    """The recipe of the quickstart, or of its smoke test, with `key.key=value` overrides."""
    tree = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    if smoke:
        _merge(tree, yaml.safe_load((RECIPES / "quickstart-smoke.yaml").read_text()))
    return check_recipe(tree, QuickstartRecipe, "the quickstart's recipe", overrides)


def quickstart(recipe: QuickstartRecipe, out: str | Path, progress: Progress | None = None) -> tuple[RunFolder, bool]:
    """Runs every stage that is not done yet; says whether the run was finished already.

    Raises:
        UniXError: a folder of another recipe, too small a disk, a missing extra.
        KeyboardInterrupt: after Ctrl-C, with everything in place to go on.
    """
    own = {"train": {"seed", "run"}}  # which follow from the quickstart's
    run = RunFolder(out, recipe.model_dump(mode="json", exclude=own))
    if run.results_file.exists() and run.report_file.exists():
        return run, True
    training = _training(recipe, run.path)
    scenes.require_packages()
    check_before(training)
    load_image_tokenizer(training.image_tokenizer)
    run.begin()
    run.require(NEEDS_BYTES)
    stages = Stages(run.path / "stages.json", progress)
    stages.run("scenes", partial(_encode, recipe, run.path))
    stages.run("train", partial(_train, training, run.path))
    stages.run("draw", partial(_draw, recipe.evaluation, training, run.path))
    stages.run("answer", partial(_answer, recipe.evaluation, training, run.path))
    run.write_results(collect_results(run.path, stages.seconds, recipe))
    write_report(run.path)
    return run, False


def collect_results(out: Path, seconds: dict[str, float], recipe: QuickstartRecipe) -> dict[str, Any]:
    """Puts the figures of all stages together."""
    drawing, answering = _read(out / "scores-draw.json"), _read(out / "scores-answer.json")
    metrics = read_metrics(out / "train" / "metrics.jsonl")
    training_seconds = sum(entry["seconds"] for entry in metrics) or 1.0
    chance = drawing["chance"]
    for kind in ("yes_no", "multiple_choice"):
        topics = answering["trained"].get(f"{kind}_by_topic", {})
        chance[f"{kind}_by_topic"] = dict.fromkeys(topics, chance[kind])
    return {
        "scores": {
            **drawing["trained"],
            **answering["trained"],
            "untrained": {**drawing["untrained"], **answering["untrained"]},
            "chance": chance,
        },
        "seconds": {"total": sum(seconds.values()), "by_stage": seconds},
        "tokens_per_second": sum(entry["tokens"] for entry in metrics) / training_seconds,
        "steps": metrics[-1]["step"] if metrics else 0,
        "seeds": {"training": recipe.seed, "evaluation": recipe.evaluation.seed},
        "settings": {
            "sampling": recipe.train.image_sampling.model_dump(),
            "evaluation": recipe.evaluation.model_dump(),
        },
    }


class Stages:
    """Which stages are done, and the seconds that each took, over all the calls that it needed.

    What comes before the first stage of a call, the loading of libraries above all, counts as `start-up`.
    """

    def __init__(self, file: Path, progress: Progress | None):
        self.file = file
        self.progress = progress
        self.entries: dict[str, dict[str, Any]] = _read(file)
        start_up = self.entries.setdefault(START_UP, {"seconds": 0.0, "done": True})
        start_up["seconds"] += time.time() - psutil.Process().create_time()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return {name: entry["seconds"] for name, entry in self.entries.items()}

    def run(self, name: str, work: Callable[[Report], None]) -> None:
        """Does the work of a stage, unless it is done already."""
        entry = self.entries.setdefault(name, {"seconds": 0.0, "done": False})
        if entry["done"]:
            return
        logger.info("stage %s", name)
        before, start = entry["seconds"], time.perf_counter()

        def report(done: int, total: int, word: str = "") -> None:
            if self.progress is not None:
                self.progress(name, done, total, word)

        try:
            work(report)
            entry["done"] = True
        finally:
            entry["seconds"] = before + time.perf_counter() - start
            write_atomically(self.file, json.dumps(self.entries, indent=2))


def _training(recipe: QuickstartRecipe, out: Path) -> TrainRecipe:
    """The recipe of the training stage, with its folders below the run's."""
    data = recipe.train.data
    sources = [source.model_copy(update={"path": str(out / source.path)}) for source in data.sources]
    return recipe.train.model_copy(
        update={
            "run": str(out / "train"),
            "seed": recipe.seed,
            "data": data.model_copy(update={"sources": sources}),
        }
    )


def _encode(recipe: QuickstartRecipe, out: Path, report: Report) -> None:
    tokenizer = load_image_tokenizer(recipe.train.image_tokenizer).to(choose_device(recipe.train.device))
    encode_scenes(recipe.scenes, recipe.seed, out / "scenes", tokenizer, report)


def _train(recipe: TrainRecipe, out: Path, report: Report) -> None:
    if not (out / "model").exists():
        trained = train(recipe, lambda done, total, losses: report(done, total, losses_in_words(losses)))
        os.replace(trained.model_dir, out / "model")


def _draw(settings: ScenesEvaluationSection, recipe: TrainRecipe, out: Path, report: Report) -> None:
    prompts = [
        prompt
        for held_out in (False, True)
        for task in (scenes.HELD_OUT_KINDS if held_out else scenes.TASKS)
        for prompt in scenes.drawing_prompts(task, settings.prompts_per_task, settings.seed, held_out)
    ]
    scores = {"chance": chance_scores()}
    for number, (name, pipeline) in enumerate(_contestants(recipe, out).items()):

        def progress(done: int, total: int, before: int = number, name: str = name) -> None:
            report(before * total + done, 2 * total, name)

        # a picture a prompt is enough to see that an untrained model draws nothing
        pictures = settings.pictures_per_prompt if name == "trained" else 1
        drawings = draw_scenes(pipeline, prompts, pictures, settings.seed, progress)
        scores[name] = drawing_scores(drawings)
        with writing_into(out):
            _save_drawings(drawings, pictures, out / FOLDERS[name])
    write_atomically(out / "scores-draw.json", json.dumps(scores, indent=2))


def _contestants(recipe: TrainRecipe, out: Path) -> dict[str, UniXPipeline]:
    """The trained model, and the one that training started from."""
    device = choose_device(recipe.device)
    return {
        "trained": UniXPipeline.from_pretrained(out / "model", device),
        "untrained": UniXPipeline(make_start(recipe).to(device)),
    }


def _answer(settings: ScenesEvaluationSection, recipe: TrainRecipe, out: Path, report: Report) -> None:
    yes_no = scenes.yes_no_questions(settings.questions, settings.seed)
    choices = scenes.multiple_choice_questions(settings.questions, settings.seed)
    scores = {}
    for number, (name, pipeline) in enumerate(_contestants(recipe, out).items()):
        answers = _ask_everything(pipeline, yes_no, choices, settings.seed)
        scores[name] = answer_scores(*answers)
        with writing_into(out):
            _save_answers([answer for kind in answers for answer in kind], out / FOLDERS[name])
        report(number + 1, 2, name)
    write_atomically(out / "scores-answer.json", json.dumps(scores, indent=2))


def _ask_everything(
    pipeline: UniXPipeline, yes_no: list[scenes.YesNoItem], choices: list[scenes.ChoiceItem], seed: int
) -> tuple[list[Answer], list[Answer]]:
    return (
        answer_yes_no(pipeline, yes_no)
        + answer_yes_no(pipeline, scenes.with_other_pictures(yes_no, seed), other_picture=True),
        answer_multiple_choice(pipeline, choices)
        + answer_multiple_choice(pipeline, scenes.with_other_pictures(choices, seed), other_picture=True),
    )


def _save_drawings(drawings: Sequence[Drawing], pictures_per_prompt: int, folder: Path) -> None:
    """Writes a strip of pictures a prompt, and a row a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for start in range(0, len(drawings), pictures_per_prompt):
        strip = drawings[start : start + pictures_per_prompt]
        kind = strip[0].prompt.held_out or strip[0].prompt.task
        name = f"{kind}-{start // pictures_per_prompt:03d}.png"
        _side_by_side([drawing.picture for drawing in strip]).save(folder / name)
        rows += [{**drawing.to_dict(), "file": name, "place": place} for place, drawing in enumerate(strip)]
    _write_rows(folder / "drawings.jsonl", rows)


def _save_answers(answers: Sequence[Answer], folder: Path) -> None:
    """Writes a row an answer, with a picture for the first few of each topic."""
    folder.mkdir(parents=True, exist_ok=True)
    shown: Counter[tuple[str, bool]] = Counter()
    rows = []
    for number, answer in enumerate(answers):
        row = answer.to_dict()
        kind = (answer.topic + "-choice" * bool(answer.options), answer.other_picture)
        if not answer.other_picture and shown[kind] < PICTURES_SHOWN:
            shown[kind] += 1
            row["file"] = f"question-{number:04d}.png"
            scenes.compose(answer.scene).save(folder / row["file"])
        rows.append(row)
    _write_rows(folder / "answers.jsonl", rows)


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height), "white")
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * width, 0))
    return strip


def _write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def losses_in_words(losses: dict[str, float]) -> str:
    """The newest losses, for a progress line."""
    return ", ".join(
        f"{name} loss {losses[f'loss_{name}']:.2f}" for name in ("text", "image") if f"loss_{name}" in losses
    )


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
