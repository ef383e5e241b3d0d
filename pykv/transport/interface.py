"""What an engine must do to bring pages from one process to another."""

from __future__ import annotations

import time
from typing import Any, Protocol

from pykv.errors import DtypeError, TransportError
from pykv.transport.messages import Message, check_seconds
from pykv.transport.region import PeerRegion, Region


class Transport(Protocol):
    """An engine: memory that other processes read, and messages between them.

    Attributes:
        name: of this process, by which others know it.

    What goes wrong with a peer is a pykv.errors.TransportError of the call, and of no other one.
    Not thread-safe, but for `get`. One that is closed does nothing any more.
    """

    name: str

    def register(self, count: int, nbytes: int, facts: dict[str, str]) -> Region:
        """Memory of `count` rows of `nbytes` for pages, which peers read; once. `facts` are all
        that contents depend on: pages of others are refused. Region.put offers a row.

        Raises:
            CapacityError: there is no such memory.
            ParameterError: there is a region already, or a number is out of its range; `nbytes` are
                a multiple of 8.
            DtypeError: one is no whole number, or `facts` are no dict that JSON can hold.
        """

    def connect(self, peer: str) -> PeerRegion:
        """The region of a peer as it is now, for `exists` and `get`; after an error `landing` says
        what may still be written to.

        Raises:
            TransportError: there is no such process, it has died, or its region is none, of another
                version, or of other pages than those that are registered here.
        """

    def landing(self) -> list[Any]:
        """Memory that a `get` which was given up, or is not over, may still write to: for nobody
        else until it is not among this any more. A closed engine writes to nothing."""

    def notify(self, peer: str, facts: dict[str, Any]) -> None:
        """Send `peer` a message: `facts` that JSON can hold, by name.

        Raises:
            TransportError: there is no such process, it has died, or takes no message.
            DtypeError: `facts` are none.
        """

    def messages(self, timeout: float) -> list[Message]:
        """What has come, once something has or `timeout` seconds have passed. A message that is
        none is left out.

        Raises:
            DtypeError, ParameterError: `timeout` is no number from 0 to a year.
            TransportError: the engine itself fails.
        """

    def is_alive(self, peer: str) -> bool:
        """Whether a process `peer` is there, as far as can be known."""

    def close(self) -> None:
        """Give memory and names back. Also done when the process ends, however it does."""


def check_engine(op: str, transport: Any) -> None:
    """Check for `op` that `transport` is an engine.

    Raises:
        DtypeError: it is something else.
    """
    if not all(callable(getattr(transport, name, None)) for name in ("register", "connect")):
        given = type(transport).__name__
        expected = "an engine such as pykv.transport.Local"
        raise DtypeError(f"{op}: transport is a {given}, expected {expected}")


def wait_for(transport: Transport, peer: str, timeout: float = 60.0) -> PeerRegion:
    """Connect to a process that may not have begun yet. Whatever is wrong is tried again meanwhile,
    another model, too.

    Raises:
        TransportError: as Transport.connect, after so many seconds.
        DtypeError, ParameterError: `transport` is no engine, `peer` no name, `timeout` no time.
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
