"""A checkpoint's text files, written once: GLM's added tokens over bytes and 2,000 pairs of bytes."""

import pytest
import tokenizers
from checkpoints import write_tokenizer

from glimmer.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(directory, vocab_extra=2000)
    return directory


@pytest.fixture(scope="session")
def tokenizer(directory):
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def library(directory):
    """The same file as the `tokenizers` library reads it: the judge of our decoding."""
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
