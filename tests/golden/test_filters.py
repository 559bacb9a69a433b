"""Temperature, top-k and top-p keep what the published code keeps."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.conftest import GOLDEN, folders
from uni_x.generation.sampling import filtered_probabilities

FILE = GOLDEN / "published" / "filters.safetensors"
FILTERS = load_file(FILE) if FILE.is_file() else {}


@pytest.mark.parametrize("case", sorted(name for name in FILTERS if name.endswith(".probs")))
def test_filters_agree_with_the_published_ones(case: str) -> None:
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders("published")]
    first = next((config["real_text_vocab_size"] for config in configs if "real_text_vocab_size" in config), 120)
    modality, temperature, top_k, top_p = (
        case.removesuffix(".probs").replace(".t", " ").replace(".k", " ").replace(".p", " ").split()
    )
    logits = FILTERS["logits"].clone()
    logits[:, slice(None, first) if modality == "image" else slice(first, None)] = float("-inf")
    rows = len(logits)
    probabilities = filtered_probabilities(
        logits,
        torch.full((rows,), float(temperature)),
        torch.full((rows,), int(top_k)),
        torch.full((rows,), float(top_p)),
    )
    torch.testing.assert_close(probabilities, FILTERS[case], rtol=0, atol=1e-6)
