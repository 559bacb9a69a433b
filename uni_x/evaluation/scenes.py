"""The quickstart's benchmark: drawings judged as GenEval does, questions in the manner of POPE and MMBench."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from uni_x import scenes
from uni_x.data.schema import CodeGrid
from uni_x.generation.pipeline import Question, UniXPipeline

MAX_ANSWER_TOKENS = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawing:
    """One drawn picture and its judgement."""

    prompt: scenes.DrawingPrompt
    codes: torch.Tensor  # (height, width)
    picture: Image.Image
    judgement: scenes.Judgement

    def to_dict(self) -> dict[str, Any]:
        """A row of the per-item file, from which the figures can be computed again."""
        return {
            **self.prompt.metadata(),
            "held_out": self.prompt.held_out,
            "codes": self.codes.tolist(),
            "correct": self.judgement.correct,
            "reason": self.judgement.reason,
        }


@dataclass(frozen=True)
class Answer:
    """One answered question. `options` is empty for yes/no, where `expected` and `given` are words."""

    scene: scenes.Scene
    question: str
    topic: str
    options: tuple[str, ...]
    expected: str
    given: str
    other_picture: bool

    @property
    def correct(self) -> bool:
        """Whether the model was right."""
        return self.given == self.expected

    def to_dict(self) -> dict[str, Any]:
        """A row of the per-item file."""
        return {
            "question": self.question,
            "topic": self.topic,
            "options": list(self.options),
            "expected": self.expected,
            "given": self.given,
            "correct": self.correct,
            "other_picture": self.other_picture,
            "picture": scenes.describe(self.scene),
        }


def draw_scenes(
    pipeline: UniXPipeline,
    prompts: Sequence[scenes.DrawingPrompt],
    pictures_per_prompt: int,
    seed: int,
    progress: Progress | None = None,
) -> list[Drawing]:
    """Draws each prompt several times, next to each other in the result, and judges the pictures."""
    repeated = [prompt for prompt in prompts for _ in range(pictures_per_prompt)]
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(repeated))

    codes = pipeline.draw_codes([prompt.text for prompt in repeated], seed=seed, progress=report)
    pictures = pipeline.folder.image_tokenizer.decode(codes)
    return [
        Drawing(prompt, grid, picture, scenes.judge(prompt, picture))
        for prompt, grid, picture in zip(repeated, codes, pictures, strict=True)
    ]


def answer_yes_no(
    pipeline: UniXPipeline, items: Sequence[scenes.YesNoItem], other_picture: bool = False
) -> list[Answer]:
    """Asks each question about its picture; whatever is neither yes nor no is wrong."""
    grids = _look(pipeline, [item.scene for item in items])
    texts = pipeline.ask([item.question for item in items], [(grid,) for grid in grids], MAX_ANSWER_TOKENS)
    return [
        Answer(item.scene, item.question, item.topic, (), item.answer, scenes.read_yes_no(text) or text, other_picture)
        for item, text in zip(items, texts, strict=True)
    ]


def answer_multiple_choice(
    pipeline: UniXPipeline, items: Sequence[scenes.ChoiceItem], other_picture: bool = False
) -> list[Answer]:
    """Asks the open question and takes the option whose words the model finds most likely."""
    grids = _look(pipeline, [item.scene for item in items])
    questions = [Question(item.question, (grid,), item.options) for item, grid in zip(items, grids, strict=True)]
    return [
        Answer(
            item.scene,
            item.question,
            item.topic,
            item.options,
            item.options[item.answer],
            item.options[chosen],
            other_picture,
        )
        for item, chosen in zip(items, pipeline.choose(questions), strict=True)
    ]


def drawing_scores(drawings: Sequence[Drawing]) -> dict[str, Any]:
    """Score by task, as GenEval: the share of right pictures a task, and the plain mean of the tasks.

    Held-out prompts are counted apart, by kind and as the mean of the kinds.
    """
    by_task = {
        task: _share(d for d in drawings if d.prompt.task == task and d.prompt.held_out is None)
        for task in scenes.TASKS
    }
    kinds = sorted(set(scenes.HELD_OUT_KINDS.values()))
    by_kind = {kind: _share(d for d in drawings if d.prompt.held_out == kind) for kind in kinds}
    return {
        "drawing": fmean(by_task.values()),
        "drawing_by_task": by_task,
        "drawing_held_out": fmean(by_kind.values()),
        "drawing_held_out_by_kind": by_kind,
    }


def answer_scores(yes_no: Sequence[Answer], multiple_choice: Sequence[Answer]) -> dict[str, Any]:
    """Accuracies with the right pictures, and with another scene's picture in their place."""
    scores: dict[str, Any] = {}
    for name, answers in (("yes_no", yes_no), ("multiple_choice", multiple_choice)):
        right = [answer for answer in answers if not answer.other_picture]
        scores[name] = _share(right)
        scores[f"{name}_other_picture"] = _share(answer for answer in answers if answer.other_picture)
        topics = sorted({answer.topic for answer in right})
        scores[f"{name}_by_topic"] = {topic: _share(a for a in right if a.topic == topic) for topic in topics}
    return scores


def chance_scores(pairs_per_task: int = 2000) -> dict[str, Any]:
    """What a model scores that draws a scene of the task without reading the prompt, and answers without looking."""
    by_task = {task: scenes.chance(task, pairs_per_task) for task in scenes.TASKS}
    by_kind: dict[str, list[float]] = {}
    for task, kind in scenes.HELD_OUT_KINDS.items():
        by_kind.setdefault(kind, []).append(scenes.chance(task, pairs_per_task, held_out=True))
    held_out = {kind: fmean(values) for kind, values in sorted(by_kind.items())}
    return {
        "drawing": fmean(by_task.values()),
        "drawing_by_task": by_task,
        "drawing_held_out": fmean(held_out.values()),
        "drawing_held_out_by_kind": held_out,
        "yes_no": 0.5,
        "yes_no_other_picture": 0.5,
        "multiple_choice": 0.25,
        "multiple_choice_other_picture": 0.25,
    }


def _look(pipeline: UniXPipeline, seen: Sequence[scenes.Scene]) -> list[CodeGrid]:
    return pipeline.encode([scenes.compose(scene) for scene in seen])


def _share(judged: Any) -> float:
    outcomes = [item.judgement.correct if isinstance(item, Drawing) else item.correct for item in judged]
    return fmean(outcomes) if outcomes else 0.0
