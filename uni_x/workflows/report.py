"""The quickstart's report: one page that opens without a network, made from the files of the run folder alone."""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from uni_x.analysis.plots import PALETTE, describe_plan, loss_plot, plan_picture
from uni_x.errors import DataError, RunError, one_line
from uni_x.model import UniXConfig
from uni_x.model.size import ModelSize, measure_size
from uni_x.runs import write_atomically
from uni_x.scenes import ATTRIBUTION, SIDE
from uni_x.scenes.world import CELLS
from uni_x.train.callbacks import read_metrics
from uni_x.words import count_of

PROMPTS_SHOWN = 9  # of each task; a row holds three
HELD_OUT_SHOWN = 6  # of each task with held-out combinations
QUESTIONS_SHOWN = 3  # of each topic
SPACE = "\N{NO-BREAK SPACE}"

NAMES = {
    "single_object": "One object",
    "two_object": "Two objects",
    "counting": "Counting",
    "colors": "Colours",
    "position": "Position",
    "color_attr": "Two objects in their colours",
    "held_out_colour": "New colours",
    "held_out_pair": "New pairs",
    "yes_no": "Yes or no",
    "multiple_choice": "Multiple choice",
    "exists": "Is it there?",
    "exists_coloured": "Is it there in that colour?",
    "relation": "Does it stand there?",
    "colour": "Which colour?",
    "count": "How many?",
    "coloured": "What has that colour?",
    "present": "What is there?",
    "neighbour": "What stands there?",
    "scenes": "making the data",
    "train": "training",
    "draw": "drawing",
    "answer": "answering",
    "report": "this report",
}


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder; the same files give the same page.

    Only `results.json` must be there: what the other files would show is left out where they are missing.

    Raises:
        RunError: the folder has no results, or the disk is full.
        DataError: a file of the folder that cannot be read.
    """
    results = _read_json(run / "results.json")
    if results is None:
        raise RunError(f"{run}: has no results.json to report; run `uni-x quickstart --out {run}` to its end first")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(percent=percent, percent1=percent_exactly, duration=duration, count_of=count_of)
    page = environment.get_template("report.html.jinja").render(_contents(run, results))
    report = run / "report.html"
    write_atomically(report, page)
    return report


def percent(share: float | None) -> str:
    """A share in whole percent; 100% and 0% only where they are exact."""
    if share is None:
        return "–"
    whole = round(100 * share)
    if 0 < share < 1:
        whole = min(max(whole, 1), 99)
    return f"{whole}%"


def percent_exactly(share: float | None) -> str:
    """A share in percent with one decimal."""
    return "–" if share is None else f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """`6 min 52 s`, `4.1 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{SPACE}h{SPACE}{minutes}{SPACE}min"
    return f"{minutes}{SPACE}min{SPACE}{rest}{SPACE}s" if minutes else f"{rest}{SPACE}s"


def large(number: float) -> str:
    """`842,000`, `1.41 million`, `6.9 billion`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g}{SPACE}{word}"
    return f"{number:,.0f}"


@dataclass(frozen=True)
class Strip:
    """A prompt and the pictures drawn from it: a data URI, and for each whether it is right."""

    prompt: str
    image: str | None
    marks: tuple[bool, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """The drawings of one task: its score over all the pictures, and the first prompts of it."""

    title: str
    score: float
    chance: float | None
    prompts: int
    pictures: int
    strips: tuple[Strip, ...]


def _contents(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What the template shows; an empty value leaves a section out."""
    scores, samples = results.get("scores", {}), run / "samples"
    drawings = _read_rows(samples / "drawings.jsonl")
    config = UniXConfig.from_pretrained(run / "model") if (run / "model" / "config.json").is_file() else None
    size = measure_size(config) if config else None
    metrics = read_metrics(run / "train" / "metrics.jsonl")
    by_stage = results.get("seconds", {}).get("by_stage", {})
    contents: dict[str, Any] = {
        "palette": Markup(PALETTE),
        "css": Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
        "headline": _headline(results, size),
        "lead": _lead(results),
        "figures": _figures(results, size, metrics),
        "drawings": _drawn([row for row in drawings if not row.get("held_out")], scores, samples),
        "held_out": _drawn([row for row in drawings if row.get("held_out")], scores, samples),
        "questions": _questions(_read_rows(samples / "answers.jsonl"), samples),
        "tables": _tables(scores),
        "other_picture": _other_picture(scores),
        "curves": _curves(metrics),
        "stages": [{"name": _name(stage), "seconds": seconds} for stage, seconds in by_stage.items()],
        "total": results.get("seconds", {}).get("total", 0.0),
        "model": _model(config, size) if config and size else None,
        "recipe": _recipe(run / "recipe.yaml", config),
        "provenance": _provenance(results),
        "attribution": ATTRIBUTION,
    }
    titles = {
        "draws": ("drawings", "It draws"),
        "new": ("held_out", "What it never saw together"),
        "looks": ("questions", "It looks and answers"),
        "scores": ("figures", "Scores"),
        "learning": ("curves", "How it learned"),
        "model": ("model", "The model"),
        "made": ("figures", "How it was made"),
    }
    contents["sections"] = [(anchor, title) for anchor, (part, title) in titles.items() if contents[part]]
    return contents


def _headline(results: dict[str, Any], size: ModelSize | None) -> str:
    scores, cpus = results.get("scores", {}), results.get("provenance", {}).get("cpu_count")
    training = results.get("seconds", {}).get("by_stage", {}).get("train")
    who = "A model" + (f" of {large(size.total)} parameters" if size else "")
    if training is not None:
        machine = f" on a machine of {count_of(cpus, 'CPU')}" if cpus else ""
        who += f", trained in {duration(training)}{machine},"
    does = []
    if "drawing" in scores:
        does.append(f"draws {percent(scores['drawing'])} of its pictures as asked")
    if "yes_no" in scores:
        does.append(f"answers {percent(scores['yes_no'])} of yes/no questions about pictures right")
    return f"{who} {' and '.join(does) or 'is there to be tried'}."


def _lead(results: dict[str, Any]) -> list[str]:
    scores = results.get("scores", {})
    chance, untrained = scores.get("chance", {}), scores.get("untrained", {})
    sentences = []
    others = (("Chance would get", chance), ("the same model before training gets", untrained))
    if known := [(who, their) for who, their in others if "drawing" in their and "yes_no" in their]:
        words = [f"{who} {percent(their['drawing'])} and {percent(their['yes_no'])}" for who, their in known]
        sentences.append(f"{'; '.join(words)}.")
    steps = results.get("steps")
    if steps and scores.get("drawing", 1.0) < chance.get("drawing", 0.0) + 0.05:
        sentences.append(f"Its drawings are no better than chance so far: it was trained for {steps:,} steps.")
    return sentences


def _figures(
    results: dict[str, Any], size: ModelSize | None, metrics: Sequence[dict[str, float]]
) -> list[dict[str, str]]:
    scores, seconds = results.get("scores", {}), results.get("seconds", {})
    named = {
        "drawing": "Drawings right, mean of the tasks",
        "drawing_held_out": "Drawings right, new combinations",
        "yes_no": "Yes/no questions right",
        "multiple_choice": "Multiple choice right",
    }
    figures = [
        {"name": name, "value": percent(scores[key]), "note": f"chance {percent(scores.get('chance', {}).get(key))}"}
        for key, name in named.items()
        if key in scores
    ]
    if size:
        note = f"{large(size.active_text)} for a text token"
        figures.append({"name": "Parameters", "value": large(size.total), "note": note})
    if "total" in seconds:
        training = seconds.get("by_stage", {}).get("train")
        note = "" if training is None else f"{duration(training)} of it training"
        figures.append({"name": "Time from start to scores", "value": duration(seconds["total"]), "note": note})
    if "tokens_per_second" in results:
        speed = f"{results['tokens_per_second']:,.0f}"
        figures.append({"name": "Tokens a second in training", "value": speed, "note": ""})
    if "steps" in results:
        tokens = sum(entry.get("tokens", 0.0) for entry in metrics)
        note = f"{large(tokens)} tokens" if tokens else ""
        figures.append({"name": "Training steps", "value": f"{results['steps']:,}", "note": note})
    return figures


def _drawn(rows: Sequence[dict[str, Any]], scores: dict[str, Any], samples: Path) -> list[Drawn]:
    """A group for each task, held-out kinds apart, in the order of the rows."""
    groups: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row.get("held_out"), row["tag"]), []).append(row)
    chance = scores.get("chance", {})
    drawn = []
    for (kind, task), drawings in groups.items():
        strips = [list(strip) for _, strip in groupby(drawings, lambda row: row["file"])]
        by_chance = chance.get("drawing_held_out_by_kind", {}).get(kind) if kind else None
        drawn.append(
            Drawn(
                title=f"{_name(kind)}: {_name(task).lower()}" if kind else _name(task),
                score=fmean(bool(row["correct"]) for row in drawings),
                chance=by_chance if kind else chance.get("drawing_by_task", {}).get(task),
                prompts=len(strips),
                pictures=len(drawings),
                strips=tuple(_strip(strip, samples) for strip in strips[: HELD_OUT_SHOWN if kind else PROMPTS_SHOWN]),
            )
        )
    return drawn


def _strip(rows: Sequence[dict[str, Any]], samples: Path) -> Strip:
    rows = sorted(rows, key=lambda row: row["place"])
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows, start=1):
        if not row["correct"]:
            places.setdefault("; ".join(str(row.get("reason") or "wrong").splitlines()), []).append(number)
    return Strip(
        prompt=rows[0]["prompt"],
        image=_data_uri(samples, rows[0]["file"]),
        marks=tuple(bool(row["correct"]) for row in rows),
        reasons=tuple(
            f"{'Picture' if len(numbers) == 1 else 'Pictures'} {', '.join(map(str, numbers))}: {reason}"
            for reason, numbers in places.items()
        ),
    )


def _questions(rows: Sequence[dict[str, Any]], samples: Path) -> list[dict[str, Any]]:
    """The first questions of each topic that were kept with their picture; yes/no before multiple choice."""
    groups: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for row in rows:
        if not row.get("other_picture"):
            groups.setdefault((bool(row.get("options")), row.get("topic", "")), []).append(row)
    topics = []
    for (choice, topic), answers in sorted(groups.items(), key=lambda group: group[0][0]):
        shown = [row for row in answers if row.get("file")] or answers
        topics.append(
            {
                "title": f"{_name('multiple_choice' if choice else 'yes_no')}: {_name(topic)}",
                "score": fmean(bool(row["correct"]) for row in answers),
                "asked": len(answers),
                "rows": [
                    {"picture": "", "options": [], **row, "image": _data_uri(samples, row.get("file"))}
                    for row in shown[:QUESTIONS_SHOWN]
                ],
            }
        )
    return topics


def _tables(scores: dict[str, Any]) -> list[dict[str, Any]]:
    drawing = [
        _score_row(scores, ("drawing",), "All six tasks, mean", "total"),
        *_part_rows(scores, "drawing_by_task"),
        _score_row(scores, ("drawing_held_out",), "New combinations, mean", "total"),
        *_part_rows(scores, "drawing_held_out_by_kind"),
    ]
    answering = [
        row
        for kind in ("yes_no", "multiple_choice")
        for row in (_score_row(scores, (kind,), _name(kind), "total"), *_part_rows(scores, f"{kind}_by_topic", kind))
    ]
    tables = []
    for title, rows in (("Drawing", drawing), ("Answering", answering)):
        known = [row for row in rows if row["trained"] is not None]
        if known:
            tables.append({"title": title, "rows": known})
    return tables


def _part_rows(scores: dict[str, Any], key: str, whole: str | None = None) -> list[dict[str, Any]]:
    """A row for each part of a score; where chance has no parts, every part's is that of the `whole`."""
    rows = []
    for part in scores.get(key, {}):
        row = _score_row(scores, (key, part), _name(part), "part")
        if whole and row["chance"] is None:
            row["chance"] = scores.get("chance", {}).get(whole)
        rows.append(row)
    return rows


def _score_row(scores: dict[str, Any], path: tuple[str, ...], name: str, style: str) -> dict[str, Any]:
    values = {
        "trained": _look_up(scores, path),
        "untrained": _look_up(scores, ("untrained", *path)),
        "chance": _look_up(scores, ("chance", *path)),
    }
    return {"name": name, "style": style, **values}


def _other_picture(scores: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": _name(kind),
            "own": scores.get(kind),
            "other": scores[f"{kind}_other_picture"],
            "chance": _look_up(scores, ("chance", f"{kind}_other_picture")),
        }
        for kind in ("yes_no", "multiple_choice")
        if f"{kind}_other_picture" in scores
    ]


def _curves(metrics: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    curves = []
    for modality, title in (("text", "Text"), ("image", "Image codes")):
        points = [(entry["step"], entry[f"loss_{modality}"]) for entry in metrics if f"loss_{modality}" in entry]
        if points:
            steps, losses = zip(*points, strict=True)
            curves.append({"title": title, "svg": Markup(loss_plot(steps, losses, modality))})
    return curves


def _model(config: UniXConfig, size: ModelSize) -> dict[str, Any]:
    arguments = ", ".join(f"{key} {value}" for key, value in (config.preset_arguments or {}).items())
    preset = config.preset or "spelled out"
    facts = [
        ("Plan", f"{preset} ({arguments})" if arguments else preset),
        ("Parameters", f"{size.total:,}; {size.embedding:,} of them in the embedding, {size.head:,} in the head"),
        ("A token passes", f"{size.active_text:,} as text, {size.active_image:,} as an image code"),
        ("Width", f"{config.hidden_size:,}, FFN {config.intermediate_size:,}, {config.num_attention_heads} heads"),
        ("Vocabulary", f"{config.image_token_offset:,} text ids, {config.image_codebook_size:,} image codes"),
    ]
    if config.image_grid:
        rows, columns = config.image_grid
        facts.append(("A picture", f"{rows} × {columns} codes"))
    words = describe_plan(config.layer_specs)
    return {
        "sentence": f"Its {count_of(config.num_hidden_layers, 'layer')}: {words}.",
        "picture": Markup(plan_picture(config.layer_specs)),
        "facts": facts,
    }


def _recipe(file: Path, config: UniXConfig | None) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{file}: not valid YAML ({one_line(error)})") from None
    facts = [("Scenes", f"{SIDE} × {SIDE} pixels, OpenMoji objects on white in a lattice of {CELLS} × {CELLS} cells")]
    if amounts := tree.get("scenes"):
        words = {"drawings": "pictures with captions", "looking": "pictures with questions", "texts": "sentences"}
        counts = [f"{amounts[key]:,} {word}" for key, word in words.items() if key in amounts]
        facts.append(("Training data", ", ".join(counts)))
    if steps := _look_up(tree, ("train", "trainer", "max_steps")):
        length = _look_up(tree, ("train", "data", "max_length"))
        facts.append(("Training", f"{steps:,} steps" + (f", packed rows of {length:,} tokens" if length else "")))
    if optimizer := _look_up(tree, ("train", "optimizer")):
        rest = {key: value for key, value in optimizer.items() if key != "name"}
        facts.append(("Optimizer", f"{optimizer.get('name', '')} with {_settings(rest)}".strip()))
    if sampling := _look_up(tree, ("train", "image_sampling")):
        facts.append(("Drawing", _settings(sampling)))
    if evaluation := tree.get("evaluation"):
        facts.append(("Test", _settings(evaluation)))
    return {"facts": facts, "text": text}


def _provenance(results: dict[str, Any]) -> list[tuple[str, str]]:
    provenance = results.get("provenance", {})
    facts = {
        "Command": provenance.get("command"),
        "Revision": provenance.get("git_revision"),
        "Seeds": _settings(results.get("seeds", {})),
        "Machine": provenance.get("platform"),
        "CPUs": provenance.get("cpu_count"),
        "Versions": _settings(provenance.get("versions", {})),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _settings(tree: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in tree.items())


def _name(key: str) -> str:
    return NAMES.get(key) or key.replace("_", " ").capitalize()


def _look_up(tree: Any, path: Iterable[str]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _data_uri(folder: Path, name: str | None) -> str | None:
    if name is None or not (folder / name).is_file():
        return None
    return "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON ({error}); start again in a new folder") from None


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not valid JSON ({error}); start again in a new folder") from None
    return rows
