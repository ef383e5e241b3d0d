"""Which way of decoding is the faster one: measured on request for a GPU, a kind of model and a
number of answers, and kept in the cache folder.

A runner is made for each way, on a cache of its own, and its `decode` is timed with sequences that
hold CONTEXT tokens. Ways are those of runner.DECODES.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import TYPE_CHECKING, Protocol

from pykv import calibration, cuda
from pykv.arrays import module_of
from pykv.errors import DtypeError, UnsupportedError, quoted
from pykv.llm import matrices, memory
from pykv.llm.sampling import SamplingParams
from pykv.llm.sequence import Sequence
from pykv.llm.weights import Model
from pykv.options import check_flag, check_type, check_whole
from pykv.pool import PagedKVCache

if TYPE_CHECKING:
    from pykv.llm.generate import LLM

WAYS = ("persistent", "graph")
CONTEXT = 512
_TOKENS = 16  # a sample has at least so many
_SAMPLES, _BUDGET_S = 5, 1.0  # limits for a way; the shortest sample counts

Times = dict[str, float]  # microseconds of a step by way


def calibrate(
    llm: LLM, answers: Several[int] = (1, 2, 4, 8), *, force: bool = False
) -> dict[int, Times]:
    """Measure how long a step takes by each way of decoding, for an LLM with decode="auto".

    Args:
        llm: the LLM whose GPU and kind of model are measured.
        answers: numbers of answers that are decoded at once.
        force: measure anew, even if the cache folder has figures of this GPU, kind of model and
            options.

    Returns:
        Microseconds of a step, by number of answers, then by way; without numbers for which there
        is only one way, or no memory to measure with.

    Raises:
        UnsupportedError: the LLM was opened with another `decode`, is on the CPU, or evicts; or the
            call is being prepared.
        ParameterError: a number of answers is below 1.
        DtypeError: an argument has another type.

    Compiles both ways, which takes a while, so "auto" does not do it by itself: for numbers of
    answers that were never measured it is "graph". Call it on a GPU that nothing else runs on. Each
    step waits for the GPU.
    """
    from pykv.llm.generate import LLM  # here: that module imports this one

    op = "llm.calibrate"
    check_type(op, "llm", llm, LLM, "a pykv.LLM")
    force = check_flag(op, "force", force)
    cuda.refuse_prepare(op, "it measures; call it before")
    try:
        given = list(answers)
    except TypeError:
        raise DtypeError(f"{op}: answers is {quoted(answers)}, expected whole numbers") from None
    counts = [check_whole(op, "answers", n, 1) for n in given]
    with llm.turn():
        found = {n: llm.runner.times(n, force=force) for n in counts}
    return {n: times for n, times in found.items() if times is not None}


class Decodes(Protocol):
    """The runner that decodes by one way."""

    def decode(self, sequences: list[Sequence], beside: int) -> Several[int | None]: ...


class DecodeWays:
    """How long each way of decoding takes for a model on the current GPU.

    Args:
        model: its weights.
        cache: the cache that answers are in; its kind and page size count, and it is not touched.
        tokens: how many a launch of "persistent" draws, at most MOST_TOKENS.
        sms: how many such a launch takes at most; None: all.
        make: makes a runner for a cache and a way.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        tokens: int,
        sms: int | None,
        make: Callable[[PagedKVCache, str], Decodes],
    ) -> None:
        self._model, self._cache, self._tokens, self._make = model, cache, tokens, make
        self._sms = sms
        self._known: dict[int, Times | None] = {}
        self._chosen: dict[int, str] = {}

    def fastest(self, rows: int) -> str:
        """The faster way for so many answers; "graph" if nobody has measured."""
        if rows not in self._chosen:
            times = self._kept(rows)
            self._chosen[rows] = min(times, key=lambda way: times[way]) if times else "graph"
        return self._chosen[rows]

    def times(self, rows: int, *, force: bool = False) -> Times | None:
        """The kept figures for so many answers, else (with `force`, always) figures measured now;
        None if there is only one way, or no memory to measure with."""
        self._chosen.pop(rows, None)
        found = None if force else self._kept(rows)
        if found is None:
            found = self._measured(rows)
            if found is not None:
                calibration.keep(found, *self._place(rows))
        self._known[rows] = found
        return found

    def _kept(self, rows: int) -> Times | None:
        if self._known.get(rows) is None:
            self._known[rows] = _read(*self._place(rows))
        return self._known[rows]

    def _place(self, rows: int) -> tuple[int, str, str]:
        return cuda.current_device(), "decode", self._kind(rows)

    def _measured(self, rows: int) -> Times | None:
        cache = self._scratch(rows)
        if cache is None:
            return None
        try:
            return {way: self._measure(cache, rows, way) for way in WAYS}
        except UnsupportedError:  # no phases do what the model does, so "graph" is the only way
            return None

    def _kind(self, rows: int) -> str:
        """A digest of what times depend on besides the GPU: sizes, types, options, kernels."""
        model, cache = self._model, self._cache
        config = model.config
        listed = [config.heads, config.kv_heads, config.head_dim, config.windows, str(cache.spec)]
        listed += [cache.page_size, rows, self._tokens, self._sms]
        for w in model.matrices():
            listed += [(kind, tuple(part.shape)) for kind, part in matrices.parts_of(w)]
        text = repr(listed) + cuda.source("resident_program") + cuda.source("block_linear")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _scratch(self, rows: int) -> PagedKVCache | None:
        """Pages for sequences that share their first CONTEXT tokens."""
        P, cache = self._cache.page_size, self._cache
        pages = CONTEXT // P + rows * self._own_pages
        layers, heads, head_dim = cache.sizes
        xp = module_of(cache.k)
        free = memory.free(xp)
        if free is not None and 2 * pages * P * cache.bytes_per_token > free:
            return None
        options = dict(page_size=P, spec=cache.spec, margin=1.0, xp=xp)
        return PagedKVCache(layers, pages, heads, head_dim, **options)

    @property
    def _sample(self) -> int:
        """Tokens of a sample: whole launches."""
        return self._tokens * math.ceil(_TOKENS / self._tokens)

    @property
    def _own_pages(self) -> int:
        return math.ceil(
            (CONTEXT % self._cache.page_size + self._sample + 1) / self._cache.page_size
        )

    def _measure(self, cache: PagedKVCache, rows: int, way: str) -> float:
        runner, P, own = self._make(cache, way), cache.page_size, self._own_pages
        shared = list(range(CONTEXT // P))
        sequences = []
        for row in range(rows):
            first = len(shared) + row * own
            s = Sequence([0] * CONTEXT, SamplingParams(), 2**31 - 1)
            s.pages = shared + list(range(first, first + own))
            sequences.append(s)
        samples: list[float] = []
        while len(samples) < 1 + _SAMPLES and sum(samples[1:]) < _BUDGET_S:
            for s in sequences:
                s.generated, s.cached = [0], CONTEXT
            started = time.perf_counter()
            for _ in range(self._sample):
                for s, token in zip(sequences, runner.decode(sequences, beside=0), strict=True):
                    s.generated.append(max(token or 0, 0))
            samples.append(time.perf_counter() - started)
        return 1e6 * min(samples[1:]) / self._sample  # the first one compiles and captures


def _read(device: int, *more: str) -> Times | None:
    """The figures in the cache folder; None if there are none, or damaged ones."""
    try:
        read = json.loads(calibration.file_of(device, *more).read_text(encoding="utf-8"))
        times = {way: float(read[way]) for way in WAYS}
    except calibration.DAMAGED:
        return None
    return times if all(0 < us < math.inf for us in times.values()) else None
