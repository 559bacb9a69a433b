"""Texts of a file into another language, by a model behind an OpenAI-compatible endpoint."""
