"""Prompts that one GPU computes for answers of another, see LLM's `prefill_device`.

The GPU of prompts has a cache of its own, whose page n stands for page n of the answers' cache, so
that lists of pages are the same on both. Pages of a prompt go to the answers' cache layer by layer
(sent_pages.py). What a prompt finds there, of prompts and answers before it, of sessions and tiers,
is brought here before its first step.

Order: a step waits for what the answers' stream holds when it is enqueued, so that nobody reads the
pages any more that it writes; but answers go on beside it. What they compute or somebody else reads
waits for it where it may touch pages that are on their way: `join`. The host waits for the logits
of a prompt, and these come behind its pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import load_cupy, to_host
from pykv.errors import DeviceError, ParameterError, UnsupportedError
from pykv.llm import memory, sequence
from pykv.llm.prompt_steps import PromptSteps, Span
from pykv.llm.weights import Model
from pykv.ops import block_copy
from pykv.page_arrays import given_scales
from pykv.pages import copy_pages
from pykv.pool import PagedKVCache


class PrefillDevice:
    """Computes pieces of prompts, as PromptSteps does, on another GPU than the current one, with
    which it shares the numbers of pages.

    Args:
        device: the GPU, such as "cuda:1".
        load: reads the weights, to the GPU that is the current one then.
        answers: the cache to which pages go, on the current GPU; scales that heads or tensors share
            are set.

    Raises:
        DeviceError: the two GPUs have no direct way.
        CapacityError: there is no memory for as large a cache.
    """

    def __init__(self, device: str, load: Callable[[], Model], answers: PagedKVCache) -> None:
        cupy = load_cupy()
        self._device, self._answers, self._home = device, answers, cuda.current_device()
        layers, heads, head_dim = answers.sizes
        found = {name: to_host(x) for name, x in given_scales(answers).items()}
        with cuda.use_device(device):
            self._gpu = cuda.current_device()
            self._done = cupy.cuda.Event(disable_timing=True)
        with self._turn():
            cuda.enable_peer_access(self._gpu, self._home)
            sizes = layers, answers.k.shape[1], heads, head_dim
            alike = dict(page_size=answers.page_size, spec=answers.spec, xp=cupy)
            self._cache = PagedKVCache(*sizes, **alike)
            for name, scales in found.items():
                getattr(self._cache, name)[...] = cupy.asarray(scales)
            self._steps = PromptSteps(load(), self._cache, cupy, cuda.GraphMemory(), answers)

    def bring(self, sequences: Sequence[sequence.Sequence]) -> None:
        """Have all pages here that the next step of sequences reads."""
        pages: dict[int, None] = {}  # in order, each once: sequences may share pages
        for s in sequences:
            if not s.is_sent:
                pages |= dict.fromkeys(s.pages[: -(-s.cached // self._cache.page_size)])
                s.is_sent = True
        self.grow(self._answers.k.shape[1])
        if pages:
            with self._turn(), load_cupy().cuda.Device(self._home):
                copy_pages(self._answers, self._cache, list(pages), list(pages))

    def grow(self, pages: int) -> None:
        """Make room for so many pages, unless there is.

        Raises:
            CapacityError: the memory cannot be had.
        """
        if self._cache.k.shape[1] < pages:
            with self._turn():
                self._cache.grow(pages)

    def free(self) -> int:
        """Bytes that this process may still take of the GPU."""
        with cuda.use_device(self._device):
            return memory.free(load_cupy()) or 0

    def run(
        self, spans: Sequence[Span], wanted: Sequence[int], asks: bool = False
    ) -> tuple[Any, Any]:
        """As PromptSteps.run; logits are on the answers' GPU. No queries can be asked for."""
        with self._turn():
            cuda.follow(self._home, self._gpu)
            logits, queries = self._steps.run(spans, wanted, asks)
            if not wanted:
                return logits, queries
            with load_cupy().cuda.Device(self._home):
                out = load_cupy().empty(logits.shape, np.float32)
                block_copy.copy_arrays([logits], [out])
        return out, queries

    def join(self) -> None:
        """Let what is enqueued on the answers' GPU from now on wait for pages on their way."""
        with self._turn():
            cuda.follow(self._gpu, self._home)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The GPU is the current one, and what is enqueued on its current stream, which each thread
        has its own of, comes behind what was before."""
        with cuda.use_device(self._device), cuda.behind(self._done):
            yield


def check_prefill_device(
    device: str, prefill: Any, *, evicts: bool = False, require_sm: int = 0
) -> None:
    """Check that one GPU may compute prompts for answers of another.

    Args:
        device: of answers, as cuda.pick_device names it.
        prefill: of prompts, as LLM is given it.
        evicts: whether rows are evicted.
        require_sm: that both GPUs are to have.

    Raises:
        ParameterError: `prefill` names no GPU.
        DeviceError: there is no such GPU, it is that of answers or older than `require_sm`, or
            answers are on the CPU.
        UnsupportedError: rows are evicted.
    """
    if type(prefill) is not str or not re.fullmatch("cuda:[0-9]{1,4}", prefill):
        raise ParameterError(f"LLM: prefill_device is {prefill!r}, expected cuda:N")
    given = f"LLM: device is {device!r} and prefill_device {prefill!r}"
    if device == "cpu":
        raise DeviceError(f"{given}, expected two GPUs: pages move between GPUs alone")
    count = load_cupy().cuda.runtime.getDeviceCount()
    if int(prefill[5:]) >= count:
        raise DeviceError(
            f"LLM: prefill_device is {prefill!r}, expected cuda:0 to cuda:{count - 1}"
        )
    if device == f"cuda:{int(prefill[5:])}":
        raise DeviceError(f"{given}, which are one GPU; expected two, or no prefill_device")
    cuda.pick_device(prefill, load_cupy(), require_sm=require_sm)
    if evicts:
        raise UnsupportedError(
            "LLM: prefill_device is given with an eviction, expected one of the two: rows are "
            "chosen by queries of the prompt, which stay on its GPU"
        )
