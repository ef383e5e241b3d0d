"""timing: what counts as device time and as host time, on a GPU and a clock that are made up."""

from types import SimpleNamespace

import numpy as np
import pytest

from pykv.bench import Work, timing

FLUSH_US, READ_US = 50.0, 40.0


class Stream(SimpleNamespace):
    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


class Gpu:
    """A stream that works through what the host enqueues, and the host's clock; microseconds.

    Stands in for CuPy. `run` enqueues a call that keeps the host for `host_us` and the device for
    each of `device_us` in turn.
    """

    def __init__(self, host_us=8.0, device_us=(100.0,), record_us=0.0):
        self.host, self.device, self.log, self.calls = 0.0, 0.0, [], 0
        self.host_us, self.device_us, self.record_us = host_us, device_us, record_us
        self.capturing = False
        gpu = self

        class Event:
            def record(self, stream):
                assert stream is gpu.stream
                gpu.host += gpu.record_us
                gpu.log.append("event")
                gpu.device = max(gpu.device, gpu.host)
                self.at = gpu.device

        self.stream = Stream(
            synchronize=self.synchronize,
            begin_capture=self.begin_capture,
            end_capture=self.end_capture,
        )
        self.cuda = SimpleNamespace(
            Stream=lambda non_blocking: self.stream if non_blocking else None,
            Event=Event,
            get_elapsed_time=lambda start, stop: (stop.at - start.at) / 1e3,
            Device=lambda: SimpleNamespace(attributes={"L2CacheSize": 1 << 20}),
        )

    def clock(self):
        return self.host / 1e6

    def enqueue(self, name, host_us, device_us):
        self.log.append(name)
        self.host += host_us
        self.device = max(self.device, self.host) + device_us

    def run(self):
        assert not self.capturing  # a graph is made of its own calls
        self.enqueue("run", self.host_us, self.device_us[self.calls % len(self.device_us)])
        self.calls += 1

    def synchronize(self):
        self.log.append("wait")
        self.host = max(self.host, self.device)

    def begin_capture(self):
        self.capturing = True

    def end_capture(self):
        self.capturing = False
        return SimpleNamespace(launch=lambda: self.enqueue("replay", 1.0, 30.0))

    def zeros(self, shape, dtype):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = SimpleNamespace(
            memset_async=lambda value, size: self.enqueue(f"flush {size}", 1.0, FLUSH_US)
        )
        return SimpleNamespace(nbytes=nbytes, data=memory)


def timed(gpu, samples=20, warmup=timing.WARMUP, prepared=None, **options):
    timer = timing.Timer(gpu, samples=samples, warmup=warmup, clock=gpu.clock)
    return timer.time(work_of(gpu.run, **options), prepared)


def work_of(run, **options):
    return Work(run, check=lambda: True, bytes=0, **options)


def test_device_time_is_between_the_events_and_leaves_the_host_out():
    gpu = Gpu()
    times = timed(gpu)
    assert times.device_us == pytest.approx([100.0] * 20)
    assert times.host_us == pytest.approx([8.0] * 20)
    assert (times.warmup, times.flush_bytes, times.graph) == (timing.WARMUP, 4 << 20, 0)


def test_every_call_is_flushed_before_its_events_and_nothing_waits_in_between():
    gpu = Gpu()
    timed(gpu, samples=30)
    calls = timing.WARMUP + 30
    one = [f"flush {4 << 20}", "event", "run", "event"]
    assert gpu.log[: 4 * calls + 1] == one * calls + ["wait"]
    assert gpu.log[4 * calls + 1 :] == ["wait", "run", "run"] * calls + ["wait"]


def test_warm_up_calls_do_not_count():
    slow_start = [900.0] * timing.WARMUP + [100.0] * 1000
    assert timed(Gpu(device_us=slow_start)).device_us == pytest.approx([100.0] * 20)
    each = [float(100 + i) for i in range(1000)]
    want = each[timing.WARMUP : timing.WARMUP + 20]
    assert timed(Gpu(device_us=each)).device_us == pytest.approx(want)


@pytest.mark.parametrize("host_us, wait_us", [(140.0, 0.0), (170.0, 21.0)])
def test_a_host_slower_than_the_device_shows(host_us, wait_us):
    """A flush and a call take the device 150 us and the host 1 us + `host_us`."""
    times = timed(Gpu(host_us=host_us))
    assert times.device_us == pytest.approx([100.0 + wait_us] * 20)
    assert times.host_us == pytest.approx([host_us] * 20)


@pytest.mark.parametrize("calls", [1, 6])
def test_a_graph_is_captured_once_and_replayed(calls):
    """Its device time is shared by its calls; host time is that of a call without it."""
    gpu = Gpu(host_us=70.0)
    captured = [lambda i=i: gpu.log.append(f"captured {i}") for i in range(calls)]
    times = timed(gpu, graph=captured)
    first = gpu.log.index("captured 0")
    assert gpu.log[first : first + calls] == [f"captured {i}" for i in range(calls)]
    assert sum(entry.startswith("captured") for entry in gpu.log) == calls
    assert gpu.log[:first] == ["run"] and "replay" not in gpu.log[:first]
    assert gpu.log.count("replay") == timing.WARMUP + 20
    assert times.device_us == pytest.approx([30.0 / calls] * 20)
    assert times.host_us == pytest.approx([70.0] * 20) and times.graph == calls


@pytest.mark.parametrize(
    "nbytes, calls",
    [(0, timing.MAX_CALLS), (1000, timing.MAX_CALLS), (1 << 20, 4), ((1 << 20) + 1, 4)]
    + [((1 << 20) - 1, 5), (4 << 20, 1), (1 << 40, 1)],
)
def test_the_calls_of_a_graph_move_more_than_the_cache_holds(nbytes, calls):
    """Four times an L2 of 1 MiB, which is asked of the device."""
    assert timing.calls_of(Gpu(), nbytes) == calls
    assert timing.calls_of(np, nbytes) == 1


def test_prepared_calls_are_timed_on_the_host_alone():
    gpu = Gpu(host_us=9.0)
    times = timed(gpu, prepared=lambda: gpu.enqueue("ready", 2.0, 100.0))
    assert times.prepared_us == pytest.approx([2.0] * 20)
    assert times.host_us == pytest.approx([9.0] * 20)
    assert times.device_us == pytest.approx([100.0] * 20)
    assert list(timed(Gpu()).prepared_us) == []


def test_calls_with_a_clock_of_their_own_say_their_seconds():
    """The first warms up; nothing is flushed, and the device is not asked."""
    seconds = iter([9.0, 1.0, 2.0, 3.0])
    times = timing.Timer(np).time(work_of(lambda: next(seconds), clocked=True, samples=3))
    assert times.device_us == [1e6, 2e6, 3e6] and (times.warmup, times.wall) == (1, True)


def test_a_call_that_only_reads_finds_clean_lines(monkeypatch):
    gpu = Gpu()
    read = []

    def fake_read(x, sums):
        read.append(x.nbytes)
        gpu.enqueue("clean", 1.0, READ_US)

    monkeypatch.setattr(timing.bandwidth, "read", fake_read)
    times = timed(gpu, reads_only=True)
    assert gpu.log[:5] == [f"flush {4 << 20}", "clean", "event", "run", "event"]
    assert set(read) == {4 << 20} and len(read) == timing.WARMUP + 20
    assert times.device_us == pytest.approx([100.0] * 20)


def test_wall_time_is_from_the_call_to_its_end_on_the_device():
    gpu = Gpu()
    times = timed(gpu, warmup=3, wall=True)
    assert times.device_us == pytest.approx([8.0 + 100.0] * 20)
    assert times.host_us == pytest.approx([8.0] * 20)
    assert (times.warmup, times.wall) == (3, True)
    assert gpu.log == [f"flush {4 << 20}", "wait", "run", "wait"] * 23
    assert not timed(Gpu()).wall


def test_the_warm_up_can_be_longer():
    gpu = Gpu(device_us=[900.0] * 9 + [100.0] * 1000)
    assert timed(gpu, warmup=9).device_us == pytest.approx([100.0] * 20)


def test_without_a_gpu_calls_take_wall_time():
    seconds = iter(range(1000))
    calls = []
    timer = timing.Timer(np, samples=25, clock=lambda: float(next(seconds)) ** 2 * 1e-6)
    times = timer.time(work_of(lambda: calls.append(1)))
    first = 2 * timing.WARMUP  # each call looks at the clock twice
    want = [(first + 2 * i + 1) ** 2 - (first + 2 * i) ** 2 for i in range(25)]
    assert times.device_us == pytest.approx(want) and len(calls) == timing.WARMUP + 25
    assert times.host_us == [] and times.flush_bytes == 0 and times.wall


def test_percentiles_by_hand():
    """0 ... 20 shuffled: the 5th percentile is 1, the 95th 19; of 1 and 2 they lie in between."""
    samples = [float(5 * i % 21) for i in range(21)]
    assert timing.summarize(samples) == dict(median=10.0, p5=1.0, p95=19.0)
    two = timing.summarize([2.0, 1.0])
    assert two == pytest.approx(dict(median=1.5, p5=1.05, p95=1.95))
    assert set(timing.summarize([3.0]).values()) == {3.0}
