import json

import pytest
import torch
from PIL import Image

from uni_x.data.prepare import Filters
from uni_x.data.readers import SourceOptions
from uni_x.errors import ProcessError, RunError
from uni_x.images import ImageTokenizer
from uni_x.recipe import PatchNetwork, TokenizerConfig
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
            "pictures: none of its 5 rows can be used: "
            "2 such as 'the picture is too small: 4 x 20 pixels, min_side is 10', "
            "2 such as 'the caption is missing: 3.txt', 1 such as 'the picture is empty'; "
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
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = encode_source(str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "out")
    lines = describe_encoded("rows.jsonl", tmp_path / "out", summary).splitlines()
    assert lines[0] == f"7 read = 1 written + 6 rejected, in {tmp_path / 'out'}"
    assert lines[1].startswith("Rejected: 2 such as 'text: it is empty', 1 such as ")
    assert ", and 2 other reasons; all of them: " in lines[1]


def test_a_folder_goes_on_with_the_same_options_alone(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.json").write_text('[{"text": "a"}]')
    assert encode_source(str(tmp_path), tokenizer, tmp_path / "out", options=SourceOptions(kind="json")).written == 1
    with pytest.raises(RunError, match="made with another source"):
        encode_source(str(tmp_path), tokenizer, tmp_path / "out", options=SourceOptions(kind="jsonl"))
