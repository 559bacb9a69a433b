import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from uni_x.data.prepare import Filters
from uni_x.data.readers import SourceOptions
from uni_x.data.render import Renderer, Vocabulary
from uni_x.data.shards import iterate_samples
from uni_x.data.text_tokenizer import tokenize, train_text_tokenizer
from uni_x.errors import ProcessError, RunError
from uni_x.images import ImageTokenizer
from uni_x.recipe import PatchNetwork, TokenizerConfig
from uni_x.runs import refuse_to_overwrite
from uni_x.workflows.sources import describe_encoded, encode_source


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    network = PatchNetwork(patch_size=8, embed_dim=4, encoder_sizes=(8,), decoder_sizes=(8,))
    return ImageTokenizer(TokenizerConfig(resolution=16, codebook_size=64, network=network))


def test_a_source_without_a_row_that_can_be_used_fails_each_time(tokenizer, tmp_path):
    (pictures := tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.new("RGB", (4 if number < 2 else 20, 20)).save(pictures / f"{number}.png")
        if number < 3:
            (pictures / f"{number}.txt").write_text("a square")
    (pictures / "2.png").write_bytes(b"")
    out = tmp_path / "out"
    for run in range(2):
        summary = encode_source(str(pictures), tokenizer, out, filters=Filters(0, 10))
        assert (summary.read, summary.written, summary.already_done) == (5, 0, run == 1)
        with pytest.raises(ProcessError) as caught:
            describe_encoded("pictures", out, summary)
        assert str(caught.value) == (
            "pictures: of 5 rows none can be used: "
            "2 such as 'the picture is too small: 4 x 20 pixels, min_side is 10', "
            "2 such as 'the caption is missing: 3.txt', 1 with 'the picture is empty'; "
            f"all of them: {out / 'rejects.jsonl'}; mend them, delete {out}, run again"
        )


def test_a_source_without_rows_fails(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    summary = encode_source(str(path), tokenizer, tmp_path / "out")
    with pytest.raises(ProcessError, match=r"rows\.jsonl: no rows in it"):
        describe_encoded("rows.jsonl", tmp_path / "out", summary)


def test_rejects_of_many_kinds_are_summed_up(tokenizer, tmp_path):
    rows = [{"text": "a"}, {"text": ""}, {"text": ""}, {"caption": "a"}, {"text": 1}, {"url": "a"}, []]
    for count, others in ((7, "2 other reasons"), (6, "1 other reason")):
        source, out = tmp_path / f"{count}.jsonl", tmp_path / f"out-{count}"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        lines = describe_encoded(source.name, out, encode_source(str(source), tokenizer, out)).splitlines()
        assert lines[0] == f"{count} read = 1 written + {count - 1} rejected, in {out}"
        assert lines[1].startswith("Rejected: 2 such as 'text: it is empty', 1 with 'images: a caption goes with ")
        assert f", and {others}; all of them: " in lines[1]


def test_half_a_surrogate_in_the_name_of_a_source_is_spelt_out(tokenizer, tmp_path):
    (source := tmp_path / "rows.jsonl").write_text(
        '{"text": "a", "source": "x\\ud800"}\n{"text": "b", "source": "é"}\n'
    )
    assert encode_source(str(source), tokenizer, tmp_path / "out").written == 2
    assert [sample.source for sample in iterate_samples(tmp_path / "out", 64)] == ["x\\ud800", "é"]


@pytest.fixture
def clone(tmp_path):
    """A clone of a repository whose card names one file, and what it holds."""
    pytest.importorskip("datasets").disable_progress_bars()

    def write(folder, *texts):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        card = "---\nconfigs:\n- config_name: own\n  data_files: data/train-00000-of-00001.parquet\n---\n"
        (folder / "README.md").write_text(card)
        pq.write_table(pa.table({"text": texts}), folder / "data" / "train-00000-of-00001.parquet")
        return folder

    return write


def texts_in(out):
    return [sample.text for sample in iterate_samples(out, 64)]


@pytest.mark.parametrize("config", ["", ":own"])
def test_a_clone_gives_the_rows_that_it_holds_now(tokenizer, clone, tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    one, other = clone(tmp_path / "one" / "clone", "a", "b"), clone(tmp_path / "other" / "clone", "c")
    encode_source(f"one/clone{config}", tokenizer, tmp_path / "first")
    encode_source(f"{other}{config}", tokenizer, tmp_path / "second")
    assert (texts_in(tmp_path / "first"), texts_in(tmp_path / "second")) == (["a", "b"], ["c"])
    assert encode_source(f"{one}{config}", tokenizer, tmp_path / "first").already_done
    clone(one, "a", "b", "new")
    with pytest.raises(RunError, match="has changed since it was encoded"):
        encode_source(f"{one}{config}", tokenizer, tmp_path / "first")
    encode_source(f"{one}{config}", tokenizer, tmp_path / "third")
    assert texts_in(tmp_path / "third") == ["a", "b", "new"]


def test_codes_inside_the_folder_of_pictures_are_none_of_it(uni_x, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (source := tmp_path / "pictures").mkdir()
    for number in range(1500):
        Image.new("L", (16, 16), number % 256).save(source / f"{number:04d}.png")
        (source / f"{number:04d}.txt").write_text(f"number {number}")
    out = source / "more" / "codes"
    command = ("encode", source, "--image-tokenizer", tmp_path / "tokenizer", "--out", out)
    process = subprocess.Popen([sys.executable, "-m", "uni_x", *map(str, command)], stdout=subprocess.DEVNULL)
    while not list(out.glob("part-*.parquet")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert len(list(out.glob("part-*.parquet"))) == 1

    code, said, err = uni_x(*command)
    assert (code, said.splitlines()[0]) == (0, f"1500 read = 1500 written + 0 rejected, in {out}"), err
    code, said, _ = uni_x(*command)
    assert (code, said.startswith("This folder is finished already")) == (0, True)
    code, _, err = uni_x(*command[:-1], source)
    assert (code, err) == (1, f"error: {source}: --out is the folder of the source itself; choose another\n")


def test_nothing_is_written_among_other_things(uni_x, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "source: scenes\npictures: 8\neval_pictures: 2\ntraining: {steps: 2, continuous_steps: 1, batch_size: 2}\n"
        "tokenizer: {resolution: 32, codebook_size: 4, network: {kind: patch, patch_size: 16, embed_dim: 4}}\n"
    )
    (texts := tmp_path / "texts.jsonl").write_text('{"text": "Hearts are red."}\n')
    commands = {
        "rows": ("encode", texts, "--image-tokenizer", "scenes"),
        "scenes": ("encode", "scenes", "--limit", "1"),
        "tokenizer": ("tokenizer", "train", recipe),
    }
    (documents := tmp_path / "documents").mkdir()
    (documents / "letter.txt").touch()
    for name, command in commands.items():
        code, _, err = uni_x(*command, "--out", documents)
        mend = "such as letter.txt; choose a new or an empty folder"
        assert (code, err) == (1, f"error: {documents}: holds other things, {mend}\n")
        assert list(documents.iterdir()) == [documents / "letter.txt"]
        (out := tmp_path / name).mkdir()
        assert uni_x(*command, "--out", out)[0] == 0
        (out / "letter.txt").touch()
        code, said, err = uni_x(*command, "--out", out)
        assert (code, "finished already" in said) == (0, True), err
    for name, command in commands.items():
        for output in commands.keys() - {name}:
            code, _, err = uni_x(*command, "--out", tmp_path / output)
            assert (code, err.startswith(f"error: {tmp_path / output}: holds other things")) == (1, True), err


def test_another_process_may_begin_while_a_folder_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "begin.log").touch()
    refuse_to_overwrite(tmp_path, "manifest.json")
    with pytest.raises(RunError, match=r"holds other things, such as begin\.log"):  # it would be replaced
        refuse_to_overwrite(tmp_path)
    (tmp_path / "part-00000-00000.parquet").touch()
    with pytest.raises(RunError, match=r"holds other things, such as part-00000-00000\.parquet"):
        refuse_to_overwrite(tmp_path, "manifest.json")
    names = list(tmp_path.iterdir())

    def read_names(folder):
        (folder / "manifest.json").touch()
        return iter(names)

    monkeypatch.setattr(Path, "iterdir", read_names)
    refuse_to_overwrite(tmp_path, "manifest.json")


def test_a_folder_goes_on_with_the_same_options_alone(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.json").write_text('[{"text": "a"}]')
    assert encode_source(str(tmp_path), tokenizer, tmp_path / "out", options=SourceOptions(kind="json")).written == 1
    with pytest.raises(RunError, match="made with another source"):
        encode_source(str(tmp_path), tokenizer, tmp_path / "out", options=SourceOptions(kind="jsonl"))


def test_ready_ids_come_back_as_the_text_that_gives_them(uni_x, tmp_path):
    texts = ["Hearts are red.", "\n\n two stars, é漢字🙂", "spelt out: <|endoftext|>"]
    text_tokenizer = train_text_tokenizer(["Hearts are red.", "two stars"] * 5, 400)
    text_tokenizer.save_pretrained(tmp_path / "text")
    eos, marker = (text_tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|vision_start|>"))
    ids = [tokenize(text_tokenizer, [text])[0] for text in texts]
    unusable = {
        "empty": ([], "input_ids: it is empty"),
        "nothing but its end": ([eos], "input_ids: it is empty"),
        "an image's": ([*ids[0], 900], f"input_ids[{len(ids[0])}]: 900 is none of the {len(text_tokenizer)} ids of"),
        "a marker": ([5, marker, 6], "input_ids[1]: the special token <|vision_start|>, which a text"),
        "two texts": ([*ids[0], eos, *ids[0]], f"input_ids[{len(ids[0])}]: the special token <|endoftext|>, which"),
        "cut amidst a character": (ids[1][:-1], "input_ids: --text-tokenizer makes other ids of the text that they sp"),
    }
    rows = [{"input_ids": each, "data_type": "text"} for each in ids]
    rows += [{"id": "ended", "input_ids": [*ids[0], eos]}, {"id": "padded", "input_ids": [*ids[1], eos, eos, eos]}]
    rows += [{"id": name, "input_ids": each} for name, (each, _) in unusable.items()]
    (source := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("encode", source, "--image-tokenizer", "scenes", "--out", tmp_path / "out")

    code, out, err = uni_x(*command, "--text-tokenizer", tmp_path / "text")
    assert (code, out.splitlines()[0]) == (0, f"11 read = 5 written + 6 rejected, in {tmp_path / 'out'}"), err
    samples = list(iterate_samples(tmp_path / "out", 1024))
    assert [sample.text for sample in samples] == [*texts, texts[0], texts[1]]
    vocabulary = Vocabulary(len(text_tokenizer), 1024, marker, marker + 1, eos, eos)
    rendered = Renderer(text_tokenizer, vocabulary).render_all(samples, np.random.default_rng(0))
    assert [each.input_ids.tolist() for each in rendered] == [[*each, eos] for each in (*ids, ids[0], ids[1])]
    rejects = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    for reject, (name, (_, reason)) in zip(rejects, unusable.items(), strict=True):
        assert (reject["id"], reject["reason"][: len(reason)]) == (name, reason)

    train_text_tokenizer(["Hearts are red."], 300).save_pretrained(tmp_path / "other")
    for option in ((), ("--text-tokenizer", tmp_path / "other")):
        code, _, err = uni_x(*command, *option)
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith(f"error: {tmp_path / 'out'}: made with another text tokenizer (")
    code, _, err = uni_x(*command[:-1], tmp_path / "without")
    assert code == 1
    assert "name its folder (--text-tokenizer)" in err
    code, _, err = uni_x(*command[:-1], tmp_path / "nowhere", "--text-tokenizer", tmp_path / "nowhere")
    assert (code, err) == (1, f"error: --text-tokenizer: {tmp_path / 'nowhere'} is not a folder\n")
