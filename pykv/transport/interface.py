"""The interface of an engine that moves pages between processes."""

from __future__ import annotations

import time
from typing import Any, Protocol

from pykv.errors import DtypeError, TransportError, a_type
from pykv.transport.messages import Message, check_seconds
from pykv.transport.region import PeerRegion, Region


class Transport(Protocol):
    """An engine: memory that other processes read, and messages between them.

    Attributes:
        name: of this process, under which others address it.

    A failure of a peer is a pykv.errors.TransportError of that call alone. Not thread-safe, except
    PeerRegion.get. A closed engine cannot be used again.
    """

    name: str

    def register(self, count: int, nbytes: int, facts: dict[str, str]) -> Region:
        """Allocate the region of this process, once: `count` rows of `nbytes` for pages, which
        peers can read. Region.put offers a row. `facts` are all that page contents depend on;
        regions of other facts are refused.

        Raises:
            CapacityError: the memory cannot be allocated.
            ParameterError: there is a region already, a number is out of range, or `nbytes` is not
                a multiple of 8.
            DtypeError: one is not a whole number, or `facts` is not a dict that JSON can hold.
        """

    def connect(self, peer: str) -> PeerRegion:
        """The present region of a peer, for `exists` and `get`. After an error, `landing` lists the
        memory that may still be written to.

        Raises:
            TransportError: there is no such process, it has died, or its region is invalid, of
                another version, or of other facts or row size than the region registered here.
        """

    def landing(self) -> list[Any]:
        """Memory that an abandoned or unfinished `get` may still write to. It must not be reused
        until it is no longer listed here. A closed engine writes to no memory."""

    def notify(self, peer: str, facts: dict[str, Any]) -> None:
        """Send `peer` a message: `facts`, a dict that JSON can hold.

        Raises:
            TransportError: there is no such process, it has died, or does not accept the message.
            DtypeError: `facts` is something else.
        """

    def messages(self, timeout: float) -> list[Message]:
        """The messages received; waits up to `timeout` seconds for the first. Invalid messages are
        dropped.

        Raises:
            DtypeError, ParameterError: `timeout` is not a number from 0 to a year.
            TransportError: the engine itself fails.
        """

    def is_alive(self, peer: str) -> bool:
        """Whether the process `peer` runs, as far as the engine can tell."""

    def close(self) -> None:
        """Release memory and names. A process that ends, or is killed, loses its name as well; the
        files that Local leaves then are removed by the next process that opens the folder."""


def check_engine(op: str, transport: Any) -> None:
    """Check for `op` that `transport` is an engine.

    Raises:
        DtypeError: it is not.
    """
    if not all(callable(getattr(transport, name, None)) for name in ("register", "connect")):
        expected = "an engine such as pykv.transport.Local"
        raise DtypeError(f"{op}: transport is {a_type(transport)}, expected {expected}")


def wait_for(transport: Transport, peer: str, timeout: float = 60.0) -> PeerRegion:
    """Connect to a `peer` that may not have started yet. Retries after any TransportError, even if
    the peer has another model, for `timeout` seconds.

    Raises:
        TransportError: as Transport.connect, after `timeout` seconds.
        DtypeError, ParameterError: `transport` is not an engine, `peer` not a name, or `timeout`
            not a number from 0 to a year.
    """
    check_engine("wait_for", transport)
    end = time.monotonic() + check_seconds("wait_for", timeout)
    while True:
        try:
            return transport.connect(peer)
        except TransportError:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)
