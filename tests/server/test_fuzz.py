"""The HTTP surface, fuzzed from its own description: whatever comes, no request is answered by a failure of the server.

schemathesis reads /openapi.json and makes requests that follow it, requests that do not, and from those that follow it
a few fields of an otherwise good request. Not here: what an answer must hold, which the tests of each API say.
"""

import os

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, strategies
from schemathesis import GenerationMode

from glimmer.server.schema import BODIES

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))  # requests of each kind for a route with a body
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n")  # longer answers find no more faults
HELLO = [{"role": "user", "content": "hello"}]
GOOD = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"prompt": "hello", "max_tokens": 2},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5]},
    "/v1/messages": {"model": "any", "messages": HELLO, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "any", "messages": HELLO},
    "/v1/responses": {"model": "any", "input": "hello", "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"model": "any", "input": "hello"},
}


@pytest.fixture(scope="module")
def described(server):
    """The operations that the server says it has, by their paths."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return {operation.path: operation for operation in (found.ok() for found in schema.get_all_operations())}


def attack(operation, mode: GenerationMode, examples: int, good: dict | None = None) -> None:
    """Ask for as many examples as that. A status of 500 and more, but for "too much is waiting", is a bug."""

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), data=strategies.data())
    def run(case, data):
        if good is not None and isinstance(case.body, dict) and case.body:
            names = data.draw(strategies.lists(strategies.sampled_from(sorted(case.body)), max_size=3, unique=True))
            case.body = good | {name: case.body[name] for name in names}
        if isinstance(case.body, dict):
            for name in LIMITS:
                if isinstance(case.body.get(name), int) and case.body[name] > 3:
                    case.body[name] = 3
        response = case.call(timeout=30)
        assert response.status_code < 500 or response.status_code == 503, f"{case.as_curl_command()}\n{response.text}"

    run()


@pytest.mark.parametrize("path", [*BODIES])
def test_no_body_makes_the_server_fail(described, server, path):
    attack(described[path], GenerationMode.POSITIVE, EXAMPLES // 2)
    attack(described[path], GenerationMode.NEGATIVE, EXAMPLES)
    attack(described[path], GenerationMode.POSITIVE, EXAMPLES * 2, GOOD[path])
    assert server.health() == 200 and server.post(path, GOOD[path]).status_code == 200


def test_nothing_else_does(described, server):
    for path in described.keys() - BODIES.keys() - {"/metrics"}:
        attack(described[path], GenerationMode.POSITIVE, 5)
    assert server.health() == 200
