"""A complete model folder: the model, its text tokenizer and its image tokenizer.

Everything that writes one (training, conversion) and everything that reads one (generation, evaluation, serving)
goes through here.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from uni_x.errors import DataError, one_line
from uni_x.images import ImageTokenizer
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.runs import writing_into

IMAGE_TOKENIZER = "image_tokenizer"


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


@contextmanager
def saving_whole(path: str | Path) -> Iterator[Path]:
    """Gives a folder to write into that takes the place of `path` once everything in it is written."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing_into(path):
        partial.mkdir(parents=True)
        yield partial
        _open_to_readers(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)


def save_model_folder(
    folder: ModelFolder,
    path: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
    card: str | None = None,
) -> None:
    """Writes the folder so that it is whole or not there; an older one at that place is replaced.

    Args:
        folder: what is written.
        path: where to.
        weights: of the model, where they are not in it because several processes share them.
        card: a text about the model, which becomes `README.md`.
    """
    with saving_whole(path) as partial:
        folder.model.save_pretrained(partial, state_dict=weights)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        save_tokenizers(folder, partial)


def save_tokenizers(folder: ModelFolder, path: Path) -> None:
    """Writes the text tokenizer into `path`, and the image tokenizer into a folder below it."""
    folder.text_tokenizer.save_pretrained(path)
    folder.image_tokenizer.save_pretrained(path / IMAGE_TOKENIZER)


def read_model_config(path: str | Path) -> UniXConfig:
    """Reads the configuration of a model folder.

    Raises:
        DataError: for a folder that holds no model, or another kind of model.
    """
    file = Path(path) / "config.json"
    if (Path(path) / "model" / "config.json").is_file():
        raise DataError(f"{path}: not a model folder but that of a run; its model is {Path(path) / 'model'}")
    if not file.is_file():
        raise _no_model(Path(path))
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{file}: not valid JSON") from None
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind != UniXConfig.model_type:
        mend = f" but {kind}; `uni-x init {path} …` makes one out of a pretrained LLM" if kind else ""
        raise DataError(f"{file}: not a Uni-X model{mend}")
    try:
        return UniXConfig(**tree)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: {one_line(error)}") from None


def _no_model(path: Path) -> DataError:
    """Says what a folder without a model is, where that is known."""
    if (path / "adapter_config.json").is_file():
        return DataError(
            f"{path}: has the adapters of LoRA alone, which their run puts into its model at its end; docs/models.md "
            "tells how to do so before"
        )
    sealed = [file.parent for file in path.glob("checkpoints/checkpoint-*/files.json")]
    if sealed:
        last = max(sealed, key=lambda checkpoint: (len(checkpoint.name), checkpoint.name))
        return DataError(f"{path}: a run that has not finished; its last checkpoint is {last}")
    return DataError(f"{path}: not a model folder (it has no config.json); `uni-x train` and `uni-x init` make one")


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> UniXForCausalLM:
    """Reads the model of a folder, in eval mode on `device`; `dtype` None keeps the stored one.

    Raises:
        DataError: that says what the folder lacks.
    """
    path = Path(path)
    read_model_config(path)
    with _loading(path):
        loaded: Any = UniXForCausalLM.from_pretrained(
            path,
            dtype=dtype or "auto",
            device_map=None if torch.device(device).type == "cpu" else {"": device},  # not by way of the CPU's memory
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = loaded
    refuse_incomplete(path, report["missing_keys"], report["unexpected_keys"])
    return model


def load_model_folder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ModelFolder:
    """Reads a complete model folder, with the model in eval mode on `device`; `dtype` None keeps the stored one.

    A checkpoint of a training run may be read as well: its tokenizers are in the folder above.

    Raises:
        DataError: that says what the folder lacks.
    """
    model = load_model(path, dtype, device)
    return ModelFolder(model, *load_tokenizers(path)).to(device)


def load_tokenizers(path: str | Path) -> tuple[PreTrainedTokenizerBase, ImageTokenizer]:
    """Reads the text and the image tokenizer of a model folder, or of the folder above a checkpoint.

    Raises:
        DataError: that says what the folder lacks.
    """
    path = Path(path)
    tokenizers = path if (path / IMAGE_TOKENIZER).is_dir() else path.parent
    if not (tokenizers / IMAGE_TOKENIZER).is_dir():
        raise DataError(f"{path}: not a complete model folder (it has no {IMAGE_TOKENIZER})")
    with _loading(path):
        text_tokenizer = AutoTokenizer.from_pretrained(tokenizers, local_files_only=True)
    return text_tokenizer, ImageTokenizer.from_pretrained(tokenizers / IMAGE_TOKENIZER)


def _open_to_readers(folder: Path) -> None:
    """Gives files the permissions that the user's mask grants; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def refuse_incomplete(where: str | Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises `DataError` for a checkpoint whose weights are not just those of the model."""
    for problem, found in (("lacks", missing), ("has the unknown", unexpected)):
        if names := sorted(found):
            raise DataError(f"{where}: the checkpoint {problem} {', '.join(names[:3])} ({len(names)} in all)")


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be loaded ({one_line(error, 300)})") from None
