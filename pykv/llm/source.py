"""The bytes of a model's tensors, by pieces of whole rows: on the host in new memory, to a GPU
through a little pinned memory, into which pieces are read while earlier ones are on their way.

So loading takes no more of the host's memory than a few pieces, whatever the size of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from pykv.llm.gguf import ModelFile, TensorInfo
from pykv.tiers import host

_PIECE = 8 << 20  # bytes read at once, or a row if that is more
_READERS = 3  # threads: one alone reads the file cache more slowly than the link copies


class _Slot(NamedTuple):
    """Pinned memory, and the event behind which it may be written to."""

    memory: np.ndarray
    free: Any


class Source:
    """Reads tensors of a file; a context, at whose end nothing is on its way any more.

    Args:
        file: the file.
        xp: `numpy` or `cupy`; where the bytes go, on CuPy's current GPU.
        progress: called with the bytes of each piece that has been read.

    Raises:
        CapacityError: the host has no memory that can be pinned for so many pieces, of 32 MiB but
            for small models.
    """

    def __init__(
        self, file: ModelFile, xp: Any, progress: Callable[[int], object] = lambda nbytes: None
    ) -> None:
        self.xp, self._progress = xp, progress
        self._slots: deque[_Slot] = deque()
        if xp is not np:
            infos = file.tensors.values()
            nbytes = max(min(info.nbytes, max(info.row_bytes, _PIECE)) for info in infos)
            rows = host.allocate("LLM", "reading the model", xp, _READERS + 1, nbytes)
            self._slots += [_Slot(row, xp.cuda.Event()) for row in rows]
            self._threads = ThreadPoolExecutor(_READERS)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        if self._slots:
            self._threads.shutdown(cancel_futures=True)
        for slot in self._slots:
            slot.free.synchronize()

    def pieces(self, info: TensorInfo, on_host: bool = False) -> Iterator[tuple[int, Any]]:
        """Rows of a tensor in order: the number of the first of them, and [rows, row_bytes] uint8,
        new, of the host if `on_host`; else for what is enqueued on CuPy's current stream.

        Raises:
            FormatError: the file is not what it was when its header was read.
        """
        step = max(1, _PIECE // max(1, info.row_bytes))
        parts = [range(n, min(n + step, info.rows)) for n in range(0, info.rows, step)]
        if on_host or not self._slots:
            for rows in parts:
                blocks = np.empty((len(rows), info.row_bytes), np.uint8)
                info.read(blocks, rows.start * info.row_bytes)
                self._progress(blocks.nbytes)
                yield rows.start, blocks
            return
        stream, ahead = self.xp.cuda.get_current_stream(), iter(parts)
        reading = deque(self._begin(info, rows) for rows in islice(ahead, _READERS))
        while reading:
            rows, slot, read = reading.popleft()
            read.result()
            blocks = self.xp.empty((len(rows), info.row_bytes), np.uint8)
            blocks.set(slot.memory[: blocks.nbytes].reshape(blocks.shape), stream)
            slot.free.record(stream)
            reading.extend(self._begin(info, rows) for rows in islice(ahead, 1))
            self._progress(blocks.nbytes)
            yield rows.start, blocks

    def _begin(self, info: TensorInfo, rows: range) -> tuple[range, _Slot, Future[None]]:
        """Rows that are being read, and into what: the slot whose copy began longest ago."""
        self._slots.rotate()
        slot = self._slots[0]
        slot.free.synchronize()
        data = slot.memory[: len(rows) * info.row_bytes]
        return rows, slot, self._threads.submit(info.read, data, rows.start * info.row_bytes)
