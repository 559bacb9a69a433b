"""Checkpoints in the published layout give the published logits, losses and gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.conftest import GOLDEN, Load, folders
from uni_x.convert.reference import load_reference, rename
from uni_x.errors import DataError
from uni_x.generation.engine import Engine, Request
from uni_x.generation.sampling import Sampling
from uni_x.model import UniXForCausalLM

TOLERANCE = 1e-4
PREFILL = 5
TRAIN = GOLDEN / "published" / "train.json"


def incremental(model: UniXForCausalLM, ids: torch.Tensor, mask: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of a prefill and of one token at a time after it."""
    output = model(ids[:, :prefill], mask[:, :prefill], use_cache=True)
    parts = [output.logits]
    for end in range(prefill + 1, ids.shape[1] + 1):
        parts.append(model(ids[:, end - 1 : end], mask[:, :end], cache=output.cache).logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("folder", folders("reference"), ids=lambda folder: folder.name)
def test_full_and_cached_logits(load: Load, folder: Path) -> None:
    model, golden = load(folder), load_file(folder / "golden.safetensors")
    cases = [name.removesuffix(".ids") for name in golden if name.endswith(".ids")]
    assert cases
    for case in cases:
        ids = golden[f"{case}.ids"].long().reshape(1, -1)
        mask = torch.ones_like(ids)
        full = golden[f"{case}.logits"].reshape(1, ids.shape[1], -1)
        torch.testing.assert_close(model(ids).logits, full, rtol=0, atol=TOLERANCE)
        cached = golden[f"{case}.cached_logits"].reshape(1, -1, full.shape[-1])
        ours = incremental(model, ids, mask, PREFILL)[:, -cached.shape[1] :]
        torch.testing.assert_close(ours, cached, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("folder", folders("published"), ids=lambda folder: folder.name)
def test_batches_with_padding(load: Load, folder: Path) -> None:
    model, golden = load(folder), load_file(folder / "io.safetensors")
    cases = json.loads((folder / "cases.json").read_text())
    for case, facts in cases.items():
        if f"{case}.input_ids" not in golden:
            continue  # the published code refuses this one
        ids, mask = golden[f"{case}.input_ids"].long(), golden[f"{case}.attention_mask"].long()
        difference = (model(ids, mask).logits - golden[f"{case}.logits"]) * mask[..., None]
        assert difference.abs().max() < TOLERANCE, case
        start = facts["prefill"] - 1
        ours = incremental(model, ids, mask, facts["prefill"])[:, start:]
        difference = (ours - golden[f"{case}.inc_logits"]) * mask[:, start:, None]
        assert difference.abs().max() < TOLERANCE, case


def packed_results() -> dict[str, dict[str, Any]]:
    if not TRAIN.is_file():
        return {}
    results = json.loads(TRAIN.read_text())["results"]
    there = {folder.name for folder in folders("published")}
    return {name: result["isolated"] for name, result in results.items() if "isolated" in result and name in there}


@pytest.mark.parametrize("name", packed_results())
def test_packed_documents_have_the_published_losses_and_gradients(load: Load, name: str) -> None:
    model = load(GOLDEN / "published" / name).train()
    golden, expected = load_file(TRAIN.with_suffix(".safetensors")), packed_results()[name]
    ids, labels, documents = (golden[part].long().reshape(1, -1) for part in ("input_ids", "labels", "attention_mask"))
    logits = golden[f"{name}.isolated.logits"].reshape(1, ids.shape[1], -1)
    torch.testing.assert_close(model(ids, document_ids=documents).logits, logits, rtol=0, atol=TOLERANCE)
    output = model(ids, document_ids=documents, labels=labels)
    assert output.loss.item() == pytest.approx(expected["loss"], abs=TOLERANCE)
    assert (output.loss_text + output.loss_image).item() == pytest.approx(expected["loss_sum"], abs=1e-3)
    divided = model(ids, document_ids=documents, labels=labels, num_items_in_batch=100).loss
    assert divided.item() == pytest.approx(expected["loss_num_items_100"], abs=TOLERANCE)
    output.loss.backward()
    norms = {rename(key, model.config): value for key, value in expected["grad_norms"].items()}
    for key, weight in model.named_parameters():
        assert weight.grad.norm().item() == pytest.approx(norms[key], abs=TOLERANCE), key


@torch.no_grad()
@pytest.mark.parametrize(("name", "logits"), [("unix", "logits"), ("unix_share", "train_logits")])
def test_separators_run_with_the_image_tokens(load: Load, name: str, logits: str) -> None:
    golden = load_file(TRAIN.with_suffix(".safetensors")) if TRAIN.is_file() else {}
    if f"{name}.sep.{logits}" not in golden:
        pytest.skip(f"no {name}.sep in {TRAIN}")
    model = load(GOLDEN / "published" / name)
    ids = golden["unix.sep.input_ids"].long().reshape(1, -1)
    is_code = ids[0] >= model.config.image_token_offset
    separators = set(ids[0, 1:-1][~is_code[1:-1] & is_code[:-2] & is_code[2:]].tolist())  # between two codes
    assert separators
    model.config.image_marker_ids = [*model.config.image_marker_ids, *separators]
    torch.testing.assert_close(model(ids).logits, golden[f"{name}.sep.{logits}"], rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "size", "dropped"),
    [("shareonly", "ffn_vision_size", "mlp.vision_"), ("visiononly", "ffn_share_size", "mlp.share_")],
)
def test_parts_of_the_shared_ffn_can_be_left_out(
    load: Load, tmp_path: Path, case: str, size: str, dropped: str
) -> None:
    golden = load_file(TRAIN.with_suffix(".safetensors")) if TRAIN.is_file() else {}
    if f"unix_share.{case}.logits" not in golden:
        pytest.skip(f"no unix_share.{case} in {TRAIN}")
    source = GOLDEN / "published" / "unix_share"
    config = json.loads((source / "config.json").read_text()) | {size: 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if dropped not in name}, tmp_path / "model.safetensors")
    ids = golden[f"unix_share.{case}.input_ids"].long().reshape(1, -1)
    logits = load(tmp_path)(ids).logits
    torch.testing.assert_close(logits, golden[f"unix_share.{case}.logits"], rtol=0, atol=TOLERANCE)


def generations() -> dict[str, dict[str, Any]]:
    file = GOLDEN / "published" / "generate.json"
    cases = json.loads(file.read_text()) if file.is_file() else {}
    # an image prompt is followed by separators in one case, which is not built
    return {name: case for name, case in cases.items() if "sequences" in case and "_sep" not in name}


@pytest.mark.parametrize("case", generations())
def test_greedy_sequences(load: Load, case: str) -> None:
    """The published code may sample rows that stand for no code, which is a fault: up to there all must agree."""
    facts, folder = generations()[case], GOLDEN / "published" / case.split(".")[0]
    configs = [json.loads((other / "config.json").read_text()) for other in folders("published")]
    offset = next(config["real_text_vocab_size"] for config in configs if "real_text_vocab_size" in config)
    model = load(folder, offset)  # which dense checkpoints do not say
    image = ".image." in case
    longest = max(len(prompt.split()) for prompt in facts["prompts"])
    guided = facts.get("cfg_scale") or 1.0
    unconditional = [int(word) for word in (facts.get("unconditional_prompt") or "").split()][-longest:]
    requests = [
        Request(
            prompt=[int(word) for word in prompt.split()],
            max_new_tokens=len(sequence) - longest,
            image=image,
            sampling=Sampling(temperature=0.0, guidance_scale=guided),
            unconditional_prompt=unconditional,
        )
        for prompt, sequence in zip(facts["prompts"], facts["sequences"], strict=True)
    ]
    first, last = Engine(model).codes
    for completion, sequence in zip(Engine(model).generate(requests), facts["sequences"], strict=True):
        expected = sequence[longest:]
        end = next((place for place, token in enumerate(expected) if token >= last), len(expected))
        assert completion.ids[:end] == expected[:end]
        assert all((token >= first) == image for token in completion.ids)


def copy_with(folder: Path, target: Path, config: dict[str, Any], dropped: str = "nothing") -> Path:
    target.mkdir()
    settings = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value != "gone"}))
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if dropped not in name}, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("name", "config", "dropped", "message"),
    [
        ("unix", {}, "vision_", "lacks model.layers.0.image"),
        ("unix", {}, "lm_head", "lacks lm_head.weight"),
        ("unix_share", {}, "share_", "lacks model.layers.2.shared_mlp"),
        ("dense_qwen2", {}, ".bias", "lacks model.layers.0.self_attn"),
        ("dense_qwen3", {}, "_norm.weight", "lacks model.layers.0.self_attn.k_norm.weight"),
        ("unix", {"skip_connection_loc": 0}, "nothing", "skip_connection_loc: 0 is not something that is built here"),
        ("unix", {"hidden_size": 64}, "nothing", "weights do not fit the configuration"),
        ("unix", {"rope_theta": "gone"}, "nothing", "the key 'rope_theta' is missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    tmp_path: Path, name: str, config: dict[str, Any], dropped: str, message: str
) -> None:
    source = GOLDEN / "published" / name
    if not source.is_dir():
        pytest.skip(f"no {name} in {GOLDEN}")
    with pytest.raises(DataError) as caught:
        load_reference(copy_with(source, tmp_path / name, config, dropped))
    assert message in str(caught.value)


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a checkpoint holds"):
        load_reference(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"model.safetensors: cannot be read"):
        load_reference(tmp_path)
