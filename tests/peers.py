"""A second GPU of the SIMT machine, a driver, and streams that run in either order."""

from collections import deque
from functools import partial
from types import SimpleNamespace

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


class Streams:
    """The current streams of the two SIMT GPUs: what is enqueued waits there until `run`."""

    def __init__(self):
        self.queues = {gpu: deque() for gpu in (simt.DEVICE, simt.OTHER)}
        self.reached = set()  # events

    def enqueue(self, work, *args, **options):
        self.queues[simt.Device.current].append(partial(work, *args, **options))

    def current(self, device=-1):
        gpu = simt.Device.current if device == -1 else device
        return SimpleNamespace(
            ptr=int(simt.Stream.captured is not None),
            device_id=gpu,
            synchronize=self.run,
            record=lambda event: self.queues[gpu].append(partial(self.reached.add, event)),
            wait_event=lambda event: self.queues[gpu].append(event),
        )

    def run(self, first=simt.DEVICE):
        """Do it all, that of one GPU as early as events let it."""
        lanes = sorted(self.queues, key=lambda gpu: gpu != first)
        while any(self.queues.values()):
            gpu = next(gpu for gpu in lanes if self._may_go_on(gpu))  # none: a deadlock
            step = self.queues[gpu].popleft()
            if callable(step):
                with simt.Device(gpu):
                    step()

    def _may_go_on(self, gpu):
        queue = self.queues[gpu]
        return bool(queue) and (callable(queue[0]) or queue[0] in self.reached)


class Event:
    """One that is reached when the stream gets to it."""

    ptr = 0

    def __init__(self, disable_timing=False):
        pass

    def record(self, stream):
        stream.record(self)


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
    return driver, streams
