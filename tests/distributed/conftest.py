from tests.data.conftest import encoded_folder, image_tokenizer, make_image, samples

__all__ = ["encoded_folder", "image_tokenizer", "make_image", "samples"]
