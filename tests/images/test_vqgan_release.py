"""The published VQGAN folder: the same codes and pixels as the code it came with, and no foreign code run."""

import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from uni_x.errors import ConfigError, DataError
from uni_x.images import ImageTokenizer
from uni_x.images.inert_pickle import Stub, read_inert
from uni_x.images.tokenizer import build_network
from uni_x.recipe import TokenizerConfig, VQGANNetwork

COPIES = Path(__file__).parents[1] / "fixtures"
GOLDEN = Path(os.environ.get("UNI_X_GOLDEN", COPIES)) / "reference" / "vqgan"
if not GOLDEN.is_dir():
    GOLDEN = COPIES / "reference" / "vqgan"  # that set has none
PICTURES = sorted(path.stem for path in GOLDEN.glob("*.png"))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def tokenizer():
    return ImageTokenizer.from_pretrained(GOLDEN)


def test_the_yaml_says_what_the_tokenizer_is(tokenizer, golden):
    params = yaml.safe_load((GOLDEN / "vqgan.yaml").read_text())["model"]["params"]
    assert tokenizer.codebook.shape == (params["n_embed"], params["embed_dim"])
    assert tokenizer.codebook_size == params["n_embed"]
    assert tokenizer.resolution == golden["pixels"].shape[-1]
    assert tokenizer.grid == golden["codes"].shape[1:]


def test_pixels_become_the_published_codes(tokenizer, golden):
    assert torch.equal(tokenizer.encode_pixels(golden["pixels"]), golden["codes"].long())


def test_codes_become_the_published_pixels(tokenizer, golden):
    torch.testing.assert_close(tokenizer.decode_pixels(golden["codes"]), golden["decoded"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_prepared_and_encoded_as_published(tokenizer, golden, name):
    with Image.open(GOLDEN / f"{name}.png") as picture:
        torch.testing.assert_close(tokenizer.preprocess([picture])[0], golden[f"{name}.input"], rtol=0, atol=1e-6)
        assert torch.equal(tokenizer.encode([picture])[0], golden[f"{name}.codes"].long())


def test_our_own_folder_holds_the_same_tokenizer(tokenizer, golden, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config
    assert torch.equal(again.decode_pixels(golden["codes"]), tokenizer.decode_pixels(golden["codes"]))


def test_attention_stands_where_the_checkpoints_have_it():
    network = VQGANNetwork(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), z_channels=8, embed_dim=4)
    config = TokenizerConfig(resolution=16, codebook_size=8, network=network)
    names = {name.rpartition(".q.")[0] for name in build_network(config).state_dict() if ".q.weight" in name}
    assert names == {
        "encoder.down.1.attn.0",
        "encoder.mid.attn_1",
        "decoder.mid.attn_1",
        "decoder.up.1.attn.0",
        "decoder.up.1.attn.1",
    }
    pixels = torch.zeros(1, 3, 16, 16)
    assert ImageTokenizer(config).encode_pixels(pixels).shape == (1, 8, 8)


def test_patches_before_the_network_leave_the_grid_as_configured():
    sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8, "embed_dim": 4}
    config = TokenizerConfig(resolution=16, codebook_size=8, network=VQGANNetwork(**sizes, patch_size=2))
    tokenizer = ImageTokenizer(config)
    codes = tokenizer.encode_pixels(torch.zeros(1, 3, 16, 16))
    assert codes.shape == (1, *config.grid) == (1, 4, 4)
    assert tokenizer.decode_pixels(codes).shape == (1, 3, 16, 16)
    plain = build_network(config.model_copy(update={"network": VQGANNetwork(**sizes)})).state_dict()
    differing = {
        name for name, weight in build_network(config).state_dict().items() if weight.shape != plain[name].shape
    }
    assert differing == {"encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_out.bias"}


# --- checkpoints that name foreign classes -----------------------------------------------------------------------


class RunsACommand:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class EvaluatesText:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def release_folder(folder, content):
    folder.joinpath("vqgan.yaml").write_bytes((GOLDEN / "vqgan.yaml").read_bytes())
    torch.save(content, folder / "vqgan.ckpt")
    return folder


def published_weights():
    return torch.load(GOLDEN / "vqgan.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("attack", [RunsACommand, EvaluatesText])
def test_a_malicious_pickle_runs_nothing(tmp_path, golden, attack):
    marker = tmp_path / "marker"
    folder = release_folder(tmp_path, {"hook": attack(marker), "state_dict": published_weights()})
    tokenizer = ImageTokenizer.from_pretrained(folder)
    assert not marker.exists()
    assert torch.equal(tokenizer.encode_pixels(golden["pixels"]), golden["codes"].long())


def test_the_attack_would_work_on_a_trusting_reader(tmp_path):
    marker = tmp_path / "marker"
    pickle.load(io.BytesIO(pickle.dumps(RunsACommand(marker))))
    assert marker.exists()


def test_a_malicious_pickle_in_place_of_the_weights_is_one_error(tmp_path):
    folder = release_folder(tmp_path, RunsACommand(tmp_path / "marker"))
    with pytest.raises(DataError, match=r"vqgan\.ckpt: holds no state_dict"):
        ImageTokenizer.from_pretrained(folder)
    assert not (tmp_path / "marker").exists()


def test_classes_of_training_frameworks_need_not_be_installed(tmp_path, golden, monkeypatch):
    lightning = types.ModuleType("pytorch_lightning.callbacks")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", lightning)

    class ModelCheckpoint:
        def __init__(self):
            self.best = {"score": 1.0}

    class Config(dict):
        pass

    class Lines(list):
        pass

    for made in (ModelCheckpoint, Config, Lines):
        made.__module__, made.__qualname__ = lightning.__name__, made.__name__
        setattr(lightning, made.__name__, made)
    content = {
        "callbacks": {ModelCheckpoint: ModelCheckpoint()},
        "hyper_parameters": Config(lr=1e-3),
        "lines": Lines(["a", "b"]),
        "state_dict": {**published_weights(), "loss.logvar": torch.nn.Parameter(torch.zeros(3))},
    }
    folder = release_folder(tmp_path, content)
    monkeypatch.undo()
    assert "pytorch_lightning.callbacks" not in sys.modules

    tokenizer = ImageTokenizer.from_pretrained(folder)
    assert torch.equal(tokenizer.encode_pixels(golden["pixels"]), golden["codes"].long())
    read = read_inert(folder / "vqgan.ckpt")
    assert isinstance(read["hyper_parameters"], Stub)
    assert "pytorch_lightning" not in sys.modules


def test_tensors_come_out_the_same_on_both_ways(tmp_path):
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    content = {"part": base.T[1:], "half": base.half(), "none": torch.empty(0, 2), "flags": base > 3}
    torch.save(content, tmp_path / "some.ckpt")
    read = read_inert(tmp_path / "some.ckpt")
    for name, tensor in content.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_half_a_checkpoint_is_one_error(tmp_path):
    folder = release_folder(tmp_path, {"state_dict": published_weights()})
    whole = (folder / "vqgan.ckpt").read_bytes()
    (folder / "vqgan.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"vqgan\.ckpt: not a readable torch checkpoint"):
        ImageTokenizer.from_pretrained(folder)


def test_a_zip_of_something_else_is_one_error(tmp_path):
    folder = release_folder(tmp_path, {})
    with zipfile.ZipFile(folder / "vqgan.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match="not a torch checkpoint"):
        ImageTokenizer.from_pretrained(folder)


def test_a_missing_checkpoint_is_named(tmp_path):
    release_folder(tmp_path, {}).joinpath("vqgan.ckpt").unlink()
    with pytest.raises(DataError, match=r"vqgan\.ckpt: missing"):
        ImageTokenizer.from_pretrained(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    weights = published_weights()
    del weights["quantize.embedding.weight"]
    with pytest.raises(DataError, match=r"quantize\.embedding\.weight is missing"):
        ImageTokenizer.from_pretrained(release_folder(tmp_path, {"state_dict": weights}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": True}, "only double_z: false is known"),
        ({"ch": 48}, "must be a multiple of 32"),
        ({"resolution": 65}, "must be a multiple of the"),
        ({"upscaler": "magic"}, "unknown key 'upscaler' in ddconfig"),
    ],
)
def test_a_yaml_of_another_network_is_refused(tmp_path, change, message):
    folder = release_folder(tmp_path, {})
    tree = yaml.safe_load((folder / "vqgan.yaml").read_text())
    tree["model"]["params"]["ddconfig"].update(change)
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        ImageTokenizer.from_pretrained(folder)


def test_a_yaml_without_its_sections_is_refused(tmp_path):
    folder = release_folder(tmp_path, {})
    (folder / "vqgan.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match="the section 'params' is missing"):
        ImageTokenizer.from_pretrained(folder)
