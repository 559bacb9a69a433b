import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from uni_x.errors import DataError, UsageError
from uni_x.generation.pipeline import UniXPipeline
from uni_x.images import ImageTokenizer
from uni_x.model_folder import load_model_folder
from uni_x.recipe import PatchNetwork, TokenizerConfig
from uni_x.workflows.convert import convert

FIXTURES = Path(__file__).parents[1] / "fixtures"
REFERENCE = FIXTURES / "reference" / "uni_x"
PUBLISHED = FIXTURES / "published"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_checkpoint_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    shutil.copy(REFERENCE / "config.json", source)
    weights = load_file(REFERENCE / "model.safetensors")
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, source / "model.safetensors")
    convert(source, made, "reference", None, tell=lambda _: None)
    assert {weight.dtype for weight in load_file(made / "model.safetensors").values()} == {dtype}


@pytest.fixture
def with_separators(tmp_path: Path) -> Path:
    """A published checkpoint that was trained with a separator behind every 8 codes."""
    source = tmp_path / "source"
    source.mkdir()
    settings = json.loads((PUBLISHED / "unix" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "add_sep_for_vis": 1}))
    shutil.copy(PUBLISHED / "unix" / "model.safetensors", source)
    return source


@torch.no_grad()
def test_a_checkpoint_with_separators_draws_with_them(tmp_path: Path, with_separators: Path) -> None:
    source, made, words, images = (with_separators, *(tmp_path / name for name in ("made", "words", "images")))
    names = {1: "<eos>", 110: "<|vision_start|>", 111: "<|vision_end|>", 112: "<|vision_pad|>", 119: "<pad>"}
    vocabulary = {names.get(number, f"word{number}"): number for number in range(120)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(words)
    network = PatchNetwork(patch_size=8, embed_dim=4, encoder_sizes=(8,), decoder_sizes=(8,))
    ImageTokenizer(TokenizerConfig(resolution=32, codebook_size=48, network=network)).save_pretrained(images)

    with pytest.raises(UsageError, match=r"--text-tokenizer is missing: .* has separators between codes"):
        convert(source, made, "reference", None)
    convert(source, made, "reference", None, image_tokenizer=str(images), text_tokenizer=words)
    folder = load_model_folder(made)
    assert folder.model.config.image_marker_ids == [110, 112]
    golden = load_file(PUBLISHED / "train.safetensors")
    ids = golden["unix.sep.input_ids"].long().reshape(1, -1)
    torch.testing.assert_close(folder.model(ids).logits, golden["unix.sep.logits"], rtol=0, atol=1e-4)
    pipeline = UniXPipeline(folder)
    assert pipeline.renderer.separator == (112, 8)
    assert pipeline.draw("word5")[0].size == (32, 32)


def test_several_lengths_of_separators_are_refused(tmp_path: Path, with_separators: Path) -> None:
    config = with_separators / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vis_sep_lens": "8,32"}))
    with pytest.raises(DataError, match=r"config.json: vis_sep_lens: 8,32: one number of codes is what is built here"):
        convert(with_separators, tmp_path / "made", "reference", None)
