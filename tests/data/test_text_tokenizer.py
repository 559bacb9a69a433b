import pytest
from transformers import AutoTokenizer

from uni_x.data.text_tokenizer import train_text_tokenizer
from uni_x.errors import ConfigError

ODD_TEXTS = [
    "",
    " ",
    "\n",
    " \n",
    "\n\n x",
    " heart",
    "  heart",
    "heart ",
    "tab\there",
    "é漢字🙂\x00\r\n",
    "▁ Ġ a",
    "<unconditional>",
]


def tokenize(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, split_special_tokens=True)["input_ids"])


def test_common_words_are_single_tokens_wherever_they_stand(text_tokenizer):
    assert tokenize(text_tokenizer, "heart") == ["Ġheart"]
    assert tokenize(text_tokenizer, "a red heart") == ["Ġa", "Ġred", "Ġheart"]
    assert tokenize(text_tokenizer, "\n") == ["Ċ"]


@pytest.mark.parametrize("text", [*ODD_TEXTS, "<|endoftext|>", "a <|vision_start|>b"])
def test_every_text_comes_back(text_tokenizer, text):
    ids = text_tokenizer(text, split_special_tokens=True)["input_ids"]
    assert text_tokenizer.decode(ids) == text


def test_special_tokens(text_tokenizer):
    assert text_tokenizer.eos_token == text_tokenizer.pad_token == "<|endoftext|>"
    assert text_tokenizer("<|vision_start|><|vision_end|>")["input_ids"] == text_tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>"]
    )


def test_the_same_texts_give_the_same_tokenizer(text_tokenizer):
    texts = ["a red heart", "two hearts", "a red car", "stars"] * 3
    first, second = (train_text_tokenizer(iter(texts), 300).get_vocab() for _ in range(2))
    assert first == second
    assert len(first) <= 300


def test_it_is_saved_and_loaded(text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == text_tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (text_tokenizer.eos_token_id, text_tokenizer.pad_token_id)
    for text in ["a red heart\nIs there one?", *ODD_TEXTS]:
        assert loaded(text)["input_ids"] == text_tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size: 200 is too small"):
        train_text_tokenizer(["a"], 200)
