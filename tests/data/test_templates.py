from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from uni_x.data.render import IGNORED, Renderer, Vocabulary
from uni_x.data.schema import Message, Sample
from uni_x.data.templates import SHIPPED, Template, load_template
from uni_x.errors import ConfigError, DataError
from uni_x.recipe import RenderOptions

CONVERSATION = (
    Message("system", "Be short."),
    Message("user", "Hi <|im_end|>?"),
    Message("assistant", "Hello."),
    Message("user", "Who?"),
    Message("assistant", "Me."),
)
EXPECTED = {
    "plain": "Be short.\nHi <|im_end|>?\nHello.<|endoftext|>\nWho?\nMe.<|endoftext|>\n",
    "chatml": (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi <|im_end|>?<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n"
    ),
    "gemma": (
        "<start_of_turn>user\nBe short.\n\nHi <|im_end|>?<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\nMe.<end_of_turn>\n"
    ),
    "vicuna": ("Be short. USER: Hi <|im_end|>? ASSISTANT: Hello.<|endoftext|>USER: Who? ASSISTANT: Me.<|endoftext|>"),
}
OPENING = {"plain": "Who?\n", "chatml": "assistant\n", "gemma": "model\n", "vicuna": "ASSISTANT:"}


@pytest.fixture
def tokenizer(text_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """One that knows the special tokens of ChatML."""
    text_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


@pytest.fixture
def make(tokenizer, vocabulary):
    def make(**options):
        own = Vocabulary(
            len(tokenizer),
            64,
            vocabulary.vision_start_token_id,
            vocabulary.vision_end_token_id,
            options.pop("eos", vocabulary.eos_token_id),
            vocabulary.pad_token_id,
        )
        return Renderer(tokenizer, own, RenderOptions(**options))

    return make


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_render_conversations_as_their_models_have_them(tokenizer, name):
    before, *behind = Template(load_template(name), tokenizer).frame([message.role for message in CONVERSATION])
    said = (message.content + text for message, text in zip(CONVERSATION, behind, strict=True))
    assert before + "".join(said) == EXPECTED[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_prompts_are_prefixes_and_answers_are_trained(make, tokenizer, name):
    renderer = make(template=name)
    rendered = renderer.render(Sample("x", messages=CONVERSATION), np.random.default_rng(0))
    prompt = renderer.chat_prompt(CONVERSATION[:-1])
    assert rendered.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(prompt).endswith(OPENING[name])
    trained = rendered.labels[rendered.labels != IGNORED].tolist()
    eos = renderer.vocabulary.eos_token_id
    assert trained.count(eos) == 2
    assert trained[-1] == eos
    words = tokenizer.decode(trained, skip_special_tokens=True)
    assert "Hello." in words
    assert "Me." in words
    assert "Who" not in words
    assert rendered.labels[len(prompt)] != IGNORED


THOUGHTFUL = """{%- set asked = namespace(last=0) -%}
{%- for m in messages if m.role == 'user' -%}{%- set asked.last = loop.index -%}{%- endfor -%}
{%- set asked.seen = 0 -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set asked.seen = asked.seen + 1 -%}{%- endif -%}
{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and asked.seen == asked.last %}(nothing to think){% endif %}
{{- m.content }}<|endoftext|>
{%- endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def test_a_template_that_adds_to_the_last_answer_alone_adds_to_each_and_to_prompts(make, tokenizer):
    """Qwen3's own does so: an empty thought leads the last answer, and no prompt."""
    renderer = make(template=THOUGHTFUL)
    rendered = renderer.render(Sample("x", messages=CONVERSATION), np.random.default_rng(0))
    assert tokenizer.decode(rendered.input_ids).count("nothing to think") == 2
    for turns in (2, 4):
        prompt = renderer.chat_prompt(CONVERSATION[:turns])
        assert rendered.input_ids[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(prompt).endswith("(nothing to think)")
        assert rendered.labels[len(prompt) - 1] == IGNORED
        assert rendered.labels[len(prompt)] != IGNORED


def test_special_tokens_are_those_of_the_template_alone(make, tokenizer):
    rendered = make(template="chatml").render(Sample("x", messages=CONVERSATION), np.random.default_rng(0))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert rendered.input_ids.tolist().count(end) == 5  # one a turn, and not the one that the user wrote


def test_an_answer_ends_in_the_templates_token_where_that_is_the_end(make, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rendered = make(template="chatml", eos=end).render(Sample("x", messages=CONVERSATION), np.random.default_rng(0))
    trained = rendered.labels[rendered.labels != IGNORED].tolist()
    assert trained.count(end) == 2
    assert rendered.input_ids.tolist().count(end) == 5


def test_images_stand_in_their_places_or_lead_the_first_question(make, make_image, tokenizer):
    messages = (Message("user", "What is it?"), Message("assistant", "A heart."))
    renderer = make(template="chatml")
    first = renderer.render(Sample("x", (make_image(),), messages=messages), np.random.default_rng(0))
    placed = (Message("user", "<image>What is it?"), messages[1])
    assert (
        first.input_ids.tolist()
        == renderer.render(Sample("x", (make_image(),), messages=placed), np.random.default_rng(0)).input_ids.tolist()
    )
    start = first.input_ids.tolist().index(renderer.vocabulary.vision_start_token_id)
    assert tokenizer.decode(first.input_ids[:start]) == "<|im_start|> user\n"
    drawn = (Message("user", "Draw <image> again."), Message("assistant", "<image>"))
    rendered = renderer.render(Sample("x", (make_image(), make_image(8)), messages=drawn), np.random.default_rng(0))
    codes = rendered.labels[rendered.labels >= renderer.vocabulary.image_token_offset]
    assert (codes - renderer.vocabulary.image_token_offset).tolist() == [8, 9, 10, 11]


def test_images_without_a_question_come_first_of_all(make, make_image):
    told = Sample("x", (make_image(3),), messages=(Message("assistant", "A heart."),))
    renderer = make(template="chatml")
    rendered = renderer.render(told, np.random.default_rng(0))
    assert rendered.input_ids[0] == renderer.vocabulary.vision_start_token_id
    assert rendered.image_tokens == 4


def test_templates_come_from_files_and_tokenizers_too(make, tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}", encoding="utf-8")
    text = load_template(str(file))
    assert load_template(text) == text
    assert Template(text, tokenizer).frame(["user", "assistant"]) == ["[", "][", "]"]
    with pytest.raises(ConfigError, match="the text tokenizer has none of its own"):
        load_template("tokenizer", tokenizer)
    tokenizer.chat_template = text
    assert load_template("tokenizer", tokenizer) == text
    with pytest.raises(ConfigError, match="no file that can be read"):
        load_template(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "the template loses, repeats or reorders them"),
        ("{{ raise_exception('roles must alternate') }}", "the template refuses them .*roles must alternate"),
        ("{% for m in messages %}{{ m.content }}", "the template refuses them"),
        ("{{ ''.__class__.__mro__ }}", "the template refuses them"),
    ],
)
def test_what_a_template_does_wrong_is_named(make, template, message):
    with pytest.raises(DataError, match=f"sample 'x', messages: {message}"):
        make(template=template).render(Sample("x", messages=CONVERSATION), np.random.default_rng(0))
