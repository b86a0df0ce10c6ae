"""The HTTP process's side of the engine's socket, with engine processes that end before there is an engine."""

import asyncio
import os
import sys

import pytest

from glimmer.server.client import EngineClient


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
