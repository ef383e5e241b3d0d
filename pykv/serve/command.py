"""`pykv serve`: options, the model, and the HTTP server until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import re
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING, Any

from pykv import install, model_options
from pykv.errors import ParameterError, quoted
from pykv.number_texts import counted
from pykv.options import check_whole
from pykv.terminal import note

if TYPE_CHECKING:
    from pykv.serve.engine_process import EngineProcess

STOP_SECONDS = 30  # for running answers to finish after SIGTERM
ERROR_SECONDS = 5  # after that, for errors to reach the clients of the others
QUEUE = 8  # sequences that may wait, per slot
GPU_SLOTS, HOST_SLOTS = 64, 16
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def add_serve(serve: argparse.ArgumentParser) -> None:
    """Add the options of `pykv serve`; model_options adds those of model and cache."""
    serve.add_argument("--host", default="127.0.0.1", help="to listen on (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    serve.add_argument(
        "--api-key",
        metavar="KEY",
        help="required of requests; PYKV_API_KEY keeps it off the command line",
    )
    serve.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="a site whose pages may send requests, as http://localhost:3000; may be repeated",
    )
    serve.add_argument(
        "--slots",
        type=int,
        help=f"most sequences decoded together ({GPU_SLOTS}, or {HOST_SLOTS} on a CPU)",
    )
    serve.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="the model's name in requests, instead of its own; may be repeated",
    )
    serve.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="info logs a line for each request, never its text (%(default)s)",
    )
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    install.require("serve", "starlette", "uvicorn", "llguidance")
    from pykv.serve.engine_process import EngineProcess
    from pykv.serve.middleware import LOOPBACK

    if args.api_key == "":  # an unset shell variable expands to this
        raise ParameterError("serve: --api-key is empty, expected a key")
    key = args.api_key or os.environ.get("PYKV_API_KEY") or None
    if key is not None and (key != key.strip() or re.search(r"[\r\n]", key)):
        raise ParameterError(
            "serve: the API key has blanks around it, or line ends, expected what a header can hold"
        )
    for name in args.served_model_name or ():
        if not name or not name.isprintable():  # bytes that are not UTF-8 are not printable either
            raise ParameterError(f"serve: --served-model-name is {name!r}, expected letters")
    for origin in args.allow_origin or ():
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ParameterError(
                f"serve: --allow-origin is {quoted(origin)}, expected a site as http://localhost:3000"
            )
    slots = None if args.slots is None else check_whole("serve", "--slots", args.slots, 1, 4096)
    loopback = args.host in LOOPBACK
    if key is None and not loopback:
        raise ParameterError(
            f"serve: --host is {args.host}, which others can reach, expected an --api-key as well"
        )
    logging.basicConfig(level=args.log_level.upper(), format=LOG_FORMAT)
    with (
        _listen(args.host, args.port) as listening,  # a port in use fails before a model loads
        EngineProcess(_options(args), slots) as engine,
    ):
        server, facts = open_server(args, engine)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        ready = f"{server.model} answers at {url} ({facts})"
        if not loopback:
            ready += "; without TLS others on the way can read it: put a proxy before it"
        origins = args.allow_origin or ()
        run(server, listening, ready, api_key=key, loopback=loopback, origins=origins)


def open_server(args: argparse.Namespace, engine: EngineProcess) -> tuple[Any, str]:
    """The server of an engine, and a description of it. Waits until the engine is ready."""
    from pykv.llm import models
    from pykv.llm.language import Language
    from pykv.serve.app import make_server

    language = Language(engine.file(), context=args.ctx)
    facts = engine.ready()
    names = args.served_model_name or [models.short_name(args.model)]
    said = f"{facts.device}, {counted(facts.slots, 'slot')}, context {facts.context:,}, "
    said += f"cache of {counted(facts.pool, 'token')}"
    return make_server(language, engine, names, limit=facts.slots * (1 + QUEUE)), said


def _options(args: argparse.Namespace) -> argparse.Namespace:
    """The options that the engine's process needs."""
    names = ("model", "log_level", *model_options.ALL)
    return argparse.Namespace(**{name: getattr(args, name) for name in names})


def run(server: Any, listening: socket.socket, ready: str, **access: Any) -> None:
    """Serve requests until SIGTERM or SIGINT. Then running answers may finish; after STOP_SECONDS,
    or at a second signal, they end with an error.

    Args:
        server: a pykv.serve.app.Server.
        listening: the socket.
        ready: printed on stderr once requests are answered.
        access: see create_app.
    """
    import uvicorn

    from pykv.serve.app import create_app

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)
            if self.started and not self.should_exit:
                note(ready)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop.call_later(STOP_SECONDS, server.desk.stop)
            await super().shutdown(sockets)

        def handle_exit(self, number: int, frame: FrameType | None) -> None:
            if self.should_exit and server.desk.is_alive:
                self.loop.call_soon_threadsafe(server.desk.stop)  # not in the middle of a message
            else:  # the first signal, or one after the answers have ended, which drops the clients
                super().handle_exit(number, frame)

    app = create_app(server, **access)
    announced = Announced(http_config(app))

    def end(*_: Any) -> None:
        announced.should_exit = True

    # Until uvicorn sets its own handlers; it raises the signal again once it has stopped. After
    # that, a signal must be able to interrupt the wait for the engine's process.
    before = {n: signal.signal(n, end) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        announced.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def http_config(app: Any) -> Any:
    """uvicorn's limits and timeouts."""
    import uvicorn

    from pykv.serve.connection import Connection
    from pykv.serve.middleware import HEADER_BYTES

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anyone can send X-Forwarded-For, and the log would show it
        timeout_keep_alive=75,
        timeout_graceful_shutdown=STOP_SECONDS + ERROR_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


def _listen(host: str, port: int) -> socket.socket:
    check_whole("serve", "--port", port, 0, 65535)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.EADDRINUSE:
            reason = f"{os.strerror(errno.EADDRINUSE)}; --port 0 takes a free one"
        raise ParameterError(f"serve: --host is {host}, --port is {port}: {reason}") from None
