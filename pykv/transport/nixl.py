"""Processes of one machine or of several, through NVIDIA's NIXL, which uses UCX between hosts.

Needs the extra `nixl`. Its wheels require torch, which takes gigabytes, but work without it:
`pip install --no-deps nixl-cu12`, 69 MB, is enough. Source: the Python API of
https://github.com/ai-dynamo/nixl.

A process listens on a port, where NIXL's own thread serves the metadata that peers need to reach
its memory. A peer requests the region's address by a message, which pykv's thread answers whatever
else the process does. That thread also makes NIXL progress on reads by peers, which need both sides
over TCP and on first contact. NIXL's own progress thread never sleeps; it takes a core of each
process.

Pages arrive in rows of the region, and NIXL cannot cancel a transfer. So `landing` lists the memory
that an abandoned transfer may still write to, and no other transfer from that peer starts, until
NIXL reports it over. NIXL also lets a connected peer write to registered memory.
"""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import count
from types import ModuleType
from typing import Any

import numpy as np

from pykv import forks, install
from pykv.errors import CapacityError, InstallError, ParameterError, TransportError
from pykv.options import check_whole
from pykv.ranges import address_of
from pykv.transport import messages
from pykv.transport.messages import Message, check_facts, check_name, check_seconds
from pykv.transport.region import PeerRegion, Region, check_region, size_of

_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")  # the first picks one of the others by asking torch
_SCRATCH = 1 << 20  # bytes of a read that does not go to the region's rows
_AGAIN = 1.0  # seconds before a request to a peer is repeated, or an answer is abandoned
_PAUSE = 1e-3  # seconds between polls for peers
_SELDOM = 20e-3  # the same while this process reads: each poll makes the reads wait for the GIL


class Nixl:
    """An engine over NIXL; see pykv.transport.Transport.

    Args:
        name: of this process.
        port: to listen on for peers, on all addresses of the host.
        peers: (host, port) of each process that this one asks, by name. A process that only answers
            needs none.
        backend: of NIXL.
        timeout: seconds to connect to a peer, or to receive a page.

    Raises:
        ParameterError: a name or the port is invalid.
        InstallError: NIXL is not installed.
        TransportError: NIXL does not start.

    NIXL does not report whether a peer lives: a dead peer is one that does not answer in time.
    """

    def __init__(
        self,
        name: str,
        port: int,
        peers: Mapping[str, tuple[str, int]] | None = None,
        *,
        backend: str = "UCX",
        timeout: float = 30.0,
    ) -> None:
        op = "Nixl"
        self.name = check_name(op, "name", name)
        port = check_whole(op, "port", port, 1, 65535)
        self._peers = {check_name(op, "peers", peer): at for peer, at in (peers or {}).items()}
        self._timeout, api = check_seconds(op, timeout), _load()
        config = api.nixl_agent_config(
            enable_prog_thread=False,
            enable_listen_thread=True,
            listen_port=port,
            backends=[backend],
        )
        self._agent = _call("cannot start", lambda: api.nixl_agent(name, config))
        if backend not in self._agent.backends:
            raise TransportError(f"{op}: NIXL has no backend {backend!r}")
        self._lock = threading.Lock()  # held during a transfer
        self._landing: dict[str, tuple[Any, Any]] = {}  # by peer: a transfer and its target
        self._read_at = 0.0  # when a transfer last began
        self._polls = forks.waits_for(threading.Lock())  # held while messages are taken and sorted
        self._inbox: list[Message] = []
        self._asked: dict[str, tuple[str, list[int]]] = {}  # by request: peer, [address, size]
        self._scratch: dict[str, Any] = {}  # by peer: the target of reads outside of the rows
        self._registered: list[Any] = []
        self._own = range(0)  # addresses of the region
        self._facts: dict[str, str] = {}
        self._nbytes = 0
        stop = threading.Event()
        thread = threading.Thread(
            target=_attend, args=[weakref.ref(self), stop], name="pykv-nixl", daemon=True
        )
        thread.start()
        self._stop = weakref.finalize(self, _end, stop, thread)
        forks.in_child(self, _forget_thread)

    def __enter__(self) -> Nixl:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- Pages ---

    def register(self, count: int, nbytes: int, facts: dict[str, str]) -> Region:
        """See pykv.transport.Transport.register."""
        op = "Nixl.register"
        if self._own:
            raise ParameterError(f"{op}: there is a region, expected one alone")
        count, nbytes = check_region(op, count, nbytes, facts)
        size = size_of(count, nbytes)
        try:
            memory = self._register(size)
        except MemoryError as error:
            raise CapacityError(f"{op}: {size:,} bytes of host memory: {error}") from error
        region = Region(memory, count, nbytes, facts)
        self._facts, self._nbytes = dict(facts), nbytes
        begin = address_of(memory)
        self._own = range(begin, begin + size)  # last: from now on peers get this address
        return region

    def connect(self, peer: str) -> PeerRegion:
        """See pykv.transport.Transport.connect."""
        op = "Nixl.connect"
        if not self._own:
            raise ParameterError(f"{op}: nothing is registered, expected a region of this process")
        end = time.monotonic() + self._timeout
        self._reach(op, peer, end)
        request = secrets.token_hex(8)
        where = self._asked.setdefault(request, (peer, []))[1]

        def is_answered() -> bool:
            self._poll()
            return bool(where)

        try:
            self.notify(peer, {"region?": request})
            self._wait(op, peer, end, is_answered)
        finally:
            del self._asked[request]  # a late answer is ignored
        address, size = where
        what = [(address, size, 0)]
        descs = _call("cannot describe memory", lambda: self._agent.get_xfer_descs(what, "DRAM"))
        self._reach(op, peer, end, descs)

        def read(parts: list[tuple[int, Any]]) -> Generator[Any, None, None]:
            return self._read(peer, [(address + at, out) for at, out in parts])

        return PeerRegion(peer, read, size, self._facts, self._nbytes)

    def landing(self) -> list[Any]:
        """See pykv.transport.Transport.landing."""
        with self._lock:
            for peer in list(self._landing):
                with suppress(TransportError):  # then it stays listed
                    self._is_over(peer)
            return [land for _, land in self._landing.values()]

    def _read(self, peer: str, parts: list[tuple[int, Any]]) -> Generator[Any, None, None]:
        """Fill arrays from a peer's addresses, and yield each once it is full."""
        ways, here, there = [self._way(peer, out) for _, out in parts], [], []
        for (address, _), way in zip(parts, ways, strict=True):
            for i, (at, _, piece) in enumerate(way):
                here.append((at, len(piece), 0))
                there.append((address + i * _SCRATCH, len(piece), 0))
        lists, index = [self._prepare("", here), self._prepare(peer, there)], count()
        try:
            for (_, out), way in zip(parts, ways, strict=True):
                for _, land, piece in way:
                    with self._lock:
                        self._transfer(peer, lists, next(index), land)
                        if land is not piece:
                            piece[...] = land
                yield out
        finally:
            for each in lists:
                each.release()

    def _way(self, peer: str, out: Any) -> list[tuple[int, Any, Any]]:
        """The targets of the transfers that fill an array: (address, its memory, piece of the
        array). A row of the region is its own target; other arrays go through scratch memory."""
        at = address_of(out)
        if at in self._own:
            return [(at, out, out)]
        if peer not in self._scratch:
            self._scratch[peer] = self._register(_SCRATCH)
        scratch, pieces = self._scratch[peer], range(0, len(out), _SCRATCH)
        ways = [(scratch[: len(out) - i], out[i : i + _SCRATCH]) for i in pieces]
        return [(address_of(land), land, piece) for land, piece in ways]

    def _transfer(self, peer: str, lists: list[Any], i: int, land: Any) -> None:
        """Have NIXL copy item `i` of the peer's list of memory to item `i` of this process's list,
        which is `land`."""
        agent, what = self._agent, f"cannot read from {peer}"
        if peer in self._landing and not self._is_over(peer):
            raise TransportError(f"transport: {peer} gave no bytes in time, and may still do so")

        def begin() -> str:
            handle = agent.make_prepped_xfer("READ", lists[0], [i], lists[1], [i])
            self._landing[peer] = handle, land  # until NIXL reports it over
            return str(agent.transfer(handle))

        self._read_at = time.monotonic()
        state = _call(what, begin)
        handle, _ = self._landing[peer]
        while state == "PROC" and time.monotonic() < self._read_at + self._timeout:
            state = _call(what, lambda: agent.check_xfer_state(handle))
        if state != "DONE":
            raise TransportError(f"transport: {peer} gave no bytes: NIXL says {state}")
        self._let_go(peer)

    def _is_over(self, peer: str) -> bool:
        """Whether the last transfer from a peer is over; releases it then."""
        handle, _ = self._landing[peer]
        try:
            state = _call("cannot query a transfer", lambda: self._agent.check_xfer_state(handle))
        except TransportError:
            state = "ERR"
        if state != "PROC":
            self._let_go(peer)
        return bool(state != "PROC")

    def _let_go(self, peer: str) -> None:
        handle, _ = self._landing[peer]
        _call("cannot release a transfer", lambda: self._agent.release_xfer_handle(handle))
        del self._landing[peer]

    def _prepare(self, peer: str, ranges: list[tuple[int, int, int]]) -> Any:
        """A list of memory ranges for transfers, of a peer or ("") of this process."""
        return _call(
            "cannot prepare memory", lambda: self._agent.prep_xfer_dlist(peer, ranges, "DRAM")
        )

    # --- Messages ---

    def notify(self, peer: str, facts: dict[str, Any]) -> None:
        """See pykv.transport.Transport.notify."""
        self._tell(peer, facts, self._timeout)

    def _tell(self, peer: str, facts: dict[str, Any], timeout: float) -> None:
        op = "Nixl.notify"
        self._reach(op, peer, time.monotonic() + timeout)
        data = messages.pack(Message(self.name, check_facts(op, facts)))
        _call(f"cannot send a message to {peer}", lambda: self._agent.send_notif(peer, data))

    def messages(self, timeout: float) -> list[Message]:
        """See pykv.transport.Transport.messages."""
        end = time.monotonic() + check_seconds("Nixl.messages", timeout)
        while True:
            self._poll()
            with self._polls:
                if self._inbox or time.monotonic() >= end:
                    found, self._inbox = self._inbox, []
                    return found
            time.sleep(_PAUSE)

    def _poll(self) -> None:
        """Receive messages, and answer requests for the region's address."""
        asking: list[Message] = []
        with self._polls:
            found = _call("cannot receive messages", lambda: self._agent.get_new_notifs())
            for sender, all_data in found.items():
                for data in all_data:
                    with suppress(TransportError):  # invalid message
                        message = messages.unpack(data)
                        if message.sender == sender:
                            self._sort(message, asking)
        for message in asking:
            own = self._own.start, len(self._own)
            with suppress(TransportError):  # the peer has ended meanwhile
                answer = {"region": message.facts["region?"], "at": own}
                self._tell(message.sender, answer, _AGAIN)  # it has sent its metadata before

    def _sort(self, message: Message, asking: list[Message]) -> None:
        asked, given = message.facts.get("region?"), message.facts.get("region")
        if isinstance(asked, str) and self._own:
            asking.append(message)
        elif isinstance(given, str):
            at, (peer, where) = message.facts.get("at"), self._asked.get(given, ("", []))
            if peer == message.sender and isinstance(at, list):
                where[:] = at if len(at) == 2 and all(type(n) is int for n in at) else []
        elif asked is None:
            self._inbox.append(message)

    # --- Who lives ---

    def is_alive(self, peer: str) -> bool:
        """See Transport; here, whether NIXL has the peer's metadata."""
        return self._is_known(check_name("Nixl.is_alive", "peer", peer))

    def close(self) -> None:
        """See pykv.transport.Transport.close."""
        self._stop()
        for peer in list(self._landing):  # transfers first, then the agent, then its memory
            with suppress(TransportError):
                self._let_go(peer)
        self._landing, self._agent = {}, None
        self._own, self._scratch, self._registered = range(0), {}, []

    def _is_known(self, peer: str, where: Any = None) -> bool:
        what = f"cannot look up {peer}"
        return bool(_call(what, lambda: self._agent.check_remote_metadata(peer, where)))

    def _reach(self, op: str, peer: str, end: float, where: Any = None) -> None:
        """Exchange metadata with a peer, until NIXL knows the peer and its memory `where`."""
        at = self._peers.get(peer)

        def ask() -> None:
            if at is not None:
                self._agent.fetch_remote_metadata(peer, *at)
                self._agent.send_local_metadata(*at)

        def asks() -> bool:
            _call(f"cannot reach {peer}", ask)
            again = time.monotonic() + _AGAIN
            while not (known := self._is_known(peer, where)) and time.monotonic() < again:
                time.sleep(_PAUSE)
            return known

        if not self._is_known(peer, where):
            self._wait(op, peer, end, asks)

    def _wait(self, op: str, peer: str, end: float, is_done: Callable[[], bool]) -> None:
        while not is_done():
            if time.monotonic() > end:
                raise TransportError(f"{op}: {peer} did not answer in {self._timeout:g} s")
            time.sleep(_PAUSE)

    def _register(self, size: int) -> Any:
        """Allocate memory and register it with NIXL; it lives until `close`."""
        memory = np.zeros(size, np.uint8)
        where = [(address_of(memory), size, 0, "")]
        _call("cannot register memory", lambda: self._agent.register_memory(where, "DRAM"))
        self._registered.append(memory)
        return memory


def _attend(engine: weakref.ref[Nixl], stop: threading.Event) -> None:
    """Receive messages and let peers read while the process does something else; a thread."""
    pause = _PAUSE
    while not stop.wait(pause) and (own := engine()) is not None:
        with suppress(TransportError):  # `messages` meets and raises it
            own._poll()
        pause = _SELDOM if time.monotonic() - own._read_at < _SELDOM else _PAUSE
        del own  # or the engine would never be freed


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    """End the thread before its engine is freed."""
    stop.set()
    if thread is not threading.current_thread():  # the thread held the last reference
        thread.join()


def _forget_thread(engine: Nixl) -> None:
    """In a forked child: never run `_end`. The thread is absent, and `stop` may be locked."""
    engine._stop.detach()


def _load() -> ModuleType:
    for package in _PACKAGES:
        try:
            return import_module(f"{package}._api")
        except ImportError:
            continue
    raise InstallError(f"nixl is not installed: {install.command('nixl')}", name="nixl")


def _call(what: str, run: Callable[[], Any]) -> Any:
    """The result of a call of NIXL.

    Raises:
        TransportError: the call raises; NIXL's errors share no base class but Exception.
    """
    try:
        return run()
    except Exception as error:
        raise TransportError(f"transport: NIXL {what}: {type(error).__name__}: {error}") from error
