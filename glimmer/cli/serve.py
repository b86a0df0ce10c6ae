"""`glimmer serve`: answers over HTTP. This file reads the settings and starts the two kinds of process.

    glimmer serve MODEL                    this process speaks HTTP; it starts the engine process, or one for each rank
    torchrun ... -m glimmer serve MODEL    each process is a rank of the engine; rank 0 starts the one that speaks HTTP

Not here: what the processes do (server/).
"""

import json
import logging
import shlex
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from glimmer.cli import demo
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, SERVER, Command, without
from glimmer.config import EngineConfig
from glimmer.hub import model_directory
from glimmer.server.settings import ServerConfig

if TYPE_CHECKING:
    from glimmer import parallel
    from glimmer.server import http_process
else:
    parallel, http_process = lazy("glimmer.parallel"), lazy("glimmer.server.http_process")

ENGINE_OPTIONS = without(ENGINE, "skip_tokenizer_init")
COMMAND = Command(
    "serve",
    "Serves a model of the GLM-4.5 family over HTTP: OpenAI's API and others, and a page to talk to.",
    "[MODEL] [options]",
    {"server": SERVER, "engine": ENGINE_OPTIONS},
    positional=("model",),
    notes=(
        "",
        "examples",
        "  glimmer serve DIR",
        "  glimmer serve DIR --host 0.0.0.0 --port 8080 --api-key @keys.txt",
        "  glimmer serve DIR --tensor-parallel-size 2",
    ),
)


def main(argv: list[str]) -> int:
    """Serve until told to end; returns the exit code: 0 told, 1 the engine failed, 2 bad input."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    logging.basicConfig(format="glimmer serve: %(message)s", level=logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # clients that leave are no news
    given = settings.fields(ENGINE_OPTIONS)
    named = given.get("model")
    engine = given | {"model": str(model_directory(named or demo.default_model(COMMAND.name)))}
    settings.check(EngineConfig, engine)
    server = settings.fields(SERVER)
    server.setdefault("served_model_name", [named or "glimmer-demo"])
    config = settings.check(ServerConfig, server)
    return http_process.run(config, engine["model"], command_for(engine))


def command_for(engine: dict[str, Any]) -> list[str]:
    """The command that starts the engine process; where several share the model, the launcher that starts them."""
    words = ["-m", "glimmer.server.engine_process", "{socket}", json.dumps(engine)]
    ranks = engine.get("tensor_parallel_size", 1)
    if ranks == 1:
        return [sys.executable, *words]
    logs = tempfile.mkdtemp(prefix="glimmer-logs-")
    job = shlex.join(["python", *words])
    return [sys.executable, "-m", "glimmer.mindformers.launch", job, str(ranks), "0", logs, "False", "300"]
