"""A complete model folder: the model, its text tokenizer and its image tokenizer.

Everything that writes one (training, conversion) and everything that reads one (generation, evaluation, serving)
goes through here.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from uni_x.errors import DataError
from uni_x.images import ImageTokenizer
from uni_x.model import UniXConfig, UniXForCausalLM

IMAGE_TOKENIZER = "image_tokenizer"
MODEL_TYPE = f'"model_type": "{UniXConfig.model_type}"'


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds, loaded."""

    model: UniXForCausalLM
    text_tokenizer: PreTrainedTokenizerBase
    image_tokenizer: ImageTokenizer

    def to(self, device: torch.device | str) -> "ModelFolder":
        """Moves the model to a device, in eval mode; the image tokenizer follows."""
        self.model.to(device).eval()  # type: ignore[arg-type]
        self.image_tokenizer.to(device)
        return self


def save_model_folder(folder: ModelFolder, path: str | Path) -> None:
    """Writes the folder so that it is whole or not there; an older one at that place is replaced."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.model.save_pretrained(partial)
    folder.text_tokenizer.save_pretrained(partial)
    folder.image_tokenizer.save_pretrained(partial / IMAGE_TOKENIZER)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def load_model_folder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ModelFolder:
    """Reads a model folder, with the model in eval mode on `device`; `dtype` None keeps the stored one.

    Raises:
        DataError: that says what the folder lacks.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise DataError(f"{path}: not a model folder (it has no config.json); train one with `uni-x train`")
    if MODEL_TYPE not in config_file.read_text(encoding="utf-8", errors="replace"):
        raise DataError(f"{config_file}: not a Uni-X model")
    try:
        model = UniXForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
        text_tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    image_tokenizer = ImageTokenizer.from_pretrained(path / IMAGE_TOKENIZER)
    return ModelFolder(model, text_tokenizer, image_tokenizer).to(device)
