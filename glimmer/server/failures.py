"""What an error is in HTTP: its status, its kind and its field, in the shape of the API that was asked.

An API's own shape is registered by the beginning of its paths (SHAPES); all other paths have OpenAI's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glimmer.errors import CheckpointError, GlimmerError, RequestError
from glimmer.server.client import Unavailable
from glimmer.server.service import ContextError


@dataclass(frozen=True)
class Failure:
    """A request that is not answered. kind and code are OpenAI's words; param: the field at fault."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class Refusal(Exception):
    """A failure that is no GlimmerError: of the way that something is asked, and not of what is asked."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


def failure_of(error: BaseException) -> Failure:
    """What to say about an exception."""
    if isinstance(error, Refusal):
        return error.failure
    if not isinstance(error, GlimmerError):
        return Failure(
            500, "the server has failed; what went wrong is in its log", "server_error", code="internal_error"
        )
    message = f"{error.found}. Expected: {error.expected}. To do: {error.todo}."
    if isinstance(error, ContextError):
        return Failure(400, message, param=error.field, code="context_length_exceeded")
    if isinstance(error, RequestError):
        return Failure(400, message, param=error.field, code="invalid_value")
    if isinstance(error, CheckpointError):
        return Failure(400, message, code="chat_not_served")
    if isinstance(error, Unavailable):
        return Failure(503, message, "service_unavailable_error", code="unavailable", retry_after=error.retry_after)
    return Failure(500, message, "server_error", code="engine_error")


def openai_shape(failure: Failure) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}"""
    return {"error": {"message": failure.message, "type": failure.kind, "param": failure.param, "code": failure.code}}


Shape = Callable[[Failure], dict[str, Any]]
SHAPES: dict[str, Shape] = {}


def shape_for(path: str) -> Shape:
    """The shape of errors at a path."""
    return next((shape for prefix, shape in SHAPES.items() if path.startswith(prefix)), openai_shape)
