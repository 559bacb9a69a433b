"""`uni-x` with storage that fails once in the last process, while DeepSpeed writes what that process has."""

import errno
import os
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from uni_x.cli import main

save = TorchCheckpointEngine.save
failures = [OSError(errno.EIO, "Input/output error")] if os.environ["RANK"] == "1" else []


def fail_once(self: TorchCheckpointEngine, state_dict: Any, path: str) -> None:
    if failures:
        print("storage fails", flush=True)
        raise failures.pop()
    save(self, state_dict, path)


TorchCheckpointEngine.save = fail_once
main()
