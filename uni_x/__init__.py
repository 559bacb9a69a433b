"""Uni-X: unified multimodal language models that write, look and draw.

Public names load what they need on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uni_x.data.schema import Sample
    from uni_x.generation.engine import Engine
    from uni_x.generation.pipeline import UniXPipeline
    from uni_x.images import ImageTokenizer
    from uni_x.model import UniXConfig, UniXForCausalLM

_PLACES = {
    "Engine": "uni_x.generation.engine",
    "ImageTokenizer": "uni_x.images",
    "Sample": "uni_x.data.schema",
    "UniXConfig": "uni_x.model",
    "UniXForCausalLM": "uni_x.model",
    "UniXPipeline": "uni_x.generation.pipeline",
}

__all__ = ["Engine", "ImageTokenizer", "Sample", "UniXConfig", "UniXForCausalLM", "UniXPipeline"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'uni_x' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
