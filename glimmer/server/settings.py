"""ServerConfig: the settings of `glimmer serve` beside those of the engine. Not here: their flags (cli/options.py)."""

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glimmer.errors import ConfigError, shown
from glimmer.foreign import read_text

MAX_KEYS = 1 << 20  # bytes of a file of keys


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, whom it answers, and how much it takes on.

    host, port            the address; uds: a unix socket in their place
    api_key               keys of which a request must carry one; @FILE: the lines of a file
    served_model_name     the names of the model in answers and in /v1/models
    root_path             the prefix under which a proxy serves the server
    ssl_certfile, ssl_keyfile   for HTTPS
    allowed_origins       web pages of other servers that may ask; none unless said
    max_queue_requests    requests that may wait for their first token; further ones get 503
    max_queue_tokens      tokens of their prompts together
    max_body_bytes        the longest body of a request
    max_answers           the largest n of a request
    max_logprobs          the largest number of log-probabilities for a token
    max_stored_bytes      responses that are kept for previous_response_id, together; 0 keeps none
    keep_alive            seconds of silence after which a stream gets a comment
    stalled_client        seconds after which a client that reads nothing is given up
    shutdown_timeout      seconds that SIGTERM leaves to what is being answered
    on_engine_death       "restart" the engine, or "exit", when its process dies
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: Sequence[str] | None = None
    served_model_name: Sequence[str] | None = None
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    allowed_origins: Sequence[str] | None = None
    max_queue_requests: int = 1024
    max_queue_tokens: int = 16_000_000
    max_body_bytes: int = 32 << 20
    max_answers: int = 128
    max_logprobs: int = 20
    max_stored_bytes: int = 64 << 20
    keep_alive: float = 10.0
    stalled_client: float = 120.0
    shutdown_timeout: float = 30.0
    on_engine_death: str = "restart"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_queue_requests", 1, 2**31 - 1),
            ("max_queue_tokens", 1, 2**31 - 1),
            ("max_body_bytes", 1024, 2**31 - 1),
            ("max_answers", 1, 4096),
            ("max_logprobs", 0, 1000),
            ("max_stored_bytes", 0, 2**63 - 1),
            ("keep_alive", 0.1, 1e6),
            ("stalled_client", 0.1, 1e6),
            ("shutdown_timeout", 0, 1e6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={shown(value)}", f"a number from {low:g} to {high:g}", f"change {name}")
        if self.on_engine_death not in ("restart", "exit"):
            found = f"on_engine_death={shown(self.on_engine_death)}"
            raise ConfigError(found, "'restart' or 'exit'", "choose one of these")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile without ssl_keyfile, or the reverse", "both or none", "give both")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path={shown(self.root_path)}", "a path that begins with /", "correct it")

    @property
    def prefix(self) -> str:
        """root_path without a slash at its end."""
        return self.root_path.rstrip("/")


class Keys:
    """The keys that open the server, as digests: a comparison takes the same time whatever a client sends."""

    def __init__(self, given: Sequence[str]):
        """Raises ConfigError for a file that cannot be read or holds no key."""
        keys: list[str] = []
        for one in given:
            keys += _keys_in(Path(os.path.expanduser(one[1:]))) if one.startswith("@") else [one]
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open_with(self, key: str) -> bool:
        """Whether this is one of the keys."""
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # all of them, always


def _keys_in(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(file, MAX_KEYS, ConfigError).splitlines()]
    except FileNotFoundError:
        lines = []
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(
            f"no key in {file} (api_key)", "a file with a key on each line", "correct the path or the file"
        )
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
