"""Text tokenizers: one that is trained on the texts that a small model will see, and those of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from uni_x.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, VISION_START, VISION_END)
_BYTES = 256


def check_vocab_size(vocab_size: int) -> None:
    """Raises `ConfigError` for a vocabulary that cannot hold the bytes and the special tokens."""
    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size: {vocab_size} is too small, bytes and special tokens alone are {smallest}")


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most `vocab_size` tokens; a small corpus may need fewer.

    A text gets a space in front, which decoding takes off again, so that its first word has the token that it has
    elsewhere; a line break stays bare, so that it is one token. Every text comes back exactly. `<|endoftext|>` ends
    and pads, `<|vision_start|>` and `<|vision_end|>` enclose images. The same texts give the same tokenizer.

    Raises `ConfigError` where `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A \n"), "\n")])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[VISION_START, VISION_END],
        clean_up_tokenization_spaces=False,
    )


def load_text_tokenizer(folder: str | Path, named: str) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a folder; `named` is the option or key that names it, for errors.

    Raises `DataError` for a folder that is none.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{named}: {folder} is not a folder")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library tokenizers raises nothing narrower
        raise DataError(f"{named}: {folder}: {one_line(error, 200)}") from None


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """The ids of texts, with nothing put around them; special tokens spelled in them are such only where `special`."""
    encoded: Any = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not special,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Ids of the tokenizer's special tokens under the names that a model's configuration has for them."""
    markers: Any = tokenizer.convert_tokens_to_ids([VISION_START, VISION_END])
    return {
        "vision_start_token_id": markers[0],
        "vision_end_token_id": markers[1],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def settle_special_tokens(tokenizer: PreTrainedTokenizerBase, *others: str) -> int:
    """Gives a pretrained tokenizer the image markers and `others` where it lacks them, and something to pad with.

    Returns how many tokens were added. Raises `ConfigError` for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the text tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = tokenizer.get_vocab()
    lacking = [marker for marker in (VISION_START, VISION_END, *others) if marker not in known]
    return tokenizer.add_tokens(lacking, special_tokens=True) if lacking else 0
