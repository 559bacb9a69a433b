"""The small world of the quickstart: real pictures on a lattice, words about them, and a scorer that reads them back.

It draws scenes (`world`), asks for them in GenEval's six tasks (`drawing`), asks about them in the manner of POPE and
MMBench (`looking` to train on, `quiz` to test with), talks about them (`text`), and judges drawings from their
pixels (`scorer`, `judge`). It knows nothing of models, tokens or files, and of `uni_x` it uses the errors alone.
"""

from uni_x.scenes.answers import read_choice, read_yes_no
from uni_x.scenes.catalogue import COLOURS, HELD_OUT_COLOURS, HELD_OUT_PAIRS, KINDS
from uni_x.scenes.drawing import (
    HELD_OUT_KINDS,
    TASKS,
    DrawingPrompt,
    DrawingSample,
    describe,
    drawing_prompts,
    drawing_sample,
    drawing_samples,
)
from uni_x.scenes.judge import Judgement, chance, judge
from uni_x.scenes.looking import LookingSample, Turn, looking_sample, looking_samples
from uni_x.scenes.pictures import ATTRIBUTION, NamedPicture, named_pictures, require_packages
from uni_x.scenes.quiz import ChoiceItem, YesNoItem, multiple_choice_questions, with_other_pictures, yes_no_questions
from uni_x.scenes.rows import SourceRow, drawing_rows, looking_rows, openmoji_rows, text_rows
from uni_x.scenes.scorer import Detection, read_picture
from uni_x.scenes.text import sentence, sentences
from uni_x.scenes.world import SIDE, Placement, Scene, Thing, compose, compose_placements

__all__ = [
    "ATTRIBUTION",
    "COLOURS",
    "HELD_OUT_COLOURS",
    "HELD_OUT_KINDS",
    "HELD_OUT_PAIRS",
    "KINDS",
    "SIDE",
    "TASKS",
    "ChoiceItem",
    "Detection",
    "DrawingPrompt",
    "DrawingSample",
    "Judgement",
    "LookingSample",
    "NamedPicture",
    "Placement",
    "Scene",
    "SourceRow",
    "Thing",
    "Turn",
    "YesNoItem",
    "chance",
    "compose",
    "compose_placements",
    "describe",
    "drawing_prompts",
    "drawing_rows",
    "drawing_sample",
    "drawing_samples",
    "judge",
    "looking_rows",
    "looking_sample",
    "looking_samples",
    "multiple_choice_questions",
    "named_pictures",
    "openmoji_rows",
    "read_choice",
    "read_picture",
    "read_yes_no",
    "require_packages",
    "sentence",
    "sentences",
    "text_rows",
    "with_other_pictures",
    "yes_no_questions",
]
