"""Write the API reference as HTML from the docstrings of the public modules: python docs/api.py DIRECTORY.

`make docs` calls it. Only names without a leading underscore are shown. Not here: the guides, which are docs/*.md.
"""

import sys
from pathlib import Path

import pdoc

import glimmer

MODULES = (
    "glimmer",
    "glimmer.config",
    "glimmer.llm",
    "glimmer.errors",
    "glimmer.backends.base",
    "glimmer.checkpoint.formats.base",
    "glimmer.group",
    "glimmer.parallel",
    "glimmer.text.parse",
    "glimmer.text.answers",
)


def main(directory: str) -> None:
    """Write one page for each module, and a search index."""
    glimmer.LLM = glimmer.LLM  # the package imports it when it is first asked for; pdoc reads the module's dictionary
    pdoc.render.configure(docformat="markdown", footer_text=f"glimmer {glimmer.__version__}")
    pdoc.pdoc(*MODULES, output_directory=Path(directory))


if __name__ == "__main__":
    main(sys.argv[1])
