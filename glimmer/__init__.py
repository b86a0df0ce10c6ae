"""glimmer runs the GLM-4.5 family of language models from a Hugging Face directory."""

from glimmer.config import SamplingParams
from glimmer.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"
