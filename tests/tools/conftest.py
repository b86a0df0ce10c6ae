"""The scripts under tools/ import their neighbours by bare names, as they do when they are run."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "demo_model"))


@pytest.fixture(scope="session")
def demo() -> Path:
    """The checkpoint that comes with the package."""
    return ROOT / "glimmer" / "demo"
