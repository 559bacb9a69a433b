"""Image tokenizers: pictures to codes and back, and their training.

Knows nothing of text, models or datasets: it works on pictures that the caller brings.
"""

from uni_x.images.folder import PictureFolder
from uni_x.images.quality import peak_signal_to_noise, structural_similarity
from uni_x.images.tokenizer import ImageTokenizer, load_image_tokenizer, scenes_tokenizer_folder
from uni_x.images.training import TokenizerResult, train_tokenizer

__all__ = [
    "ImageTokenizer",
    "PictureFolder",
    "TokenizerResult",
    "load_image_tokenizer",
    "peak_signal_to_noise",
    "scenes_tokenizer_folder",
    "structural_similarity",
    "train_tokenizer",
]
