"""A second GPU of the SIMT machine, a driver, and streams that run in either order."""

from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from pykv import cuda, ranges
from tests.simt import cupy as simt


class Driver:
    """What peers.py asks of cuda.bindings.driver; notes what it gives access to."""

    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="a device")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="both")

    def __init__(self, used=(simt.DEVICE, simt.OTHER)):
        self.used = set(used)  # GPUs that have a context
        self.opened, self.pools, self.status = [], [], "CUDA_SUCCESS"
        self.pool_status = "CUDA_SUCCESS"

    def CUmemAccessDesc(self):
        return SimpleNamespace(location=SimpleNamespace())

    def cuCtxGetCurrent(self):
        return _status(), simt.Device.current

    def cuCtxEnablePeerAccess(self, context, flags):
        assert flags == 0
        self.opened.append((simt.Device.current, context))
        return (_status(self.status),)

    def cuDevicePrimaryCtxGetState(self, device):
        return _status(), 0, int(device in self.used)

    def cuDeviceGetDefaultMemPool(self, device):
        return _status(self.pool_status), f"default of {device}"

    def cuDeviceGetMemPool(self, device):
        return _status(), f"current of {device}"

    def cuMemPoolSetAccess(self, pool, accesses, count):
        assert count == len(accesses)
        self.pools += [(pool, x.location.id, x.location.type, x.flags) for x in accesses]
        return (_status(),)


def _status(name="CUDA_SUCCESS"):
    return SimpleNamespace(name=name)


class Record(NamedTuple):
    """Of an event in a stream: each time that it is recorded is a mark of its own."""

    mark: object


class Wait(NamedTuple):
    mark: object


class Event:
    """One that is reached when the stream gets to where it was recorded last."""

    ptr, mark, streams = 0, None, None

    def __init__(self, disable_timing=False):
        pass

    def record(self, stream):
        self.streams = stream.streams
        stream.record(self)

    @property
    def done(self):
        return self.mark is None or self.mark in self.streams.reached

    def synchronize(self):
        if not self.done:
            self.streams.run()


class Lane:
    """A stream of a GPU: what is enqueued waits there until `Streams.run`."""

    def __init__(self, streams, gpu, number):
        self.streams, self.gpu, self.number = streams, gpu, number
        self.queue, self.before = deque(), []
        self.device_id, self.synchronize = gpu, streams.run

    @property
    def ptr(self):
        return int(simt.Stream.captured is not None)

    def __enter__(self):
        self.before.append(self.streams.lanes[self.gpu])
        self.streams.lanes[self.gpu] = self

    def __exit__(self, *error):
        self.streams.lanes[self.gpu] = self.before.pop()

    def add(self, item):
        captured = simt.Stream.captured
        if captured is None:
            self.queue.append(item)
        else:
            captured.append((self, item))

    def record(self, event):
        event.mark = object()
        self.add(Record(event.mark))

    def wait_event(self, event):
        if event.mark is not None:
            self.add(Wait(event.mark))

    def begin_capture(self):
        simt.Stream.captured = []

    def end_capture(self):
        """A graph, whose launch puts what came to this stream into the current one, and what came
        to others there; all of these have come back to this one, as CUDA wants it."""
        items, simt.Stream.captured = simt.Stream.captured, None
        last = {lane: item for lane, item in items if lane is not self}
        joined = {item.mark for lane, item in items if lane is self and isinstance(item, Wait)}
        assert all(isinstance(x, Record) and x.mark in joined for x in last.values()), "unjoined"

        def launch():
            marks = {item.mark: object() for _, item in items if isinstance(item, Record)}
            for lane, item in items:
                if not callable(item):
                    item = type(item)(marks[item.mark])
                (self.streams.current() if lane is self else lane).add(item)

        return SimpleNamespace(launch=launch)


class Streams:
    """The streams of the two SIMT GPUs, of which each has a current one."""

    def __init__(self):
        self.made, self.reached = [], set()
        self.lanes = {gpu: self.make(gpu) for gpu in (simt.DEVICE, simt.OTHER)}

    def make(self, gpu=None):
        gpu = simt.Device.current if gpu is None else gpu
        self.made.append(Lane(self, gpu, len(self.made)))
        return self.made[-1]

    def current(self, device=-1):
        return self.lanes[simt.Device.current if device == -1 else device]

    def enqueue(self, work, *args, **options):
        self.current().add(partial(work, *args, **options))

    def run(self, first=simt.DEVICE, until=None, newest=False):
        """Do what waits: that of one GPU as early as events let it, of its streams that made first,
        or the newest.

        Args:
            until: a stream; once that has nothing left, others may wait on. None: do it all.
        """
        sign = -1 if newest else 1
        lanes = sorted(self.made, key=lambda lane: (lane.gpu != first, sign * lane.number))
        while any(lane.queue for lane in ([until] if until else lanes)):
            lane = next(lane for lane in lanes if self._may_go_on(lane))  # none: a deadlock
            item = lane.queue.popleft()
            if isinstance(item, Record):
                self.reached.add(item.mark)
            elif callable(item):
                with simt.Device(lane.gpu):
                    item()

    def _may_go_on(self, lane):
        first = lane.queue[0] if lane.queue else Wait(None)
        return not isinstance(first, Wait) or first.mark in self.reached


def _end_of_allocation(address):
    ((_, end),) = simt.allocations_at(np.array([address], np.uint64))
    return end


def second_gpu(monkeypatch):
    """Give the SIMT machine its second GPU; returns driver and streams."""
    driver, streams = Driver(), Streams()
    runtime = simt.cuda.runtime
    monkeypatch.setattr(cuda.peers, "_enabled", set())
    monkeypatch.setattr(cuda.peers, "_driver", lambda: driver)
    monkeypatch.setattr(runtime, "getDeviceCount", lambda: simt.OTHER + 1)
    monkeypatch.setattr(runtime, "deviceCanAccessPeer", lambda a, b: 1, raising=False)
    set_device = partial(setattr, simt.Device, "current")
    monkeypatch.setattr(runtime, "setDevice", set_device, raising=False)
    copy = partial(streams.enqueue, simt.copy_bytes)
    monkeypatch.setattr(
        runtime, "memcpyAsync", lambda to, at, size, kind, stream: copy(to, at, size)
    )
    monkeypatch.setattr(
        *(runtime, "memcpyPeerAsync"),
        lambda to, target, at, source, size, stream: copy(to, at, size),
        raising=False,
    )
    monkeypatch.setattr(simt.Device, "synchronize", lambda self: None, raising=False)
    monkeypatch.setattr(ranges, "end_of_allocation", _end_of_allocation)
    monkeypatch.setattr(simt, "enqueue", streams.enqueue)
    monkeypatch.setattr(simt.cuda, "get_current_stream", streams.current)
    monkeypatch.setattr(simt.cuda, "Event", Event)
    monkeypatch.setattr(simt.cuda, "Stream", lambda non_blocking: streams.make())
    return driver, streams


def synchronise_as_cupy(monkeypatch, streams, **order):
    """Let the host wait for the current stream where it reads an array, and for no other; uploads
    come in the stream's order. `order` is of Streams.run."""

    def wait():
        streams.run(**order, until=streams.current())

    def waits(call):
        def waiting(*args, **options):
            wait()
            return call(*args, **options)

        return waiting

    def attribute(self, name):
        found = get_attribute(self, name)
        return waits(found) if name in ("tolist", "astype", "copy", "item", "all", "any") else found

    get_attribute, array = simt.ndarray.__getattr__, simt.array
    for name in ("get", "__bool__", *(f"__{name}__" for name in simt.OPERATORS.split())):
        monkeypatch.setattr(simt.ndarray, name, waits(getattr(simt.ndarray, name)))
    monkeypatch.setattr(simt.ndarray, "__getattr__", attribute)
    monkeypatch.setattr(
        *(simt.ndarray, "set"),
        lambda self, values, stream=None: streams.enqueue(
            self.host.__setitem__, ..., np.array(values)
        ),
    )
    monkeypatch.setattr(
        simt, "array", lambda x, dtype=None: (waits(array) if _is_device(x) else array)(x, dtype)
    )
    monkeypatch.setattr(simt.cublas, "gemmEx", waits(simt.cublas.gemmEx))


def _is_device(x):
    return isinstance(x, simt.ndarray)
