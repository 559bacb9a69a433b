import json
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from uni_x import scenes
from uni_x.analysis.plots import describe_plan, fold, loss_plot, plan_picture
from uni_x.errors import DataError, RunError
from uni_x.evaluation.scenes import Answer, Drawing, answer_scores, drawing_scores
from uni_x.model import UniXConfig
from uni_x.model.plan import LayerSpec, moe, mot, shared, uni_share, uni_x
from uni_x.scenes.drawing import lay_out
from uni_x.workflows.quickstart import load_quickstart_recipe
from uni_x.workflows.report import percent, write_report

HOSTILE = '<script>alert("x")</script> & a cat'


def make_run(folder, prompts_per_task=2, pictures_per_prompt=2, questions=20):
    """A run folder as the quickstart leaves it, with an imagined model that is right four times in five."""
    rng = np.random.default_rng(0)
    drawings = _drawings(rng, prompts_per_task, pictures_per_prompt)
    samples = folder / "samples"
    samples.mkdir(parents=True)
    rows = []
    for start in range(0, len(drawings), pictures_per_prompt):
        strip = drawings[start : start + pictures_per_prompt]
        name = f"{strip[0].prompt.task}-{start:03d}.png"
        _side_by_side([drawing.picture for drawing in strip]).save(samples / name)
        rows += [{**drawing.to_dict(), "file": name, "place": place} for place, drawing in enumerate(strip)]
    _write_rows(samples / "drawings.jsonl", rows)
    yes_no, choices = _answers(rng, questions)
    shown = Counter()
    rows = []
    for number, answer in enumerate([*yes_no, *choices]):
        row = answer.to_dict()
        shown[row["topic"]] += 1
        if not answer.other_picture and shown[row["topic"]] <= 3:
            row["file"] = f"question-{number}.png"
            scenes.compose(answer.scene).save(samples / row["file"])
        rows.append(row)
    _write_rows(samples / "answers.jsonl", rows)
    (folder / "train").mkdir()
    losses = [
        {
            "step": 50 * (index + 1),
            "tokens": 6e4,
            "seconds": 7.0,
            "loss_text": 5.8 * 0.9**index + 0.31,
            "loss_image": 6.2 * 0.93**index + 1.04,
        }
        for index in range(56)
    ]
    _write_rows(folder / "train" / "metrics.jsonl", losses)
    UniXConfig(
        vocab_size=1536,
        image_token_offset=1024,
        image_codebook_size=512,
        image_grid=[4, 4],
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        preset="uni-x",
        preset_arguments={"first": 1, "last": 1},
    ).save_pretrained(folder / "model")
    recipe = load_quickstart_recipe().model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    scores = {**drawing_scores(drawings), **answer_scores(yes_no, choices)}
    chance = {
        "drawing": 0.12,
        "drawing_by_task": dict.fromkeys(scenes.TASKS, 0.12),
        "drawing_held_out": 0.02,
        "drawing_held_out_by_kind": {"held_out_colour": 0.03, "held_out_pair": 0.01},
        **{
            f"{kind}{ending}": share
            for kind, share in (("yes_no", 0.5), ("multiple_choice", 0.25))
            for ending in ("", "_other_picture")
        },
    }
    results = {
        "scores": {**scores, "untrained": scores, "chance": chance},
        "seconds": {
            "total": 552.0,
            "by_stage": {"scenes": 71.0, "train": 392.4, "draw": 58.2, "answer": 24.1, "report": 6.3},
        },
        "tokens_per_second": 8563.2,
        "steps": 2800,
        "seeds": {"training": 0, "evaluation": 2026},
        "provenance": {
            "command": "uni-x quickstart",
            "git_revision": "0123456789ab",
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "platform": "Linux-6.1-x86_64",
            "cpu_count": 2,
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


class Page(HTMLParser):
    """The page as elements: their attributes by name of the tag, their text, and what was left open."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read_page(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_report_says_what_happened_in_one_sentence(run):
    results = json.loads((run / "results.json").read_text())
    assert write_report(run) == run / "report.html"
    drawing, yes_no = (percent(results["scores"][key]) for key in ("drawing", "yes_no"))
    assert (
        f"trained in 6 min 32 s on a machine of 2 CPUs, draws {drawing} of its pictures as asked and answers {yes_no}"
        in read_page(run).text
    )


def test_the_report_needs_nothing_from_outside(run):
    write_report(run)
    page = read_page(run)
    addresses = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not page.all("script")
    assert "@import" not in (run / "report.html").read_text()
    assert not re.search(r"url\((?!#)", (run / "report.html").read_text())


def test_the_same_files_give_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_ids_are_unique_and_anchors_lead_somewhere(run):
    write_report(run)
    page = read_page(run)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for _, attributes in page.elements if attributes.get("href", "").startswith("#")}
    assert {target[1:] for target in targets} <= set(ids)


def test_every_picture_has_words_in_its_place(run):
    write_report(run)
    page = read_page(run)
    assert len(page.all("img")) > 20
    assert all(attributes["alt"].strip() for attributes in page.all("img"))
    assert all(attributes["aria-label"].strip() for attributes in page.all("svg"))


def test_it_shows_the_first_prompts_of_every_task_with_a_mark_a_picture_and_the_reasons(run):
    rows = [json.loads(line) for line in (run / "samples" / "drawings.jsonl").read_text().splitlines()]
    write_report(run)
    page = read_page(run)
    assert {row["tag"] for row in rows} == set(scenes.TASKS)
    for row in rows:
        assert row["prompt"] in page.text
        for reason in row["reason"].splitlines():
            assert reason in page.text
    marks = Counter(attributes["aria-label"] for attributes in page.all("span") if attributes.get("role") == "img")
    assert marks == {"right": sum(row["correct"] for row in rows), "wrong": sum(not row["correct"] for row in rows)}


def test_only_so_many_prompts_of_a_task_are_shown(tmp_path):
    run = make_run(tmp_path / "run", prompts_per_task=12, pictures_per_prompt=1)
    write_report(run)
    strips = [attributes for attributes in read_page(run).all("img") if "drawings of" in attributes["alt"]]
    assert len(strips) == 6 * 9 + 4 * 6


def test_questions_stand_with_the_answer_and_what_was_right(run):
    rows = [json.loads(line) for line in (run / "samples" / "answers.jsonl").read_text().splitlines()]
    write_report(run)
    text = read_page(run).text
    wrong = [row for row in rows if row.get("file") and not row["correct"]]
    assert wrong
    for row in wrong:
        assert row["question"] in text
        assert f"✗ {row['given']} ; right was {row['expected']}" in text


def test_scores_stand_beside_the_untrained_model_and_chance(run):
    results = json.loads((run / "results.json").read_text())
    results["scores"]["drawing_by_task"]["counting"] = 0.876
    results["scores"]["untrained"] = {"drawing_by_task": {"counting": 0.031}}
    (run / "results.json").write_text(json.dumps(results))
    write_report(run)
    assert "Counting 87.6% 3.1% 12.0%" in read_page(run).text


def test_data_cannot_break_out_of_the_page(run):
    results = json.loads((run / "results.json").read_text())
    results["provenance"]["command"] = HOSTILE
    results["seconds"]["by_stage"][HOSTILE] = 1.0
    results["scores"]["yes_no_by_topic"][HOSTILE] = 0.5
    (run / "results.json").write_text(json.dumps(results))
    for name, keys in (
        ("drawings", ("prompt", "reason", "tag")),
        ("answers", ("question", "given", "picture", "topic")),
    ):
        file = run / "samples" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[0].update({**dict.fromkeys(keys, HOSTILE), "correct": False})
        _write_rows(file, rows)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"evaluation": {"x": HOSTILE}}))
    write_report(run)
    page = read_page(run)
    assert not page.all("script")
    assert page.text.count("alert(") > 8
    assert unescape(page.all("img")[0]["alt"]).endswith(HOSTILE)


@pytest.mark.parametrize(
    "missing",
    ["samples/drawings.jsonl", "samples/answers.jsonl", "train/metrics.jsonl", "model/config.json", "recipe.yaml"],
)
def test_what_is_missing_is_left_out(run, missing):
    (run / missing).unlink()
    write_report(run)
    assert "Scores" in read_page(run).text


def test_it_reports_results_alone(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    write_report(tmp_path)
    assert "A model is there to be tried." in read_page(tmp_path).text


def test_parts_of_the_scores_may_be_missing(run):
    results = json.loads((run / "results.json").read_text())
    results["scores"] = {"drawing": 0.5, "yes_no": 1.0}
    (run / "results.json").write_text(json.dumps(results))
    write_report(run)
    assert "Yes or no 100.0% – –" in read_page(run).text


def test_a_picture_that_is_missing_is_told(run):
    for file in (run / "samples").glob("*.png"):
        file.unlink()
    write_report(run)
    page = read_page(run)
    assert not page.all("img")
    assert "The picture file is missing." in page.text


def test_a_run_that_no_better_than_chance_says_so(run):
    results = json.loads((run / "results.json").read_text())
    results["scores"]["drawing"], results["steps"] = 0.1, 40
    (run / "results.json").write_text(json.dumps(results))
    write_report(run)
    assert "no better than chance so far: it was trained for 40 steps" in read_page(run).text


def test_a_folder_without_results_is_one_clear_line(tmp_path):
    with pytest.raises(RunError, match=r"has no results\.json to report; run `uni-x quickstart"):
        write_report(tmp_path)


def test_a_row_that_was_cut_off_is_named(run):
    with (run / "samples" / "answers.jsonl").open("a") as stream:
        stream.write('{"question": "Is th')
    with pytest.raises(DataError, match=r"answers\.jsonl, line \d+: not valid JSON"):
        write_report(run)


PLANS = {
    "shared": shared(4),
    "uni-x": uni_x(4, 1, 1),
    "uni-x, ends see all": uni_x(4, 1, 1, "all"),
    "moe": moe(28, 2),
    "mot": mot(28, 512),
    "uni-share": uni_share(28, 9, 5, 0, 128),
    "of its own": (LayerSpec(shared_ffn_size=64, sees="own"), LayerSpec(norms="separate", output="separate")),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_any_plan_becomes_a_picture(plan):
    picture = ElementTree.fromstring(plan_picture(plan))
    assert picture.get("aria-label") == describe_plan(plan)
    width, height = float(picture.get("width")), float(picture.get("height"))
    assert width < 1200
    bars = picture.findall("{*}rect")
    assert all(0 <= float(bar.get("x")) < width - 40 and 0 <= float(bar.get("y")) < height for bar in bars)


def test_a_plan_in_words():
    assert describe_plan(uni_x(4, 1, 1)) == (
        "layer 0: apart for text and images, sees its own; layers 1 to 2: shared, see all; "
        "layer 3: apart for text and images, sees its own"
    )
    assert describe_plan(moe(4, 2)) == "layers 0 to 3, in turn: shared, sees all and ffn apart, sees all"


def test_a_plan_shows_what_is_shared_and_what_is_seen():
    def count(plan, what):
        return plan_picture(plan).count(what)

    # norms twice, projections twice, ffn: five bars, once for both or once for each
    assert count(shared(1), 'style="fill:var(--ux-shared)"') == 5
    assert count(uni_x(1, 1, 0), 'rx="4" style="fill:var(--ux-text)"') == 5
    assert count(uni_x(1, 1, 0), 'rx="4" style="fill:var(--ux-image)"') == 5
    assert count(uni_x(1, 1, 0), 'r="9"') == 2
    assert count(uni_x(1, 1, 0, "all"), 'rx="9"') == 1


@pytest.mark.parametrize("plan", [uni_x(28, 9, 5), moe(28, 3), moe(29, 2), shared(7), uni_share(40, 1, 38)])
def test_folding_loses_no_layer(plan):
    unfolded = [spec for block in fold(plan) for spec in block.specs * block.times]
    assert tuple(unfolded) == plan
    assert [block.first for block in fold(plan)][1:] == [block.last + 1 for block in fold(plan)][:-1]
    assert sum(len(block.specs) for block in fold(plan)) < 7


@pytest.mark.parametrize("losses", [[5.0], [0.0, 0.0], [6.2, 3.1, 1.05]])
def test_a_loss_plot_states_first_and_last_in_words(losses):
    steps = [50 * (index + 1) for index in range(len(losses))]
    plot = ElementTree.fromstring(loss_plot(steps, losses, "image"))
    assert f"from {losses[0]:.2f} at step 50 to {losses[-1]:.2f}" in plot.get("aria-label")
    assert "#0102" not in loss_plot(steps, losses, "image")


def _drawings(rng, prompts_per_task, pictures_per_prompt):
    prompts = [
        prompt
        for held_out in (False, True)
        for task in (scenes.HELD_OUT_KINDS if held_out else scenes.TASKS)
        for prompt in scenes.drawing_prompts(task, prompts_per_task, 1, held_out)
    ]
    drawings = []
    for prompt in prompts:
        for _ in range(pictures_per_prompt):
            asked = prompt if rng.random() < 0.8 else prompts[rng.integers(len(prompts))]
            picture = scenes.compose(lay_out(asked.include, rng))
            codes = torch.zeros(4, 4, dtype=torch.int64)
            drawings.append(Drawing(prompt, codes, picture, scenes.judge(prompt, picture)))
    return drawings


def _answers(rng, count):
    yes_no, choices = scenes.yes_no_questions(count, 1), scenes.multiple_choice_questions(count, 1)
    answered = [
        Answer(i.scene, i.question, i.topic, (), i.answer, i.answer if rng.random() < 0.8 else "no idea", other)
        for other in (False, True)
        for i in yes_no
    ]
    chosen = [
        Answer(i.scene, i.question, i.topic, i.options, i.options[i.answer], i.options[rng.integers(4)], other)
        for other in (False, True)
        for i in choices
    ]
    return answered, chosen


def _side_by_side(pictures):
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))


def _write_rows(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
