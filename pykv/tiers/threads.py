"""Threads that read and write the files of tiers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier
from typing import Any

from pykv.errors import CapacityError


def fulfil(future: Future[Any], work: Callable[..., Any], *given: Any) -> None:
    """Do the work of a future, of a thread, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work(*given))
    except BaseException as error:
        future.set_exception(error)


def start(count: int) -> ThreadPoolExecutor:
    """Threads that run already. One that the system refused later would leave its task with the
    others, who would write a row when it holds another page.

    Raises:
        CapacityError: the system refuses.
    """
    threads, all_run = ThreadPoolExecutor(max(count, 1), "pykv-tiers"), Barrier(max(count, 1))
    try:
        wait([threads.submit(all_run.wait) for _ in range(count)])
    except BaseException as error:
        all_run.abort()  # or those that wait would never end
        threads.shutdown(wait=False, cancel_futures=True)
        if not isinstance(error, RuntimeError):
            raise
        raise CapacityError(f"Tiers: disk_cache asks for {count} threads: {error}") from error
    return threads
