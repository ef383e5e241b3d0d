"""Pages of one sequence on their way back from tiers, while the model computes others.

    begin     Tiers.begin finds them; from then on their rows of the host tier stay, but for those
              far ahead that files have as well
    advance   between two steps: files that are there become rows, rows go to the cache, and those
              behind are read; what fails ends the fetch there, and the rest is computed
    cancel    the sequence goes: what is on its way comes to an end, and nobody waits for it

Threads read files. On a GPU copies are enqueued, and are there when their events say so: the host
waits for files alone, and only where it is asked to.
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
        tiers: where they are.
        keys: of the pages behind those that the sequence has.
        pages: of the sequence, in place: the caller extends it, and these become the pages of keys,
            as far as it reaches then.

    Attributes:
        done: pages of the sequence that are there, those before among them, for what is enqueued on
            the current stream.
        stop: where it ends.
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
        """Whether the row of a page must stay as it is."""
        i = self._index.get(key)
        if i is None or not self._released <= self._start + i < self.stop:
            return False
        # Unless its turn is near, earlier pages may take the row: a file brings this page back.
        at, tiers = self._start + i, self._tiers
        return at < self._sent + tiers.most_ahead(at) or not tiers.has_file(key)

    @property
    def _released(self) -> int:
        """Pages of the sequence whose copies are done."""
        return self._sent - sum(count for count, _ in self._moving)

    def advance(self, *, wait: bool = False) -> int:
        """Go on. Returns `done`.

        Args:
            wait: until it is over. On a GPU the host waits for files, and the current stream for
                copies.

        Whatever it raises leaves a fetch that can be cancelled.
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
        """Have what is enqueued on the current stream from now on wait for copies."""
        for _, moved in self._moving:
            moved.join()

    def release(self) -> bool:
        """Let go of rows that were copied. Returns whether there is nothing left to hold."""
        while self._moving and self._moving[0][1].is_done:
            self._moving.popleft()
        return self.is_over and not self._moving

    def cancel(self) -> None:
        """Bring no more. The pages may go to others: what is enqueued on the current stream from
        now on waits for copies to them. Whatever it raises, they are there, and it is over."""
        self.stop = self.done = self._sent
        try:
            self.join()
        except BaseException:
            for _, moved in self._moving:
                moved.wait()
            raise

    def end_before(self, key: bytes) -> None:
        """Do without a page, which nobody can bring, and those behind it."""
        i = self._index.get(key)
        if i is not None and self._sent <= self._start + i < self.stop:
            self._end_at(self._start + i)

    def _end_at(self, stop: int) -> None:
        self._tiers.counters.misses += self.stop - stop
        self.stop = stop

    @property
    def has_next(self) -> bool:
        """Whether the next page is in a row, or will be."""
        at = self._sent
        return at < self.stop and self._tiers.has_row(self._keys[at - self._start], at)

    def send(self) -> None:
        """Copy what is in rows, as far as the sequence has pages."""
        self._end_at(min(self.stop, len(self._pages)))
        while self._sent < self.stop:
            at = self._sent
            some = self._keys[at - self._start : self.stop - self._start]
            moved = self._tiers.bring_back(some, self._asked, self._pages, at)
            if moved is None:
                return
            self._moving.append(moved)
            self._sent += moved[0]
            if self._sent == self.stop:  # rows were filled in order, but the last shall go first
                self._tiers.touch(self._keys[: self.stop - self._start], is_use=False)
        self.release()

    def _read_ahead(self) -> None:
        """Have threads read files of the pages that come next."""
        tiers, at = self._tiers, self._sent
        while at < min(self._sent + tiers.most_ahead(at), self.stop):
            key = self._keys[at - self._start]
            if not tiers.has_row(key, at):
                if not tiers.read_later(key, at):
                    if at == self._sent and not tiers.is_busy:
                        self._end_at(at)  # no row is left for it
                    return
                self._asked.add(key)
            at += 1
