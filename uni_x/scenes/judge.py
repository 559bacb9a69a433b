"""Judges a drawing by GenEval's rules on what the scorer finds in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from uni_x.scenes.catalogue import COLOURS
from uni_x.scenes.dice import pick
from uni_x.scenes.drawing import Clause, DrawingPrompt, drawing_prompts, drawing_sample, requests
from uni_x.scenes.geometry import directions
from uni_x.scenes.scorer import Detection, read_picture
from uni_x.scenes.world import Scene


@dataclass(frozen=True)
class Judgement:
    """Whether a picture is what was asked for; `reason` lists every failure, a line each, in GenEval's words."""

    correct: bool
    reason: str = ""


def judge(prompt: DrawingPrompt, picture: Image.Image | Sequence[Detection]) -> Judgement:
    """Whether a picture, or what was found in it, holds what a prompt asks for.

    Each include clause wants its count of objects, of which the most certain ones must have the colour and
    the position; more of them, and other objects, do not hurt, unless an exclude clause (counting) forbids
    them. The rules are those of `evaluate` in djghosh13/geneval, `evaluation/evaluate_images.py`; its thresholds
    on the detector's confidence are replaced by the scorer's own.
    """
    detections = read_picture(picture) if isinstance(picture, Image.Image) else picture
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        kept.setdefault(detection.object, []).append(detection)
    failures: list[str] = []
    targets: list[list[Detection]] = []  # what each include clause found, empty where it failed
    for clause in prompt.include:
        found = kept.get(clause.object, [])[: clause.count]
        failure = _presence(clause, found) or _position(clause, found, targets)
        if failure:
            failures.append(failure)
        targets.append([] if failure else found)
    for clause in prompt.exclude:
        number = len(kept.get(clause.object, []))
        if number >= clause.count:
            failures.append(f"expected {clause.object}<{clause.count}, found {number}")
    return Judgement(not failures, "\n".join(failures))


def detections_of(scene: Scene) -> list[Detection]:
    """What a scorer without fault finds in the picture of a scene."""
    return [Detection(thing.object, thing.colour, thing.box, 1.0) for thing in scene.things]


def chance(task: str, count: int = 2000, seed: int = 0, held_out: bool = False) -> float:
    """The share of prompts that a drawing of something else fulfils.

    The drawings are scenes of the task's own training pairs, each judged against an unrelated prompt.
    """
    rng = np.random.default_rng(seed)
    pool = drawing_prompts(task, len(requests(task)), seed, held_out)
    hits = 0
    for _ in range(count):
        scene = drawing_sample(rng, {task: 1.0}).scene
        hits += judge(pick(rng, pool), detections_of(scene)).correct
    return hits / count


def _presence(clause: Clause, found: Sequence[Detection]) -> str | None:
    if len(found) < clause.count:
        return f"expected {clause.object}>={clause.count}, found {len(found)}"
    if clause.colour is None:
        return None
    colours = [detection.colour for detection in found]
    right = colours.count(clause.colour)
    if right >= clause.count:
        return None
    seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in COLOURS if colour in colours)
    return f"expected {clause.colour} {clause.object}>={clause.count}, found {right} {clause.colour}; and {seen}"


def _position(clause: Clause, found: Sequence[Detection], targets: Sequence[Sequence[Detection]]) -> str | None:
    if clause.position is None:
        return None
    relation, index = clause.position
    if not targets[index]:
        return f"no target for {clause.object} to be {relation}"
    for detection in found:
        for target in targets[index]:
            held = directions(detection.box, target.box)
            if relation not in held:
                return f"expected {clause.object} {relation} target, found {' and '.join(held)} target"
    return None
