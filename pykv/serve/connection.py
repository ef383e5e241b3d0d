"""Timeouts for clients that send no header or read no answer; uvicorn alone would wait for ever.
Malformed HTTP gets an error in the API's form, and no traceback in the log."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pykv.serve.fields import ApiError

HEADER_SECONDS = 30.0  # from the connection, or a header's first byte, to its end; see _watch
SEND_SECONDS = 60.0  # within which a client must read some of the data that waits for it


class Connection(H11Protocol):
    """uvicorn's connection with these timeouts."""

    _timer: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # which uvicorn skips if given `exc`
        self._stop_timer()
        self._stop_taking()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_taking()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_taking()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with an error in the API's form. If an answer has begun already,
        such as a refusal before the body was read, only close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(400, msg, code="invalid_http").body()).encode()
            facts = {"content-type": "application/json", "content-length": str(len(body))}
            facts["connection"] = "close"
            head = h11.Response(status_code=400, headers=[*facts.items()], reason="Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: clients may ask for another protocol, and are answered in this one."""

    def _watch(self) -> None:
        """Run the timer while a header is due, or the rest of the body of a refused request: many
        clients read the answer only once they have sent all of it."""
        state = self.conn.their_state
        is_refused = state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if state is not h11.IDLE and not is_refused:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _expect_taking(self) -> None:
        """Abort the connection unless the write buffer shrinks within SEND_SECONDS; repeat until
        it is small enough."""
        before = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < before:
                self._expect_taking()
            else:
                self.transport.abort()

        self._taking = self.loop.call_later(SEND_SECONDS, look)

    def _stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
