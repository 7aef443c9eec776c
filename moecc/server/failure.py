"""Errors as the server answers them: OpenAI's form, the right status and headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from moecc.errors import BusyError, MoeccError, RequestError, StoppedError
from moecc.runtime.request import Finish

STOPPED_RETRY_AFTER = 5
INVALID = "invalid_request_error"
_BROKEN = "server_error"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error answer: an HTTP status, OpenAI's error fields and headers of its own."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def document(self) -> dict[str, Any]:
        fields = {"message": self.message, "type": self.type}
        return {"error": {**fields, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.document(), self.status, dict(self.headers))


class FailureError(Exception):
    """Ends the handling of a request with a Failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def unavailable(message: str) -> Failure:
    """The server cannot answer now; later it may."""
    retry = (("Retry-After", str(STOPPED_RETRY_AFTER)),)
    return Failure(503, message, "unavailable_error", headers=retry)


def internal() -> Failure:
    """A bug; what it was goes to the log, not to the client."""
    return Failure(500, "internal error", _BROKEN)


def of_error(error: MoeccError) -> Failure:
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, RequestError):
        status = 404 if error.code == "model_not_found" else 400
        return Failure(status, message, param=error.param, code=error.code)
    if isinstance(error, BusyError):
        retry = (("Retry-After", str(error.retry_after)),)
        return Failure(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=retry)
    if isinstance(error, StoppedError):
        return unavailable(message)
    return Failure(500, message, _BROKEN)


def of_finish(finish: Finish) -> Failure | None:
    """Why a request that has ended has no answer; None if it has one."""
    if finish.reason == "timeout":
        # The same request would most likely time out again.
        headers = (("x-should-retry", "false"),)
        message = "the request ran into its timeout"
        return Failure(408, message, "timeout_error", "timeout", "timeout", headers)
    if finish.reason == "error":
        return Failure(500, finish.error or "the engine failed", _BROKEN)
    return None
