"""The process that has a server's model, and the way to it."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from pykv import cuda
from pykv.errors import CapacityError, TransportError, UnsupportedError
from pykv.llm import models
from pykv.llm.prompts import begin
from pykv.serve.command import GPU_SLOTS, HOST_SLOTS, LOG_FORMAT
from pykv.serve.constraints import Grammars
from pykv.serve.engine import Engine, Report, Request, State, Steps
from pykv.terminal import show_warning

log = logging.getLogger("pykv.serve")

SLOT_TOKENS = 2048  # of the pool for each slot, if memory allows
DIRECT_BYTES = 32 << 10  # of a message that a socket with room for any takes whole
REPORTS = 64  # delivered in one go: readers must have their turn, however fast an engine is
EXIT_SECONDS = 10.0  # of a process from which nothing comes any more
GONE_SECONDS = 60.0  # from the server's end to the engine's, its step and its tiers' flush included
SHARE = 0.5  # of the free memory: limit of the pool, unless one context needs more


class Facts(NamedTuple):
    """What an engine has.

    Attributes:
        device: its name.
        slots: sequences that it decodes together at most.
        context: tokens of prompt and answer.
        pool: tokens that its cache holds.
    """

    device: str
    slots: int
    context: int
    pool: int


class EngineProcess:
    """A process that opens a model, and answers what is put to it; a Link of pykv.serve.desk.

    Args:
        args: options of the model, see pykv.model_options.
        slots: sequences decoded together at most; None: as many as its device is for.

    As a context it lets the process end at the end: behind an error at once, else once it has kept
    what tiers keep.
    """

    def __init__(self, args: argparse.Namespace, slots: int | None) -> None:
        if not sys.executable or getattr(sys, "frozen", False):  # a program that holds a Python
            raise UnsupportedError(
                f"serve: sys.executable is {sys.executable!r}, expected a Python that can be "
                "started for the model"
            )
        ours, theirs = socket.socketpair()
        # What multiprocessing starts processes with, too: -I, -X dev and the like.
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        code = f"import sys; sys.path[:] = {[x for x in sys.path if isinstance(x, str)]!r}; "
        code += f"from pykv.serve import engine_process as e; e.main({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
        self._connection = Connection(ours.detach())
        self._deliver: Callable[[Report | None], None] | None = None
        self._has_ended = False  # the last report was delivered
        self._orders: deque[Any] = (
            deque()
        )  # pickled, to be sent by the thread; None ends the process
        self._some = threading.Condition()  # held to change these, or to send without the thread
        self._writable = select.poll()
        self._writable.register(self._connection.fileno(), select.POLLOUT)
        self._sender = threading.Thread(target=self._send, name="pykv-orders", daemon=True)
        self._sender.start()
        self._order((args, slots))

    def file(self) -> Path:
        """Wait for the model's file, which is being loaded then. Raises: as `ready`."""
        path: Path = self._said()
        return path

    def ready(self) -> Facts:
        """Wait for the model, once its file is there.

        Raises:
            TransportError: the process has ended.
            As pykv.llm.LLM; CapacityError: there is no room for one context.
        """
        facts: Facts = self._said()
        return facts

    def _said(self) -> Any:
        said = self._receive()
        if said is None or isinstance(said, Exception):
            raise said or self._died()
        return said

    # --- As a Link ---

    def start(self, deliver: Callable[[Report | None], None]) -> None:
        self._deliver = deliver
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._read)

    def put(self, request: Request) -> None:
        self._order(request)

    def abort(self, numbers: list[int]) -> None:
        self._order(numbers)

    def stop(self) -> None:
        with self._some:
            self._orders.append(None)
            self._some.notify()

    def _read(self) -> None:
        """Deliver all reports that have arrived, before any reader wakes. So a reader that was busy
        gets one piece, and the engine never waits for readers at a full socket. None is the last
        report, also if the process has died."""
        assert self._deliver is not None
        for _ in range(REPORTS):
            if (report := self._receive()) is None:
                asyncio.get_running_loop().remove_reader(self._connection.fileno())
                self._has_ended = True
            self._deliver(report)
            if report is None or not self._connection.poll():
                return

    def _receive(self) -> Any:
        """What the process says; None where it has ended."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return None

    def _died(self) -> TransportError:
        """Why nothing comes any more."""
        try:
            how = f"ended with status {self._process.wait(EXIT_SECONDS)}"
        except subprocess.TimeoutExpired:
            how = f"fallen silent, and not ended within {EXIT_SECONDS:g} s"
        return TransportError(f"serve: the process of the model has {how}")

    def _order(self, message: Any) -> None:
        """Send a message, by the thread if that may have to wait. What cannot be pickled is an
        error here, of the request alone."""
        data = ForkingPickler.dumps(message)
        with self._some, suppress(OSError):  # the process has ended, which `_receive` notices
            # A socket of Linux can be written to while three quarters of its buffer are free.
            if not self._orders and len(data) <= DIRECT_BYTES and self._writable.poll(0):
                self._connection.send_bytes(data)
            else:
                self._orders.append(data)
                self._some.notify()

    def _send(self) -> None:
        """Send queued messages, on a thread: it blocks while the process does not read, as during a
        large schema, or when stopped; answers continue meanwhile. A thread alone would send late:
        it gets the GIL only when the event loop waits or has had its turn."""
        with suppress(OSError):
            while True:
                with self._some:
                    self._some.wait_for(lambda: self._orders)
                    message = self._orders[0]  # stays while it is sent: nobody else sends then
                if message is None:
                    self._connection.send(None)
                    return
                self._connection.send_bytes(message)
                with self._some:
                    self._orders.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.stop()
                while not self._has_ended:
                    self._has_ended = self._receive() is None
                said, died = self._receive(), self._died()
                if said is not None or self._process.returncode != 0:
                    raise said or died
        finally:
            self._process.kill()
            self._process.wait()
            self.stop()
            self._sender.join()
            self._connection.close()


# --- The process ---


def main(descriptor: int) -> None:
    """Open the model that options name, and answer what comes until the server ends."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the server ends it
        signal.signal(number, signal.SIG_IGN)
    warnings.showwarning = show_warning
    os.set_inheritable(descriptor, False)  # or the server would not see the end of this process
    threading.Thread(target=_end_behind_server, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    args, slots = connection.recv()
    logging.basicConfig(level=args.log_level.upper(), format=LOG_FORMAT)
    opened: list[Engine] = []  # the one, once it is there; the server sends nothing before
    threading.Thread(target=_take_orders, args=(connection, opened), daemon=True).start()

    def tell(what: Any) -> None:
        with suppress(OSError):  # the server has gone, which is read from it
            connection.send(what)

    try:
        # A device that cannot be used is refused before anything is fetched for it.
        cuda.pick_device(args.device, cuda.array_module(args.device))
        tell(models.fetch(args.model))
        llm, scheduler, facts = open_model(args, slots)
        opened.append(make_engine(llm, scheduler, tell))
        tell(facts)
        if not opened[0].run():
            sys.exit(1)  # and keep nothing: who knows what pages hold
        llm.flush()
    except Exception as error:  # which the server shows as it shows its own
        if sys.flags.dev_mode:
            raise
        tell(error)


def _end_behind_server(descriptor: int) -> None:
    """Wait for the server's end, then kill this process after GONE_SECONDS if it is still there,
    whichever of its threads hangs. faulthandler keeps the time: its timer is a C thread that needs
    no GIL and runs through the interpreter's shutdown. Not covered: code that never releases the
    GIL while the server ends, an uninterruptible system call, SIGSTOP.

    PR_SET_PDEATHSIG would leave no time to flush tiers, and fires when the thread that started the
    process ends."""
    hung_up = select.poll()
    hung_up.register(descriptor, 0)  # what the server has sent is read by others
    hung_up.poll()
    nowhere = open(os.devnull, "w")  # as long as the process
    faulthandler.dump_traceback_later(GONE_SECONDS, exit=True, file=nowhere)


def _take_orders(connection: Connection, opened: list[Engine]) -> None:
    """Let the engine have what comes. All is read until the server has ended, as that waits where
    nobody reads."""
    try:
        while True:
            message = connection.recv()
            if message is None:
                opened[0].stop()
            elif isinstance(message, Request):
                opened[0].put(message)
            else:
                opened[0].abort(message)
    except (EOFError, OSError):
        pass
    finally:
        if not opened:  # nobody waits for the model
            os._exit(1)
        opened[0].stop()


def make_engine(llm: Any, scheduler: Steps, tell: Callable[[Report | None], None]) -> Engine:
    """The engine of a model; arguments as of Engine."""

    def state() -> State:
        manager = llm.cache.manager
        return State(pages=manager.num_pages, held=manager.num_pages - manager.num_free)

    def counters() -> tuple[tuple[str, float], ...]:
        return () if llm.tiers is None else tuple(llm.tiers.counters.as_dict().items())

    return Engine(
        scheduler,
        llm.turn,
        answer=partial(begin, llm),
        constraint=Grammars(llm.tokenizer, llm.config.vocab).constraint,
        state=state,
        counters=counters,
        tell=tell,
    )


def open_model(args: argparse.Namespace, slots: int | None) -> tuple[Any, Any, Facts]:
    """The model that options name, the scheduler that shall answer, and what they have."""
    import numpy as np

    from pykv.llm.scheduler import Scheduler
    from pykv.model_options import open_llm

    llm = open_llm(args)
    slots = slots or (HOST_SLOTS if llm.xp is np else GPU_SLOTS)
    _grow(llm, slots)
    with llm.turn():
        llm.runner.warm_up(slots)
    scheduler = Scheduler(
        llm.runner,
        llm.cache,
        may_grow=False,
        prefix_cache=llm.prefix_cache,
        slots=slots,
        tiers=llm.tiers,
    )
    pool = llm.cache.manager.num_pages * llm.cache.page_size
    return llm, scheduler, Facts(llm.device, slots, llm.context, pool)


def _grow(llm: Any, slots: int) -> None:
    """Give the cache the pages of a server, which do not become more.

    Raises:
        CapacityError: there is no room for one context.
    """
    cache = llm.cache
    with llm.turn():
        free = llm.runner.free()
    tokens = slots * min(llm.context, SLOT_TOKENS)
    if free is not None:
        tokens = min(tokens, int(SHARE * free) // cache.bytes_per_token)
    tokens = max(tokens, _rows_of_one(llm))
    if free is not None and tokens * cache.bytes_per_token > free:
        raise CapacityError(
            f"serve: a context of {llm.context:,} tokens takes {tokens:,} rows, "
            f"{tokens * cache.bytes_per_token:,} bytes of cache, expected at most the {free:,} "
            "that are free: see --context and --kv-dtype"
        )
    with llm.turn():
        llm.runner.grow(-(-tokens // cache.page_size))


def _rows_of_one(llm: Any) -> int:
    """Rows of the cache that any one request finds enough. Where rows are evicted, a long prompt
    needs more than the context, as what is kept of it is copied; most of all one of the longest, as
    far as a page's length, by which pages of prompts are shared."""
    from pykv.llm import SamplingParams
    from pykv.llm.sequence import Sequence

    most: int = llm.context
    for prompt in range(max(1, most - llm.cache.page_size), llm.context):
        s = Sequence([0] * prompt, SamplingParams(), llm.context)
        most = max(most, llm.runner.room(s) or 0)
    return most
