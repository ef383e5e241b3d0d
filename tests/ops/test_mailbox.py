"""mailbox: jobs for a kernel that stays on the GPU."""

import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import (
    CapacityError,
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
)
from pykv.ops import mailbox as op
from pykv.ops.mailbox import Counts, Mailbox
from pykv.programs import host_rings
from tests.helpers import assert_same_bits, to_numpy
from tests.test_interrupts import interrupted

SLOW = dict(silence=30.0)  # for machines that run many tests at once
HOST = "pykv.ops.mailbox", "pykv.programs.host_rings"


def test_jobs_are_done_in_their_order(xp, rng):
    x = rng.standard_normal((2, 300)).astype(np.float32)
    want, got = x.copy(), xp.asarray(x)
    with Mailbox(got, **SLOW) as box:
        numbers = [box.submit(1, 3.0, 1.5, iterations=2), box.submit(1, 0.1, 0.0, n=7)]
        numbers += [box.submit(0, 1.0, 0.0, iterations=0), box.submit(0, 5.0, 1.0, n=0)]
        box.wait(numbers[-1])
        assert all(map(box.poll, numbers)) and numbers == [1, 2, 3, 4]
        assert box.counts() == Counts(0, 0, 4)
    for _ in range(2):
        for i in range(300):
            want[1, i] = np.float32(want[1, i] * np.float32(3)) + np.float32(1.5)
    want[1, :7] = [np.float32(v * np.float32(0.1)) for v in want[1, :7]]
    assert_same_bits(got, want)


def test_more_jobs_than_slots(xp):
    """Twice around both rings, and the host takes results late."""
    x = xp.asarray(np.zeros((1, 1), np.float32))
    with Mailbox(x, **SLOW) as box:
        for i in range(150):
            job = box.submit(0, 1.0, 1.0)
            if i % 60 == 59:
                box.wait(job)
        box.wait(job)
    assert_same_bits(x, np.array([[150]], np.float32))


def test_stop_drains_and_is_idempotent(xp):
    x = xp.asarray(np.zeros((1, 8), np.float32))
    box = Mailbox(x, **SLOW)
    for _ in range(5):
        box.submit(0, 1.0, 1.0)
    box.stop()
    box.stop()
    assert_same_bits(x, np.full((1, 8), 5, np.float32))
    assert box.counts() == Counts(0, 0, 5)
    with pytest.raises(DeviceError, match="mailbox.Mailbox: it is stopped"):
        box.submit(0, 1.0, 1.0)


def test_a_full_ring_is_refused(device):
    """No slot is written again before its message has been taken."""
    x = device.asarray(np.zeros((1, 4), np.float32))
    with Mailbox(x, **SLOW) as box:
        box._take = lambda: None  # a host that takes no results
        for _ in range(host_rings.SLOTS):
            box.submit(0, 1.0, 1.0)
        with pytest.raises(CapacityError, match="64 jobs are not done yet"):
            box.submit(0, 1.0, 1.0)
        del box._take
        box.wait(64)
        box.wait(box.submit(0, 1.0, 1.0))
    assert_same_bits(x, np.full((1, 4), 65, np.float32))


def test_a_silent_host_ends_the_kernel(device):
    x = device.asarray(np.zeros((1, 4), np.float32))
    box = Mailbox(x, silence=0.05)
    box.wait(box.submit(0, 1.0, 1.0))
    deadline = time.monotonic() + 30
    while not box._kernel.has_ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(DeviceError, match="the kernel has ended, it heard nothing of the host for"):
        box.submit(0, 1.0, 1.0)
    box.stop()
    with Mailbox(x, **SLOW) as other:  # the GPU is free for another
        other.wait(other.submit(0, 1.0, 1.0))
    assert_same_bits(x, np.full((1, 4), 2, np.float32))


def test_beats_keep_the_kernel(device):
    x = device.asarray(np.zeros((1, 4), np.float32))
    with Mailbox(x, silence=2.0) as box:
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            box.beat()
            time.sleep(0.01)
        box.wait(box.submit(0, 1.0, 1.0))


def test_a_job_that_is_interrupted_is_done_once_or_not_at_all(device):
    """Wherever, and jobs and stops that follow go on behind it."""
    x = device.asarray(np.zeros((1, 4), np.float32))
    for at in itertools.count():
        x.fill(0)
        box = Mailbox(x, silence=2.0)
        with suppress(KeyboardInterrupt), interrupted(at, HOST) as left:
            box.submit(0, 1.0, 1.0)
        box.wait(box.submit(0, 1.0, 10.0))
        with suppress(KeyboardInterrupt), interrupted(at, HOST):
            box.submit(0, 1.0, 1.0)
        with suppress(KeyboardInterrupt), interrupted(at, HOST):
            box.stop()
        box.stop()
        others = box.counts().done - 1
        assert box._kernel.has_ended() and others >= (2 if left[0] >= 0 else 0)
        assert_same_bits(x, np.full((1, 4), 10 + others, np.float32))
        if left[0] >= 0:
            break
    assert at > 20


def test_what_the_host_let_pass_the_kernel_refuses(device):
    x = device.asarray(np.zeros((2, 4), np.float32))
    with Mailbox(x, **SLOW) as box:
        wrong = [[op._SCALE, 2, 4, 1], [op._SCALE, 0, 5, 1], [7, 0, 1, 1]]
        jobs = [box._post([*payload, 0, 0]) for payload in wrong]
        for job in jobs:
            with pytest.raises(DeviceError, match=f"the kernel refused job {job}"):
                box.wait(job)
        box.wait(box.submit(1, 1.0, 2.0))
    assert_same_bits(x, np.array([[0] * 4, [2] * 4], np.float32))


def test_an_error_in_the_context_drops_what_waits(device):
    x = device.asarray(np.zeros((1, 4), np.float32))
    with pytest.raises(KeyError), Mailbox(x, **SLOW) as box:
        raise KeyError
    assert box._kernel.has_ended() and box._kernel.rings.state() == host_rings.State.ABORTED


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(row=1), ParameterError, "row is 1, expected 0 to 0"),
        (dict(n=5), ParameterError, "n is 5, expected 0 to 4"),
        (dict(iterations=1 << 17), ParameterError, "iterations is 131072, expected 0 to 65536"),
        (
            dict(iterations=8, n=4),  # where a job may have 2^4 steps
            ParameterError,
            "iterations is 8, expected at most 4 of 4 elements",
        ),
        (dict(scale=float("nan")), ParameterError, "scale is nan"),
        (dict(bias=1e39), ParameterError, "bias is 1e.39, expected a finite number of float32"),
        (dict(scale="2"), DtypeError, "scale"),
    ],
    ids=str,
)
def test_wrong_jobs(xp, monkeypatch, change, error, text):
    monkeypatch.setattr(op, "_MOST_STEPS", 16)
    with Mailbox(xp.asarray(np.zeros((1, 4), np.float32)), **SLOW) as box:
        with pytest.raises(error, match=f"mailbox.Mailbox: {text}"):
            box.submit(**(dict(row=0, scale=1.0, bias=0.0) | change))
        with pytest.raises(ParameterError, match="job is 1, expected"):
            box.poll(1)


def test_floats_overflow_without_a_warning(xp):
    x = xp.asarray(np.array([[1, 0]], np.float32))
    with Mailbox(x, **SLOW) as box:
        box.wait(box.submit(0, 1e30, 0.0, iterations=2))
        box.wait(box.submit(0, 1.0, 1.0))
        assert_same_bits(x, np.array([[np.inf, 1]], np.float32))
        box.wait(box.submit(0, 0.0, 0.0))
    assert np.isnan(to_numpy(x)[0]).tolist() == [True, False]


def test_jobs_are_not_prepared(xp):
    x = xp.asarray(np.ones((1, 4), np.float32))
    with Mailbox(x, **SLOW) as box:
        with pytest.raises(UnsupportedError, match="mailbox.Mailbox: cannot be prepared"):
            cuda.prepare(box.submit, 0, 2.0, 0.0)
        assert box.counts() == Counts(0, 0, 0)
    assert_same_bits(x, np.ones((1, 4), np.float32))


def test_wrong_arrays(xp):
    with pytest.raises(DtypeError, match="x has dtype int32, expected float32"):
        Mailbox(xp.asarray(np.zeros((1, 4), np.int32)))
    with pytest.raises(ShapeError):
        Mailbox(xp.asarray(np.zeros(4, np.float32)))
    for silence in (0.0, 1e4):
        with pytest.raises(ParameterError, match="silence"):
            Mailbox(xp.asarray(np.zeros((1, 4), np.float32)), silence=silence)


def test_a_read_only_array_is_refused():
    x = np.zeros((1, 4), np.float32)
    x.flags.writeable = False
    with pytest.raises(ParameterError, match="mailbox.Mailbox: x is read-only, expected"):
        Mailbox(x)


def test_words_of_a_ring(device):
    """By hand: message 65 is in slot 1 again, and half a message is none."""
    rings = host_rings.Rings()
    rings.post(65, [7, 0xFFFFFFFF])
    words = rings._words
    assert (
        words[32 + 8 : 32 + 16].tolist() == [65 << 32 | 7, 65 << 32 | 0xFFFFFFFF] + [65 << 32] * 6
    )
    at = 32 + 64 * 8 + 8
    for i in range(7):
        words[at + i] = 65 << 32 | i
    assert rings.result(65) is None and rings.result(1) is None
    words[at + 7] = 65 << 32 | 7
    assert rings.result(65) == list(range(8))
    words[16] = 2
    assert rings.state() == host_rings.State.STOPPED


KILLED = """
import os, signal, cupy, numpy as np
from pykv.ops.mailbox import Mailbox
box = Mailbox(cupy.zeros((1, 4), np.float32), silence=1.0)
box.wait(box.submit(0, 1.0, 1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.gpu
@pytest.mark.skipif(os.name == "nt", reason="has no SIGKILL")
def test_a_host_that_is_killed_leaves_the_gpu_usable():
    cupy = pytest.importorskip("cupy")
    done = subprocess.run([sys.executable, "-c", KILLED], timeout=120)
    assert done.returncode == -signal.SIGKILL
    x = cupy.zeros((1, 4), np.float32)
    with Mailbox(x, **SLOW) as box:
        box.wait(box.submit(0, 1.0, 1.0))
    assert_same_bits(x, np.ones((1, 4), np.float32))


@pytest.mark.gpu
def test_memory_is_allocated_beside_a_kernel():
    """A growing pool of CuPy, and work of other streams, by kernels that are loaded."""
    cupy = pytest.importorskip("cupy")
    x = cupy.zeros((1, 4), np.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:

        def grow(size):
            blocks = [cupy.full(size, i, np.float32) for i in range(8)]
            assert float(sum(block[0] for block in blocks)) == 28
            stream.synchronize()

        grow(1)  # loads what it calls: a kernel's first launch waits for all that run
        with Mailbox(x, **SLOW) as box:
            grow(1 << 22)
            box.wait(box.submit(0, 1.0, 1.0))


def _faulty(**change):
    """A Mailbox whose jobs have another argument."""

    def plant(cls):
        class Faulty(cls):
            def submit(self, *args, **options):
                return super().submit(*args, **{**options, **change})

        return Faulty

    return plant


def _in_other_order(reference):
    """The bias first."""

    def faulty(x, scale, bias, iterations):
        for _ in range(iterations):
            x += bias
            x *= scale

    return faulty


# Faults that `pykv verify` must see, in the kernel's jobs and in the reference.
FAULTS = {
    "mailbox: one iteration": (op, "Mailbox", _faulty(iterations=1)),
    "mailbox: whole rows": (op, "Mailbox", _faulty(n=None)),
}
REFERENCE_FAULTS = [(op, "reference", _in_other_order)]
