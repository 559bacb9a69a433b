from pathlib import Path

import torch.distributed as dist

from uni_x import launch


def test_leaving_ends_the_group_of_processes_where_there_is_one(tmp_path: Path) -> None:
    launch.leave()
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    launch.leave()
    assert not dist.is_initialized()
