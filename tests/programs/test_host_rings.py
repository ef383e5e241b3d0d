"""host_rings: a kernel that runs beside the host, from its launch to its end."""

import gc
import time

import pytest

from pykv import cuda
from pykv.errors import DeviceError, UnsupportedError
from pykv.programs import host_rings
from pykv.programs.host_rings import State
from tests.ops.test_resident_program import all_of, chain, expected, of_row
from tests.simt import cupy as simt


@pytest.fixture
def made(device, rng, hopper):
    """A program of the SIMT machine."""
    return chain(device, rng, [5])


pytestmark = pytest.mark.parametrize("device", ["simt"], indirect=True)


def test_a_launch_comes_behind_earlier_work_and_ahead_of_later_work(made, monkeypatch):
    """The machine's streams have no order of their own."""
    seen, kernel = [], made.program._kernel
    current = simt.cuda.get_current_stream()
    current.wait_event = lambda event: seen.append(("waits for", event.stream))
    monkeypatch.setattr(simt.cuda, "get_current_stream", lambda: current)
    monkeypatch.setattr(host_rings.cuda, "synchronize", lambda: seen.append("synchronizes"))
    monkeypatch.setattr(simt.Event, "record", lambda self, stream: setattr(self, "stream", stream))
    launch = made.program._launch
    monkeypatch.setattr(
        made.program,
        "_launch",
        lambda arrays: (seen.append(("launches on", simt.Stream.within[-1])), launch(arrays)),
    )
    made.program.launch(2, [10**6], [[]])
    all_of(made.program)
    stream = kernel._stream
    assert seen == ["synchronizes", ("launches on", stream), ("waits for", stream)]


def test_a_kernel_that_nobody_waits_for_is_ended(made):
    program = made.program
    rings, stream = program._kernel.rings, program._kernel._stream
    program.launch(64, [10**6], [[]])
    while rings.state() == State.STARTING:
        time.sleep(0.001)
    del program, made.program
    gc.collect()
    assert stream.done and rings.state() == State.ABORTED


def test_results_that_come_just_before_the_end_are_not_lost(made):
    program, kernel = made.program, made.program._kernel

    def has_ended():
        while not kernel._stream.done:
            time.sleep(0.001)
        return True

    kernel.has_ended = has_ended
    program.launch(20, [10**6], [[]])
    assert of_row(all_of(program), 0) == (expected(made, 0, 20), [])


def test_launches_are_of_one_gpu_and_not_captured(made, monkeypatch):
    launch = lambda: (made.program.launch(2, [10**6], [[]]), all_of(made.program))  # noqa: E731
    step = cuda.graph(launch)
    with pytest.raises(UnsupportedError, match="ResidentProgram: cannot be"):
        for _ in range(2):  # one runs it, one captures
            step()
    with monkeypatch.context() as patched:
        patched.setattr(cuda, "current_device", lambda: 7)
        with pytest.raises(DeviceError, match="GPU 7 is the current one, expected GPU"):
            launch()
    launch()
