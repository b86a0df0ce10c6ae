"""`glimmer serve`: answers over HTTP. This file reads the settings and starts the two kinds of process.

    glimmer serve MODEL                    this process speaks HTTP; it starts the engine process, or one for each rank
    torchrun ... -m glimmer serve MODEL    each process is a rank of the engine; rank 0 starts the one that speaks HTTP

Not here: what the processes do (server/).
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glimmer.cli import demo, exits
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, SERVER, Command, Foreign, Option, truth, without
from glimmer.config import EngineConfig
from glimmer.errors import EngineError
from glimmer.hub import download, model_directory
from glimmer.model_config import ModelConfig
from glimmer.server.settings import ServerConfig
from glimmer.server.socket_directory import SocketDirectory

if TYPE_CHECKING:
    from glimmer import parallel
    from glimmer.server import engine_process, http_process
else:
    parallel, http_process = lazy("glimmer.parallel"), lazy("glimmer.server.http_process")
    engine_process = lazy("glimmer.server.engine_process")

ENDING = (signal.SIGTERM, signal.SIGINT)
LAST_WORDS = 10.0  # seconds that the HTTP process may take to end after the engine

ENGINE_OPTIONS = without(ENGINE, "skip_tokenizer_init")
# Of vLLM, SGLang and llama-server: what is found out here, what is always so, and what changes nothing.
NOT_NEEDED = Foreign(
    ignored=(
        "reasoning_parser", "tool_call_parser", "tool_parser_plugin", "reasoning_format", "tokenizer_mode",
        "chat_template_content_format", "uvicorn_log_level", "log_level", "generation_config", "load_format",
    ),
    switches=(
        "enable_auto_tool_choice", "enable_reasoning", "jinja", "no_jinja", "enable_prompt_tokens_details", "metrics",
        "enable_metrics", "no_webui", "disable_log_requests", "no_enable_log_requests", "disable_log_stats",
        "disable_uvicorn_access_log", "trust_remote_code", "enforce_eager", "enable_chunked_prefill",
        "disable_cuda_graph", "cont_batching", "no_mmap", "mlock",
    ),
)  # fmt: skip
COMMAND = Command(
    "serve",
    "Serves a model of the GLM-4.5 family over HTTP: OpenAI's API and others, and a page to talk to.\n"
    "MODEL is a directory, or a Hub id in the local cache of Hugging Face or ModelScope.",
    "[MODEL] [options]",
    {
        "server": SERVER | {"download": Option(truth, "", "download MODEL from Hugging Face if it is not here")},
        "engine": ENGINE_OPTIONS,
    },
    positional=("model",),
    foreign=NOT_NEEDED,
    notes=(
        "",
        "Flags of vLLM, SGLang and llama-server that name a parser or a template are accepted and not needed.",
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
    find = download if settings.take("download") else model_directory
    model = find(named) if named else demo.default_model(COMMAND.name)
    ModelConfig.load(model)  # what is no model, or another family's, is refused before processes are started
    engine = given | {"model": str(model)}
    settings.check(EngineConfig, engine)
    server = settings.fields(SERVER)
    server.setdefault("served_model_name", [named or "glimmer-demo"])
    config = settings.check(ServerConfig, server)
    if exits.alone():
        return http_process.run(config, engine["model"], command_for(engine))
    return rank(config, engine)


def command_for(engine: dict[str, Any]) -> list[str]:
    """The command that starts the engine process; where several share the model, the launcher that starts them."""
    words = ["-m", "glimmer.server.engine_process", "{socket}", json.dumps(engine)]
    ranks = engine.get("tensor_parallel_size", 1)
    if ranks == 1:
        return [sys.executable, *words]
    port, logs, show_all, seconds = "0", "{socket}-logs", "False", "300"
    job = shlex.join(["python", *words])
    return [sys.executable, "-m", "glimmer.mindformers", job, str(ranks), port, logs, show_all, seconds]


def rank(config: ServerConfig, engine: dict[str, Any]) -> int:
    """This process is one of several that torchrun has started: it computes; rank 0 starts the one that speaks HTTP.

    torchrun's SIGTERM or SIGINT is for the HTTP process, which ends the engine when the answers are done. Where that
    process ends before it wants an engine, because it refuses its settings, so does this one, with the same exit code.
    """
    number, size = parallel.world()
    engine = {"tensor_parallel_size": size} | engine
    if number > 0:
        return engine_process.follow(engine, _leave_signals_to_rank_0)
    directory = SocketDirectory()
    try:
        path = f"{directory.path}/engine.sock"
        words = [sys.executable, "-m", "glimmer.server.http_process", path]
        http = subprocess.Popen(words, stdin=subprocess.PIPE, text=True, start_new_session=True)
        told = False

        def tell(signal_number: int, _: object) -> None:
            """It ends in order what it has begun: nothing, as long as its socket is not there."""
            nonlocal told
            told = True
            http.send_signal(signal_number) if os.path.exists(path) else http.kill()

        for ending in ENDING:
            signal.signal(ending, tell)
        try:
            assert http.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already
                http.stdin.write(json.dumps({"server": asdict(config), "model": engine["model"]}) + "\n")
                http.stdin.flush()  # it stays open: its end tells that this process has ended
            answer = engine_process.serve  # imported while the other process begins
            while http.poll() is None and not os.path.exists(path):
                time.sleep(0.05)
            code = answer(path, engine) if http.poll() is None else 0
            how = http.wait(LAST_WORDS)
            if how < 0:  # ended by a signal
                how = 0 if told else EngineError.exit_code
            return how or code
        except subprocess.TimeoutExpired:
            return EngineError.exit_code
        finally:
            http.kill()
            http.wait()
    finally:
        directory.close()


def _leave_signals_to_rank_0() -> None:
    """This rank ends when rank 0 says so, whose HTTP process still has answers to give."""
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)
