"""The endpoints, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import resources
from typing import Any, NamedTuple, TypeVar

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from pykv.errors import quoted
from pykv.llm.language import Language
from pykv.number_texts import whole_of
from pykv.serve import metrics, replies
from pykv.serve.desk import Desk, Link, Work
from pykv.serve.fields import ApiError, parse
from pykv.serve.middleware import ClientGone, Middleware
from pykv.serve.openapi import describe
from pykv.serve.protocol import Asked, Protocol
from pykv.serve.replies import Reply

_T = TypeVar("_T")

BODY_BYTES = 8 << 20  # of a request; a context of a million tokens fits
SHORT_BYTES = 4 << 10  # of a body: hundreds of tokens, parsed and tokenized within milliseconds
BODY_SECONDS = 30.0  # within which a body must arrive
END_SECONDS = 10.0  # for the step under way when the server ends
_PAGE = {"/": ("index.html", "text/html"), "/chat.js": ("chat.js", "text/javascript")}
_PAGE |= {"/style.css": ("style.css", "text/css")}
_CSP = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
_CSP += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Server(NamedTuple):
    """State that the endpoints share."""

    language: Language
    desk: Desk
    protocol: Protocol
    created: int

    @property
    def model(self) -> str:
        """The model's name in responses."""
        return self.protocol.names[0]


def make_server(language: Language, link: Link, names: list[str], *, limit: int) -> Server:
    """A server that is not started yet.

    Args:
        language: of the model.
        link: to the model's engine.
        names: of the model in requests; the first is its name in responses.
        limit: sequences that may run or wait.
    """
    desk = Desk(link, limit=limit)
    return Server(language, desk, Protocol(language, names), int(time.time()))


def create_app(
    server: Server,
    *,
    api_key: str | None = None,
    loopback: bool = True,
    origins: Sequence[str] = (),
) -> ASGIApp:
    """The ASGI application.

    Args:
        server: the server.
        api_key: required of requests, if given.
        loopback: whether the server listens on this machine alone; then foreign Hosts are refused.
        origins: other sites whose pages may send requests.
    """

    @asynccontextmanager
    async def lifespan(_: Router) -> AsyncIterator[None]:
        server.desk.start()
        try:
            yield
        finally:
            server.desk.stop()
            await server.desk.wait(END_SECONDS)

    posts = {
        "/v1/chat/completions": chat,
        "/v1/completions": completions,
        "/generate": generate,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    gets: dict[str, Callable[..., Any]] = {
        "/health": health,
        "/metrics": read_metrics,
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/openapi.json": partial(openapi, has_key=api_key is not None),
    }
    routes = [Route(path, partial(call, server), methods=["POST"]) for path, call in posts.items()]
    routes += [Route(path, partial(call, server), methods=["GET"]) for path, call in gets.items()]
    routes += [Route(path, partial(page, *file), methods=["GET"]) for path, file in _PAGE.items()]
    router = Router(routes, lifespan=lifespan, redirect_slashes=False)
    app = Middleware(
        router, server.desk.metrics, api_key=api_key, loopback=loopback, origins=origins
    )
    if not origins:
        return app
    ways: dict[str, Any] = dict(allow_methods=("GET", "POST"), allow_headers=("*",))
    ways["allow_private_network"] = True  # an origin may be a site on the internet
    return CORSMiddleware(app, allow_origins=origins, **ways)


# --- Answers ---


async def chat(server: Server, request: Request) -> Response:
    return await _complete(server, request, server.protocol.chat, chat=True)


async def completions(server: Server, request: Request) -> Response:
    return await _complete(server, request, server.protocol.completions, chat=False)


async def _complete(
    server: Server, request: Request, read: Callable[[dict[str, Any]], Asked], *, chat: bool
) -> Response:
    asked, work = await _begin(server, request, read)
    reply = Reply(asked, work, server.model, server.language.tokenizer, chat=chat)
    if not asked.stream:
        return await _whole(server, request, work, reply.body())

    async def events() -> AsyncIterator[bytes]:
        async for chunk in reply.chunks():
            yield replies.event(chunk)
        yield replies.DONE

    def failed(error: ApiError) -> bytes:
        return replies.event(json.dumps(error.body())) + replies.DONE

    return Stream(server, work, events(), failed, "text/event-stream")


async def generate(server: Server, request: Request) -> Response:
    """m40-llm's endpoint: each line has the text so far, and the new part."""
    asked, work = await _begin(server, request, server.protocol.generate)

    async def lines() -> AsyncIterator[dict[str, Any]]:
        output = ""
        async for _, delta in work.deltas():
            output += delta.text
            done = bool(delta.finish_reason)
            yield {"output": output, "delta": delta.text, "done": done}

    async def whole() -> Response:
        return JSONResponse({"output": [line async for line in lines()][-1]["output"]})

    if not asked.stream:
        return await _whole(server, request, work, whole())

    async def encoded() -> AsyncIterator[bytes]:
        async for line in lines():
            yield json.dumps(line).encode() + b"\n"

    def failed(error: ApiError) -> bytes:
        return json.dumps({"error": str(error)}).encode() + b"\n"

    return Stream(server, work, encoded(), failed, "application/jsonl")


async def _begin(
    server: Server, request: Request, read: Callable[[dict[str, Any]], Asked]
) -> tuple[Asked, Work]:
    """Read a body and submit its sequences."""
    asked = await _read(request, read)
    work = Work(asked.orders, asked.rule)
    server.desk.submit(work)
    request.scope["pykv.work"] = work  # for the log and metrics; refused requests have none
    return asked, work


async def _whole(
    server: Server, request: Request, work: Work, body: Coroutine[Any, Any, Response]
) -> Response:
    try:
        return await _unless_gone(request.receive, body)
    finally:
        server.desk.abort(work)


class Stream(Response):
    """A streamed response; ends its sequences when the client disconnects."""

    def __init__(
        self,
        server: Server,
        work: Work,
        parts: AsyncIterator[bytes],
        failed: Callable[[ApiError], bytes],
        media_type: str,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._desk, self._work, self._parts, self._failed = server.desk, work, parts, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}

        async def send_part(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def send_all() -> None:
            await send(start)
            try:
                async for part in self._parts:
                    await send_part(part)
            except ApiError as error:
                await send_part(self._failed(error))
            await send_part(b"", False)

        try:
            await _unless_gone(receive, send_all())
        finally:
            self._desk.abort(self._work)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        ClientGone: the client disconnected first.
    """

    task = asyncio.create_task(work)

    async def gone() -> bool:
        """Wait for the end of the connection. Returns whether `work` was unfinished."""
        while (await receive())["type"] != "http.disconnect":
            pass
        return not task.done()

    gone_task = asyncio.create_task(gone())
    tasks: list[asyncio.Task[Any]] = [task, gone_task]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if gone_task.done() and gone_task.result():
            raise ClientGone
        return task.result()
    finally:
        for each in tasks:
            each.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _read(request: Request, read: Callable[[dict[str, Any]], _T]) -> _T:
    """Parse a body, a long one in a thread, as that takes long. A thread gets the GIL only when the
    event loop waits or has had its turn, which a short body would wait for longer than it takes."""
    data = await _body(request)

    def made() -> _T:
        try:
            return read(parse(data))
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None

    return made() if len(data) <= SHORT_BYTES else await asyncio.to_thread(made)


async def _body(request: Request) -> bytes:
    """The bytes of a body.

    Raises:
        ApiError: it is too large, encoded, or late.
        ClientGone: the client disconnected before its end.
    """
    too_large = ApiError(413, f"the body is larger than {BODY_BYTES} bytes", code="too_large")
    if whole_of(request.headers.get("content-length", "0"), most=BODY_BYTES) is None:
        raise too_large
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() not in ("", "identity"):
        message = f"Content-Encoding is {quoted(coding)}, expected a body as it is"
        raise ApiError(415, message, headers={"Accept-Encoding": "identity"})
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body took more than {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(data)


# --- Facts ---


async def tokenize(server: Server, request: Request) -> Response:
    ids = await _read(request, server.protocol.tokenize)
    facts = {"tokens": ids, "count": len(ids), "max_model_len": server.language.context}
    return JSONResponse(facts)


async def detokenize(server: Server, request: Request) -> Response:
    text = await _read(request, server.protocol.detokenize)
    return JSONResponse({"prompt": text})


async def health(server: Server, _: Request) -> Response:
    if not server.desk.is_alive:
        raise server.desk.refusal()
    return JSONResponse({"status": "ok"})


async def read_metrics(server: Server, _: Request) -> Response:
    desk = server.desk
    text = desk.metrics.text(server.model, desk.state, running=desk.running)
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})


async def models(server: Server, _: Request) -> Response:
    data = [_model(server, name) for name in server.protocol.names]
    return JSONResponse({"object": "list", "data": data})


async def model(server: Server, request: Request) -> Response:
    name = request.path_params["name"]
    server.protocol.check_model(name)
    return JSONResponse(_model(server, name))


def _model(server: Server, name: str) -> dict[str, Any]:
    facts = {"id": name, "object": "model", "created": server.created, "owned_by": "pykv"}
    return facts | {"max_model_len": server.language.context}


async def openapi(server: Server, _: Request, *, has_key: bool) -> Response:
    facts = await asyncio.to_thread(lambda: describe(server.protocol, has_key=has_key))
    return JSONResponse(facts)


async def page(file: str, media_type: str, _: Request) -> Response:
    """A file of the page to chat with."""
    data = resources.files("pykv.serve").joinpath("page", file).read_bytes()
    headers = {"Content-Security-Policy": _CSP, "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(data, media_type=media_type, headers=headers)
