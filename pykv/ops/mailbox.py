"""A kernel that stays on the GPU and takes jobs from the host: `x * scale + bias`.

Dimensions: R rows, N elements.
Kernel: kernels_cu/mailbox.cu; pykv/programs/host_rings.py describes what host and kernel write.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, on_gpu
from pykv.checker import checker
from pykv.errors import CapacityError, DeviceError, ParameterError
from pykv.options import check_flag, check_number, check_whole
from pykv.programs.host_rings import SLOTS, RingKernel, State
from pykv.testing import wrong_values

_BLOCK = 256
_STOP, _SCALE = 1, 2  # kinds of commands
_DONE = 1  # result code of success; any other: refused
_MOST_ITERATIONS = 1 << 16
_MOST_STEPS = 1 << 32  # limit of a job, which cannot be interrupted: about 0.1 s
_MOST_SECONDS = 3600.0
_LOOKS = 64  # polls of the ring for each query of the stream, which is slower

VARIANTS: list[dict[str, Any]] = [dict(BLOCK=_BLOCK, RING_SLOTS=SLOTS)]
VARIANTS_SMS = range(0)  # none at import: compiled by the first Mailbox


class Counts(NamedTuple):
    """Jobs of a Mailbox by their states; the first that is not done is running, as the kernel does
    one after another."""

    pending: int
    running: int
    done: int


class Mailbox:
    """Jobs for rows of an array, done by a kernel that is launched once.

    Args:
        x: [R, N] float32, contiguous. Rows of jobs that are done may be read and written as always;
            on a GPU copies of them must have ended before `submit`.
        silence: seconds of the host's silence after which the kernel ends by itself, so that no
            GPU is left spinning: every call of a method is a sign of life. A host that pauses for
            longer needs a larger one.

    Raises:
        ShapeError, DtypeError: of `x`.
        ParameterError: `x` is read-only, or `silence` is not above 0 and up to an hour.

    Use it as a context, which stops the kernel; it has one SM of the GPU until then. The kernel is
    loaded and its memory pinned before it is launched, on a stream that waits for no other. What
    waits for the whole GPU meanwhile (`cudaFree`, `cudaDeviceSynchronize`, the legacy stream, the
    first launch of a kernel, which loads it) waits for the end of the kernel: `silence`, if this
    thread is the one that waits. So call once before what is called beside it. One thread at a time
    may use a Mailbox. NumPy arrays have no kernel: `submit` does the job.

    The idea of a mailbox for a persistent kernel: the project m40-llm.

    >>> x = np.arange(4, dtype=np.float32).reshape(1, 4)
    >>> with pykv.ops.mailbox.Mailbox(x) as box:
    ...     box.wait(box.submit(0, 2.0, 1.0))
    >>> x
    array([[1., 3., 5., 7.]], dtype=float32)
    """

    __reduce_ex__ = cuda.refuse_copy

    def __init__(self, x: Any, *, silence: float = 1.0) -> None:
        _check(x)
        seconds = check_number(_OP, "silence", silence, positive=True)
        if seconds > _MOST_SECONDS:
            raise ParameterError(
                f"{_OP}: silence is {silence}, expected up to {_MOST_SECONDS} seconds"
            )
        self._x, self._silence = x, seconds
        self._submitted = self._taken = 0  # commands sent, results taken
        self._refused: set[int] = set()
        self._is_open, self._is_over = True, False  # whether it takes jobs, its kernel has ended
        self._unsent: tuple[int, list[int]] | None = None  # a command and its number
        self._kernel: RingKernel | None = None
        if x.size and on_gpu(x):
            self._start()

    def _start(self) -> None:
        """Launch the kernel. It waits for what is enqueued on the current stream."""
        R, N = self._x.shape
        kernel = cuda.kernel("mailbox", "mailbox", **VARIANTS[0])
        scalars = dict(first=1, R=R, N=N, limit=int(self._silence * 1e9))
        self._kernel = RingKernel(_OP)
        launch = cuda.Launch(kernel, 1, _BLOCK, scalars, cooperative=True)
        self._kernel.launch(launch, dict(x=self._x))

    def submit(
        self, row: int, scale: float, bias: float, *, iterations: int = 1, n: int | None = None
    ) -> int:
        """Have `x[row, :n] = x[row, :n] * scale + bias` done `iterations` times, and return the
        number of the job.

        Args:
            row: of `x`.
            scale, bias: rounded to float32.
            iterations: 0 to 65536, and at most 2^32 / n.
            n: elements; None: all.

        Raises:
            ParameterError: an argument is out of its range.
            CapacityError: 64 jobs wait for `wait` or `poll` to see them done.
            DeviceError: the kernel has ended.
            UnsupportedError: the call is being prepared.
        """
        cuda.refuse_prepare(_OP, "jobs are numbered")
        R, N = self._x.shape
        row = check_whole(_OP, "row", row, 0, R - 1)
        payload = [
            _SCALE,
            row,
            N if n is None else check_whole(_OP, "n", n, 0, N),
            check_whole(_OP, "iterations", iterations, 0, _MOST_ITERATIONS),
            *(_bits(name, value) for name, value in (("scale", scale), ("bias", bias))),
        ]
        if payload[2] * payload[3] > _MOST_STEPS:
            raise ParameterError(
                f"{_OP}: iterations is {payload[3]}, expected at most {_MOST_STEPS // payload[2]} "
                f"of {payload[2]} elements"
            )
        self._check_open()
        if self._kernel is None:
            values = np.float32(scale), np.float32(bias)
            reference(self._x[row, : payload[2]], *values, iterations)
            self._submitted += 1
            self._taken += 1
            return self._submitted
        return self._post(payload)

    def poll(self, job: int) -> bool:
        """Whether a job is done.

        Raises:
            ParameterError: there is no such job.
            DeviceError: the kernel has ended before it, or refused it.
        """
        job = check_whole(_OP, "job", job, 1, self._submitted)
        self.beat()
        if self._is_done(job):
            return True
        self._check_open(asks=True)
        return False

    def wait(self, job: int) -> None:
        """Return when a job is done; it raises what `poll` does."""
        job = check_whole(_OP, "job", job, 1, self._submitted)
        while True:
            self.beat()
            for _ in range(_LOOKS):
                if self._is_done(job):
                    return
            self._check_open(asks=True)

    def beat(self) -> None:
        """Say that the host lives, without asking for anything."""
        if self._kernel is not None:
            self._kernel.rings.beat()

    def counts(self) -> Counts:
        """How many jobs are in which state."""
        self.beat()
        self._take()
        left = self._submitted - self._taken
        return Counts(max(left - 1, 0), min(left, 1), self._taken)

    def stop(self, *, drain: bool = True) -> None:
        """End the kernel, after the jobs that wait if `drain`; again without effect.

        Raises:
            DeviceError: the kernel has ended by itself, so that jobs were lost.
        """
        check_flag(_OP, "drain", drain)
        self._is_open = False
        if self._is_over or self._kernel is None:
            return
        self._take()
        while drain and self._submitted - self._taken >= SLOTS and not self._kernel.has_ended():
            self.beat()
            self._take()
        if drain:
            self._kernel.rings.post(self._submitted + 1, [_STOP])
        else:
            self._kernel.rings.abort()
        self._kernel.wait()
        self._is_over = True  # last: what interrupts this leaves the rest to another call
        self._take()
        lost = self._submitted - self._taken
        if drain and lost:
            raise DeviceError(self._why_ended(lost))

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.stop(drain=kind is None)

    def _post(self, payload: list[int]) -> int:
        """Write a command and return its number."""
        assert self._kernel is not None
        self._kernel.rings.beat()
        self._take()
        if self._submitted - self._taken >= SLOTS:
            raise CapacityError(
                f"{_OP}: {SLOTS} jobs are not done yet, expected fewer before another"
            )
        self._unsent = self._submitted + 1, payload
        return self._send()

    def _send(self) -> int:
        """Write the command that is not sent, or of which an interrupt may have left parts."""
        assert self._kernel is not None and self._unsent is not None
        number, payload = self._unsent
        self._kernel.rings.post(number, payload)
        self._submitted = number
        self._unsent = None
        return number

    def _is_done(self, job: int) -> bool:
        self._take()
        if job in self._refused:
            raise DeviceError(f"{_OP}: the kernel refused job {job}")
        return job <= self._taken

    def _take(self) -> None:
        """Note the results that have come."""
        if self._kernel is None:
            return
        if self._unsent is not None:
            self._send()
        while self._taken < self._submitted:
            result = self._kernel.rings.result(self._taken + 1)
            if result is None:
                return
            if result[0] != _DONE:
                self._refused.add(self._taken + 1)
            self._taken += 1

    def _check_open(self, *, asks: bool = False) -> None:
        """Raise where no kernel will do another job: by its own word, or if it `asks`, as the
        driver says."""
        if not self._is_open:
            raise DeviceError(f"{_OP}: it is stopped, expected a Mailbox that is not")
        if self._kernel is None:
            return
        if self._kernel.rings.state() > State.RUNNING or (asks and self._kernel.has_ended()):
            self._is_open = False
            self._kernel.wait()
            self._is_over = True
            self._take()
            raise DeviceError(self._why_ended(self._submitted - self._taken))

    def _why_ended(self, lost: int) -> str:
        assert self._kernel is not None
        state = self._kernel.rings.state()
        why = {State.SILENT: f"it heard nothing of the host for {self._silence} s"}
        return (
            f"{_OP}: the kernel has ended, {why.get(state, state.name.lower())}; {lost} jobs are "
            "not done"
        )


_OP = "mailbox.Mailbox"
_check = checker(_OP, ("x",), x=("R N", FLOAT32))


def _bits(name: str, value: Any) -> int:
    of_float = array("f", [check_number(_OP, name, value)])  # three times faster than NumPy
    return int.from_bytes(of_float.tobytes(), sys.byteorder)


def reference(x: Any, scale: Any, bias: Any, iterations: int) -> None:
    """One job, in NumPy."""
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(iterations):
            x *= scale
            x += bias


def cases(rng: np.random.Generator, xp: Any) -> Iterator[tuple[str, float, float]]:
    """The family of `pykv verify`: more jobs than there are slots, whose order shows."""
    x = rng.standard_normal((3, 1000)).astype(np.float32)
    want, got = x.copy(), xp.asarray(x)
    with Mailbox(got, silence=10.0) as box:
        for job in range(SLOTS + 9):
            row, n = job % 3, 1000 - 5 * job
            scale, bias = np.float32(1 + job / 64), np.float32(job)
            for i in range(n):
                for _ in range(2):
                    want[row, i] = np.float32(want[row, i] * scale) + bias
            number = box.submit(row, float(scale), float(bias), iterations=2, n=n)
            if job % 8 == 7:
                box.wait(number)
    yield "jobs", wrong_values(got, want), 0.0
