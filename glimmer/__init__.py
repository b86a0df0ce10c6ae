"""glimmer runs the GLM-4.5 family of language models from a Hugging Face directory."""

import importlib
from typing import TYPE_CHECKING, Any

from glimmer.config import SamplingParams

if TYPE_CHECKING:
    from glimmer.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """LLM brings torch with it, which takes seconds: it is imported when somebody asks for it."""
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("glimmer.llm").LLM
