import pytest
import torch

from uni_x.devices import choose_own_device, device_of_process


@pytest.mark.parametrize(
    ("device", "local_rank", "gpus", "own"),
    [
        ("cuda", 0, 1, "cuda:0"),
        ("cuda", 3, 8, "cuda:3"),
        ("cuda", 3, 2, "cuda:1"),  # more processes than GPUs
        ("cuda", 3, 1, "cuda:0"),  # a launcher that shows each process its own GPU alone
        ("cuda:5", 3, 8, "cuda:5"),
        ("cpu", 3, 0, "cpu"),
        ("mps", 3, 0, "mps"),
    ],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(device, local_rank, gpus, own):
    assert device_of_process(torch.device(device), local_rank, gpus) == torch.device(own)


def test_processes_without_a_gpu_share_the_cpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_own_device("cpu") == torch.device("cpu")
