import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from uni_x.workflows.convert import convert

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference" / "uni_x"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_checkpoint_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    shutil.copy(REFERENCE / "config.json", source)
    weights = load_file(REFERENCE / "model.safetensors")
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, source / "model.safetensors")
    convert(source, made, "reference", None, tell=lambda _: None)
    assert {weight.dtype for weight in load_file(made / "model.safetensors").values()} == {dtype}
