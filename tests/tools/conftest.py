"""What the tests of tools/ share. The scripts there import their neighbours by bare names, as when they are run."""

from pathlib import Path

import pytest
from checkpoints import DEMO


@pytest.fixture(scope="session")
def demo() -> Path:
    """The checkpoint that comes with the package."""
    return DEMO
