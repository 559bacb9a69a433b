"""Draws from an explicit `numpy.random.Generator`, fast enough for a hundred thousand small scenes."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, all alike."""
    return items[int(rng.integers(len(items)))]


def pick_weighted(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """One of the keys by its weight; the weights need no sum of 1."""
    left = rng.random() * sum(weights.values())
    for item, weight in weights.items():
        left -= weight
        if left < 0:
            return item
    return item


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """All the items in a random order."""
    return [items[place] for place in rng.permutation(len(items)).tolist()]
