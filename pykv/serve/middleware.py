"""The outermost layer of the application: access checks, errors as JSON, the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pykv.errors import quoted
from pykv.serve.fields import ApiError
from pykv.serve.metrics import Metrics

log = logging.getLogger("pykv.serve")

_OPEN = ("/", "/chat.js", "/style.css", "/health")  # no key required
HEADER_BYTES = 32 << 10
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ClientGone(Exception):
    """The client closed the connection before the answer was complete."""


class Middleware:
    """Wraps an application in these.

    Args:
        app: the application.
        metrics: counts responses.
        api_key: required of requests, if given.
        loopback: whether the server listens on this machine alone.
        origins: other sites whose pages may send requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        api_key: str | None,
        loopback: bool,
        origins: Sequence[str] = (),
    ) -> None:
        self._app, self._metrics = app, metrics
        self._key, self._loopback, self._origins = api_key, loopback, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self  # then the router raises HTTPException for unknown paths
        began, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
                await self._app(scope, receive, noted)
            except (ClientGone, asyncio.CancelledError):  # the latter when the server ends first
                status = 499  # nginx's code
            except HTTPException as error:  # no such path, or method
                headers = dict(error.headers or {})
                message = f"{scope['method']} {quoted(scope['path'], 200)}: {error.detail}, "
                if allowed := headers.get("Allow"):
                    message += f"expected {allowed}"
                else:
                    message += "expected an endpoint of GET /openapi.json"
                refused = ApiError(error.status_code, message, headers=headers)
                await self._refuse(refused, scope, receive, noted)
            except ApiError as error:
                await self._refuse(error, scope, receive, noted)
            except Exception as error:
                log.exception("a fault at %.100r", scope["path"])  # quoted: it may have line ends
                if status:
                    raise  # the response has begun: close the connection
                fault = ApiError(500, f"a fault inside the server: {type(error).__name__}")
                await self._refuse(fault, scope, receive, noted)
        finally:
            self._metrics.responses[status] += 1
            self._log(scope, status, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        """Refuse requests without access.

        A page of another site can make a browser send requests to a server on the same machine.
        Such requests have a foreign Origin or, after DNS rebinding, a foreign Host.
        """
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(k) + len(v) for k, v in scope["headers"])
        if size > HEADER_BYTES:
            raise ApiError(431, f"path and headers take {size} bytes, expected {HEADER_BYTES}")
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and _netloc(origin) != host:
            expected = "this server's own, or one of --allow-origin"
            raise ApiError(403, f"origin is {quoted(origin)}, expected {expected}")
        if self._key is None:
            if self._loopback and _hostname(host) not in LOOPBACK:
                raise ApiError(403, f"host is {quoted(host)}, expected localhost, or an --api-key")
        elif scope["path"] not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = self._key.encode("utf-8", "surrogateescape")  # the bytes of the command line
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), key)
            if scheme.lower() != "bearer" or not is_right:
                advice = {"WWW-Authenticate": "Bearer"}
                message = "the API key is missing or wrong, expected Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers=advice)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        # m40-llm's endpoint sends the message alone.
        plain = scope["path"] == "/generate"
        body: dict[str, Any] = {"error": str(error)} if plain else error.body()
        if error.status == 408:  # the rest of the body is not read
            error.headers["Connection"] = "close"
        await JSONResponse(body, error.status, error.headers)(scope, receive, send)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        """Log one line, without any text of the request."""
        client = (scope.get("client") or ["-"])[0]
        facts = f"{client} {scope['method']} {quoted(scope['path'], 100)} {status} {seconds:.3f} s"
        if (work := scope.get("pykv.work")) is not None:
            prompt = sum(choice.prompt_tokens for choice in work.choices)
            answers = sum(choice.answer_tokens for choice in work.choices)
            facts += f" {prompt}+{answers} tokens"
            self._metrics.e2e_request_latency.observe(seconds)
        log.info("%s", facts)


def _netloc(url: str) -> str | None:
    """Host and port of a URL; None if it is invalid."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _hostname(netloc: str) -> str | None:
    """The host of "host:port"; None if that is invalid."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None
