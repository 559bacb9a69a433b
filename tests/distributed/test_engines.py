import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_two_processes_have_the_losses_of_one(engine: str) -> None:
    """With uneven targets, and with steps in which a rank has one modality alone or nothing to learn."""
    if engine != "fsdp":
        pytest.importorskip("deepspeed")
    assert "ok" in launch(2, str(WORKER), engine).split()


def test_the_trainer_of_transformers_has_the_losses_of_one_process() -> None:
    """Ten steps, under DDP and ZeRO-3, with uneven targets and steps in which a rank has no image, or nothing else."""
    pytest.importorskip("deepspeed")
    one, *others = (
        losses(launch(1 if engine == "one" else 2, "-m", "tests.distributed.trainer_worker", engine))
        for engine in ("one", "ddp", "zero3")
    )
    assert len(one) == 10
    for engine in others:
        assert engine == pytest.approx(one, abs=1e-5)


def launch(processes: int, *words: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def losses(output: str) -> list[float]:
    return json.loads(next(line for line in output.splitlines() if line.startswith("[")))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_of_sharded_processes_goes_on_in_one_and_back(optimizer: str, tmp_path: Path) -> None:
    """Weights and optimizer state, by torch.distributed.checkpoint: two processes, one, and two again."""

    def train(processes: int, folder: str, first: int, last: int) -> list[float]:
        words = [optimizer, str(tmp_path / folder), str(first), str(last)]
        return losses(launch(processes, "-m", "tests.distributed.resharding_worker", *words))

    parts = [*train(2, "parts", 0, 4), *train(1, "parts", 4, 7), *train(2, "parts", 7, 10)]
    assert parts == pytest.approx(train(1, "whole", 0, 10), abs=1e-5)
