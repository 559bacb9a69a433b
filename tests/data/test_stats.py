import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from uni_x.analysis.lengths import save_histogram
from uni_x.data.packing import plan_rows
from uni_x.data.schema import CodeGrid, Message, Sample
from uni_x.data.stats import Lengths, TokenCounts, TooLong, statistics
from uni_x.errors import DataError, UsageError
from uni_x.images import ImageTokenizer
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.model_folder import ModelFolder, save_model_folder
from uni_x.recipe import PatchNetwork, TokenizerConfig
from uni_x.workflows.data import describe_data


@pytest.fixture
def mixed(encoded_folder, samples):
    return encoded_folder(samples)


@pytest.fixture
def filler(make_renderer):
    """Writes a text of exactly so many tokens, two at least."""
    renderer = make_renderer()
    first = len(renderer.encode_text("x"))

    def write(tokens):
        text = "x" + "\n" * (tokens - first)
        assert len(renderer.encode_text(text)) == tokens
        return text

    return write


@pytest.fixture
def texts(encoded_folder, filler):
    """Writes documents of so many tokens, three at least."""

    def write(lengths, name="texts", source="told"):
        made = [
            Sample(f"{name}-{number}", text=filler(length - 1), source=source) for number, length in enumerate(lengths)
        ]
        return encoded_folder(made, name)

    return write


def test_samples_and_tokens_are_counted_by_source_and_kind(mixed, make_renderer, samples):
    renderer = make_renderer(t2i_ratio=1.0, unconditional_share=0.0)
    found = statistics([(mixed, 1.0)], renderer, 64)
    (folder,) = found.folders
    assert set(folder.counts) == {("drawn", "draw"), ("asked", "converse")}
    assert list(found.by_kind) == ["draw", "converse"]
    assert folder.by_origin["drawn"] == found.by_kind["draw"]
    assert (found.by_kind["draw"].sequences, found.by_kind["draw"].image_tokens) == (25, 100)
    rendered = [renderer.render(sample, np.random.default_rng(0)) for sample in samples if sample.source == "asked"]
    text_tokens = sum(len(sequence.input_ids) - 4 for sequence in rendered)
    assert folder.by_origin["asked"] == TokenCounts(25, text_tokens, 100)
    assert found.total.sequences == 50
    assert found.total.tokens == folder.by_origin["asked"].tokens + folder.by_origin["drawn"].tokens


def test_separators_are_image_tokens(mixed, make_renderer):
    token = "<|vision_end|>"  # any that the tokenizer has
    plain, separated = make_renderer(), make_renderer(vis_sep={"every": 2, "token": token})
    before, after = (statistics([(mixed, 1.0)], renderer, 64).total for renderer in (plain, separated))
    assert (before.image_tokens, after.image_tokens) == (200, 300)
    assert after.text_tokens == before.text_tokens


def test_what_a_template_refuses_is_counted_as_left_out(encoded_folder, samples, make_renderer):
    template = "{% for m in messages %}{% if 'system' == m.role %}{{ raise_exception('no systems') }}{% endif %}" + (
        "[{{ m.content }}]{% endfor %}"
    )
    turns = (Message("system", "Be short."), Message("user", "Hi"), Message("assistant", "Hello"))
    refused = [Sample(f"refused-{number}", messages=turns) for number in range(3)]
    found = statistics([(encoded_folder(samples + refused), 1.0)], make_renderer(template=template), 64)
    (folder,) = found.folders
    assert (found.total.sequences, found.refused, folder.refused) == (50, 3, 3)
    assert re.fullmatch(r"sample 'refused-\d', messages: the template refuses them \(no systems\)", folder.refusal)
    only = encoded_folder(refused, "refused")
    with pytest.raises(DataError, match=r"refused: none of its 3 samples can be rendered; the first: sample 'refused-"):
        statistics([(only, 1.0)], make_renderer(template=template), 64)


def test_captions_are_drawn_and_described_as_the_renderer_says(mixed, make_renderer):
    found = statistics([(mixed, 1.0)], make_renderer(t2i_ratio=0.5), 64)
    kinds = found.by_kind
    assert list(kinds) == ["draw", "describe", "converse"]
    assert kinds["draw"].sequences + kinds["describe"].sequences == 25
    assert 5 < kinds["draw"].sequences < 20


def test_the_same_seed_counts_the_same(mixed, make_renderer):
    first, same, other = (statistics([(mixed, 1.0)], make_renderer(), 64, seed) for seed in (3, 3, 4))
    assert first == same
    assert first.by_kind != other.by_kind


def test_lengths_and_their_histogram(texts, make_renderer):
    lengths = [10] * 12 + [20] * 3 + [30] * 4 + [200]
    found = statistics([(texts(lengths), 1.0)], make_renderer(), 40)
    assert found.lengths == Lengths(10, 10.0, pytest.approx(25.0), pytest.approx(38.5), 200)
    assert found.histogram.width == 2
    bars = found.histogram.counts["text"]
    assert {number * 2: count for number, count in enumerate(bars) if count} == {10: 12, 20: 3, 30: 4, 80: 1}


def test_the_histogram_counts_every_sequence_once_and_by_kind(mixed, make_renderer):
    found = statistics([(mixed, 1.0)], make_renderer(), 64)
    assert {kind: sum(bars) for kind, bars in found.histogram.counts.items()} == {
        kind: counts.sequences for kind, counts in found.by_kind.items()
    }
    assert len({len(bars) for bars in found.histogram.counts.values()}) == 1


def test_long_texts_are_split_and_long_sequences_with_images_dropped(
    texts, encoded_folder, filler, make_image, make_renderer
):
    told = texts([8, 25, 20, 10])
    shown = encoded_folder(
        [
            Sample("short", (make_image(),), text="<image>" + filler(2)),
            Sample("long", (make_image(),), text="<image>" + filler(30)),
            Sample("answer", messages=(Message("user", filler(2)), Message("assistant", filler(30)))),
        ],
        "shown",
    )
    found = statistics([(told, 1.0), (shown, 1.0)], make_renderer(), 10)
    assert found.too_long == TooLong(2, 45, 2, 37 + 34)
    dropped = statistics([(told, 1.0), (shown, 1.0)], make_renderer(), 10, split=False)
    assert dropped.too_long == TooLong(0, 0, 4, 45 + 37 + 34)


def test_the_forecast_is_that_of_the_packing(texts, make_renderer):
    lengths = np.random.default_rng(0).integers(3, 90, 200).tolist()
    found = statistics([(texts(lengths), 1.0)], make_renderer(), 100).packing
    rows = plan_rows(lengths, 100)
    assert (found.documents, found.tokens) == (200, sum(lengths))
    assert abs(found.rows - len(rows)) <= 2  # the order is another
    assert found.fill == sum(lengths) / (found.rows * 100)
    assert found.documents_per_row == 200 / found.rows


def test_pieces_of_texts_are_documents_of_the_forecast_and_what_is_dropped_is_not(texts, make_renderer):
    folder = texts([25, 20, 10])
    packing = statistics([(folder, 1.0)], make_renderer(), 10).packing
    assert (packing.documents, packing.rows, packing.tokens) == (6, 6, 55)
    packing = statistics([(folder, 1.0)], make_renderer(), 10, split=False).packing
    assert (packing.documents, packing.rows, packing.tokens, packing.fill) == (1, 1, 10, 1.0)


def test_without_joining_each_sequence_has_a_row(texts, make_renderer):
    packing = statistics([(texts([3] * 30), 1.0)], make_renderer(), 10, join=False).packing
    assert (packing.rows, packing.documents) == (30, 30)
    assert packing.fill == pytest.approx(0.3)


def test_nothing_that_fits_is_no_row(texts, make_renderer):
    packing = statistics([(texts([30] * 3), 1.0)], make_renderer(), 10, split=False).packing
    assert (packing.rows, packing.documents, packing.documents_per_row) == (0, 0, 0)


def test_weights_are_shares_of_the_sequences(texts, make_renderer):
    short, long = texts([10] * 90, "short"), texts([30] * 10, "long", "other")
    found = statistics([(short, 1.0), (long, 3.0)], make_renderer(), 1000)
    assert found.total == TokenCounts(100, 1200, 0)
    assert [folder.total for folder in found.folders] == [TokenCounts(90, 900, 0), TokenCounts(10, 300, 0)]
    assert [folder.weight for folder in found.folders] == [0.25, 0.75]
    assert [folder.token_share for folder in found.folders] == pytest.approx([0.1, 0.9])
    assert found.packing.tokens == 25 * 10 + 75 * 30
    assert found.packing.documents == 100


def test_a_folder_of_weight_0_is_counted_but_not_in_the_forecast(texts, make_renderer):
    found = statistics([(texts([10] * 5, "a"), 1.0), (texts([30] * 5, "b"), 0.0)], make_renderer(), 100)
    assert found.total.sequences == 10
    assert found.packing.tokens == 10 * 10


def test_a_limit_and_a_fraction_hold_for_each_folder(texts, make_renderer):
    folders = [(texts([10] * 40, "a"), 1.0), (texts([30] * 4, "b"), 1.0)]
    limited = statistics(folders, make_renderer(), 100, limit=8)
    assert [folder.total.sequences for folder in limited.folders] == [8, 4]
    parts = statistics(folders, make_renderer(), 100, fractions=[0.5, 0.25])
    assert [folder.total.sequences for folder in parts.folders] == [20, 1]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0]])
def test_weights_that_are_none_are_refused(texts, make_renderer, weights):
    folders = [(texts([10], f"folder-{number}"), weight) for number, weight in enumerate(weights)]
    with pytest.raises(DataError, match="at least one folder, with weights of 0 or more"):
        statistics(folders, make_renderer(), 10)


def test_codes_beyond_the_models_codebook_are_an_error(encoded_folder, make_renderer):
    image = CodeGrid(np.array([0, 64], dtype=np.uint16), 1, 2)
    folder = encoded_folder([Sample("far", (image,), caption="a star")])
    with pytest.raises(DataError, match=r"sample 'far', images.codes: code 64 is not in a codebook of 64"):
        statistics([(folder, 1.0)], make_renderer(), 10)


def test_the_histogram_is_drawn_as_svg_that_follows_the_theme(mixed, make_renderer, tmp_path):
    found = statistics([(mixed, 1.0)], make_renderer(), 64)
    save_histogram(found, tmp_path / "lengths.svg")
    text = (tmp_path / "lengths.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    words = "".join(root.itertext())
    for word in ("max_length 64", "draw", "describe", "converse", "tokens in a sequence"):
        assert word in words
    assert "var(--ux-image)" in text
    assert "#0102" not in text
    assert root.get("aria-label") == (
        f"Lengths of 50 sequences, from {found.lengths.shortest} to {found.lengths.longest}"
    )


def test_the_histogram_is_drawn_as_png_in_colours(mixed, make_renderer, tmp_path):
    save_histogram(statistics([(mixed, 1.0)], make_renderer(), 64), tmp_path / "lengths.png")
    with Image.open(tmp_path / "lengths.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**16)}
    assert {(0xA8, 0x65, 0x0C), (0x2B, 0x6A, 0x99), (0xFC, 0xFB, 0xF8)} <= colours


def test_the_line_stands_at_max_length_and_bars_where_the_lengths_are(texts, make_renderer, tmp_path):
    """Read back from the picture: columns of ink, and of bars to its left."""
    found = statistics([(texts([20] * 50), 1.0)], make_renderer(), 80)
    save_histogram(found, tmp_path / "lengths.png")
    pixels = np.asarray(Image.open(tmp_path / "lengths.png").convert("RGB")).astype(int)
    bars = np.flatnonzero((np.abs(pixels - (0x6A, 0x6C, 0x70)).sum(axis=2) < 3).sum(axis=0) > 100)
    line = np.flatnonzero((np.abs(pixels - (0x23, 0x26, 0x2B)).sum(axis=2) < 90).sum(axis=0) > 100)
    left, width = 0.13 * pixels.shape[1], 0.84 * pixels.shape[1]
    of_axes = [(place - left) / width * 80 * 1.04 for place in (bars.min(), bars.max(), line.mean())]
    assert of_axes == pytest.approx([20, 21, 80], abs=0.5)


def test_other_pictures_than_svg_and_png_are_refused(mixed, make_renderer, tmp_path):
    with pytest.raises(UsageError, match=r"lengths.gif: a picture's name ends in .svg or .png"):
        save_histogram(statistics([(mixed, 1.0)], make_renderer(), 64), tmp_path / "lengths.gif")


@pytest.fixture
def small_model(text_tokenizer, image_tokenizer, vocabulary, tmp_path):
    config = UniXConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=vocabulary.image_token_offset + 64,
        image_token_offset=vocabulary.image_token_offset,
        image_codebook_size=64,
        vision_start_token_id=vocabulary.vision_start_token_id,
        vision_end_token_id=vocabulary.vision_end_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
        rendering={"t2i_ratio": 1.0},
        max_position_embeddings=2048,
    )
    folder = ModelFolder(UniXForCausalLM(config), text_tokenizer, image_tokenizer)
    save_model_folder(folder, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_described_with_a_models_tokenizer_and_rendering(mixed, small_model, tmp_path):
    picture = tmp_path / "lengths.svg"
    lines = list(describe_data(mixed, small_model, 64, picture))
    assert re.fullmatch(r"source +sequences +text tokens +image tokens +of all tokens", lines[0])
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["all"][0] == "50"
    assert (rows["draw"][0], rows["draw"][2]) == ("25", "100")
    assert "describe" not in rows  # the model's rendering draws every caption
    assert lines[-4].startswith("lengths: ")
    assert lines[-3] == "longer than a row of 64: none"
    assert lines[-2].startswith("packing: 50 sequences in ")
    assert lines[-1] == f"picture: {picture}"
    assert picture.is_file()
    assert "row of 2,048" in "\n".join(describe_data(mixed, small_model))  # as long as the model's


def test_a_source_has_its_path_for_a_name_and_its_origins_below_it(mixed, texts, recipe, small_model):
    told = texts([6] * 10)
    lines = list(describe_data(recipe([(mixed, 1), (told, 3)], model={"base": str(small_model)})))
    names = [re.split(r"  +", line)[0] for line in lines[1:5]]
    assert (names[0], names[3]) == (str(mixed), str(told))
    assert sorted(line.split()[0] for line in lines[2:4]) == ["asked", "drawn"]
    assert all(line.startswith("  ") for line in lines[2:4])
    assert f"  {mixed}: 25.0% of the sequences" in "\n".join(lines)


def test_overrides_change_the_recipe(mixed, recipe, small_model):
    path = recipe([(mixed, 1)], model={"base": str(small_model)})
    lines = list(describe_data(path, overrides=["data.max_length=48", "data.render.t2i_ratio=1.0"]))
    assert "row of 48" in "\n".join(lines)
    assert not any(line.startswith("describe") for line in lines)
    with pytest.raises(UsageError, match=r"'data.max_length=48': .*encoded is none; name one folder"):
        list(describe_data(mixed, small_model, overrides=["data.max_length=48"]))


def test_what_is_longer_than_a_row_is_told(texts, small_model):
    lines = list(describe_data(texts([8, 25]), small_model, 10))
    assert lines[-3:-1] == ["longer than a row of 10: 1", "  cut into several: 1 text of 25 tokens"]
    assert lines[-1] == (
        "packing: 4 sequences in 4 rows of 10; too few to tell how full rows get in training, where samples come again"
    )
    lines = list(describe_data(texts([8, 25] * 3, "more"), small_model, 10))
    assert lines[-1] == "packing: 12 sequences in 11 rows of 10, 1.1 in each, 90.0% full"


@pytest.fixture
def recipe(tmp_path):
    def write(folders, **sections):
        sources = [{"path": str(folder), "weight": weight} for folder, weight in folders]
        data = {"sources": sources, "max_length": 32, "render": {"t2i_ratio": 0.0}}
        tree = {"data": {**data, **sections.pop("data", {})}, **sections}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture
def image_tokenizer_folder(tmp_path):
    torch.manual_seed(0)
    network = PatchNetwork(patch_size=8, embed_dim=4, encoder_sizes=(8,), decoder_sizes=(8,))
    ImageTokenizer(TokenizerConfig(resolution=16, codebook_size=64, network=network)).save_pretrained(tmp_path / "it")
    return str(tmp_path / "it")


def test_a_recipe_brings_sources_tokenizers_length_and_rendering(mixed, texts, recipe, image_tokenizer_folder):
    path = recipe(
        [(mixed, 1), (texts([6] * 10), 3)],
        image_tokenizer=image_tokenizer_folder,
        text_tokenizer={"vocab_size": 300},
        model={"hidden_size": 8, "num_attention_heads": 1},
    )
    lines = list(describe_data(path))
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["all"][0] == "60"
    assert rows["describe"][0] == "25"
    assert f"  {mixed}: 25.0% of the sequences" in "\n".join(lines)
    assert "row of 32" in "\n".join(lines)
    assert "row of 16" in "\n".join(describe_data(path, max_length=16))
    limited = list(describe_data(path, limit=3))
    assert next(line for line in limited if line.startswith("all")).split()[1] == "6"


def test_a_recipe_with_a_base_takes_its_tokenizer_and_its_own_rendering(mixed, recipe, small_model):
    lines = list(describe_data(recipe([(mixed, 1)], model={"base": str(small_model)})))
    assert [line.split()[1] for line in lines if line.startswith("describe")] == ["25"]


def test_codes_of_another_image_tokenizer_are_refused_as_in_training(
    mixed, recipe, small_model, image_tokenizer_folder, encoded_folder, samples
):
    (mixed / "manifest.json").write_text(json.dumps({"finished": True, "tokenizer": "0" * 64}))
    other = encoded_folder(samples, "other")
    base = {"model": {"base": str(small_model)}}

    def check(image_tokenizer, path, model=None):
        message = f"encoded: was encoded with another image tokenizer than {image_tokenizer}; encode it with this one"
        with pytest.raises(DataError, match=message):
            list(describe_data(path, model))

    check(image_tokenizer_folder, recipe([(mixed, 1)], image_tokenizer=image_tokenizer_folder))
    of_model = f"{small_model}/image_tokenizer"
    check(of_model, recipe([(mixed, 1)], **base))
    check(of_model, recipe([(other, 1)], validation={"sources": [str(mixed)]}, **base))
    check(of_model, mixed, small_model)


def test_a_recipe_without_packing_or_splitting_is_forecast_so(texts, recipe, small_model):
    path = recipe(
        [(texts([6] * 10 + [40]), 1)],
        model={"base": str(small_model)},
        data={"packing": "none", "long_texts": "drop"},
    )
    lines = list(describe_data(path))
    assert "  left out: 1 sequence of 40 tokens" in lines
    assert lines[-1] == "packing none: 10 rows of one sequence each"


def test_wrong_usage_says_what_is_missing(mixed, recipe, small_model, tmp_path):
    with pytest.raises(UsageError, match="--model is missing"):
        list(describe_data(mixed))
    with pytest.raises(UsageError, match="--model: a recipe names its own tokenizers"):
        list(describe_data(recipe([(mixed, 1)]), small_model))
    with pytest.raises(UsageError, match=r"ends in .svg or .png"):
        list(describe_data(mixed, small_model, picture=tmp_path / "a.gif"))
    with pytest.raises(DataError, match="not a model folder"):
        list(describe_data(mixed, tmp_path))
