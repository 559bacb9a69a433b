import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import uni_x
from uni_x.data import shards
from uni_x.data.collate import Collator
from uni_x.data.dataset import NOTES, Source, StreamPosition, TrainingStream, held_out_batches, start_positions
from uni_x.data.schema import Message, Sample
from uni_x.data.shards import ShuffledShards
from uni_x.errors import DataError

CODEBOOK_SIZE = 64


def ids_of(batches):
    return [[row.tolist() for row in batch["input_ids"]] for batch in batches]


@pytest.fixture
def make_stream(encoded_folder, make_renderer, samples, vocabulary):
    folder = encoded_folder(samples)
    collate = Collator(vocabulary.image_token_offset + vocabulary.image_codebook_size, vocabulary.pad_token_id)

    def make(sources=None, max_length=128, batch_size=2, seed=3, renderer=None, **options):
        sources = [Source(folder)] if sources is None else sources
        return TrainingStream(sources, renderer or make_renderer(), collate, max_length, batch_size, seed, **options)

    return make


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of some batches, so that a test sees many of them."""
    monkeypatch.setattr("uni_x.data.dataset._BLOCK_TOKENS", 128 * 8)


def texts_of(batches):
    """How often each text was seen among the documents of the batches."""
    seen = Counter()
    for batch in batches:
        for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
            for number in range(1, int(documents.max()) + 1):
                seen[tuple(ids[documents == number].tolist())] += 1
    return seen


def test_rows_are_well_filled(make_stream):
    batches = list(islice(make_stream(), 200))
    assert np.mean([float(batch["attention_mask"].sum()) / (128 * len(batch["input_ids"])) for batch in batches]) > 0.94


def test_seed_and_block_decide_on_every_row(make_stream, small_blocks):
    first = ids_of(islice(make_stream(), 30))
    assert ids_of(islice(make_stream(), 30)) == first
    assert ids_of(islice(make_stream(seed=4), 30)) != first
    flat = [row for batch in first for row in batch]
    assert len(set(map(tuple, flat))) > 0.9 * len(flat)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_sees_what_an_uninterrupted_one_would(make_stream, small_blocks, workers, processes):
    def batches(positions, rank, count):
        stream = make_stream(position=positions[rank])
        return list(islice(DataLoader(stream, batch_size=None, num_workers=workers), count))

    starts = start_positions(processes, workers)
    for rank in range(processes):
        uninterrupted = batches(starts, rank, 40)
        for stopped_after in (1, 7, 22):
            position = starts[rank]
            for batch in batches(starts, rank, stopped_after):
                position = position.after(batch[NOTES])
            former = list(starts)
            former[rank] = StreamPosition.from_json(json.loads(json.dumps(position.to_json())))
            resumed = batches(start_positions(processes, workers, former), rank, 12)
            assert ids_of(resumed) == ids_of(uninterrupted[stopped_after : stopped_after + 12])


def test_with_other_processes_nothing_is_lost_or_repeated(encoded_folder, make_stream, small_blocks):
    folder = encoded_folder([Sample(str(number), (), text=f"a{number}b") for number in range(6000)], "texts")

    def run(positions, counts):
        seen, stood = [], []
        for rank, position in enumerate(positions):
            stream = make_stream([Source(folder)], position=position)
            for batch in islice(DataLoader(stream, batch_size=None, num_workers=len(position.workers)), counts[rank]):
                position = position.after(batch[NOTES])
                seen.append(batch)
            stood.append(position)
        return seen, stood

    seen, stood = run(start_positions(3, 2), [13, 17, 4])
    more, stood = run(start_positions(1, 1, stood), [9])
    rest, stood = run(start_positions(2, 1, stood), [11, 2])
    counts = texts_of([*seen, *more, *rest])
    assert set(counts.values()) == {1}
    # one who goes on alone comes by everything that the others have left
    last, _ = run(start_positions(1, 1, stood), [150])
    counts = texts_of([*seen, *more, *rest, *last])
    assert len(counts) == 6000
    assert set(counts.values()) == {1, 2}


def test_each_pass_over_a_source_takes_every_sample_once(encoded_folder, monkeypatch):
    folder = encoded_folder([Sample(str(number), (), text=f"{number}") for number in range(95)])
    monkeypatch.setattr(shards, "_SHUFFLED_TOGETHER", 30)
    source = ShuffledShards(folder, CODEBOOK_SIZE, (1,))
    passes = [[source.sample(number * 95 + index).id for index in range(95)] for number in range(3)]
    assert [sorted(seen) for seen in passes] == [sorted(map(str, range(95)))] * 3
    assert passes[0] != passes[1]
    again = ShuffledShards(folder, CODEBOOK_SIZE, (1,))
    assert [again.sample(index).id for index in (250, 3, 94, 95, 189)] == [
        passes[2][60],
        passes[0][3],
        passes[0][94],
        passes[1][0],
        passes[1][94],
    ]
    assert len(again._loaded) < 10


def test_a_fraction_is_the_same_part_in_every_pass(encoded_folder):
    folder = encoded_folder([Sample(str(number), (), text=f"{number}") for number in range(40)])
    part = ShuffledShards(folder, CODEBOOK_SIZE, (1,), 0.25)
    assert len(part) == 10
    first = {part.sample(index).id for index in range(10)}
    assert len(first) == 10
    assert {part.sample(index).id for index in range(10, 20)} == first
    other_seed = ShuffledShards(folder, CODEBOOK_SIZE, (2,), 0.25)
    assert {other_seed.sample(index).id for index in range(10)} == first


def samples_of(stream, block):
    size = stream._block_size
    between = stream._samples_between(block * size, (block + 1) * size, np.random.default_rng(0))
    return [sample for _, sample in between]


def test_weights_are_shares_of_the_sequences(encoded_folder, make_stream, make_renderer, samples):
    drawn = encoded_folder([sample for sample in samples if sample.caption], "drawn")
    asked = encoded_folder([sample for sample in samples if sample.messages], "asked")
    stream = make_stream([Source(drawn, 3), Source(asked, 1)], renderer=make_renderer(t2i_ratio=1.0))
    for block in (0, 1, 5):
        sources = Counter(sample.source for sample in samples_of(stream, block))
        assert sources["drawn"] / sources.total() == pytest.approx(0.75, abs=0.01)
    # over blocks no sample is lost between two quotas
    taken = [[stream._taken(number, count) for number in (0, 1)] for count in range(200)]
    assert [sum(both) for both in taken] == list(range(200))


def test_without_packing_batches_hold_one_sequence_a_row_of_similar_length(make_stream):
    batches = list(islice(make_stream(batch_size=4, packing=False), 60))
    assert all(int(batch["document_ids"].max()) == 1 for batch in batches)
    share = sum(float(batch["attention_mask"].sum()) for batch in batches)
    assert share / sum(batch["input_ids"].numel() for batch in batches) > 0.95
    assert len({batch["input_ids"].shape[1] for batch in batches[:10]}) > 2  # not sorted by length


def test_overlong_samples_are_counted(encoded_folder, make_stream, make_renderer, make_image):
    long = [Sample("long", (make_image(),), caption="heart " * 50), Sample("text", (), text="heart " * 50)]
    folder = encoded_folder([*long, Sample("short", (make_image(),), caption="a")], "mixed")
    renderer = make_renderer(draw_instructions=[], describe_instructions=[])
    for split in (True, False):
        stream = make_stream([Source(folder)], max_length=40, renderer=renderer, split_long_texts=split)
        assert (stream.forecast.dropped > 0, stream.forecast.split > 0) == (True, split)
        notes = [batch[NOTES] for batch in islice(stream, 200)]
        taken = len({note.block for note in notes}) * stream._block_size / 3  # of each of the three
        counted = sum(note.left_out for note in notes), sum(note.split for note in notes)
        assert counted == pytest.approx((taken, taken) if split else (2 * taken, 0), rel=0.1)


def test_samples_that_a_template_refuses_are_left_out_and_counted(encoded_folder, make_stream, make_renderer, caplog):
    turns = (Message("user", "Hi"), Message("assistant", "Hello"))
    odd = (Message("system", "Be short."), *turns)
    folder = encoded_folder([Sample(str(n), messages=odd if n == 3 else turns) for n in range(40)], "said")
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    template += "{{ messages | map(attribute='content') | join(' ') }}"
    stream = make_stream([Source(folder)], renderer=make_renderer(template=template))
    batches = list(islice(stream, 600))
    blocks = {batch[NOTES].block for batch in batches}
    left_out = sum(batch[NOTES].left_out for batch in batches)
    assert left_out == pytest.approx(len(blocks) * stream._block_size / 40, rel=0.1)
    assert "left out: sample '3', messages: the template refuses them (no system)" in caplog.text
    renderer = make_renderer(template=template)
    assert len(held_out_batches([folder], renderer, Collator(10_000, 0), 64, 1, samples=40, packing=False)) == 39
    refused = encoded_folder([Sample("3", messages=odd)], "odd")
    with pytest.raises(DataError, match="none of the first 512 samples can be rendered"):
        make_stream([Source(refused)], renderer=renderer)
    for folders, length, message in (
        ([refused], 64, "odd: no held-out sample can be rendered"),
        ([folder], 3, r"said: no held-out sample fits into the 3 tokens of data\.max_length; the shortest needs \d"),
    ):
        with pytest.raises(DataError, match=message):
            held_out_batches(folders, renderer, Collator(10_000, 0), length, 1, samples=40)


def test_sources_that_give_nothing_are_refused(encoded_folder, make_stream, tmp_path):
    too_few = r"data\.max_length: 5 tokens are too few for each sample that was tried; the shortest needs \d+$"
    with pytest.raises(DataError, match=too_few) as caught:
        make_stream(max_length=5)
    shortest = int(str(caught.value).split()[-1])
    assert make_stream(max_length=shortest).forecast.rows
    with pytest.raises(DataError, match=f"the shortest needs {shortest}"):
        make_stream(max_length=shortest - 1)
    with pytest.raises(DataError, match="at least one source"):
        make_stream([Source(tmp_path, 0.0)])
    with pytest.raises(DataError, match="no such file or folder"):
        make_stream([Source(tmp_path / "nowhere")])


def test_a_loader_with_other_workers_is_refused(make_stream):
    loader = DataLoader(make_stream(position=start_positions(1, 2)[0]), batch_size=None, num_workers=1)
    with pytest.raises(DataError, match="one of 2 workers"):
        next(iter(loader))


def test_hashes_of_another_process_change_nothing(make_stream, text_tokenizer, vocabulary, tmp_path):
    text_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = f"""
from itertools import islice
from transformers import PreTrainedTokenizerFast
from uni_x.data.collate import Collator
from uni_x.data.dataset import Source, TrainingStream
from uni_x.data.render import Renderer, Vocabulary
renderer = Renderer(PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tokenizer")!r}), {vocabulary!r})
stream = TrainingStream([Source({str(tmp_path / "encoded")!r})], renderer, Collator(1000, 0), 128, 2, 3)
print([[row.tolist() for row in batch["input_ids"]] for batch in islice(stream, 12)])
"""
    root = Path(uni_x.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(ids_of(islice(make_stream(), 12)))


def test_a_position_says_where_the_process_stands(make_stream, small_blocks):
    stream = make_stream()
    position = stream.position
    for batch in islice(stream, 10):
        position = position.after(batch[NOTES])
    assert position.batches == 10
    (worker,) = position.workers
    (block, used), *_ = worker.left
    assert sum(len(stream.block(number).batches) for number in range(block)) + used == 10
