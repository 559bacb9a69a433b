"""Ids and labels of the published collators, under `layout: published`.

What they leave to chance (mode, instruction, number of newlines, no text) is read from the golden data and written out
here. How they pack is not ours: images are never cut.
"""

import ast
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from tests.golden.conftest import GOLDEN
from uni_x.data.layouts import PUBLISHED_CAPTION, PublishedLayout, Segment
from uni_x.data.render import Renderer, Vocabulary, _assemble
from uni_x.data.schema import CodeGrid, Message, Sample
from uni_x.recipe import RenderOptions

FILE = GOLDEN / "published" / "collator.json"
JOBS: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
ARRAYS = np.load(FILE.with_suffix(".npz")) if JOBS else {}
VOCABULARY = Vocabulary(151665, 8192, 151652, 151653, 151643, 151643)
SEPARATOR = "<|vision_pad|>"


class Bytes:
    """The tokenizer of the golden data: a byte is an id."""

    def __len__(self) -> int:
        return 151665

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode("utf-8")) for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {SEPARATOR: 151654}


def texts_of(layout: str) -> str:
    """The text in a layout in words, whose other parts are markers and counts of image ids."""
    quoted = re.findall(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", layout)
    return "".join(ast.literal_eval(text) for text in quoted)


def newlines_of(text: str) -> int:
    return len(text) - len(text.lstrip("\n"))


@pytest.mark.parametrize("name", [name for name in JOBS if not name.startswith("pack.")])
def test_ids_and_labels_are_the_published_ones(name: str) -> None:
    job = JOBS[name]
    codes = ARRAYS["codes"]
    side = int(len(codes) ** 0.5)
    image = CodeGrid(codes.astype(np.uint16), side, side)
    separator = re.search(r"\[(\d+) image ids\] <\|vision_pad\|>", job["layout"])
    ignored = any(kind == "ignored" for *_, kind, _ in job["label_runs"])
    options = RenderOptions(
        layout="published",
        ignore_instruction=ignored,
        vis_sep={"every": int(separator[1]), "token": SEPARATOR} if separator else None,
    )
    renderer = Renderer(Bytes(), VOCABULARY, options, "sft" if "SFT" in job["collator"] else "pretrain")
    layout = renderer._layout
    assert isinstance(layout, PublishedLayout)
    segments = lay_out(name, job, layout, image)
    sample = Sample("x", (image,), caption="x")
    rendered = _assemble("any", segments, renderer._tokenize(segments), sample, layout.markers)
    assert rendered.input_ids.tolist() == ARRAYS[f"{name}.input_ids"].tolist()
    assert rendered.labels.tolist() == ARRAYS[f"{name}.labels"].tolist()


def lay_out(name: str, job: dict[str, Any], layout: PublishedLayout, image: CodeGrid) -> list[Segment]:
    text = texts_of(job["layout"])
    if "t2i" in name:
        return layout.drawing(text, image)
    if text.startswith(PUBLISHED_CAPTION):
        return layout.description(image, "", text.removeprefix(PUBLISHED_CAPTION), itertools.repeat(0))
    runs = [texts_of(words) for *_, words in job["label_runs"]]
    if len(runs) == 1:
        return layout.document(text, ())
    newlines = iter([newlines_of(run) for run in runs])
    has_image = "vision_start" in job["layout"]
    if not has_image and job["layout"].endswith("<|endoftext|>"):
        return layout.instruction(runs[0], runs[1].lstrip("\n"), itertools.islice(newlines, 1, None))
    messages = [Message(("user", "assistant")[number % 2], run.lstrip("\n")) for number, run in enumerate(runs)]
    if name == "sft_caption_reverse":
        return layout.description(image, messages[0].content, messages[1].content, newlines)
    return layout.conversation(messages, (image,) if has_image else (), newlines)
