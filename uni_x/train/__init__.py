"""Training: a recipe, the Trainer of transformers, and what happens around a step."""
