"""Counters of tiers: hits and misses, bytes and seconds in each direction, and waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pykv.number_texts import counted

_MOST = 1 << 62  # limit of each count


@dataclass
class Flow:
    """Pages copied in one direction, their bytes at the target, and the seconds of the copies,
    which may overlap with each other and with the model's work."""

    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def count(self, pages: int, nbytes: int, seconds: float) -> None:
        """Add a copy."""
        self.pages += pages
        self.bytes += nbytes
        self.seconds += seconds


@dataclass
class Counters:
    """Counters of one process's tiers, or of all processes that used a folder.

    Attributes:
        host_hits, disk_hits: pages that prompts found in host memory, on disk.
        misses: full pages of prompts that neither the cache nor a tier had.
        refused: pages that fell and found no row, or could not be written to a file.
        damaged: files that could not be read, or whose metadata or checksum did not match; each is
            also a miss.
        waits, waited_seconds: how often and how long the model's thread waited: prompts for files
            and copies, with nothing else to compute; falling pages for rows being written.
        to_host, from_host: between the cache and the host tier.
        to_disk, from_disk: between the host tier and files.
    """

    host_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    refused: int = 0
    damaged: int = 0
    waits: int = 0
    waited_seconds: float = 0.0
    to_host: Flow = field(default_factory=Flow)
    from_host: Flow = field(default_factory=Flow)
    to_disk: Flow = field(default_factory=Flow)
    from_disk: Flow = field(default_factory=Flow)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as a wait."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waits += 1
            self.waited_seconds += time.perf_counter() - began

    def as_dict(self) -> dict[str, Any]:
        """A flat dict; a flow gives `<name>_pages`, `<name>_bytes` and `<name>_seconds`."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{name}_{part}" if part else name: number for part, number in parts}
        return flat

    @staticmethod
    def from_dict(flat: dict[str, Any]) -> Counters:
        """The inverse of `as_dict`.

        Raises:
            ValueError: a name or a number is not one of `as_dict`.
        """
        counters = Counters()
        known = counters.as_dict()
        for name, number in flat.items():
            if type(number) not in (int, float) or not 0 <= number < _MOST:
                raise ValueError(f"{name} is {number!r}, expected a number of things")
            if name not in known:
                raise ValueError(f"{name!r} is unknown")
            flow, _, part = name.rpartition("_")
            of_flow = isinstance(getattr(counters, flow, None), Flow)
            target = getattr(counters, flow) if of_flow else counters
            setattr(target, part if of_flow else name, type(known[name])(number))
        return counters

    def plus(self, other: Counters) -> Counters:
        """The sums of both."""
        more = other.as_dict()
        flat = self.as_dict().items()
        return Counters.from_dict({name: min(n + more[name], _MOST - 1) for name, n in flat})

    def since(self, before: Counters) -> Counters:
        """The difference to these counters at an earlier time."""
        less = before.as_dict()
        flat = self.as_dict().items()
        return Counters.from_dict({name: max(n - less[name], 0) for name, n in flat})  # sums round

    def as_text(self) -> str:
        """Lines for people."""
        asked = self.host_hits + self.disk_hits + self.misses
        lines = ["looked up no page"]
        if asked:
            share = (self.host_hits + self.disk_hits) / asked
            lines = [
                f"looked up {counted(asked, 'page')}: {self.host_hits:,} in host memory, "
                f"{self.disk_hits:,} on disk, {self.misses:,} nowhere ({share:.0%} found)"
            ]
        for item in fields(self):
            flow = getattr(self, item.name)
            if isinstance(flow, Flow) and flow.pages:
                speed = flow.bytes / 1e9 / flow.seconds if flow.seconds else 0.0
                way = item.name.replace("_", " ")
                lines.append(
                    f"{way}: {counted(flow.pages, 'page')}, {flow.bytes:,} bytes, {speed:.3g} GB/s"
                )
        if self.waits:
            lines.append(
                f"waited {counted(self.waits, 'time')}, {self.waited_seconds:.2f} s in all"
            )
        if self.refused or self.damaged:
            refused, damaged = counted(self.refused, "page"), counted(self.damaged, "file")
            lines.append(f"{refused} refused, {damaged} damaged")
        return "\n".join(lines)
