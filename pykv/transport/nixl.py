"""Processes of one machine or of several, by NVIDIA's NIXL, which takes UCX between hosts.

The extra `nixl`. Its wheels ask for torch, gigabytes of it, and do without: `pip install --no-deps
nixl-cu12` is 69 MB, and enough for this. Source: https://github.com/ai-dynamo/nixl, its Python API.

A process listens at a port, where NIXL's own thread hands out what peers need to reach its memory.
A region's address is asked for by a message, which a thread of ours answers whatever else the
process does. That thread also has NIXL go on with what peers read, which by TCP, and at a first
time, needs both sides: NIXL's own one does so without a pause, and takes a core of each process.

Bytes come through memory that is nobody else's: a transfer that was given up may still write to it,
and not to a page whose checksum held. NIXL lets a peer that was reached write to what is
registered, too.
"""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
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

_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")  # the first one picks one of the others, by torch
_SCRATCH = 1 << 20  # bytes of one transfer at most; caches hold them while they are copied on
_AGAIN = 1.0  # seconds before a request to a peer is repeated, or an answer is given up
_PAUSE = 1e-3  # seconds between polls of what peers do


class Nixl:
    """An engine over NIXL; see pykv.transport.Transport.

    Args:
        name: of this process.
        port: where it listens, for peers; on all addresses of the host.
        peers: host and port of each process that this one asks. One that only answers needs none.
        backend: of NIXL.
        timeout: seconds that a peer may take to be reached, or to give what one call reads.

    Raises:
        ParameterError: a name or port is none.
        InstallError: NIXL is not installed.
        TransportError: NIXL does not start.

    NIXL does not say whether a peer lives: one that has died is one that does not answer in time.
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
        self._agent = _call("starts not", lambda: api.nixl_agent(name, config))
        if backend not in self._agent.backends:
            raise TransportError(f"{op}: NIXL has no backend {backend!r}")
        self._lock = threading.Lock()  # held during a transfer
        self._late: dict[str, tuple[Any, Any]] = {}  # by peer: unfinished transfer, memory
        self._polls = forks.waits_for(threading.Lock())  # held while messages are taken and sorted
        self._inbox: list[Message] = []
        self._asked: dict[str, tuple[str, list[int]]] = {}  # by request: peer, its region
        self._spares: list[Any] = []  # buffers that later transfers reuse
        self._registered: list[Any] = []
        self._memory: Any = None
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
        if self._memory is not None:
            raise ParameterError(f"{op}: there is a region, expected one alone")
        count, nbytes = check_region(op, count, nbytes, facts)
        size = size_of(count, nbytes)
        try:
            memory = self._register(size)
        except MemoryError as error:
            raise CapacityError(f"{op}: {size:,} bytes of host memory: {error}") from error
        region = Region(memory, count, nbytes, facts)
        self._facts, self._nbytes = dict(facts), nbytes
        self._memory = memory  # last: peers are told of it from now on
        return region

    def connect(self, peer: str) -> PeerRegion:
        """See pykv.transport.Transport.connect."""
        op = "Nixl.connect"
        if self._memory is None:
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
        descs = _call("takes no address", lambda: self._descs([(address, size)]))
        self._reach(op, peer, end, descs)

        def read(parts: list[tuple[int, Any]]) -> None:
            self._read(peer, [(address + at, out.reshape(-1).view(np.uint8)) for at, out in parts])

        return PeerRegion(peer, read, size, self._facts, self._nbytes)

    def _read(self, peer: str, parts: list[tuple[int, Any]]) -> None:
        """Fill arrays from a peer's addresses."""
        end = time.monotonic() + self._timeout
        for address, out in parts:
            for at in range(0, out.nbytes, _SCRATCH):
                self._transfer(peer, address + at, out[at : at + _SCRATCH], end)

    def _transfer(self, peer: str, address: int, out: Any, end: float) -> None:
        with self._lock:
            self._check_over(peer, end)
            scratch = self._fetch(peer, address, out.nbytes, end)
        try:  # others may transfer meanwhile
            out[...] = scratch[: out.nbytes]
        finally:
            self._spares.append(scratch)

    def _fetch(self, peer: str, address: int, nbytes: int, end: float) -> Any:
        """Memory of our own with bytes of a peer; whoever asked for it gives it back."""
        agent = self._agent
        scratch = self._spares.pop() if self._spares else self._register(_SCRATCH)

        def run() -> str:
            local = self._descs([(address_of(scratch), nbytes)])
            remote = self._descs([(address, nbytes)])
            handle = agent.initialize_xfer("READ", local, remote, peer)
            state = "ERR"
            try:
                state = str(agent.transfer(handle))
                while state == "PROC" and time.monotonic() < end:
                    state = "ERR"  # stays so if the next line raises
                    state = str(agent.check_xfer_state(handle))
            finally:
                if state == "PROC":
                    self._late[peer] = handle, scratch
                else:
                    agent.release_xfer_handle(handle)
            return state

        state = "ERR"
        try:
            state = _call(f"reads nothing of {peer}", run)
        finally:
            if state != "DONE" and peer not in self._late:
                self._spares.append(scratch)
        if state != "DONE":
            raise TransportError(f"transport: {peer} gave no bytes: NIXL says {state}")
        return scratch

    def _check_over(self, peer: str, end: float) -> None:
        """Let go of a transfer that was given up, if it is over; else no other one begins."""
        if peer in self._late:
            handle, scratch = self._late[peer]
            try:
                state = _call("has no state", lambda: self._agent.check_xfer_state(handle))
            except TransportError:
                state = "ERR"
            if state == "PROC":
                raise TransportError(
                    f"transport: {peer} gave no bytes in time, and may still do so"
                )
            del self._late[peer]
            self._spares.append(scratch)
            _call("ends no transfer", lambda: self._agent.release_xfer_handle(handle))
        if time.monotonic() > end:
            raise TransportError(f"transport: {peer} gave no bytes in time")

    def _descs(self, ranges: list[tuple[int, int]]) -> Any:
        return self._agent.get_xfer_descs([(*x, 0) for x in ranges], "DRAM")

    # --- Messages ---

    def notify(self, peer: str, facts: dict[str, Any]) -> None:
        """See pykv.transport.Transport.notify."""
        self._tell(peer, facts, self._timeout)

    def _tell(self, peer: str, facts: dict[str, Any], timeout: float) -> None:
        op = "Nixl.notify"
        self._reach(op, peer, time.monotonic() + timeout)
        data = messages.pack(Message(self.name, check_facts(op, facts)))
        _call(f"brings no message to {peer}", lambda: self._agent.send_notif(peer, data))

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
        """Take what has come; answer who asks for the region."""
        asking: list[Message] = []
        with self._polls:
            found = _call("gives no messages", lambda: self._agent.get_new_notifs())
            for sender, all_data in found.items():
                for data in all_data:
                    with suppress(TransportError):  # of another sender, or none
                        message = messages.unpack(data)
                        if message.sender == sender:
                            self._sort(message, asking)
        for message in asking:
            own = address_of(self._memory), self._memory.nbytes
            with suppress(TransportError):  # it has gone meanwhile
                answer = {"region": message.facts["region?"], "at": own}
                self._tell(message.sender, answer, _AGAIN)  # it has said how to reach it

    def _sort(self, message: Message, asking: list[Message]) -> None:
        asked, given = message.facts.get("region?"), message.facts.get("region")
        if isinstance(asked, str) and self._memory is not None:
            asking.append(message)
        elif isinstance(given, str):
            at, (peer, where) = message.facts.get("at"), self._asked.get(given, ("", []))
            if peer == message.sender and isinstance(at, list):
                where[:] = at if len(at) == 2 and all(type(n) is int for n in at) else []
        elif asked is None:
            self._inbox.append(message)

    # --- Who lives ---

    def is_alive(self, peer: str) -> bool:
        """See Transport: whether it was reached."""
        return self._is_known(check_name("Nixl.is_alive", "peer", peer))

    def close(self) -> None:
        """See pykv.transport.Transport.close."""
        self._stop()
        self._late = {}  # release handles before the agent, and the agent before its memory
        self._agent = None
        self._memory, self._spares, self._registered = None, [], []

    def _is_known(self, peer: str, where: Any = None) -> bool:
        what = f"knows nothing of {peer}"
        return bool(_call(what, lambda: self._agent.check_remote_metadata(peer, where)))

    def _reach(self, op: str, peer: str, end: float, where: Any = None) -> None:
        """Know how to reach a peer, and its memory at `where`, and have it know this process."""
        at = self._peers.get(peer)

        def ask() -> None:
            if at is not None:
                self._agent.fetch_remote_metadata(peer, *at)
                self._agent.send_local_metadata(*at)

        def asks() -> bool:
            _call(f"reaches no {peer}", ask)
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
        """Memory that NIXL may write to, which stays until it ends."""
        memory = np.zeros(size, np.uint8)
        where = [(address_of(memory), size, 0, "")]
        _call("registers no memory", lambda: self._agent.register_memory(where, "DRAM"))
        self._registered.append(memory)
        return memory


def _attend(engine: weakref.ref[Nixl], stop: threading.Event) -> None:
    """Take messages and let peers read, also while the process does something else."""
    while not stop.wait(_PAUSE) and (own := engine()) is not None:
        with suppress(TransportError):  # who calls `messages` meets it
            own._poll()
        del own  # or it would never go


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    """End the thread before its engine goes."""
    stop.set()
    if thread is not threading.current_thread():  # which let go of the engine last
        thread.join()


def _forget_thread(engine: Nixl) -> None:
    """In a forked child, which has no such thread, but perhaps a lock of `stop` that it held."""
    engine._stop.detach()


def _load() -> ModuleType:
    for package in _PACKAGES:
        try:
            return import_module(f"{package}._api")
        except ImportError:
            continue
    raise InstallError(f"nixl is not installed: {install.command('nixl')}", name="nixl")


def _call(what: str, run: Callable[[], Any]) -> Any:
    """What a call of NIXL returns.

    Raises:
        TransportError: it raises; NIXL's errors have no parent but Exception.
    """
    try:
        return run()
    except Exception as error:
        raise TransportError(f"transport: NIXL {what}: {type(error).__name__}: {error}") from error
