"""What every request passes: who may ask, errors as JSON, a line in the log."""

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

from pykv.serve.fields import ApiError
from pykv.serve.metrics import Metrics

log = logging.getLogger("pykv.serve")

_OPEN = ("/", "/chat.js", "/style.css", "/health")  # need no key
HEADER_BYTES = 32 << 10
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class App:
    """An application behind these checks.

    Args:
        app: answers what passes.
        metrics: counts answers.
        api_key: that requests must carry, if any.
        loopback: the server listens on this machine alone.
        origins: of other sites, whose pages may ask as well.
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
            except (ClientGone, asyncio.CancelledError):  # or one that stays when the server goes
                status = 499  # as nginx calls it
            except HTTPException as error:  # no such path, or method
                headers = dict(error.headers or {})
                message = f"{scope['method']} {scope['path']!r:.200}: {error.detail}, "
                if allowed := headers.get("Allow"):
                    message += f"expected {allowed}"
                else:
                    message += "expected an endpoint of GET /openapi.json"
                refused = ApiError(error.status_code, message, headers=headers)
                await self._refuse(refused, scope, receive, noted)
            except ApiError as error:
                await self._refuse(error, scope, receive, noted)
            except Exception as error:
                log.exception("a fault at %.100r", scope["path"])  # quoted: it may hold line ends
                if status:
                    raise  # the answer has begun, so the connection is closed
                fault = ApiError(500, f"a fault inside the server: {type(error).__name__}")
                await self._refuse(fault, scope, receive, noted)
        finally:
            self._metrics.responses[status] += 1
            self._log(scope, status, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        """Refuse what may not be asked.

        A page of another site can let its reader's browser ask a server on the same machine: such
        requests carry an Origin, or, after DNS rebinding, another Host.
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
            raise ApiError(403, f"origin is {origin!r:.80}, expected {expected}")
        if self._key is None:
            if self._loopback and _hostname(host) not in LOOPBACK:
                raise ApiError(403, f"host is {host!r:.80}, expected localhost, or an --api-key")
        elif scope["path"] not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            key = self._key.encode("utf-8", "surrogateescape")  # the bytes of the command line
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), key)
            if scheme.lower() != "bearer" or not is_right:
                advice = {"WWW-Authenticate": "Bearer"}
                message = "the API key is missing or wrong, expected Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers=advice)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        # m40-llm's endpoint has the message alone.
        plain = scope["path"] == "/generate"
        body: dict[str, Any] = {"error": str(error)} if plain else error.body()
        if error.status == 408:  # nobody waits for the rest of the body
            error.headers["Connection"] = "close"
        await JSONResponse(body, error.status, error.headers)(scope, receive, send)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        """One line, without any text of the request."""
        client = (scope.get("client") or ["-"])[0]
        facts = f"{client} {scope['method']} {scope['path']!r:.100} {status} {seconds:.3f} s"
        if (work := scope.get("pykv.work")) is not None:
            prompt = sum(choice.prompt_tokens for choice in work.choices)
            answers = sum(choice.answer_tokens for choice in work.choices)
            facts += f" {prompt}+{answers} tokens"
            self._metrics.e2e_request_latency.observe(seconds)
        log.info("%s", facts)


def _netloc(url: str) -> str | None:
    """Host and port of a URL; None: it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _hostname(netloc: str) -> str | None:
    """The host alone of a host and port; None: they are none."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None
