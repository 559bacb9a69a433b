from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch

from tests.model.conftest import TEXT
from uni_x.model import UniXForCausalLM
from uni_x.model.layout import CacheLengths, build_layout


@pytest.mark.parametrize("first", [5, TEXT], ids=["text", "image"])
@pytest.mark.parametrize(("texts", "images"), [((4, 4, 4), (2, 2, 2)), ((4, 1, 3), (2, 5, 3)), ((4, 0, 3), (0, 5, 3))])
def test_one_more_token_a_row_is_laid_out_as_any_batch(
    make_model: Callable[..., UniXForCausalLM], first: int, texts: tuple[int, ...], images: tuple[int, ...]
) -> None:
    config = make_model().config
    held = [np.array(texts) + np.array(images), np.array(texts), np.array(images)]
    lengths = CacheLengths(*(counts.astype(np.int64) for counts in held))
    ids = torch.arange(first, first + 3)[:, None]
    short = build_layout(config, ids, cache_lengths=lengths)
    # with a mask, even one that hides nothing, the general way is taken
    general = build_layout(config, ids, torch.ones_like(ids), cache_lengths=lengths)
    for name in ("shape", "sizes", "order", "positions", "everything", "text", "image", "new_tokens"):
        _assert_same(getattr(short, name), getattr(general, name))


def _assert_same(short: object, general: object) -> None:
    if hasattr(short, "__dataclass_fields__"):
        short, general = asdict(short), asdict(general)
    if isinstance(short, dict):
        short.pop("blocks", None)  # of an empty stream
        assert isinstance(general, dict)
        for name, value in short.items():
            _assert_same(value, general[name])
    elif isinstance(short, torch.Tensor | np.ndarray):
        np.testing.assert_array_equal(np.asarray(short), np.asarray(general))
    else:
        assert short == general
