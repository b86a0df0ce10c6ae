"""One server with the demo model for all tests that leave it as it is."""

import pytest
from servers import Server


@pytest.fixture(scope="session")
def server():
    """A server that nobody may stop or overload."""
    with Server() as started:
        yield started
