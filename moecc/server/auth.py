"""The API key: whoever does not know it gets no further than the public routes."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from moecc.server.failure import Failure

GUARDED = ("/v1", "/tokenize", "/detokenize", "/api")

_REFUSED = Failure(
    401,
    "the API key is missing or wrong (send `Authorization: Bearer KEY`)",
    code="invalid_api_key",
    headers=(("WWW-Authenticate", "Bearer"),),
)


class ApiKey:
    """ASGI middleware that wants `Authorization: Bearer KEY` below the guarded paths."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(GUARDED)
        app = self._app if not guarded or self._knows_key(scope) else _REFUSED.response()
        await app(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        # Digests have one length, so the time tells nothing about the key's.
        same = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
        return scheme.lower() == b"bearer" and same
