from typing import Any

import pytest

from tests.data.conftest import encoded_folder, image_tokenizer, make_image, samples
from uni_x.recipe import TrainRecipe

__all__ = ["encoded_folder", "image_tokenizer", "make_image", "samples"]


@pytest.fixture
def make_recipe(encoded_folder, samples, image_tokenizer, tmp_path):
    """A recipe of a tiny model in the run folder `run`; `trainer` as words, sections by their names."""
    folder = encoded_folder(samples)
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def make(run: str, sections: dict[str, Any] | None = None, **trainer: Any) -> TrainRecipe:
        model = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings = {"max_steps": 9, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2}
        content = {
            "run": str(tmp_path / run),
            "image_tokenizer": str(tmp_path / "tokenizer"),
            "text_tokenizer": {"vocab_size": 400},
            "model": model,
            "data": {"sources": [{"path": str(folder)}], "max_length": 128},
            "trainer": settings | trainer,
            "device": "cpu",
        }
        for name, section in (sections or {}).items():
            merge = isinstance(section, dict) and isinstance(content.get(name), dict) and "base" not in section
            content[name] = content[name] | section if merge else section
        if "base" in content["model"]:
            del content["image_tokenizer"], content["text_tokenizer"]
        return TrainRecipe.model_validate(content)

    return make
