"""Uni-X: unified multimodal language models that write, look and draw."""
