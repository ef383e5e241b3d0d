"""Pages of one sequence on their way back from tiers, while the model computes others.

    begin     Tiers.begin finds the pages; from then on their rows of the host tier are held, except
              those far ahead that are in files as well
    advance   between two steps: takes files that were read, copies rows to the cache, and has
              threads read the next files. A page that fails ends the fetch there; the model
              computes the rest
    cancel    the sequence ends: copies under way finish, and the host does not wait for them

Threads read files. On a GPU, copies are asynchronous and complete by events: the host waits for
files alone, and only on request.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pykv import interrupts
from pykv.tiers.moves import Moved

if TYPE_CHECKING:
    from pykv.tiers.stack import Tiers


class Fetch:
    """Pages that tiers have, and the sequence that waits for them.

    Args:
        tiers: where the pages are.
        keys: of the pages to bring back, which follow those that the sequence has.
        pages: the sequence's page list. The caller extends it in place; the pages behind the
            present ones receive the contents, in the order of `keys`.

    Attributes:
        done: how many pages of the sequence, from its start, hold their contents for work enqueued
            on the current stream.
        stop: what `done` will be at the end.
    """

    def __init__(self, tiers: Tiers, keys: list[bytes], pages: list[int]) -> None:
        self._tiers, self._keys, self._pages = tiers, keys, pages
        self._start = self.done = self._sent = len(pages)
        self.stop = self._start + len(keys)
        self._index = {key: i for i, key in enumerate(keys)}
        self._moving: deque[tuple[int, Moved]] = deque()  # pages, and their copy
        self._asked: set[bytes] = set()  # keys that threads are reading

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.done >= self.stop

    def holds(self, key: bytes) -> bool:
        """Whether the row of a page must not be evicted."""
        i = self._index.get(key)
        if i is None or not self._released <= self._start + i < self.stop:
            return False
        # Earlier pages may take the row of a page that is far ahead and can be read from a file.
        at, tiers = self._start + i, self._tiers
        return at < self._sent + tiers.most_ahead(at) or not tiers.has_file(key)

    @property
    def came(self) -> list[bytes]:
        """The keys of the pages that hold their contents, see `done`."""
        return self._keys[: self.done - self._start]

    @property
    def _released(self) -> int:
        """Pages of the sequence whose copies are done."""
        return self._sent - sum(count for count, _ in self._moving)

    def advance(self, *, wait: bool = False) -> int:
        """Make progress. Returns `done`.

        Args:
            wait: go on until the fetch is over. On a GPU the host waits for files, and the current
                stream for copies.

        After an exception the fetch can still be cancelled.
        """
        while True:
            self._tiers.settle()
            self.send()
            self._read_ahead()
            if wait:
                self.join()
            self.done = self._sent if wait else self._released
            if self.is_over or not wait:
                return self.done
            interrupts.allowing(self._tiers.wait_for_one)

    @property
    def is_moving(self) -> bool:
        """Whether copies are on their way."""
        return bool(self._moving)

    def wait(self) -> None:
        """Return when the first copy is done."""
        self._moving[0][1].wait()

    def join(self) -> None:
        """Make the current stream wait for copies."""
        for _, moved in self._moving:
            moved.join()

    def release(self) -> bool:
        """Release rows whose copies are done. Returns whether none is held any more."""
        while self._moving and self._moving[0][1].is_done:
            self._moving.popleft()
        return self.is_over and not self._moving

    def cancel(self) -> None:
        """End the fetch. The current stream waits for copies under way, so the pages may be given
        to others. Even if this raises, the copies are done and the fetch is over."""
        self.stop = self.done = self._sent
        try:
            self.join()
        except BaseException:
            for _, moved in self._moving:
                moved.wait()
            raise

    def end_before(self, key: bytes) -> None:
        """End ahead of a page that cannot be read."""
        i = self._index.get(key)
        if i is not None and self._sent <= self._start + i < self.stop:
            self._end_at(self._start + i)

    def _end_at(self, stop: int) -> None:
        self._tiers.counters.misses += self.stop - stop
        self.stop = stop

    @property
    def has_next(self) -> bool:
        """Whether the next page is in a row, or being read into one."""
        at = self._sent
        return at < self.stop and self._tiers.has_row(self._keys[at - self._start], at)

    def send(self) -> None:
        """Copy pages that are in rows, as far as the sequence has pages for them."""
        self._end_at(min(self.stop, len(self._pages)))
        while self._sent < self.stop:
            at = self._sent
            some = self._keys[at - self._start : self.stop - self._start]
            moved = self._tiers.bring_back(some, self._asked, self._pages, at)
            if moved is None:
                return
            self._moving.append(moved)
            self._sent += moved[0]
            if self._sent == self.stop and self._asked:  # files came in an order of their own
                self._tiers.touch(self._keys[: self.stop - self._start], self._start, is_use=False)
        self.release()

    def _read_ahead(self) -> None:
        """Have threads read the files of the next pages."""
        tiers, at = self._tiers, self._sent
        while at < min(self._sent + tiers.most_ahead(at), self.stop):
            key = self._keys[at - self._start]
            if not tiers.has_row(key, at):
                if not tiers.read_later(key, at):
                    if at == self._sent and not tiers.is_busy:
                        self._end_at(at)  # no row can become free
                    return
                self._asked.add(key)
            at += 1
