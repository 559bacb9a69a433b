"""Evaluation: one module or folder a benchmark family. Scorers are pure functions of what a model gave."""
