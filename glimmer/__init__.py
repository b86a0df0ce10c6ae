"""glimmer runs the GLM-4.5 family of language models from a Hugging Face directory."""

TYPE_CHECKING = False  # typing's, which takes milliseconds to import: Ctrl-C in them would not be ours to answer
if TYPE_CHECKING:
    from glimmer.config import SamplingParams
    from glimmer.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """LLM brings torch with it, which takes seconds: names are imported when somebody asks for them."""
    import importlib

    modules = {"LLM": "glimmer.llm", "SamplingParams": "glimmer.config"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)
