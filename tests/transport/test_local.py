"""Processes of one machine: who is there, who has died, and what they leave."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pykv.errors import CapacityError, ParameterError, TransportError
from pykv.transport import Local, Message, local, messages, wait_for

pytestmark = pytest.mark.skipif(local.fcntl is None, reason="this system has no file locks")
FACTS = dict(model="a")
KEY = b"k" * 16
OTHER = """
import sys
from pykv.transport import Local
with Local("other", sys.argv[1]) as transport:
    region = transport.register(4, 1000, dict(model="a"))
    region.rows[2] = 5
    region.put(b"k" * 16, 2)
    while True:  # and not before
        for message in transport.messages(1.0):
            transport.notify(message.sender, dict(said=message.facts))
"""


@pytest.fixture
def other(tmp_path):
    """A process of its own."""
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)])
    yield process
    process.kill()
    process.wait()


def connect(here):
    """The other's region, once it has a page."""
    while not (region := wait_for(here, "other")).exists([KEY]):
        time.sleep(0.01)
    return region


@pytest.fixture
def here(tmp_path):
    with Local("here", tmp_path) as transport:
        transport.register(2, 1000, FACTS)
        yield transport


def test_pages_and_messages_come_from_another_process(other, here):
    region = connect(here)
    row = np.zeros(1000, np.uint8)
    assert region.exists([KEY]) == [KEY] and region.get([KEY], [row]) == 1 and (row == 5).all()
    assert here.messages(0.0) == []
    big = dict(tokens=list(range(200_000)))
    here.notify("other", big)
    assert here.messages(10.0) == [Message("other", dict(said=big))]


def test_a_process_that_is_killed(other, here, tmp_path):
    """It is known at once, and what it left goes when somebody begins."""
    region = connect(here)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert not here.is_alive("other")
    for call in (lambda: here.connect("other"), lambda: here.notify("other", {})):
        with pytest.raises(TransportError, match="other has died"):
            call()
    assert region.exists([KEY]) == [KEY]  # who reads it goes on
    left = {path.name for path in tmp_path.iterdir() if path.stem == "other"}
    assert left == {"other.pykv-lock", "other.pykv-pages", "other.pykv-socket"}
    with Local("third", tmp_path):
        assert not [path for path in tmp_path.iterdir() if path.stem == "other"]
        assert here.is_alive("here") and here.is_alive("third")
    assert {path.stem for path in tmp_path.iterdir()} == {"here"}
    with pytest.raises(TransportError, match="third is no process that is known here"):
        here.connect("third")


def test_one_that_stands_still_takes_no_message_for_ever(other, here, monkeypatch):
    wait_for(here, "other")
    monkeypatch.setattr(local, "_PATIENCE", 0.2)
    os.kill(other.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TransportError, match="other takes no message"):
        here.notify("other", dict(tokens=[0] * 300_000))
    assert time.monotonic() - began < 5
    assert here.is_alive("other")


def test_names_are_taken_once(here, tmp_path):
    with pytest.raises(ParameterError, match="Local: name is 'here', expected one that no process"):
        Local("here", tmp_path)
    assert here.is_alive("here")
    here.close()
    with Local("here", tmp_path) as again, pytest.raises(ParameterError, match="nothing is regis"):
        again.connect("here")


def test_a_region_is_registered_once(here):
    with pytest.raises(ParameterError, match="there is a region"):
        here.register(2, 1000, FACTS)
    with pytest.raises(ParameterError, match="count is 0"):
        here.register(0, 1000, FACTS)


def test_one_without_a_region(here, tmp_path):
    with Local("bare", tmp_path), pytest.raises(TransportError, match="bare has no region"):
        wait_for(here, "bare", 0.1)


def test_a_region_that_is_cut_short(here, tmp_path):
    with Local("other", tmp_path) as other:
        other.register(4, 1000, FACTS).put(KEY, 2)
        region = here.connect("other")
        assert region.exists([KEY])
        os.truncate(tmp_path / "other.pykv-pages", 4096)
        with pytest.raises(TransportError, match="a region that was cut short"):
            region.get([KEY], [np.zeros(1000, np.uint8)])
        with pytest.raises(TransportError, match="other has rows 4, expected as many as its 4096"):
            here.connect("other")
        os.truncate(tmp_path / "other.pykv-pages", size_before := 4096 + 4000)
        assert (tmp_path / "other.pykv-pages").stat().st_size == size_before


def test_memory_that_cannot_be_had(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Local("here", tmp_path) as transport:
        with pytest.raises(CapacityError, match="Local.register: 6,096 bytes of .*here.pykv-pages"):
            transport.register(2, 1000, FACTS)
        assert not (tmp_path / "here.pykv-pages").exists()


def test_foreign_bytes_are_left_out(here, tmp_path, monkeypatch):
    """And one that sends no end is not waited for."""
    monkeypatch.setattr(local, "_PATIENCE", 0.2)
    monkeypatch.setattr(local, "MOST_BYTES", 1000)

    def say(data, closes=True):
        to = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        to.connect(str(tmp_path / "here.pykv-socket"))
        to.sendall(data)
        if closes:
            to.close()
        return to

    say(b"GET / HTTP/1.1\r\n\r\n")
    say(b"")
    say(bytes(2000))
    open_end = say(b"\x89PYKVTM\n", closes=False)
    say(local.messages.pack(Message("other", dict(a=1))))
    assert here.messages(5.0) == [Message("other", dict(a=1))]
    open_end.close()


def test_a_message_that_nobody_takes_is_not_sent(here, monkeypatch):
    monkeypatch.setattr(messages, "MOST_BYTES", 1000)
    with pytest.raises(ParameterError, match="facts have 1,008 bytes, expected a message of at"):
        here.notify(here.name, dict(text="x" * 996))


def test_silent_senders_do_not_hold_up_the_others(here, tmp_path, monkeypatch):
    """Nor the call, whose time is its own; they are given up after a while."""

    def connect():
        to = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        to.connect(str(tmp_path / "here.pykv-socket"))
        return to

    monkeypatch.setattr(local, "_PATIENCE", 60.0)
    message = Message("other", dict(a=1))
    data = local.messages.pack(message)
    silent = [connect() for _ in range(20)]
    slow = connect()
    slow.sendall(data[:20])
    began = time.monotonic()
    assert here.messages(0.1) == []
    with connect() as to:
        to.sendall(data)
    assert here.messages(30.0) == [message]
    assert time.monotonic() - began < 30
    slow.sendall(data[20:])
    slow.close()
    assert here.messages(5.0) == [message] and len(here._coming) == 20
    silent += [connect() for _ in range(local._BACKLOG)]
    here.messages(0.0)
    assert len(here._coming) == local._BACKLOG
    monkeypatch.setattr(here._coming[0], "_end", 0.0)
    here.messages(0.0)
    assert len(here._coming) == local._BACKLOG - 1
    for to in silent:
        to.close()
    here.messages(0.0)
    assert not here._coming


def test_a_message_that_comes_while_nobody_looks(here, tmp_path, monkeypatch):
    """Of a prompt that a socket cannot hold, to a process that computes another for long."""
    monkeypatch.setattr(local, "_PATIENCE", 0.1)
    message = Message("other", dict(a="x" * 999))
    data = local.messages.pack(message)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
        to.connect(str(tmp_path / "here.pykv-socket"))
        for begin in (0, 500):
            to.sendall(data[begin : begin + 500])
            assert here.messages(0.0) == []
            time.sleep(0.2)
        to.sendall(data[1000:])
    assert here.messages(5.0) == [message]


FORKED = """
import os, sys, time
from pykv.transport import Local
transport = Local("other", sys.argv[1])
if not os.fork():
    transport.close()  # which is its parent's
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_another_process(here, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    try:
        assert here.is_alive("other")
        parent.kill()
        parent.wait()
        assert not here.is_alive("other")
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_one_that_is_closed(tmp_path):
    with Local("other", tmp_path), Local("here", tmp_path) as here:
        here.close()
        for call in (
            lambda: here.register(2, 1000, FACTS),
            lambda: here.connect("other"),
            lambda: here.notify("other", {}),
            lambda: here.messages(0.0),
        ):
            with pytest.raises(ParameterError, match="here is closed, expected one that is open"):
                call()
        assert here.is_alive("other")
        assert {path.stem for path in tmp_path.iterdir()} == {"other"}


def test_files_of_others_stay(tmp_path):
    names = ["poetry.lock", "poetry.pages", "poetry.socket", "a b.pykv-lock", "a b.pykv-pages"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "dead.pykv-lock").write_text("")
    with Local("here", tmp_path):
        left = {path.name for path in tmp_path.iterdir() if path.stem != "here"}
        assert left == set(names)


def test_the_usual_folder_is_no_link(tmp_path, monkeypatch):
    """Which anybody can make where it lies, to another folder of this user."""
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.setattr(local, "default_folder", lambda: tmp_path / "link")
    with pytest.raises(PermissionError, match="it is a link, or another user's"):
        Local("here")
    assert not list((tmp_path / "home").iterdir())
    monkeypatch.setattr(local, "default_folder", lambda: tmp_path / "new")
    with Local("here"):
        assert (tmp_path / "new" / "here.pykv-lock").exists()


def test_a_folder_where_others_can_write(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write there"):
        Local("here", tmp_path)


def test_messages_of_many_at_once(here, tmp_path):
    with Local("other", tmp_path) as other:

        def send(i):
            other.notify("here", dict(number=i))

        threads = [threading.Thread(target=send, args=[i]) for i in range(20)]
        for thread in threads:
            thread.start()
        found = []
        while len(found) < 20:
            found += here.messages(5.0)
        assert sorted(message.facts["number"] for message in found) == list(range(20))
        for thread in threads:
            thread.join()
