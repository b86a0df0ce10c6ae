"""The HTTP process's side of the engine's socket, with engine processes that end before there is an engine."""

import asyncio
import os
import sys
import tempfile

import pytest

from glimmer.errors import ConfigError
from glimmer.server.client import EngineClient, private_directory


@pytest.mark.parametrize(
    "program, told",
    [("raise SystemExit(3)", "exit code 3"), ("import os; os.kill(os.getpid(), 9)", "killed by signal 9")],
)
def test_an_engine_that_has_never_begun_is_not_started_again(program, told):
    """What ended the first start would end the next one."""

    async def life() -> EngineClient:
        client = EngineClient([sys.executable, "-c", program], restart=True)
        try:
            await client.start()
            await asyncio.wait_for(client.died.wait(), 20)
        finally:
            await client.close()
        return client

    client = asyncio.run(life())
    assert client.deaths == 1 and client.state == "dead" and told in client.problem.found
    assert not os.path.exists(client._path)


def test_places_for_sockets(tmp_path, monkeypatch):
    """A long place is not used, since a socket's path is short; none at all is refused."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 100)
    made = private_directory()
    os.rmdir(made)
    assert made.startswith("/tmp/")
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(ConfigError, match="No such file"):
        private_directory()
