"""Tokenizers of transformers' VQ models, held against what transformers itself makes of the same pixels and codes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from uni_x.data.encode import tokenizer_fingerprint
from uni_x.errors import ConfigError, DataError
from uni_x.images import ImageTokenizer, load_image_tokenizer
from uni_x.images import tokenizer as tokenizer_module

SIZES = {"base_channels": 32, "channel_multiplier": [1, 2, 1], "num_res_blocks": 1}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ("janus", "emu3", "chameleon")
RESOLUTIONS = {"janus": 32, "emu3": 512, "chameleon": 48}
RESOLUTION = 32  # to work at


@pytest.fixture(scope="module")
def models():
    """A whole model of each kind, small and with random weights."""
    from transformers.models.chameleon import ChameleonConfig, ChameleonForConditionalGeneration
    from transformers.models.emu3 import Emu3Config, Emu3ForConditionalGeneration
    from transformers.models.janus import JanusConfig, JanusForConditionalGeneration

    vq = {**SIZES, "embed_dim": 8, "latent_channels": 16, "num_embeddings": 50}
    emu3 = {**SIZES, "embed_dim": 4, "latent_channels": 4, "codebook_size": 50, "attn_resolutions": [2]}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 2}
    torch.manual_seed(0)
    models = {
        "janus": JanusForConditionalGeneration(
            JanusConfig(vq_config=vq, text_config=TEXT, vision_config={**vision, "projection_dim": 32})
        ),
        "emu3": Emu3ForConditionalGeneration(
            Emu3Config(
                vq_config={**emu3, "hidden_size": 32},
                text_config=TEXT,
                vocabulary_map={"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5},
            )
        ),
        "chameleon": ChameleonForConditionalGeneration(
            ChameleonConfig(
                vq_config={**vq, "resolution": 48, "attn_resolutions": [24]}, vocabulary_map={"<image>": 3}, **TEXT
            )
        ),
    }
    for model in models.values():
        spread(model.model.vqmodel)
    return models


@torch.no_grad()
def spread(vq):
    """Weights and statistics far from their start, and codes that lie as far apart as the latents of pictures do."""
    for module in vq.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    latents = []
    hook = vq.quant_conv.register_forward_hook(lambda module, given, result: latents.append(result))
    pixels = torch.rand(16, 3, 16, 16) * 2 - 1
    codes_of_transformers(vq, pixels)
    hook.remove()
    vectors = latents[0].transpose(0, 1).flatten(1).T  # (count, embed_dim)
    vq.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:50]])


@torch.no_grad()
def codes_of_transformers(vq, pixels):
    if "Emu3" in type(vq).__name__:
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
        return torch.stack(list(vq.encode(pixels, sizes).image_tokens))
    side = pixels.shape[-1] // 4
    return vq.encode(pixels).image_tokens.view(-1, side, side)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Each kind as transformers writes it: the VQ model alone, the whole model, and the whole in shards."""
    root = tmp_path_factory.mktemp("folders")
    for kind, model in models.items():
        model.model.vqmodel.save_pretrained(root / kind / "alone")
        model.save_pretrained(root / kind / "whole")
        model.save_pretrained(root / kind / "shards", max_shard_size="50KB")
        assert len(list((root / kind / "shards").glob("*.safetensors"))) > 3
    return root


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (3, 9, 11, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((50, 40)) for picture in small]


@pytest.fixture
def folder(folders, tmp_path):
    """A folder of Janus' VQ model that a test may spoil."""
    return shutil.copytree(folders / "janus" / "alone", tmp_path / "folder")


@pytest.mark.parametrize("form", ["alone", "whole", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_transformers(models, folders, pictures, kind, form):
    tokenizer = ImageTokenizer.from_pretrained(folders / kind / form, resolution=RESOLUTION)
    codes = tokenizer.encode(pictures)
    assert codes.shape == (3, *tokenizer.grid) == (3, 8, 8)
    assert len(codes.unique()) > 5
    assert torch.equal(codes, codes_of_transformers(models[kind].model.vqmodel, tokenizer.preprocess(pictures)))
    assert torch.equal(tokenizer.codebook, models[kind].model.vqmodel.quantize.embedding.weight)
    assert tokenizer.codebook_size == 50


def test_codes_of_janus_become_the_pictures_of_its_decode_image_tokens(models, folders):
    codes = torch.arange(128).view(2, 8, 8) % 50
    tokenizer = ImageTokenizer.from_pretrained(folders / "janus" / "whole")
    with torch.no_grad():
        expected = models["janus"].decode_image_tokens(codes.view(2, 64))  # (2, height, width, 3)
    torch.testing.assert_close(tokenizer.decode_pixels(codes), expected.permute(0, 3, 1, 2))
    assert [picture.size for picture in tokenizer.decode(codes)] == [(32, 32)] * 2


def test_codes_of_emu3_become_the_pictures_of_its_decode(models, folders):
    codes = torch.arange(128).view(2, 8, 8) % 50
    tokenizer = ImageTokenizer.from_pretrained(folders / "emu3" / "whole", resolution=RESOLUTION)
    with torch.no_grad():
        expected = models["emu3"].model.vqmodel.decode(codes)
    torch.testing.assert_close(tokenizer.decode_pixels(codes), expected)


def test_codes_of_chameleon_stay_codes(folders):
    tokenizer = ImageTokenizer.from_pretrained(folders / "chameleon" / "alone")
    with pytest.raises(DataError, match=r"Chameleon has no decoder.*vqgan\.yaml and vqgan\.ckpt can decode") as raised:
        tokenizer.decode(torch.zeros(1, 12, 12, dtype=torch.int64))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["alone", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_resolution_is_what_the_folder_says(folders, kind, form):
    tokenizer = ImageTokenizer.from_pretrained(folders / kind / form)
    assert tokenizer.resolution == RESOLUTIONS[kind]
    assert tokenizer.grid == (RESOLUTIONS[kind] // 4,) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same(folders, pictures, tmp_path, kind):
    tokenizer = ImageTokenizer.from_pretrained(folders / kind / "whole", resolution=40)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_image_tokenizer(str(tmp_path / "saved"))
    assert again.config == tokenizer.config
    assert again.resolution == 40
    assert torch.equal(again.encode(pictures), tokenizer.encode(pictures))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    alone = ImageTokenizer.from_pretrained(folders / kind / "alone", resolution=40)
    assert tokenizer_fingerprint(alone) == tokenizer_fingerprint(tokenizer)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_a_saved_tokenizer(models, folders, pictures, tmp_path, kind):
    tokenizer = ImageTokenizer.from_pretrained(folders / kind / "whole", resolution=40)
    tokenizer.save_pretrained(tmp_path)
    vq = type(models[kind].model.vqmodel)
    model, report = vq.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = codes_of_transformers(model, tokenizer.preprocess(pictures))
    assert torch.equal(tokenizer.encode(pictures), expected)
    if kind == "janus":
        assert model.decode(expected.view(3, 100)).shape == (3, 3, 40, 40)


def test_half_precision_leaves_the_counts_of_batch_norms_whole(folders, tmp_path):
    tokenizer = ImageTokenizer.from_pretrained(folders / "emu3" / "alone", resolution=RESOLUTION)
    tokenizer.save_pretrained(tmp_path, torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    counts = {name for name, tensor in stored.items() if tensor.dtype == torch.int64}
    assert counts == {name for name in stored if name.endswith("num_batches_tracked")} != set()
    assert {tensor.dtype for name, tensor in stored.items() if name not in counts} == {torch.float16}
    again = ImageTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(again.codebook, tokenizer.codebook, rtol=1e-3, atol=1e-3)
    assert again.codebook.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_batches_inside_changes_nothing(folders, pictures, monkeypatch, kind):
    tokenizer = ImageTokenizer.from_pretrained(folders / kind / "alone", resolution=RESOLUTION)
    codes = tokenizer.encode(pictures)
    monkeypatch.setattr(tokenizer_module, "FLOATS_AT_ONCE", 2 * tokenizer.network.floats_per_picture)
    assert tokenizer.pictures_at_once == 2
    assert torch.equal(tokenizer.encode(pictures), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_whole_model_only_the_shards_with_the_image_tokenizer_are_needed(folders, tmp_path, kind):
    folder = shutil.copytree(folders / kind / "shards", tmp_path / "folder")
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in shards.items() if "vqmodel." in name}
    for shard in set(shards.values()) - needed:
        (folder / shard).unlink()
    assert len(list(folder.glob("*.safetensors"))) == len(needed) < len(set(shards.values()))
    ImageTokenizer.from_pretrained(folder)
    first = sorted(needed)[0]
    (folder / first).unlink()
    with pytest.raises(DataError, match=rf"{first}: missing beside model\.safetensors\.index\.json"):
        ImageTokenizer.from_pretrained(folder)


def test_a_whole_model_without_its_image_tokenizer_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "janus" / "whole", tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "vqmodel" not in name}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors: the tensor \S+ is missing"):
        ImageTokenizer.from_pretrained(folder)


def test_a_resolution_is_a_multiple_of_the_pixels_of_a_code(folders):
    with pytest.raises(ConfigError, match=r"config\.json: resolution is 34, which must be a multiple of the 4 pixels"):
        ImageTokenizer.from_pretrained(folders / "emu3" / "alone", resolution=34)


def test_a_folder_without_weights_says_which_are_read(folder):
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: missing beside config\.json; .* safetensors alone"):
        ImageTokenizer.from_pretrained(folder)


def test_half_a_weights_file_is_one_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors: not a whole safetensors file"):
        ImageTokenizer.from_pretrained(folder)


def test_a_missing_weight_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.mid.attn_1.q.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors: the tensor decoder\.mid\.attn_1\.q\.bias is missing"):
        ImageTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "llama"}, ConfigError, r"model_type is 'llama'; those with an image tokenizer are .* janus, "),
        ({"model_type": "janus"}, ConfigError, "the section 'vq_config' is missing"),
        ({"num_embeddings": "many"}, ConfigError, "num_embeddings"),
        ({"channel_multiplier": 3}, ConfigError, "channel_multiplier"),
        ({"channel_multiplier": []}, ConfigError, "resolution"),
        ({"base_channels": 33}, ConfigError, "no janus_vqgan has these sizes: .*divisible"),
        ({"num_patches": "many"}, ConfigError, "num_patches"),
        ({"image_size": "large"}, ConfigError, "resolution"),
        ({"num_embeddings": 51}, DataError, r"quantize\.embedding\.weight has the shape \(50, 8\)"),
        ({"embed_dim": 9}, DataError, "has the shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(folder, change, error, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message) as raised:
        ImageTokenizer.from_pretrained(folder)
    assert str(raised.value).startswith(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index of safetensors"),
        ('{"weight_map": ["model.safetensors"]}', "not an index of safetensors"),
        ('{"weight_map": {"quantize.embedding.weight": "../model.safetensors"}}', "a file outside its folder"),
    ],
)
def test_an_index_that_is_none_is_refused(folder, index, message):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=rf"model\.safetensors\.index\.json: .*{message}"):
        ImageTokenizer.from_pretrained(folder)


SCRIPT = """
import sys

from uni_x.images import ImageTokenizer

def loaded(kind):
    owners = ("janus", "emu3", "chameleon")
    return [name for name in sys.modules if name.startswith(tuple(f"transformers.models.{o}.{kind}" for o in owners))]

assert not loaded("modeling_")
for folder in sys.argv[1:]:
    ImageTokenizer.from_pretrained(folder)
assert len(loaded("modeling_")) == 3
assert not loaded("image_processing_")  # which is what needs torchvision
"""


def test_models_are_imported_when_first_needed_and_no_image_processor_is(folders):
    arguments = [str(folders / kind / "alone") for kind in KINDS]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
