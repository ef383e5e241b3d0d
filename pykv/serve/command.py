"""An application on a socket, until a signal ends it."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from typing import Any

STOP_SECONDS = 30  # that running answers have to end after SIGTERM


def run(
    server: Any, listening: socket.socket, ready: str, *, api_key: str | None, loopback: bool
) -> None:
    """Answer requests at a socket until SIGTERM or SIGINT; running answers end first.

    Args:
        server: a pykv.serve.app.Server.
        listening: the socket.
        ready: printed on stderr once requests are answered.
        api_key, loopback: see create_app.
    """
    import uvicorn

    from pykv.serve.app import create_app

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(ready, file=sys.stderr, flush=True)

    # uvicorn raises the signal again once it has stopped: this is how it should end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    app = create_app(server, api_key=api_key, loopback=loopback)
    Announced(http_config(app)).run(sockets=[listening])


def http_config(app: Any) -> Any:
    """How uvicorn runs an application: its limits and timeouts."""
    import uvicorn

    from pykv.serve.front import HEADER_BYTES

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
