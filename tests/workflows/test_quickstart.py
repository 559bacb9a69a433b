"""The quickstart's smoke run in real processes: once through, and killed and stopped on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import uni_x.model  # noqa: F401  (registers the Auto classes)
from uni_x.scenes import TASKS

DEADLINE = 240  # seconds for one process


def start(out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "uni_x", "quickstart", "--smoke", "--out", str(out), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy())


def finish(out: Path) -> str:
    process = start(out)
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors[-3000:]
    return output


def interrupt_when(reached: Callable[[], bool], out: Path, number: signal.Signals) -> tuple[int, str]:
    """Starts the run, sends it a signal once it has got somewhere, and returns its exit code and errors."""
    process = start(out)
    until = time.monotonic() + DEADLINE
    while process.poll() is None and not reached():
        assert time.monotonic() < until, "the run did not get there"
        time.sleep(0.02)
    assert process.poll() is None, f"the run ended before: {process.communicate()[1][-3000:]}"
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE)
    assert "Traceback" not in errors
    return process.returncode, errors


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    finish(out)
    return out


def test_a_run_leaves_everything_that_is_promised(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for scores in (results["scores"], results["scores"]["untrained"], results["scores"]["chance"]):
        assert set(scores) >= set(results["scores"]["untrained"])
        assert set(scores["drawing_by_task"]) == set(TASKS)
        for name in ("drawing", "drawing_held_out", "yes_no", "multiple_choice"):
            assert 0 <= scores[name] <= 1
    assert results["seconds"]["total"] == pytest.approx(sum(results["seconds"]["by_stage"].values()))
    assert set(results["seconds"]["by_stage"]) == {"start-up", "scenes", "train", "draw", "answer"}
    assert results["tokens_per_second"] > 0
    assert results["provenance"]["versions"]["torch"]
    assert results["seeds"] == {"training": 0, "evaluation": 2026}
    assert "<html" in (finished / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.config.preset == "uni-x"


def test_the_figures_can_be_computed_again_from_the_items(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "samples" / "drawings.jsonl").read_text().splitlines()]
    scores = json.loads((finished / "results.json").read_text())["scores"]
    for task, score in scores["drawing_by_task"].items():
        of_task = [row["correct"] for row in rows if row["tag"] == task and row["held_out"] is None]
        assert score == pytest.approx(sum(of_task) / len(of_task))
    answers = [json.loads(line) for line in (finished / "samples" / "answers.jsonl").read_text().splitlines()]
    for name, has_options in (("yes_no", False), ("multiple_choice", True)):
        asked = [a["correct"] for a in answers if bool(a["options"]) == has_options and not a["other_picture"]]
        assert scores[name] == pytest.approx(sum(asked) / len(asked))


def test_a_finished_run_says_so(finished: Path) -> None:
    before = (finished / "results.json").read_bytes()
    assert "finished already" in finish(finished)
    assert (finished / "results.json").read_bytes() == before


def test_another_recipe_is_refused(finished: Path) -> None:
    process = start(finished, "seed=1")
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "was made by another recipe (other seed)" in errors


def test_a_run_killed_and_stopped_ends_with_the_same_model(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    encoding = (out / "scenes" / "looking" / "manifest.json").exists
    code, errors = interrupt_when(encoding, out, signal.SIGINT)
    assert (code, "Run the same command again to go on." in errors) == (130, True)
    training = (out / "train" / "checkpoints" / "checkpoint-20" / "trainer_state.json").exists
    code, _ = interrupt_when(training, out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    log = out / "log.txt"
    code, errors = interrupt_when(lambda: "going on from checkpoint-20" in log.read_text(), out, signal.SIGINT)
    assert (code, "Run the same command again to go on." in errors) == (130, True)
    drawing = (out / "model").exists
    code, _ = interrupt_when(drawing, out, signal.SIGINT)
    assert code == 130
    finish(out)
    assert (out / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    scores = [json.loads((run / "results.json").read_text())["scores"] for run in (out, finished)]
    assert scores[0] == scores[1]
    steps = [
        [json.loads(line)["step"] for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
        for run in (out, finished)
    ]
    assert steps[0] == steps[1]
