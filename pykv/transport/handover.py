"""Disaggregated prefill: one process computes prompts and hands their pages to another to answer.

    prefill process   Handover(llm, Local("prefill")).serve()
    decode process    Handover(llm, Local("decode")).ask("prefill", prompt), then llm.generate

Both need the same model file, weights, kv_dtype and page_size. A failure of the other process is a
TransportError of that call; the prompt can then be computed here as usual.
"""

from __future__ import annotations

import os
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from pykv import cuda, interrupts
from pykv.arrays import load_cupy, on_gpu
from pykv.blocks import prefix_keys
from pykv.errors import (
    CapacityError,
    DtypeError,
    ParameterError,
    PykvError,
    TransportError,
    a_type,
    quoted,
)
from pykv.llm.generate import LLM
from pykv.llm.prompts import read_ids
from pykv.llm.sampling import SamplingParams
from pykv.llm.tiering import identity
from pykv.options import check_type
from pykv.ranges import address_of
from pykv.tiers.forms import form_of
from pykv.tiers.host import HostTier
from pykv.tiers.moves import Moves
from pykv.tiers.sizes import parse_bytes
from pykv.transport.interface import Transport, check_engine
from pykv.transport.messages import Message, check_seconds

THREADS = min(8, os.cpu_count() or 1)  # that read and verify pages
_LOOK = 0.2  # seconds without a message before checking that the peer lives
_MOST_REQUEST = 64  # characters of a request's id, which the answer repeats


class Handover:
    """Gives full pages of a model's prefix cache to other processes, and takes theirs.

    Args:
        llm: with a prefix cache.
        transport: an engine, such as pykv.transport.Local, without a registered region.
        size: bytes of host memory for pages offered or received; evicts the least recently used.
            "256MiB", or an integer.
        timeout: seconds that an answer may take, and that all pages of a call of `take` may take.

    Attributes:
        taken_pages, taken_bytes: pages received, and their bytes.

    Raises:
        ParameterError: the size is less than two pages, the LLM has no prefix cache, or the
            transport has a region already.
        DtypeError: an argument has another type.
        CapacityError: the memory cannot be allocated, or not page-locked for a GPU: then close the
            transport, whose region is taken.

    Not thread-safe. Calls of the LLM may run concurrently, and wait for no peer. For a GPU the
    memory stays page-locked as long as the Handover lives. Source: disaggregated prefill, see
    DistServe (Zhong et al., OSDI 2024), vLLM's connectors and NVIDIA Dynamo.
    """

    def __init__(
        self, llm: LLM, transport: Transport, *, size: str | int = "256MiB", timeout: float = 60.0
    ) -> None:
        op = "Handover"
        check_type(op, "llm", llm, LLM, "a pykv.LLM")
        if not llm.prefix_cache:
            raise ParameterError(f"{op}: prefix_cache is False, expected an LLM that keeps pages")
        check_engine(op, transport)
        timeout, cache = check_seconds(op, timeout), llm.cache
        form = form_of(op, "size", cache, "none")
        nbytes = parse_bytes(op, "size", size)
        if nbytes < 2 * form.nbytes:
            raise ParameterError(
                f"{op}: size is {nbytes:,} bytes, expected at least the {2 * form.nbytes:,} of two "
                "pages"
            )
        self.taken_pages = self.taken_bytes = 0
        self._llm, self._transport, self._timeout = llm, transport, timeout
        self._is_exact = llm.is_exact
        facts = identity(llm) | dict(layout=cache.spec.layout)
        facts |= dict(exact=str(llm.is_exact))  # exact caches must not take pages of inexact ones
        self._region = transport.register(nbytes // form.nbytes, form.nbytes, facts)
        rows = self._region.rows
        self._host = HostTier(rows)
        self._kept: list[int] = []  # rows that an abandoned read may still write to
        with llm.turn():
            self._moves = Moves(cache, form, rows)
            if on_gpu(cache.k):  # asynchronous copies need pinned memory
                device = f"cuda:{load_cupy().cuda.runtime.getDevice()}"
                _pin(f"{op}: size", rows)
                weakref.finalize(self, _unpin, device, rows, self._moves)
        self._threads = ThreadPoolExecutor(THREADS, "pykv-transport")

    # --- To others ---

    def offer(self, tokens: str | Sequence[int]) -> int:
        """Let other processes read the full pages that the cache holds for `tokens`, from the first
        on.

        Args:
            tokens: ids, or a text.

        Returns:
            The number of pages of these tokens that others can read, as far as `size` allows.

        Raises:
            ParameterError: `tokens` are invalid, or the LLM has since loaded a coded session.

        Waits for a GPU.
        """
        llm, region = self._llm, self._region
        if llm.is_exact != self._is_exact:
            raise ParameterError(
                "Handover.offer: the LLM has loaded pages that were coded, expected those that "
                "models computed"
            )
        ids, P = read_ids(llm, "tokens", tokens), llm.cache.page_size
        with llm.turn(), llm.pages.known(ids) as pages:
            self._release([])
            room = min(len(pages), len(region.rows) - len(self._kept))
            keys = list(prefix_keys.of_pages("Handover.offer", ids, P))[:room]
            missing = [i for i, key in enumerate(keys) if key not in self._host]
            self._host.touch(keys)
            for start in range(0, len(missing), self._moves.most):
                places = missing[start : start + self._moves.most]
                slots = self._claim(len(places))  # not those of `keys`, used last
                try:
                    self._moves.out([pages[i] for i in places], slots, places).wait()
                except BaseException:
                    self._host.release(slots)
                    raise
                for i, slot in zip(places, slots, strict=True):
                    region.put(keys[i], slot)
                    self._host.add(keys[i], slot)
        return len(keys)

    def serve(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Compute the prompts that other processes request, one by one, until `stop` returns true;
        it is called a few times a second. Errors of a request go to its sender. Messages that are
        not requests are dropped: a late answer must not be answered."""
        if not callable(stop):
            raise DtypeError(f"Handover.serve: stop is {a_type(stop)}, expected a function")
        while not stop():
            for message in self._transport.messages(_LOOK):
                request = message.facts.get("request")
                if not isinstance(request, str) or len(request) > _MOST_REQUEST:
                    continue
                facts = self._answer(message)
                try:
                    self._transport.notify(message.sender, facts)
                except TransportError:
                    pass  # the peer has ended meanwhile

    def _answer(self, message: Message) -> dict[str, Any]:
        request, tokens = message.facts["request"], message.facts.get("tokens")
        try:
            if not isinstance(tokens, list):
                raise ParameterError("Handover.serve: a message is no request for tokens")
            ids = read_ids(self._llm, "tokens", tokens)
            first = SamplingParams(max_tokens=1, ignore_eos=True)
            self._llm.generate([ids], first)
            return dict(answer=request, pages=self.offer(ids))
        except PykvError as error:
            return dict(answer=request, error=str(error))

    # --- From others ---

    def ask(self, peer: str, prompt: str | Sequence[int]) -> int:
        """Have another process compute a prompt, and take its pages.

        Args:
            peer: the name of a process that runs `serve`.
            prompt: a text, or token ids.

        Returns:
            How many of the first tokens need no prefill here. The last one always does.

        Drops messages of other processes that arrive meanwhile: a process that asks should not
        serve.

        Raises:
            TransportError: the peer died, did not answer in time, refused, has another version, or
                its pages are damaged or of another model.
            CapacityError: there is no memory for the peer's table.
            For the prompt, as LLM.generate.
        """
        ids = read_ids(self._llm, "prompt", prompt)
        request = secrets.token_hex(8)
        self._transport.connect(peer)  # first: no peer computes a prompt that cannot be taken
        self._transport.notify(peer, dict(request=request, tokens=ids))
        facts = self._wait_for(peer, request)
        if "error" in facts:
            raise TransportError(f"Handover.ask: {peer} says: {quoted(str(facts['error']), 500)}")
        return self.take(peer, ids[:-1]) if len(ids) > 1 else 0

    def _wait_for(self, peer: str, request: str) -> dict[str, Any]:
        """The peer's answer to a request. Drops answers to earlier, abandoned requests."""
        end = time.monotonic() + self._timeout
        while (left := end - time.monotonic()) > 0:
            alive = self._transport.is_alive(peer)  # before reading: it may answer, then end
            for message in self._transport.messages(min(left, _LOOK)):
                if message.sender == peer and message.facts.get("answer") == request:
                    return message.facts
            if not alive:
                raise TransportError(f"Handover.ask: {peer} has died")
        raise TransportError(f"Handover.ask: {peer} did not answer in {self._timeout:g} s")

    def take(self, peer: str, tokens: str | Sequence[int]) -> int:
        """Read the pages of `tokens` that a peer offers and this cache lacks, from the first on,
        and publish them in the prefix cache.

        Args:
            peer: the name of a process.
            tokens: ids, or a text.

        Returns:
            How many of the first tokens need no prefill here: received, or here already.

        Raises:
            TransportError: as `ask`. Pages received before stay.

        A page is written to the cache only if its checksum matches. Waits for a GPU.
        """
        llm, P = self._llm, self._llm.cache.page_size
        ids, end = read_ids(llm, "tokens", tokens), time.monotonic() + self._timeout
        region = self._transport.connect(peer)
        keys = list(prefix_keys.of_pages("Handover.take", ids, P))
        done = self._keep(ids, [], 0)
        there = done + len(region.exists(keys[done:]))
        while done < there:
            if time.monotonic() > end:
                text = f"{peer} did not give all pages in {self._timeout:g} s"
                raise TransportError(f"Handover.take: {text}")
            start, most = done, min(self._moves.most, there - done)
            slots = self._read(region, keys[start : start + most])
            try:
                done = self._keep(ids, slots, start)
            finally:
                self._host.release(slots)
            if done < start + most:
                break  # the peer has overwritten the next page, or no page is free here
        return done * P

    @interrupts.finished
    def _keep(self, ids: list[int], slots: list[int], start: int) -> int:
        """Write rows, which hold the pages of tokens from page `start` on, to the cache. Returns
        how many first pages the cache then has: other calls may have computed or evicted some."""
        llm, manager, P = self._llm, self._llm.cache.manager, self._llm.cache.page_size
        with llm.turn():
            pages = manager.reuse(ids)
            try:
                first, stop = len(pages), start + len(slots)
                if start <= first < stop and (room := self._room_for(stop - first)):
                    stop = first + room
                    manager.extend(pages, first * P, stop * P)
                    places = list(range(first, stop))
                    rows = slots[first - start : stop - start]
                    moved = self._moves.back(rows, pages[first:], places)
                    try:
                        moved.wait()
                    except BaseException:
                        moved.join()  # the pages are freed next: their next writer waits
                        raise
                    manager.publish(pages, ids[: stop * P])
                    self.taken_pages += len(rows)
                    self.taken_bytes += len(rows) * self._region.rows.shape[1]
                return len(pages)
            finally:
                manager.free(pages)

    def _room_for(self, wanted: int) -> int:
        """How many pages are free, up to `wanted`; the cache grows if it may."""
        try:
            self._llm.pages.make_room(wanted)
        except CapacityError:
            pass
        return min(self._llm.cache.manager.num_free, wanted)

    def _read(self, region: Any, keys: list[bytes]) -> list[int]:
        """Rows with the first of these pages, as far as the peer still has them."""
        slots = self._claim(len(keys))
        rows, step = self._region.rows, -(-len(slots) // THREADS) or 1
        parts = [slice(i, i + step) for i in range(0, len(slots), step)]
        reads: list[Future[int]] = []
        try:
            try:
                for part in parts:
                    into = [rows[slot] for slot in slots[part]]
                    reads.append(self._threads.submit(region.get, keys[: len(slots)][part], into))
                wait(reads, return_when=FIRST_EXCEPTION)
            finally:
                for read in reads:
                    read.cancel()  # one read failed: drop those that have not begun
                wait(reads)  # before their rows are released
            came = [read.result() for read in reads if not read.cancelled()]
        except BaseException:
            self._release(slots)
            raise
        count = 0
        for part, n in zip(parts, came, strict=True):
            count += n
            if count < min(part.stop, len(slots)):
                break
        self._release(slots[count:])
        return slots[:count]

    def _claim(self, count: int) -> list[int]:
        """Claim rows; they are no longer offered to peers."""
        self._moves.wait()
        self._release([])
        slots = self._host.claim(count)
        try:
            for slot in slots:
                self._region.drop(slot)
        except BaseException:
            self._host.release(slots)
            raise
        return slots

    @interrupts.finished
    def _release(self, slots: list[int]) -> None:
        """Release claimed rows. Rows that an abandoned read may still write to stay claimed until
        it is over."""
        slots, landing = self._kept + slots, self._transport.landing()
        rows = self._region.rows
        self._kept = [i for i in slots if any(np.may_share_memory(rows[i], x) for x in landing)]
        self._host.release(i for i in slots if i not in self._kept)


def _pin(what: str, rows: Any) -> None:
    """Page-lock host memory.

    Raises:
        CapacityError: the system refuses.
    """
    runtime = load_cupy().cuda.runtime
    try:
        runtime.hostRegister(address_of(rows), rows.nbytes, 0)
    except runtime.CUDARuntimeError as error:
        raise CapacityError(
            f"{what} asks for {rows.nbytes:,} bytes of pinned host memory: {error}; files in a "
            "folder on a disk cannot be pinned, those in memory, as in /dev/shm, can"
        ) from error


def _unpin(device: str, rows: Any, moves: Moves) -> None:
    """Undo `_pin` before the memory is freed; its next owner would get it page-locked."""
    with cuda.use_device(device):
        moves.wait()
        load_cupy().cuda.runtime.hostUnregister(address_of(rows))
