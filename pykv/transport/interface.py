"""What an engine must do to bring pages from one process to another."""

from __future__ import annotations

import time
from typing import Any, Protocol

from pykv.errors import TransportError
from pykv.transport.messages import Message
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
            ParameterError: there is a region already.
        """

    def connect(self, peer: str) -> PeerRegion:
        """The region of a peer as it is now, for `exists` and `get`.

        Raises:
            TransportError: there is no such process, it has died, or its region is none, of another
                version, or of other pages than those that are registered here.
        """

    def notify(self, peer: str, facts: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            TransportError: there is no such process, it has died, or takes no message.
        """

    def messages(self, timeout: float) -> list[Message]:
        """What has come, once something has or so many seconds have passed. A message that is none
        is left out.

        Raises:
            TransportError: the engine itself fails.
        """

    def is_alive(self, peer: str) -> bool:
        """Whether a process of this name is there, as far as can be known."""

    def close(self) -> None:
        """Give memory and names back. Also done when the process ends, however it does."""


def wait_for(transport: Transport, peer: str, timeout: float = 60.0) -> PeerRegion:
    """Connect to a process that may not have begun yet. Whatever is wrong is tried again meanwhile,
    another model, too.

    Raises:
        TransportError: as Transport.connect, after so many seconds.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            return transport.connect(peer)
        except TransportError:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)
