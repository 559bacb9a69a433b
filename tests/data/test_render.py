from types import SimpleNamespace

import numpy as np
import pytest

from uni_x.data.render import IGNORED, Renderer, Vocabulary
from uni_x.data.schema import CodeGrid, Message, Sample
from uni_x.errors import ConfigError, DataError, InputError
from uni_x.recipe import RenderOptions

ALWAYS_DRAW = {"t2i_ratio": 1.0, "unconditional_share": 0.0}
ALWAYS_DESCRIBE = {"t2i_ratio": 0.0}
CONVERSATION = (
    Message("system", "Be short."),
    Message("user", "<image>Is there a heart?"),
    Message("assistant", "Yes."),
    Message("user", "Now draw a car."),
    Message("assistant", "Here: <image>"),
    Message("user", "And compare <image> with it."),
    Message("assistant", "Alike."),
)


@pytest.fixture
def read(text_tokenizer, vocabulary):
    """Spells ids out: texts as they were, markers by name, codes as [n]."""
    markers = {
        vocabulary.vision_start_token_id: "<s>",
        vocabulary.vision_end_token_id: "<e>",
        vocabulary.eos_token_id: "<eos>",
    }

    def spell(ids):
        spelled, text = "", []
        for token in [*map(int, ids), None]:
            if token is not None and token < vocabulary.image_token_offset and token not in markers:
                text.append(token)
                continue
            spelled += text_tokenizer.decode(text)
            text = []
            if token is not None:
                spelled += markers.get(token) or f"[{token - vocabulary.image_token_offset}]"
        return spelled

    return spell


@pytest.fixture
def read_trained(read):
    """Spells out the trained ids alone."""
    return lambda rendered: read(rendered.labels[rendered.labels != IGNORED])


def rng(seed=0):
    return np.random.default_rng(seed)


def test_draw(make_renderer, make_image, read, read_trained):
    sample = Sample("x", (make_image(7),), caption="a red heart", source="s")
    rendered = make_renderer(**ALWAYS_DRAW, draw_instructions=[" please"]).render(sample, rng())
    assert read(rendered.input_ids) == "a red heart please<s>[7][8][9][10]<e><eos>"
    assert read_trained(rendered) == "[7][8][9][10]<e><eos>"
    assert (rendered.kind, rendered.source, rendered.image_tokens) == ("draw", "s", 4)
    assert rendered.input_ids.dtype == rendered.labels.dtype == np.int64


def test_describe(make_renderer, make_image, read, read_trained):
    sample = Sample("x", (make_image(7),), caption="a red heart")
    rendered = make_renderer(**ALWAYS_DESCRIBE, describe_instructions=["What is it?\n"]).render(sample, rng())
    assert read(rendered.input_ids) == "<s>[7][8][9][10]<e>What is it?\n a red heart<eos>"
    assert read_trained(rendered) == "a red heart<eos>"
    assert rendered.kind == "describe"


def test_converse(make_renderer, make_image, read, read_trained):
    sample = Sample("x", (make_image(0), make_image(4), make_image(8)), messages=CONVERSATION)
    rendered = make_renderer().render(sample, rng())
    assert read(rendered.input_ids) == (
        "Be short.\n"
        "<s>[0][1][2][3]<e>Is there a heart?\n Yes.<eos>"
        "\n Now draw a car.\n Here: <s>[4][5][6][7]<e><eos>"
        "\n And compare <s>[8][9][10][11]<e> with it.\n Alike.<eos>"
    )
    assert read_trained(rendered) == "Yes.<eos>Here: <s>[4][5][6][7]<e><eos>Alike.<eos>"
    assert (rendered.kind, rendered.image_tokens) == ("converse", 12)


def test_images_without_a_place_come_first(make_renderer, make_image, read, read_trained):
    messages = (Message("user", "Alike?"), Message("assistant", "No"))
    rendered = make_renderer().render(Sample("x", (make_image(0), make_image(4)), messages=messages), rng())
    assert read(rendered.input_ids) == "<s>[0][1][2][3]<e><s>[4][5][6][7]<e>Alike?\n No<eos>"
    assert read_trained(rendered) == "No<eos>"


def test_text_and_interleaved_images_are_trained_whole(make_renderer, make_image, read, read_trained):
    renderer = make_renderer()
    rendered = renderer.render(Sample("x", text="a heart"), rng())
    assert read(rendered.input_ids) == read_trained(rendered) == "a heart<eos>"
    rendered = renderer.render(Sample("x", (make_image(0),), text="a <image> heart"), rng())
    assert read(rendered.input_ids) == read_trained(rendered) == "a <s>[0][1][2][3]<e> heart<eos>"


def test_instructions_are_trained_on_request_and_images_to_look_at_never(make_renderer, make_image, read_trained):
    options = {"ignore_instruction": False, "draw_instructions": [], "describe_instructions": ["What?"]}
    caption = Sample("x", (make_image(),), caption="a heart")
    drawn = make_renderer(**options, **ALWAYS_DRAW).render(caption, rng())
    assert read_trained(drawn) == "a heart<s>[0][1][2][3]<e><eos>"
    described = make_renderer(**options, **ALWAYS_DESCRIBE).render(caption, rng())
    assert read_trained(described) == "What? a heart<eos>"
    messages = (Message("user", "<image>Red?"), Message("assistant", "No"))
    conversation = make_renderer(**options).render(Sample("x", (make_image(),), messages=messages), rng())
    assert read_trained(conversation) == "Red?\n No<eos>"


def test_labels_are_the_ids_or_ignored(make_renderer, samples):
    for rendered in make_renderer().render_all(samples, rng()):
        assert ((rendered.labels == rendered.input_ids) | (rendered.labels == IGNORED)).all()


def test_shares_of_drawing_and_of_no_text(make_renderer, make_image, read):
    renderer = make_renderer(t2i_ratio=0.25, unconditional_share=0.5, draw_instructions=[" now", " please"])
    sample = Sample("x", (make_image(),), caption="a heart")
    rendered = renderer.render_all([sample] * 2000, rng())
    drawn = [read(sequence.input_ids) for sequence in rendered if sequence.kind == "draw"]
    assert len(drawn) / 2000 == pytest.approx(0.25, abs=0.04)
    assert sum(text.startswith("<unconditional><s>") for text in drawn) / len(drawn) == pytest.approx(0.5, abs=0.08)
    assert sum(text.startswith("a heart now<s>") for text in drawn) / len(drawn) == pytest.approx(0.25, abs=0.08)


def test_one_by_one_and_together_are_the_same(make_renderer, samples):
    together = make_renderer().render_all(samples, rng())
    renderer, generator = make_renderer(), rng()
    for sample, expected in zip(samples, together, strict=True):
        assert renderer.render(sample, generator).input_ids.tolist() == expected.input_ids.tolist()


def starts_with(rendered, prompt):
    return rendered.input_ids[: len(prompt)].tolist() == prompt and len(prompt) < len(rendered.input_ids)


def test_prompts_are_prefixes_of_training_sequences_and_end_where_training_begins(make_renderer, make_image):
    image = make_image(5)
    sample = Sample("x", (image,), caption="a red heart")
    draws, describes = (make_renderer(**options) for options in (ALWAYS_DRAW, ALWAYS_DESCRIBE))
    for seed in range(8):
        drawn, described = draws.render(sample, rng(seed)), describes.render(sample, rng(seed))
        prompts = [draws.draw_prompt("a red heart", text) for text in draws.options.draw_instructions]
        (prompt,) = [prompt for prompt in prompts if starts_with(drawn, prompt)]
        assert np.flatnonzero(drawn.labels != IGNORED)[0] == len(prompt)
        prompts = [describes.describe_prompt(image, text) for text in describes.options.describe_instructions]
        (prompt,) = [prompt for prompt in prompts if starts_with(described, prompt)]
        assert np.flatnonzero(described.labels != IGNORED)[0] == len(prompt)

    unconditional = make_renderer(t2i_ratio=1.0, unconditional_share=1.0)
    assert starts_with(unconditional.render(sample, rng()), unconditional.unconditional_prompt())


def test_chat_prompts_are_prefixes_up_to_each_answer(make_renderer, make_image):
    renderer = make_renderer()
    images = (make_image(0), make_image(4), make_image(8))
    rendered = renderer.render(Sample("x", images, messages=CONVERSATION), rng())
    trained = rendered.labels != IGNORED
    answers = np.flatnonzero(trained & ~np.roll(trained, 1))
    prompts = [renderer.chat_prompt(CONVERSATION[:turns], images[:shown]) for turns, shown in ((2, 1), (4, 1), (6, 3))]
    assert all(starts_with(rendered, prompt) for prompt in prompts)
    assert [len(prompt) for prompt in prompts] == answers.tolist()


def test_chat_prompts_with_images_first(make_renderer, make_image):
    renderer = make_renderer()
    messages = (Message("user", "Red?"), Message("assistant", "No"))
    rendered = renderer.render(Sample("x", (make_image(),), messages=messages), rng())
    assert starts_with(rendered, renderer.chat_prompt(messages[:1], [make_image()]))


def test_special_tokens_spelled_in_texts_stay_text(make_renderer, make_image, vocabulary):
    sample = Sample("x", (make_image(),), caption="a <|vision_start|><|endoftext|> heart")
    ids = make_renderer(**ALWAYS_DRAW).render(sample, rng()).input_ids.tolist()
    assert ids.count(vocabulary.vision_start_token_id) == ids.count(vocabulary.eos_token_id) == 1


def test_texts_are_forgotten_and_tokenised_again(make_renderer, make_image, monkeypatch):
    monkeypatch.setattr("uni_x.data.render._IDS_KEPT", 3)
    renderer = make_renderer()
    first = renderer.draw_prompt("a red heart")
    renderer.draw_prompt("two yellow stars")
    assert renderer.draw_prompt("a red heart") == first


def test_images_that_do_not_fit_are_refused(make_renderer, make_image):
    renderer = make_renderer(**ALWAYS_DRAW)
    question = (Message("user", "<image>?"), Message("assistant", "Yes"))
    with pytest.raises(DataError, match=r"sample 'x', images\.codes: code 64 is not in the model's codebook of 64"):
        renderer.render(Sample("x", (make_image(61),), caption="a"), rng())
    with pytest.raises(DataError, match="sample 'x', caption: it goes with exactly one image, found 0"):
        renderer.render(Sample("x", (), caption="a"), rng())
    with pytest.raises(DataError, match=r"sample 'x', messages\[0\].content: more <image> than images"):
        renderer.render(Sample("x", (), messages=question), rng())
    with pytest.raises(DataError, match="sample 'x', messages: fewer <image> than images"):
        renderer.render(Sample("x", (make_image(), make_image()), messages=question), rng())
    with pytest.raises(DataError, match="sample 'x', text: more <image> than images"):
        renderer.render(Sample("x", text="<image>"), rng())
    with pytest.raises(DataError, match="text: fewer <image> than images"):
        renderer.render(Sample("x", (make_image(),), text="none"), rng())
    with pytest.raises(InputError, match="more <image> than images"):
        renderer.chat_prompt(question[:1])
    with pytest.raises(InputError, match="the last one must be the user's"):
        renderer.chat_prompt(question, [make_image()])


def test_vocabulary_from_a_configuration():
    ids = {
        "image_token_offset": 300,
        "image_codebook_size": 64,
        "vision_start_token_id": 1,
        "vision_end_token_id": 2,
        "pad_token_id": 0,
    }
    assert Vocabulary.from_config(SimpleNamespace(**ids, eos_token_id=[5, 6])) == Vocabulary(300, 64, 1, 2, 5, 0)
    with pytest.raises(ConfigError, match="lacks eos_token_id"):
        Vocabulary.from_config(SimpleNamespace(**ids, eos_token_id=None))


def test_a_tokenizer_larger_than_the_text_vocabulary_is_refused(text_tokenizer):
    with pytest.raises(ConfigError, match="image codes begin at id 100"):
        Renderer(text_tokenizer, Vocabulary(100, 64, 1, 2, 0, 0))


def test_grids_need_no_square_shape(make_renderer, read):
    image = CodeGrid(np.array([3, 1, 2], dtype=np.uint32), height=1, width=3)
    rendered = make_renderer(**ALWAYS_DRAW, draw_instructions=[]).render(Sample("x", (image,), caption="a car"), rng())
    assert read(rendered.input_ids) == "a car<s>[3][1][2]<e><eos>"


def test_separators_stand_behind_so_many_codes(text_tokenizer, vocabulary, make_image, read, read_trained):
    separated = make_separated(text_tokenizer, vocabulary, every=3)
    sample = Sample("x", (make_image(7),), caption="a heart")
    rendered = separated.render(sample, rng())
    assert read(rendered.input_ids) == "a heart<s>[7][8][9]<e>[10]<e><eos>"
    assert read_trained(rendered) == "[7][8][9]<e>[10]<e><eos>"
    assert separated.separator == (vocabulary.vision_end_token_id, 3)
    assert read(make_separated(text_tokenizer, vocabulary, every=2).render(sample, rng()).input_ids) == (
        "a heart<s>[7][8]<e>[9][10]<e><e><eos>"
    )
    with pytest.raises(ConfigError, match=r"vis_sep\.token: the text tokenizer has no token <\|vision_pad\|>"):
        Renderer(text_tokenizer, vocabulary, RenderOptions(vis_sep={"every": 2}))


def make_separated(text_tokenizer, vocabulary, every):
    options = RenderOptions(**ALWAYS_DRAW, draw_instructions=[], vis_sep={"every": every, "token": "<|vision_end|>"})
    return Renderer(text_tokenizer, vocabulary, options)


def test_in_pretraining_questions_are_captions_too(text_tokenizer, vocabulary, make_image, read):
    options = RenderOptions(**ALWAYS_DRAW, draw_instructions=[])
    asked = Sample("x", (make_image(7),), messages=(Message("user", "<image>Red?"), Message("assistant", "No")))
    drawn = Sample("y", (make_image(7),), messages=(Message("user", "Draw."), Message("assistant", "<image>")))
    pretrain, sft = (Renderer(text_tokenizer, vocabulary, options, stage) for stage in ("pretrain", "sft"))
    assert read(pretrain.render(asked, rng()).input_ids) == "Red?\nNo<s>[7][8][9][10]<e><eos>"
    assert read(sft.render(asked, rng()).input_ids) == "<s>[7][8][9][10]<e>Red?\n No<eos>"
    for renderer in (pretrain, sft):
        assert renderer.render(drawn, rng()).kind == "converse"


def test_the_published_layout_leaves_newlines_to_chance_and_answers_without_an_end(make_renderer, make_image, read):
    renderer = make_renderer(layout="published", t2i_ratio=0.0, describe_instructions=["What?"])
    asked = Sample("x", (make_image(7),), messages=(Message("user", "Red?"), Message("assistant", "No")))
    seen = {read(renderer.render(asked, rng(seed)).input_ids) for seed in range(60)}
    assert len(seen) == 9  # one to three newlines before each turn
    assert all(text.startswith("<s>[7][8][9][10]<e>\n") and text.endswith("No") for text in seen)
    described = read(renderer.render(Sample("x", (make_image(7),), caption="a heart"), rng()).input_ids)
    assert described.startswith("<s>[7][8][9][10]<e>\n")
    assert described.endswith("a heart")
    prompt = renderer.chat_prompt([Message("user", "Red?")], [make_image(7)])
    assert read(prompt) == "<s>[7][8][9][10]<e>\nRed?"
    # a question without a picture ends
    alone = Sample("x", messages=(Message("user", "Red?"), Message("assistant", "No")))
    assert read(renderer.render(alone, rng()).input_ids).endswith("No<eos>")


def test_instructions_are_named_by_their_language():
    assert RenderOptions(draw_instructions="both").draw_instructions == (
        RenderOptions().draw_instructions + RenderOptions(draw_instructions="chinese").draw_instructions
    )
    assert all("图" in text or "画" in text for text in RenderOptions(draw_instructions="chinese").draw_instructions)
    with pytest.raises(ValueError, match="one of english, chinese, both"):
        RenderOptions(describe_instructions="french")
    with pytest.raises(ValueError, match="the layout published has turns of its own"):
        RenderOptions(layout="published", template="plain")
