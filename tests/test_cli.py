"""The command line as a user meets it. Most calls run in this process, since each new one imports for seconds."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.conftest import RunCommand
from uni_x import cli
from uni_x.data.text_tokenizer import train_text_tokenizer
from uni_x.errors import RunError
from uni_x.model import UniXForCausalLM
from uni_x.runs import RunFolder, writing_into


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of a user's own: discs and squares in two colours, with captions, and one that is broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(24):
        picture = Image.new("RGB", (40, 32), "white")
        colour, shape = ("red", "blue")[index % 2], ("disc", "square")[index // 2 % 2]
        left, top = rng.integers(2, 12, size=2).tolist()
        pen = ImageDraw.Draw(picture)
        (pen.ellipse if shape == "disc" else pen.rectangle)((left, top, left + 16, top + 16), fill=colour)
        picture.save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"a {colour} {shape}")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (folder / "broken.txt").write_text("nothing")
    Image.new("RGB", (32, 32)).save(folder / "silent.png")
    return folder


def test_help_loads_nothing_heavy() -> None:
    script = "import sys, uni_x, uni_x.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_public_names_load_on_first_use() -> None:
    import uni_x as package

    assert package.UniXConfig.model_type == "uni_x"
    assert {"UniXConfig", "UniXForCausalLM", "ImageTokenizer", "Engine", "Sample"} <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'Unicorn'"):
        _ = package.Unicorn


def test_encoding_nothing_fails_each_time(uni_x: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (chats := tmp_path / "chats").mkdir()
    for name in ("a", "b"):
        (chats / f"{name}.jsonl").write_text('{"text": ""}\n')
    encode = ["encode", chats, "--image-tokenizer", "scenes", "--out", tmp_path / "out"]
    said = f"{chats}: of 2 rows none can be used: 2 such as 'text: it is empty'; all of them: "
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in ((0, 0), (1, 1), (1, 0), (0, 1)):  # the last one to finish says so, then the first
        monkeypatch.setenv("RANK", str(rank))
        code, _, err = uni_x(*encode)
        assert code == expected, err
        assert (said in err) == (code == 1)


def test_each_process_tells_what_it_has_done(
    uni_x: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (texts := tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (texts / f"{name}.jsonl").write_text('{"text": "Hearts are red."}\n')
    encode = ["encode", texts, "--image-tokenizer", "scenes", "--out", out := tmp_path / "out"]
    own = f"1 read = 1 written + 0 rejected, in {out}; not finished: the other processes have the rest"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (
        ("0", f"process 0 of 2: {own}\n"),
        ("1", f"2 read = 2 written + 0 rejected, in {out}\n"),
        ("1", f"process 1 of 2: {out} is finished already\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        code, said, _ = uni_x(*encode)
        assert (code, said) == (0, expected)
    for rank, expected in (
        ("x", "error: RANK=x: not a whole number from 0 on; mend or unset this variable\n"),
        ("-1", "error: RANK=-1: not a whole number from 0 on; mend or unset this variable\n"),
        ("2", "error: RANK=2: processes count from 0, and by WORLD_SIZE there are 2; set both\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        assert uni_x(*encode) == (2, "", expected)


def test_encoding_again_sees_whether_the_source_is_the_same(
    uni_x: RunCommand, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pictures / "encoded"
    tokenizer = ("--image-tokenizer", "scenes")
    monkeypatch.chdir(tmp_path)
    assert uni_x("encode", "pictures", *tokenizer, "--out", out)[0] == 0
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(
        json.dumps({key: value for key, value in manifest.items() if key != "inventory"} | {"source": "pictures"})
    )
    code, said, _ = uni_x("encode", "pictures", *tokenizer, "--out", out)  # as earlier versions left it
    assert (code, "finished already" in said) == (0, True)
    (out / "manifest.json").write_text(json.dumps(manifest))
    code, said, _ = uni_x("encode", pictures, *tokenizer, "--out", out)
    assert (code, "finished already" in said) == (0, True)

    (other := tmp_path / "other" / "pictures").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(other / "a.png")
    monkeypatch.chdir(tmp_path / "other")
    code, _, err = uni_x("encode", "pictures", *tokenizer, "--out", out)
    mend = "choose another folder, or delete this one to encode again"
    assert (code, err) == (1, f"error: {out}: made with another source ({pictures}, now {other}); {mend}\n")

    caption = pictures / "00.txt"
    before = caption.stat()
    caption.write_text(caption.read_text().upper())
    changed = f"error: {out}: {pictures} has changed since it was encoded"
    code, _, err = uni_x("encode", pictures, *tokenizer, "--out", out)
    assert (code, err) == (1, f"{changed} (files were renamed or written again); {mend}\n")
    os.utime(caption, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert uni_x("encode", pictures, *tokenizer, "--out", out)[0] == 0
    Image.new("RGB", (32, 32)).save(pictures / "new.png")
    code, _, err = uni_x("encode", pictures, *tokenizer, "--out", out)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"{changed} (51 files of "), err
    assert " then, 52 files of " in err
    (pictures / "new.png").unlink()
    (pictures / "linked").symlink_to(other)
    code, _, err = uni_x("encode", pictures, *tokenizer, "--out", out)
    assert (code, err.startswith(f"{changed} (51 files of ")) == (1, True), err


def test_encoding_again_sees_whether_files_of_rows_are_the_same(uni_x: RunCommand, tmp_path: Path) -> None:
    (texts := tmp_path / "texts").mkdir()
    row = '{"text": "Hearts are red."}\n'
    (texts / "a.jsonl").write_text(row)
    encode = ["encode", texts, "--image-tokenizer", "scenes", "--out", tmp_path / "out"]
    assert uni_x(*encode)[0] == 0
    (texts / "notes.md").write_text("of no matter")
    assert uni_x(*encode)[0] == 0
    (texts / "b.jsonl").write_text(row)
    code, _, err = uni_x(*encode)
    assert (code, "(1 file of 28 bytes then, 2 files of 56 bytes now)" in err) == (1, True), err


def test_a_folder_of_pictures_becomes_a_model_that_draws(uni_x: RunCommand, pictures: Path, tmp_path: Path) -> None:
    recipes = Path(__file__).parents[1] / "recipes"
    tokenizer, data, run = tmp_path / "tokenizer", tmp_path / "data", tmp_path / "run"
    small = "{kind: patch, patch_size: 8, embed_dim: 8, encoder_sizes: [32], decoder_sizes: [32]}"
    words = ["tokenizer", "train", recipes / "pictures-tokenizer.yaml", f"source={pictures}", "--out", tokenizer]
    words += ["eval_pictures=4", "tokenizer.resolution=32", "tokenizer.codebook_size=16", f"tokenizer.network={small}"]
    words += ["training.steps=40", "training.continuous_steps=10"]
    code, out, err = uni_x(*words)
    assert code == 0, err
    assert err.splitlines()[-1].startswith("tokenizer 40 of 40 ")
    assert "PSNR" in out
    assert (tokenizer / "reconstructions.png").is_file()

    encode = ["encode", pictures, "--image-tokenizer", tokenizer / "tokenizer", "--out", data]
    code, out, err = uni_x(*encode)
    assert code == 0, err
    code, again, _ = uni_x(*encode)
    assert "finished already" in again
    assert "26 read = 24 written + 2 rejected" in out
    reasons = (data / "rejects.jsonl").read_text()
    assert "broken.jpg" in reasons
    assert "silent.png" in reasons

    train = ["train", recipes / "pictures.yaml", f"run={run}", f"image_tokenizer={tokenizer / 'tokenizer'}"]
    train += [f"data.sources=[{{path: {data}}}]", "data.max_length=256", "trainer.max_steps=6"]
    train += ["trainer.logging_steps=2", "trainer.save_steps=3", "model.hidden_size=32", "device=cpu"]
    wrong = [words if not words.startswith("image_tokenizer=") else "image_tokenizer=scenes" for words in train[2:]]
    code, _, err = uni_x(*train[:2], *wrong)
    assert code == 1
    assert f"{data}: was encoded with another image tokenizer ({tokenizer / 'tokenizer'}) than scenes; encode it" in err
    code, out, err = uni_x(*train)
    assert code == 0, err
    assert isinstance(AutoModelForCausalLM.from_pretrained(run / "model").config.plan, list)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]

    code, out, err = uni_x(*train)
    assert code == 0, err
    assert "finished already" in out

    drawing = tmp_path / "drawings" / "today" / "drawing.png"
    code, out, err = uni_x("generate", run / "model", "a red disc", "--out", drawing, "--device", "cpu")
    assert code == 0, err
    assert Image.open(drawing).size == (32, 32)
    first = drawing.read_bytes()
    uni_x("generate", run / "model", "a red disc", "--out", drawing, "--device", "cpu")
    assert drawing.read_bytes() == first
    code, out, err = uni_x("generate", run / "model", "what is it?", "--image", pictures / "00.png", "--device", "cpu")
    assert code == 0, err
    code, out, err = uni_x("generate", run / "model", "--image", pictures / "00.png", "--device", "cpu")
    assert code == 0, err
    code, out, err = uni_x("generate", run / "model", "a red", "--text", "--max-new-tokens", "3", "--device", "cpu")
    assert code == 0, err
    assert out.startswith("a red")

    code, out, err = uni_x("info", run / "model")
    assert code == 0, err
    assert "uni-x(first=1, last=1): 4 layers, hidden size 32" in out

    # an architecture that no preset knows, and sequences of another kind, from the recipe alone
    plan = (
        "[{layers: 0, qkv: separate, sees: own}, {layers: 2-3, ffn: separate, image_ffn_size: 24, shared_ffn_size: 8}]"
    )
    other, drawing, picture = tmp_path / "other", tmp_path / "other.png", tmp_path / "plan.svg"
    other_data = ["data.packing=none", "trainer.per_device_train_batch_size=4"]
    other_data += ["data.render={vis_sep: {every: 4}, template: chatml}"]
    code, _, err = uni_x(*train[:2], f"run={other}", *train[3:], f"model.plan={plan}", *other_data)
    assert code == 0, err
    code, out, err = uni_x("info", other / "model", "--memory", "--picture", picture)
    assert code == 0, err
    assert "separate, image 24, shared 8" in out
    assert "training with AdamW" in out
    assert picture.read_text().startswith("<svg")
    code, _, err = uni_x("generate", other / "model", "a red disc", "--out", drawing, "--device", "cpu")
    assert code == 0, err
    assert Image.open(drawing).size == (32, 32)
    other_config = AutoModelForCausalLM.from_pretrained(other / "model").config
    assert len(other_config.image_marker_ids) == 2
    assert "<|im_start|>" in other_config.rendering["template"]

    code, _, err = uni_x(*train, "model.hidden_size=64")
    assert code == 1
    assert "was made by another recipe (other model.hidden_size)" in err
    code, _, err = uni_x(*encode[:-1], data, "--limit", "3")
    assert code == 1
    assert "made with another source" in err
    for *wrong, message in (
        ("--image", pictures / "broken.jpg", "broken.jpg: the file is no picture"),
        ("--image", tmp_path / "absent.png", "no such picture"),
        ("--out", drawing / "heart.png", f"{drawing}: cannot be written (File exists)"),
        ("--out", drawing.with_suffix(".h5"), "other.h5: cannot be written (HDF5 save handler not installed)"),
    ):
        code, _, err = uni_x("generate", run / "model", "what is it?", *wrong)
        assert (code, err.count("\n")) == (1, 1)
        assert message in err
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = uni_x("generate", run / "model", "a red disc", "--out", drawing)
    assert (code, err.count("\n")) == (1, 1)
    assert "cannot be loaded" in err
    (run / "model" / "config.json").write_text("{")
    for words in (["info", run / "model"], ["generate", run / "model", "a red disc"]):
        code, _, err = uni_x(*words)
        assert (code, err.count("\n")) == (1, 1)


def test_a_stopped_tokenizer_goes_on_where_it_was(pictures: Path, tmp_path: Path) -> None:
    for number in range(7):
        (pictures / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "recipe.yaml").write_text(
        f"source: {pictures}\neval_pictures: 4\ntraining: {{steps: 1000000, continuous_steps: 10}}\n"
        "tokenizer: {resolution: 32, codebook_size: 16, network: {kind: patch, patch_size: 8, embed_dim: 8}}\n"
    )
    command = [sys.executable, "-m", "uni_x", "tokenizer", "train", tmp_path / "recipe.yaml", "--out", tmp_path / "out"]
    left_out = [f"left out: {pictures / f'{number}.heic'} (the file is no picture of a format" for number in range(5)]
    left_out += ["left out: 3 more pictures that cannot be read (.heic, .jpg)"]
    steps, stops = [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        steps.append(int(process.stderr.readline().split()[1]))  # tokenizer 1 of 1000000
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        stop = re.fullmatch(
            rf"Stopped (after step (\d+) of 1000000, which {tmp_path}/out/checkpoint\.pt holds)\. "
            r"Run the same command again to go on\.",
            err.splitlines()[-1],
        )
        assert stop is not None, err
        stops.append(stop)
        assert process.returncode == 130
        assert [line[: len(said)] for line, said in zip(out.splitlines(), left_out, strict=True)] == left_out
    assert 1 == steps[0] < steps[1] < 200  # before any checkpoint was due
    assert int(stops[0][2]) == steps[1] - 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [log.count(said) for said in (*left_out, *(f"stopped {stop[1]}" for stop in stops))] == [2] * 6 + [1] * 2


def test_plain_lines_of_progress_are_frequent_at_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    with cli._progress() as report:
        for now in range(100):
            report("train", now, 99)
        report("train", 99, 99)
    steps = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()]
    assert steps == [0, 2, 6, 14, 30, 60, 90, 99]


def test_a_plain_llm_becomes_a_model_and_comes_back(uni_x: RunCommand, tmp_path: Path) -> None:
    base, made, back = tmp_path / "base", tmp_path / "made", tmp_path / "back"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    tokenizer = train_text_tokenizer(["a red disc"], 270)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    plan = tmp_path / "plan.yaml"
    plan.write_text("plan: [{layers: 0-1, ffn: separate}]")
    init = ["init", base, "--image-tokenizer", "scenes", "--init-vision-with-text"]

    code, out, err = uni_x(*init, "--plan", plan, "--out", made)
    assert (code, err) == (0, "")
    assert "parameters)" in out
    specs = AutoModelForCausalLM.from_pretrained(made).config.layer_specs
    assert [spec.ffn for spec in specs] == ["separate", "separate", "shared"]
    code, _, err = uni_x("generate", made, "a red disc", "--out", tmp_path / "drawing.png", "--device", "cpu")
    assert (code, err) == (0, "")
    code, _, err = uni_x("convert", made, back, "--to", "base")
    assert (code, err) == (0, "")
    ours, plain = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, back))
    assert all(torch.equal(ours[name], weight) for name, weight in plain.items())

    for words, message in (
        ([*init, "--plan", "shared", "--out", made], f"{made}: holds other things, such as "),
        ([*init, "--plan", "unix(1, 1)", "--out", tmp_path / "new"], "the nearest known one is 'uni-x'"),
        ([*init, "--plan", "uni-x(2, 2)", "--out", tmp_path / "new"], "do not fit into 3"),
        ([*init, "--plan", "absent.yaml", "--out", tmp_path / "new"], "absent.yaml: cannot be read"),
        (["init", tmp_path / "absent", *init[2:], "--out", tmp_path / "new"], "no such folder"),
        (["convert", made, tmp_path / "new"], "say either --from reference or --to base"),
        (["convert", base, tmp_path / "new", "--to", "base"], "not a Uni-X model"),
    ):
        code, _, err = uni_x(*words)
        assert code == (2 if "say either" in message else 1)
        assert err.count("\n") == 1
        assert message in err
        assert not (tmp_path / "new").exists()

    weights = load_file(made / "model.safetensors")
    silent = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for always in (silent["model.embed_tokens.weight"], silent["model.norm.weight"], silent["lm_head.weight"][0]):
        always.fill_(1)  # every token leads to eos, which is 0
    save_file(silent, made / "model.safetensors", metadata={"format": "pt"})
    picture = ("--image", tmp_path / "drawing.png")
    for words, said in ((("red?", *picture), ""), (picture, ""), (("a red", "--text"), "a red")):
        code, out, err = uni_x("generate", made, *words, "--device", "cpu")
        warning = "warning: the model ended its answer at once"  # once for each call in this process
        assert (code, out, set(err.splitlines())) == (0, f"{said}\n", {warning})
    odd = weights.pop("model.layers.1.image.mlp.up_proj.weight")
    for content, message in (
        (weights, "the checkpoint lacks model.layers.1.image.mlp.up_proj.weight (1 in all)"),
        (
            {**weights, "model.layers.1.image.mlp.up_proj.weight": odd, "model.odd": odd.clone()},
            "has the unknown model.odd",
        ),
    ):
        save_file(content, made / "model.safetensors", metadata={"format": "pt"})
        code, _, err = uni_x("generate", made, "a red disc", "--out", tmp_path / "drawing.png", "--device", "cpu")
        assert code == 1
        assert message in err.splitlines()[-1]


def test_a_separator_that_an_llm_lacks_is_added_when_it_becomes_a_model(uni_x: RunCommand, tmp_path: Path) -> None:
    base, data, run = tmp_path / "base", tmp_path / "data", tmp_path / "run"
    tokenizer = train_text_tokenizer(["a red disc"], 270)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    # with padding rows behind its tokens, which are no start for a token
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 9, eos_token_id=0, **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    uni_x("encode", "scenes", "--out", data, "--limit", "6")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run: {run}\nmodel: {{base: {tmp_path / 'made'}}}\ntrainer: {{max_steps: 2}}\ndevice: cpu\n"
        f"data: {{sources: [{{path: {data / 'drawing'}}}], render: {{vis_sep: {{every: 4, token: <sep>}}}}}}\n"
    )

    init = ["init", base, "--image-tokenizer", "scenes", "--plan", "uni-x(1, 1)"]
    uni_x(*init, "--out", tmp_path / "plain")
    code, _, err = uni_x("train", recipe, f"model.base={tmp_path / 'plain'}")
    assert (code, err.count("\n")) == (1, 1)
    assert "the text tokenizer has no token <sep>; name one that it has, or add it" in err

    code, _, err = uni_x(*init, "--separator", "<sep>", "--out", tmp_path / "made")
    assert (code, err) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    separator = len(tokenizer)
    assert model.config.image_token_offset == separator + 1
    assert model.config.image_marker_ids == [model.config.vision_start_token_id, separator]
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[separator], rows[:separator].mean(dim=0))

    code, _, err = uni_x("train", recipe)
    assert code == 0, err
    code, _, err = uni_x("generate", run / "model", "a red disc", "--out", tmp_path / "drawing.png", "--device", "cpu")
    assert (code, err) == (0, "")
    assert Image.open(tmp_path / "drawing.png").size == (128, 128)


def test_a_published_checkpoint_lacks_tokenizers(uni_x: RunCommand, tmp_path: Path) -> None:
    source, made = Path(__file__).parent / "fixtures" / "published" / "mot", tmp_path / "made"
    code, out, err = uni_x("convert", source, made, "--from", "reference")
    assert (code, err) == (0, "")
    assert (
        f"warning: {made} lacks an image tokenizer (--image-tokenizer) and a text tokenizer (--text-tokenizer)" in out
    )
    assert isinstance(AutoModelForCausalLM.from_pretrained(made), UniXForCausalLM)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.odd.weight"] = weights.pop("model.norm.weight")
    save_file(weights, broken / "model.safetensors")
    code, _, err = uni_x("convert", broken, tmp_path / "new", "--from", "reference")
    assert (code, err.count("\n")) == (1, 1)
    assert "the checkpoint lacks model.norm.weight" in err


RECIPE = "data: {sources: [{path: absent}]}\ntrainer: {max_steps: 2}\n"
TOKENIZER_RECIPE = Path(__file__).parents[1] / "recipes" / "scenes-tokenizer.yaml"
LONG_NAME = "n" * 300


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (None, [], "no such recipe"),
        ("[1, 2]", [], "a recipe is a mapping"),
        ("a: [", [], "not valid YAML"),
        (RECIPE + "modle: {}", [], "unknown key 'modle'; the nearest known key is 'model'"),
        (
            RECIPE,
            ["model.hiden_size=8"],
            "'model.hiden_size=8': unknown key 'model.hiden_size'; the nearest known key is 'model.hidden_size'",
        ),
        (RECIPE + "model: {hiden_size: 8}", ["seed=1"], "recipe.yaml: unknown key 'model.hiden_size'"),
        (RECIPE, ["data.sources=[{pth: a}]"], "the nearest known key is 'data.sources.0.path'"),
        (RECIPE, ["model.hidden_size=-8"], "model.hidden_size: it must be above 0 (got -8)"),
        (RECIPE, ["trainable=image"], "trainable: a list is needed, as [a, b] or one line with a dash for each (got"),
        (RECIPE, ["data.sources=[]"], "data.sources: it has 0 entries, at least 1 must be there"),
        (RECIPE, ["lora.target_modules=3"], "'lora.target_modules=3': lora.target_modules: a list is needed"),
        (
            RECIPE,
            ["text_tokenizer=folder"],
            "text_tokenizer: a section of keys is needed (got 'folder'); its keys are path, vocab_size\n",
        ),
        (RECIPE, ["data.sources=[folder]"], "a section of keys is needed (got 'folder'); its keys are path, weight, "),
        (RECIPE, ["trainer=3"], "trainer: a section of keys is needed (got 3)\n"),
        (RECIPE, ["data.render.vis_sep=eol"], "a section of keys is needed (got 'eol'); its keys are every, token\n"),
        (RECIPE, ["data.packing=best"], "data.packing: it must be 'none', 'pretrain' or 'sft' (got 'best')"),
        (RECIPE, ["data.max_length="], "data.max_length: a whole number is needed (got nothing)"),
        (RECIPE, ['image_tokenizer="a\\0b"'], "a\0b: no such folder"),
        (RECIPE, ['data.sources=[{path: "a\\0b"}]'], "a\0b: no such file or folder"),
        (RECIPE, ["model.preset=uni-y"], "unknown plan 'uni-y'; the nearest known one is 'uni-x'"),
        (RECIPE, ["model.preset=uni-x", "model.preset_arguments={frist: 1}"], "it takes first, last, ends_see"),
        (RECIPE, ["model.hidden_size=36"], "gives a head_dim of 9, which must be even"),
        (RECIPE, ["trainer.max_stepz=8"], "TrainingArguments; the nearest one is 'max_steps'"),
        (RECIPE, ["trainer.max_steps=abc"], "trainer.max_steps: a whole number is needed (got 'abc')"),
        (RECIPE, ["trainer.eval_strategy=steps"], "trainer"),
        (RECIPE, ["trainer.lr_scheduler_type=cosine", "trainer.lr_scheduler_kwargs={num_cycle: 1}"], "num_cycle"),
        (RECIPE, ["seed=5000000000"], "seed: it must be below 4294967296 (got"),
        (RECIPE, ["trainer.output_dir=x"], "trainer.output_dir: run says where everything goes"),
        (RECIPE, ["model.hidden_size=65"], "model.hidden_size: 65 cannot be shared by 4 heads; take a multiple of"),
        (RECIPE, ["device=gpu"], "device 'gpu': it is one of cpu, cuda, cuda:1, mps and auto\n"),
        (RECIPE, ["device=tpu9"], "device 'tpu9': it is one of cpu, cuda"),
        (RECIPE, ["max_steps=5"], "'max_steps=5': unknown key 'max_steps'; it is 'trainer.max_steps'"),
        (RECIPE, ["learning_rate=5"], "unknown key 'learning_rate'; it is 'optimizer.learning_rate'"),
        (RECIPE, ["every=5"], "it is 'data.render.vis_sep.every' or 'validation.every' or 'drawings.every'"),
        (RECIPE, [], "absent"),
        ("run: x", [], "the key 'data' is missing"),
        (RECIPE, ["image_tokenizer=absent"], "absent"),
    ],
)
def test_mistakes_in_a_recipe_are_one_clear_line(
    uni_x: RunCommand, tmp_path: Path, recipe: str | None, overrides: list[str], message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    if recipe is not None:
        file.write_text(recipe)
    code, _, err = uni_x("train", file, *overrides, f"run={tmp_path / 'run'}")
    assert (code, err.count("\n")) == (1, 1), err
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "Missing argument"),
        (["draw"], "No such command 'draw'"),
        (["train", "recipe.yaml", "max_steps"], "an override has the form key=value"),
        (["generate", "model", "a heart", "--number", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_usage_exits_with_2(
    uni_x: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code, _, err = uni_x(*words)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "absent", "a heart"], "absent: not a model folder"),
        (["generate", "absent", ""], "error: the prompt: it is empty"),
        (["generate", "absent", "", "--text"], "error: the prompt: it is empty"),
        (["generate", "absent", "\udcff"], "error: the prompt: it is not valid Unicode"),
        (["generate", "absent", "a heart", "--out", "heart.svg"], "heart.svg: its name must end as that of a picture"),
        (["info", "absent"], "absent: neither a model folder nor a recipe"),
        (["encode", "absent", "--out", "data", "--image-tokenizer", "scenes"], "absent: no such file or folder"),
        (["quickstart", "train.seed=3", "--out", "run"], "train.seed follows from the quickstart's own; say seed=N"),
        (["quickstart", "train.image_tokenizer=absent", "--out", "run"], "absent: no such folder"),
        (["quickstart", "train.text_tokenizer.vocab_size=9", "--out", "run"], "vocab_size: 9 is too small"),
        (["quickstart", "train.optimizer.betas=[1.5, 0.9]", "--out", "run"], "train.optimizer.betas.0"),
        (["quickstart", "train.trainer.gradient_accumulation_steps=0", "--out", "run"], "is 1 or more, not 0"),
        (["quickstart", "train.trainer.max_grad_norm=abc", "--out", "run"], "max_grad_norm: a number is needed"),
        (["quickstart", "train.trainer.logging_steps=abc", "--out", "run"], "trainer.logging_steps: "),
        (["encode", "absent", "--out", "data", "--image-tokenizer", "none"], "none"),
        (["quickstart", "--out", "file"], "file: is a file; choose a folder"),
        (["quickstart", "train.model.preset=uni-y", "--out", "run"], "unknown plan 'uni-y'"),
        (["encode", LONG_NAME, "--image-tokenizer", "scenes", "--out", "data"], f"{LONG_NAME}: no file or folder can"),
        (["data", "check", LONG_NAME], f"{LONG_NAME}: no file or folder can have a name that long"),
        (["data", "stats", "data", "--model", LONG_NAME], f"{LONG_NAME}/model/config.json: no file or folder can have"),
        (["tokenizer", "train", TOKENIZER_RECIPE, f"source={LONG_NAME}"], f"{LONG_NAME}: no file or folder can have"),
        (["tokenizer", "train", LONG_NAME], f"{LONG_NAME}: cannot be read (File name too long)"),
        (["quickstart", "scnes.texts=3", "--out", "run"], "unknown key 'scnes'; the nearest known key is 'scenes'"),
        (["quickstart", "max_steps=3", "--out", "run"], "unknown key 'max_steps'; it is 'train.trainer.max_steps'"),
    ],
)
def test_what_is_missing_is_one_clear_line(
    uni_x: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, _, err = uni_x(*words)
    assert (code, err.count("\n")) == (1, 1), err
    assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"checkpoints/checkpoint-9/files.json": "{}", "checkpoints/checkpoint-10/files.json": "{}"},
            "a run that has not finished; its last checkpoint is {folder}/checkpoints/checkpoint-10",
        ),
        ({"checkpoints/checkpoint-9/config.json": "{}"}, "not a model folder (it has no config.json)"),
        ({"adapter_config.json": "{}"}, "has the adapters of LoRA alone"),
        ({"config.json": '{"model_type": "qwen2"}'}, "not a Uni-X model but qwen2; `uni-x init {folder} …` makes one"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(
    uni_x: RunCommand, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    code, _, err = uni_x("generate", tmp_path, "a heart")
    assert (code, err.count("\n")) == (1, 1), err
    assert message.format(folder=tmp_path) in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "pictures", "--out", "data"], "--image-tokenizer is missing: which one encodes pictures?"),
        (["encode", "scenes", "--out", "data", "--split", "test"], "--text-tokenizer mean nothing to scenes"),
        (["encode", "pictures", "--out", "data", "--kind", "zip"], "'zip' is not one of"),
        (["generate", "model"], "Give a prompt, or a picture to describe"),
        (["generate", "model", "a heart", "--seed", "99999999999999999999"], "--seed"),
    ],
)
def test_wrong_usage_has_exit_code_2(uni_x: RunCommand, words: list[str], message: str) -> None:
    code, _, err = uni_x(*words)
    assert code == 2
    assert message in err


def test_a_folder_that_only_holds_a_recipe_is_free(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 7")
    RunFolder(tmp_path, {"seed": 8}).begin()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(RunError, match=r"was made by another recipe \(other seed\)"):
        RunFolder(tmp_path, {"seed": 9})
    (tmp_path / "recipe.yaml").write_text("{")
    with pytest.raises(RunError, match="not valid YAML"):
        RunFolder(tmp_path, {"seed": 8})
    (tmp_path / "results.json").write_text("{")
    (tmp_path / "recipe.yaml").write_text("seed: 8")
    with pytest.raises(RunError, match="not valid JSON"):
        RunFolder(tmp_path, {"seed": 8}).read_results()


def test_a_folder_of_other_things_is_no_run_folder(uni_x: RunCommand, tmp_path: Path) -> None:
    recipe, full, run = (tmp_path / name for name in ("recipe.yaml", "full", "run"))
    recipe.write_text(RECIPE)
    full.mkdir()
    (full / "notes.txt").touch()
    for words in (["train", recipe, f"run={full}"], ["quickstart", "--smoke", "--out", full]):
        code, _, err = uni_x(*words)
        assert (code, err.count("\n")) == (1, 1), err
        assert f"{full}: holds other things, such as notes.txt; choose a new or an empty folder" in err
        assert [path.name for path in full.iterdir()] == ["notes.txt"]
    (full / "notes.txt").unlink()
    (full / "checkpoints").mkdir()
    with pytest.raises(RunError, match=r"holds other things, such as checkpoints"):
        RunFolder(full, {"seed": 8})
    run.mkdir()
    (run / ".recipe.yaml.host-1.partial").touch()  # of another process, which is about to begin
    (run / "slurm-17.out").touch()
    first = RunFolder(run, {"seed": 8})
    first.begin()
    (run / "metrics.jsonl").touch()
    assert RunFolder(run, {"seed": 8}).path == first.path


def test_a_full_disk_is_named_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the disk is full"), writing_into(tmp_path):
        torch.save({"weight": torch.zeros(2**20)}, "/dev/full")


def test_a_missing_extra_says_which_to_install(
    uni_x: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uni_x.scenes import pictures

    pictures.tile.cache_clear()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    code, _, err = uni_x("quickstart", "--smoke", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (1, 1), err
    assert "pip install 'uni-x[quickstart]'" in err


def test_too_small_a_disk_is_named_beforehand(
    uni_x: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uni_x import runs

    usage = runs.shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: usage)
    code, _, err = uni_x("quickstart", "--smoke", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (1, 1), err
    assert "the disk has 1 MB free, this run needs 300 MB" in err


def test_warnings_that_are_not_the_users_matter_are_not_shown() -> None:
    from uni_x import cli

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        cli._settle_libraries()
        torch.nn.functional.rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), (4,), torch.ones(4))
        DataLoader(TensorDataset(torch.ones(2)), num_workers=10**6)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]


def test_env_tells_versions_and_devices(uni_x: RunCommand) -> None:
    code, out, _ = uni_x("env")
    assert code == 0
    assert {"python", "torch", "transformers", "device", "dtype"} <= {line.split(":")[0] for line in out.splitlines()}
