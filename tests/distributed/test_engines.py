import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_two_processes_have_the_losses_of_one(engine: str) -> None:
    """With uneven targets, and with steps in which a rank has one modality alone or nothing to learn."""
    if engine != "fsdp":
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), engine]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "ok" in run.stdout.split()
