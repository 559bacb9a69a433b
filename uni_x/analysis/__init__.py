"""Measurements and pictures of models: what goes on inside them, and how their training went."""
