"""Prompts that one process computes and another answers: the pages of their beginning move.

    prefill process   Handover(llm, Local("prefill")).serve()
    decode process    Handover(llm, Local("decode")).ask("prefill", prompt), then llm.generate

Both have a model of the same file, weights, kv_dtype and page_size. What goes wrong with the other
process is a TransportError of that call; the prompt can then be computed here, as ever.
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
from pykv.errors import CapacityError, DtypeError, ParameterError, PykvError, TransportError, quoted
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

THREADS = min(8, os.cpu_count() or 1)  # for reading and checking pages
_LOOK = 0.2  # seconds of silence before checking that the peer lives
_MOST_REQUEST = 64  # characters that name a request, which an answer repeats


class Handover:
    """Gives full pages of a model's prefix cache to other processes, and takes theirs.

    Args:
        llm: with a prefix cache.
        transport: an engine, such as pykv.transport.Local; with nothing registered.
        size: bytes of host memory for pages that others may read, or that have come: the least
            recently used go first. "256MiB", or an integer.
        timeout: seconds that an answer may take, and all pages of a call of `take`.

    Attributes:
        taken_pages, taken_bytes: what came.

    Raises:
        ParameterError: the size is less than two pages, the LLM has no prefix cache, or something
            is registered.
        DtypeError: an argument has another type.
        CapacityError: there is no such memory, or it cannot be page-locked for a GPU: then close
            the transport, whose region is taken.

    Not thread-safe; calls of the LLM may run beside it, and wait for no peer. For a GPU the memory
    is page-locked until the Handover goes. Source: disaggregated prefill, as of
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
        facts |= dict(exact=str(llm.is_exact))  # or files of tiers might take codes
        self._region = transport.register(nbytes // form.nbytes, form.nbytes, facts)
        rows = self._region.rows
        self._host = HostTier(rows)
        self._kept: list[int] = []  # rows that a read which was given up may still write to
        with llm.turn():
            self._moves = Moves(cache, form, rows)
            if on_gpu(cache.k):  # pinned, so that a GPU can copy to and from it
                device = f"cuda:{load_cupy().cuda.runtime.getDevice()}"
                _pin(f"{op}: size", rows)
                weakref.finalize(self, _unpin, device, rows, self._moves)
        self._threads = ThreadPoolExecutor(THREADS, "pykv-transport")

    # --- To others ---

    def offer(self, tokens: str | Sequence[int]) -> int:
        """Let others read the full pages of tokens, ids or a text, that the cache holds, from the
        first on.

        Returns:
            How many pages of these tokens others can read; as many as `size` has room for.

        Raises:
            ParameterError: the tokens are none, or the LLM has loaded a coded session since.

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
                slots = self._claim(len(places), keys)
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
        """Compute prompts that others ask for, one by one, until `stop`, which is asked a few times
        a second. What is wrong with one is said to who sent it. Messages that are no requests are
        dropped: an answer that came too late must not be answered."""
        if not callable(stop):
            given = type(stop).__name__
            raise DtypeError(f"Handover.serve: stop is a {given}, expected a function")
        while not stop():
            for message in self._transport.messages(_LOOK):
                request = message.facts.get("request")
                if not isinstance(request, str) or len(request) > _MOST_REQUEST:
                    continue
                facts = self._answer(message)
                try:
                    self._transport.notify(message.sender, facts)
                except TransportError:
                    pass  # the peer has gone meanwhile

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
            How many of the first tokens need no computing here. The last one always does.

        Messages of other processes that come meanwhile are dropped: one that asks should not serve.

        Raises:
            TransportError: the peer died, did not answer in time, refused, is of another version,
                or has pages that are damaged or another model's.
            CapacityError: there is no memory for the peer's table.
            As LLM.generate for the prompt.
        """
        ids = read_ids(self._llm, "prompt", prompt)
        request = secrets.token_hex(8)
        self._transport.connect(peer)  # first, so that it computes nothing that cannot be taken
        self._transport.notify(peer, dict(request=request, tokens=ids))
        facts = self._wait_for(peer, request)
        if "error" in facts:
            raise TransportError(f"Handover.ask: {peer} says: {quoted(str(facts['error']), 500)}")
        return self.take(peer, ids[:-1]) if len(ids) > 1 else 0

    def _wait_for(self, peer: str, request: str) -> dict[str, Any]:
        """What a peer answers to a request. Answers to requests that were given up are left out."""
        end = time.monotonic() + self._timeout
        while (left := end - time.monotonic()) > 0:
            alive = self._transport.is_alive(peer)  # asked first: it may answer and then end
            for message in self._transport.messages(min(left, _LOOK)):
                if message.sender == peer and message.facts.get("answer") == request:
                    return message.facts
            if not alive:
                raise TransportError(f"Handover.ask: {peer} has died")
        raise TransportError(f"Handover.ask: {peer} did not answer in {self._timeout:g} s")

    def take(self, peer: str, tokens: str | Sequence[int]) -> int:
        """Read pages of tokens, ids or a text, that another process offers and this one lacks, from
        the first on, and have calls find them.

        Returns:
            How many of the first tokens need no computing here, because they came or were there.

        Raises:
            TransportError: as `ask`. Pages that came before stay.

        Nothing is written to the cache unless its checksum holds. Waits for a GPU.
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
                break  # the peer has the next no longer, or there is no free page
        return done * P

    @interrupts.finished
    def _keep(self, ids: list[int], slots: list[int], start: int) -> int:
        """Write rows to the cache, which hold the pages of tokens from page `start` on. Returns how
        many the cache has then: others may have computed some meanwhile, or have made it forget."""
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
                        moved.join()  # wait, since the pages are given to others next
                        raise
                    manager.publish(pages, ids[: stop * P])
                    self.taken_pages += len(rows)
                    self.taken_bytes += len(rows) * self._region.rows.shape[1]
                return len(pages)
            finally:
                manager.free(pages)

    def _room_for(self, wanted: int) -> int:
        """Free pages of the cache, which grows where it may."""
        try:
            self._llm.pages.make_room(wanted)
        except CapacityError:
            pass
        return min(self._llm.cache.manager.num_free, wanted)

    def _read(self, region: Any, keys: list[bytes]) -> list[int]:
        """Rows with the first of these pages, as far as the peer has them still."""
        slots = self._claim(len(keys), ())
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
                wait(reads)  # before their rows are given back
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

    def _claim(self, count: int, busy: Any) -> list[int]:
        """Rows that nobody is offered any more."""
        self._moves.wait()
        self._release([])
        slots = self._host.claim(count, busy.__contains__)
        try:
            for slot in slots:
                self._region.drop(slot)
        except BaseException:
            self._host.release(slots)
            raise
        return slots

    @interrupts.finished
    def _release(self, slots: list[int]) -> None:
        """Give claimed rows back; those that a read which was given up may still write to stay
        claimed until it is over."""
        slots, landing = self._kept + slots, self._transport.landing()
        rows = self._region.rows
        self._kept = [i for i in slots if any(np.may_share_memory(rows[i], x) for x in landing)]
        self._host.release(i for i in slots if i not in self._kept)


def _pin(what: str, rows: Any) -> None:
    """Page-lock memory of the host.

    Raises:
        CapacityError: it cannot be.
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
    """Undo `_pin` before the memory goes, which others would get as page-locked memory."""
    with cuda.use_device(device):
        moves.wait()
        load_cupy().cuda.runtime.hostUnregister(address_of(rows))
