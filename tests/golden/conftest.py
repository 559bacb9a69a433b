"""Golden data from the published implementation.

The cases of the folder in `UNI_X_GOLDEN` are run, by default those beside the tests; what a folder lacks is left out.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from uni_x.model import UniXForCausalLM
from uni_x.workflows.convert import convert

Load = Callable[..., UniXForCausalLM]

GOLDEN = Path(os.environ.get("UNI_X_GOLDEN", Path(__file__).parents[1] / "fixtures"))


def folders(part: str) -> list[Path]:
    """Model folders below `reference` or `published` that have golden data beside them."""
    data = {"reference": "golden.safetensors", "published": "io.safetensors"}[part]
    found = sorted(path.parent for path in (GOLDEN / part).glob("*/config.json") if path.parent.name != "vqgan")
    return [folder for folder in found if (folder / data).is_file()]


OTHER_PARTS = ("reference/vqgan", "published/filters.safetensors", "published/collator.json", "benchmarks/golden")
if not (folders("reference") or folders("published") or any((GOLDEN / part).exists() for part in OTHER_PARTS)):
    raise FileNotFoundError(f"{GOLDEN}: no golden data in it")


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A published checkpoint as users get it: converted into a folder of ours, and loaded by the Auto class."""
    converted: dict[tuple[Path, int | None], Path] = {}

    def load(folder: Path, offset: int | None = None) -> UniXForCausalLM:
        if (folder, offset) not in converted:
            target = converted[folder, offset] = tmp_path_factory.mktemp("converted") / folder.name
            convert(folder, target, "reference", None, tell=lambda _: None, image_token_offset=offset)
        model = AutoModelForCausalLM.from_pretrained(converted[folder, offset])
        assert isinstance(model, UniXForCausalLM)
        assert model.dtype == torch.float32
        return model

    return load
