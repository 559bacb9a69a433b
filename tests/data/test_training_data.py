import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import uni_x
from uni_x.data.collate import Collator
from uni_x.data.dataset import TrainingData
from uni_x.data.schema import Sample
from uni_x.errors import DataError


def rows_of(data):
    return [row.input_ids.tolist() for row in data]


@pytest.fixture
def make_data(encoded_folder, make_renderer, samples):
    folder = encoded_folder(samples)

    def make(max_length=128, rows_per_epoch=12, seed=3, **options):
        return TrainingData([(folder, 1.0)], make_renderer(), max_length, rows_per_epoch, seed, **options)

    return make


def test_an_epoch_has_its_rows_well_filled(make_data):
    data = make_data(rows_per_epoch=40)
    assert len(data) == len(rows_of(data)) == 40
    assert np.mean([len(row.input_ids) for row in data]) / 128 > 0.97


def test_seed_and_epoch_decide_on_every_row(make_data):
    data = make_data()
    first = rows_of(data)
    data.set_epoch(1)
    second = rows_of(data)
    assert first != second
    data.set_epoch(0)
    assert rows_of(data) == first

    resumed = make_data()
    resumed.set_epoch(1)
    assert resumed[7].input_ids.tolist() == second[7]
    assert rows_of(make_data(seed=4)) != first


def test_processes_and_workers_see_the_same_rows(make_data):
    data = make_data()
    expected = rows_of(data)
    assert rows_of(pickle.loads(pickle.dumps(make_data()))) == expected
    loader = DataLoader(make_data(), batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0].input_ids.tolist())
    assert list(loader) == expected


def test_each_pass_over_a_source_takes_every_sample_once(encoded_folder, make_renderer, make_image):
    folder = encoded_folder([Sample(str(number), (), text=f"a{number}b") for number in range(90)])
    data = TrainingData([(folder, 1.0)], make_renderer(), 64, 30, open_rows=0)  # a third of a pass
    seen = Counter()
    for epoch in range(6):
        data.set_epoch(epoch)
        seen.update(map(tuple, rows_of(data)))
    assert len(seen) == 90
    assert set(seen.values()) == {2}


def test_weights_are_shares_of_the_sequences(encoded_folder, make_renderer, samples):
    drawn = encoded_folder([sample for sample in samples if sample.caption], "drawn")
    asked = encoded_folder([sample for sample in samples if sample.messages], "asked")
    data = TrainingData([(drawn, 3), (asked, 1)], make_renderer(t2i_ratio=1.0), 256, 100)
    by_source = data.statistics.by_source
    counts = {source: sum(tokens.sequences.values()) for source, tokens in by_source.items()}
    assert counts["drawn"] / sum(counts.values()) == pytest.approx(0.75, abs=0.05)
    assert set(by_source["drawn"].sequences) == {"draw"}
    assert set(by_source["asked"].sequences) == {"converse"}
    assert by_source["asked"].image_tokens == 4 * counts["asked"]
    assert by_source["asked"].text_tokens > by_source["asked"].image_tokens
    packing = data.statistics.packing
    assert packing.documents == sum(counts.values())
    assert packing.tokens == sum(tokens.text_tokens + tokens.image_tokens for tokens in by_source.values())


def test_rows_make_batches(make_data, vocabulary):
    collate = Collator(vocabulary.image_token_offset + vocabulary.image_codebook_size, vocabulary.pad_token_id)
    for batch in DataLoader(make_data(), batch_size=5, collate_fn=collate):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].max() < collate.vocab_size


def test_overlong_samples_are_counted(encoded_folder, make_renderer, make_image):
    folder = encoded_folder(
        [Sample("long", (make_image(),), caption="heart " * 50), Sample("short", (make_image(),), caption="a")]
    )
    data = TrainingData([(folder, 1.0)], make_renderer(draw_instructions=[], describe_instructions=[]), 40, 4)
    assert len(rows_of(data)) == 4
    assert data.statistics.packing.dropped > 0


def test_sources_that_give_nothing_are_refused(encoded_folder, make_renderer, samples, tmp_path):
    folder = encoded_folder(samples)
    with pytest.raises(DataError, match="max_length: 5 tokens are too few"):
        TrainingData([(folder, 1.0)], make_renderer(), 5, 4)
    with pytest.raises(DataError, match="at least one source"):
        TrainingData([(folder, 0.0)], make_renderer(), 128, 4)
    with pytest.raises(DataError, match="no such file or folder"):
        TrainingData([(tmp_path / "nowhere", 1.0)], make_renderer(), 128, 4)


def test_hashes_of_another_process_change_nothing(make_data, text_tokenizer, vocabulary, tmp_path):
    data = make_data()
    text_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = f"""
from transformers import PreTrainedTokenizerFast
from uni_x.data.dataset import TrainingData
from uni_x.data.render import Renderer, Vocabulary
renderer = Renderer(PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tokenizer")!r}), {vocabulary!r})
data = TrainingData([({str(tmp_path / "encoded")!r}, 1.0)], renderer, 128, 12, 3)
print([row.input_ids.tolist() for row in data])
"""
    root = Path(uni_x.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(rows_of(data))
