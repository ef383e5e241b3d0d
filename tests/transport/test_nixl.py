"""The engine over NIXL: with NIXL where it is installed, and with agents of this process that do
what its Python API says."""

import os
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import ranges
from pykv.errors import InstallError, ParameterError, TransportError
from pykv.llm import LLM, SamplingParams
from pykv.transport import Handover, Message, Nixl, messages, nixl, wait_for
from tests.llm import tiny

FACTS = dict(model="a")
KEYS = [bytes([i + 1]) * 16 for i in range(3)]
N = 3 << 19  # bytes of a page


class Agent:
    """Of NIXL: agents by port, whose memory is that of this process."""

    ports = {}
    failing = False
    slow = 0  # transfers of so many bytes are not over, and write late
    released = 0
    lock = threading.Lock()

    def __init__(self, name, config):
        self.name, self.backends = name, dict.fromkeys(config.backends)
        self.known, self.notifs, self.registered = {}, {}, []
        Agent.ports[config.listen_port] = self

    def register_memory(self, where, kind):
        assert kind == "DRAM"
        self.registered += [(address, size) for address, size, _, _ in where]

    def fetch_remote_metadata(self, peer, host, port):
        if port in Agent.ports:
            self.known[peer] = Agent.ports[port], list(Agent.ports[port].registered)

    def send_local_metadata(self, host, port):
        if port in Agent.ports:
            Agent.ports[port].known[self.name] = self, list(self.registered)

    def check_remote_metadata(self, peer, descs=None):
        return peer in self.known and all(
            any(a <= x and x + n <= a + size for a, size in self.known[peer][1])
            for x, n, _ in descs or ()
        )

    def get_xfer_descs(self, descs, kind):
        return descs

    def prep_xfer_dlist(self, peer, ranges, kind):
        known = self.known[peer][1] if peer else self.registered
        for address, size, _ in ranges:
            assert any(a <= address and address + size <= a + n for a, n in known)
        items = list(ranges)
        return SimpleNamespace(peer=peer, items=items, release=items.clear)

    def make_prepped_xfer(self, operation, local, i, remote, j):
        assert operation == "READ" and not local.peer and remote.peer
        return SimpleNamespace(local=local.items[i[0]], remote=remote.items[j[0]])

    def transfer(self, handle):
        return "PROC"

    def check_xfer_state(self, handle):
        if Agent.failing:
            return "ERR"
        (to, n, _), (source, m, _) = handle.local, handle.remote
        assert n == m
        if n == Agent.slow:
            return "PROC"
        ranges.bytes_at(to, n)[...] = ranges.bytes_at(source, n)
        return "DONE"

    def release_xfer_handle(self, handle):
        Agent.released += 1

    def send_notif(self, peer, data):
        with Agent.lock:
            self.known[peer][0].notifs.setdefault(self.name, []).append(data)

    def get_new_notifs(self):
        with Agent.lock:
            found, self.notifs = self.notifs, {}
        return found


def refuse(*args):
    raise RuntimeError("no")


def config(*, enable_prog_thread, enable_listen_thread, listen_port, backends):
    assert enable_listen_thread and not enable_prog_thread
    return SimpleNamespace(listen_port=listen_port, backends=[x for x in backends if x == "UCX"])


@pytest.fixture(params=["made", "installed"])
def api(request, monkeypatch):
    if request.param == "installed":
        if not any(find_spec(name) for name in nixl._PACKAGES):
            pytest.skip("NIXL is not installed")
        return
    made = SimpleNamespace(nixl_agent=Agent, nixl_agent_config=config)
    monkeypatch.setattr(nixl, "_load", lambda: made)
    monkeypatch.setattr(Agent, "ports", {})


@pytest.fixture
def ports():
    taken = [socket.socket() for _ in range(2)]
    for each in taken:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return found


@pytest.fixture
def other(api, ports):
    """A process that offers three pages, on a thread; the transport, and its region."""
    stop = threading.Event()
    transport = Nixl("other", ports[0])
    region = transport.register(4, N, FACTS)
    for slot, key in enumerate(KEYS):
        region.rows[slot] = slot + 5
        region.put(key, slot)

    def answer():
        while not stop.is_set():
            for message in transport.messages(0.05):
                transport.notify(message.sender, dict(said=message.facts))

    thread = threading.Thread(target=answer)
    thread.start()
    yield region
    stop.set()
    thread.join()
    transport.close()


@pytest.fixture
def here(api, ports):
    with Nixl("here", ports[1], {"other": ("127.0.0.1", ports[0])}, timeout=5.0) as transport:
        yield transport


def test_pages_and_messages_come(other, here):
    """Into rows that are registered, and into others by way of some that are."""
    own = here.register(3, N, FACTS)
    region = wait_for(here, "other")
    assert region.exists([*KEYS, b"z" * 16]) == KEYS and region.get([], []) == 0
    for rows in (list(own.rows), [np.zeros(N, np.uint8) for _ in KEYS]):
        assert region.get(KEYS, rows) == 3
        assert [set(row.tolist()) for row in rows] == [{5}, {6}, {7}]
    here.notify("other", dict(x=1))
    assert [message.facts for message in here.messages(5.0)] == [dict(said=dict(x=1))]
    assert here.messages(0.0) == []


def test_a_process_that_looks_for_no_messages_is_read(api, here, ports):
    """Its thread attends to that, and goes with its engine, however that goes."""
    for name, ends in (("closed", Nixl.close), ("dropped", lambda _: None)):
        before = set(threading.enumerate())
        quiet = Nixl("other", ports[0])
        (thread,) = set(threading.enumerate()) - before
        own = quiet.register(1, N, FACTS)
        own.put(KEYS[0], 0)
        if name == "closed":
            here.register(1, N, FACTS)
            region, row = wait_for(here, "other"), np.ones(N, np.uint8)
            assert region.exists(KEYS) == KEYS[:1]
            assert region.get(KEYS[:1], [row]) == 1 and not row.any()
        time.sleep(0.05)  # it has polled
        ends(quiet)
        del quiet
        thread.join(5.0)
        assert not thread.is_alive(), name


# In a process of its own, as this one has threads, with which it must not fork.
FORKED = """
import os, signal
from types import SimpleNamespace
from pykv.transport import Nixl, nixl
from tests.transport.test_nixl import Agent, config

nixl._load = lambda: SimpleNamespace(nixl_agent=Agent, nixl_agent_config=config)
engine = Nixl("here", 1)
with engine._stop.peek()[2][0]._cond:  # as its thread does, for moments
    child = os.fork()
    if not child:
        signal.alarm(20)
        assert engine.messages(0.0) == []
        engine.close()
        os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_waits_for_no_thread():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


def test_what_is_wrong_is_an_error(other, here, monkeypatch):
    with pytest.raises(ParameterError, match="nothing is registered"):
        here.connect("other")
    here.register(3, N, dict(model="b"))
    with pytest.raises(TransportError, match="other has pages of facts"):
        here.connect("other")
    with pytest.raises(ParameterError, match="there is a region"):
        here.register(3, N, FACTS)


def test_transfers_that_fail(other, here, monkeypatch):
    here.register(3, N, FACTS)
    region = here.connect("other")
    other.rows[1, 77] += 1
    assert region.exists(KEYS) == KEYS
    with pytest.raises(TransportError, match="other has a page 0202.* that is damaged"):
        region.get(KEYS, [np.zeros(N, np.uint8) for _ in KEYS])
    if isinstance(here._agent, Agent):
        monkeypatch.setattr(Agent, "failing", True)
        with pytest.raises(TransportError, match="other gave no bytes: NIXL says ERR"):
            region.exists(KEYS)
        monkeypatch.setattr(Agent, "send_notif", refuse)
        with pytest.raises(
            TransportError, match="NIXL cannot send a message to other: RuntimeError"
        ):
            here.notify("other", {})


@pytest.fixture
def made(api, request):
    if request.node.callspec.params["api"] == "installed":
        pytest.skip("NIXL cannot be told what to do")


def test_a_transfer_that_is_late_may_still_write(made, other, here, monkeypatch):
    """To what `landing` says, until it is over; then the peer can be read again."""
    own = here.register(4, N, FACTS)
    region = here.connect("other")
    assert region.exists(KEYS) == KEYS
    own.rows[...] = 9
    monkeypatch.setattr(here, "_timeout", 0.3)
    monkeypatch.setattr(Agent, "slow", N)
    monkeypatch.setattr(Agent, "released", 0)
    with pytest.raises(TransportError, match="other gave no bytes: NIXL says PROC"):
        region.get(KEYS, list(own.rows[:3]))
    for call in (lambda: region.get(KEYS, list(own.rows[1:])), lambda: region.exists(KEYS)):
        with pytest.raises(TransportError, match="other gave no bytes in time, and may still"):
            call()
    (land,) = here.landing()
    assert np.may_share_memory(land, own.rows[0]) and len(land) == N
    assert not np.may_share_memory(land, own.rows[1:]) and Agent.released == 0
    monkeypatch.setattr(Agent, "slow", 0)
    assert here.landing() == [] and Agent.released == 1  # it has written, late
    assert [set(row.tolist()) for row in own.rows] == [{5}, {9}, {9}, {9}]
    assert region.get(KEYS, list(own.rows[1:])) == 3 and here.landing() == []
    assert [set(row.tolist()) for row in own.rows[1:]] == [{5}, {6}, {7}]
    assert len(here._registered) == 2  # the region, and where tables land


def test_what_closes_writes_to_nothing(made, other, here, monkeypatch):
    """A late transfer is let go before the engine of NIXL goes, and that before its memory."""
    own, seen = here.register(3, N, FACTS), []
    region = here.connect("other")
    assert region.exists(KEYS) == KEYS
    monkeypatch.setattr(here, "_timeout", 0.1)
    monkeypatch.setattr(Agent, "slow", N)
    with pytest.raises(TransportError, match="other gave no bytes: NIXL says PROC"):
        region.get(KEYS, list(own.rows))
    handle, _ = here._landing["other"]

    def note(agent, released):
        seen.append((agent is here._agent, bool(here._registered), released is handle))

    monkeypatch.setattr(Agent, "release_xfer_handle", note)
    here.close()
    assert seen == [(True, True, True)] and here.landing() == []


def test_rows_that_may_still_be_written_to_are_nobody_elses(
    made, here, ports, tmp_path, rng, monkeypatch
):
    """Neither pages that are offered nor those that come take them, until they are written to."""
    tiny.write_case(tmp_path / "llama.gguf", "llama")
    prefill, decode = (LLM(tmp_path / "llama.gguf", device="cpu") for _ in range(2))
    prompt, another = (rng.integers(3, 250, 65).tolist() for _ in range(2))  # of four pages
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    with Nixl("other", ports[0]) as there:
        given, taken = Handover(prefill, there), Handover(decode, here, size="16KiB")
        rows, free = taken._region.rows, taken._host._free
        assert len(rows) == 4
        prefill.generate([prompt], one)
        assert given.offer(prompt) == 4
        monkeypatch.setattr(here, "_timeout", 0.1)
        monkeypatch.setattr(Agent, "slow", rows.shape[1])
        with pytest.raises(TransportError, match="other gave no bytes"):
            taken.take("other", prompt)
        (kept,) = taken._kept
        assert len(free) == 3 and kept not in free
        decode.generate([another], one)
        assert taken.offer(another) == 3 and kept not in dict(taken._host.items()).values()
        before = rows.copy()
        monkeypatch.setattr(Agent, "slow", 0)
        assert here.landing() == []
        changed = np.flatnonzero((rows != before).any(axis=1))
        assert changed.tolist() == [kept]
        assert taken.take("other", prompt) == 64 and taken._kept == []
        assert decode.generate([prompt], one) == prefill.generate([prompt], one)
        assert len(free) + len(taken._host) == 4


def test_a_handle_is_let_go_whatever_happens(made, other, here, monkeypatch):
    here.register(3, N, FACTS)
    region = here.connect("other")
    monkeypatch.setattr(Agent, "released", 0)
    for name in ("transfer", "check_xfer_state"):
        with monkeypatch.context() as patch:
            patch.setattr(Agent, name, refuse)
            with pytest.raises(TransportError, match="NIXL cannot read from other: RuntimeError"):
                region.exists(KEYS)
    assert here.landing() == [] and Agent.released == 2 and region.exists(KEYS) == KEYS


def test_a_handle_that_nixl_keeps_is_kept(made, other, here, monkeypatch):
    """For nobody knows what it does."""
    own = here.register(3, N, FACTS)
    region = here.connect("other")
    assert region.exists(KEYS) == KEYS
    with monkeypatch.context() as patch:
        patch.setattr(Agent, "release_xfer_handle", refuse)
        for _ in range(2):
            with pytest.raises(
                TransportError, match="NIXL cannot release a transfer: RuntimeError"
            ):
                region.get(KEYS, list(own.rows))
        assert len(here.landing()) == 1
    assert here.landing() == [] and region.get(KEYS, list(own.rows)) == 3


@pytest.mark.parametrize(
    "name",
    ["check_remote_metadata", "fetch_remote_metadata", "send_local_metadata", "get_new_notifs"],
)
def test_every_error_of_nixl_is_one_of_transport(made, ports, monkeypatch, name):
    with Nixl("here", ports[1], {"other": ("127.0.0.1", ports[0])}, timeout=0.2) as here:
        here.register(3, N, FACTS)
        monkeypatch.setattr(Agent, name, refuse)
        call = here.messages if name == "get_new_notifs" else lambda _: here.connect("other")
        with pytest.raises(TransportError, match="transport: NIXL .*: RuntimeError: no"):
            call(0.0)


def test_only_answers_that_were_asked_for_are_kept(made, other, here, ports):
    """Of the peer that was asked, and while it is."""
    here.register(3, N, FACTS)
    region = here.connect("other")
    with Nixl("third", 1, {"here": ("127.0.0.1", ports[1])}) as third:
        where = here._asked.setdefault("open", ("other", []))[1]
        third.notify("here", {"region": "open", "at": [1, 2]})
        third.notify("here", {"region": "never asked", "at": [1, 2]})
        assert here.messages(0.0) == [] and where == []
        assert list(here._asked) == ["open"]
    assert region.exists(KEYS) == KEYS


def test_foreign_messages_are_left_out(other, here):
    here.register(3, N, FACTS)
    here.connect("other")
    for data in (b"", b"x" * 100, messages.pack(Message("another", dict(x=1)))):
        here._agent.send_notif("other", data)
    for facts in ({"region": "x", "at": [1]}, {"region": "x", "at": [True, None]}, {"region?": 1}):
        here.notify("other", facts)
    assert not here._asked
    here.notify("other", dict(x=1))
    assert [message.facts for message in here.messages(5.0)] == [dict(said=dict(x=1))]


def test_nobody_is_there(here, monkeypatch):
    here.register(3, N, FACTS)
    monkeypatch.setattr(here, "_timeout", 0.2)
    for peer in ("other", "unknown"):
        with pytest.raises(TransportError, match=f"Nixl.connect: {peer} did not answer in 0.2 s"):
            here.connect(peer)


def test_options(api, ports):
    for given, text in (
        (dict(name="a b"), "Nixl: name is 'a b'"),
        (dict(port=0), "Nixl: port is 0"),
        (dict(peers={"a/b": ("x", 1)}), "Nixl: peers is 'a/b'"),
    ):
        with pytest.raises(ParameterError, match=text):
            Nixl(**{"name": "a", "port": ports[0], **given})


def test_a_backend_that_there_is_not(api, ports):
    with pytest.raises(TransportError, match="Nixl: NIXL has no backend 'NONE'"):
        Nixl("a", ports[0], backend="NONE")


def test_without_nixl(monkeypatch):
    monkeypatch.setattr(nixl, "_PACKAGES", ("no_such_package",))
    with pytest.raises(InstallError, match=r"nixl is not installed: .*nixl\]"):
        Nixl("a", 5000)
