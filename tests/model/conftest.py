from collections.abc import Callable
from typing import Any

import pytest
import torch

from uni_x.model import UniXConfig, UniXForCausalLM

TEXT, CODES, MARKER = 120, 64, 110

PLANS: dict[str, dict[str, Any]] = {
    "shared": {"preset": "shared"},
    "uni-x": {"preset": "uni-x", "preset_arguments": {"first": 2, "last": 1}},
    "uni-x-ends-see-all": {"preset": "uni-x", "preset_arguments": {"first": 1, "last": 1, "ends_see": "all"}},
    "moe": {"preset": "moe", "preset_arguments": {"step": 2}},
    "mot": {"preset": "mot", "preset_arguments": {"image_ffn_size": 20}},
    "uni-share": {
        "preset": "uni-share",
        "preset_arguments": {"first": 1, "last": 1, "image_ffn_size": 20, "shared_ffn_size": 12},
    },
    "own-plan": {
        "plan": [{"sees": "own"}, {"qkv": "separate", "sees": "own"}, {"output": "separate"}, {"norms": "separate"}, {}]
    },
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PLANS[request.param]


@pytest.fixture
def make_model() -> Callable[..., UniXForCausalLM]:
    """A tiny model of any plan, with weights large enough that every mistake shows."""

    def make(**changes: Any) -> UniXForCausalLM:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": TEXT + CODES + 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "image_token_offset": TEXT,
            "image_codebook_size": CODES,
            "vision_start_token_id": MARKER,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        return UniXForCausalLM(UniXConfig(**(sizes | changes))).eval()

    return make


@pytest.fixture
def mixed() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of three rows: text with a picture inside, one padded left, one padded right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, MARKER, (3, 20), generator=generator)
    for row, start, end in ((0, 5, 12), (1, 4, 9), (2, 9, 15)):
        ids[row, start - 1] = MARKER
        ids[row, start:end] = torch.randint(TEXT, TEXT + CODES, (end - start,), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 15:] = 0
    return ids, mask
