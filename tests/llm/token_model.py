"""A model in place of one: an LLM whose cache holds tokens, with logits that are a hash of all that
a row sees there. What it answers is wrong as soon as one row of a layer is not its own.

All else is the LLM's: scheduler, decoders, sampler, cache, tiers, sessions, graphs and streams.
Rows are whole numbers up to 60, four apart, so that codecs of caches bring back which they were.
"""

import random
import threading
import weakref
from functools import partial

import numpy as np

from pykv import cuda
from pykv.arrays import like, on_gpu
from pykv.kvtc import Artefact, Group, Plan, Side
from pykv.llm import LLM, model, opening, runner, token_program
from pykv.llm.model import Batch
from pykv.llm.token_program import TokenPhases, TokenStep
from pykv.ops.resident_program import ResidentProgram
from pykv.pool import PagedKVCache
from pykv.programs.phases import Argmax
from pykv.programs.stages import Touched
from tests import peers
from tests.llm import tiny
from tests.simt import cupy as simt

hooks = [lambda: None]  # called as a step begins
_GAP, _VALUES = 4, 16
_FACTORS = np.random.default_rng(1).integers(1, 2**63, 512, np.uint64) | np.uint64(1)


def _host(x):
    return getattr(x, "host", x)


def _do(x, work, *args):
    """Now, or on a GPU in the order of its stream."""
    cuda.enqueue(lambda: simt.enqueue(work, *args)) if on_gpu(x) else work(*args)


def _append_qkv(self, layer, qkv, slots, **options):
    """As PagedKVCache.append_qkv, of tokens and positions."""
    _do(slots, _write, (self.k[layer], self.v[layer]), qkv, slots)


def _write(pools, rows, slots):
    slots = _host(slots)
    given = slots[slots >= 0]
    assert len(set(given.tolist())) == len(given), "two rows write one slot"
    for pool, values in zip(pools, rows, strict=True):
        pool = _host(pool)
        page, row = np.divmod(given, pool.shape[1])
        pool[page, row] = (_host(values)[slots >= 0] % _VALUES * _GAP)[:, None, None]


def _logits(cache, batch, rows, out):
    """Of each row wanted: a hash of what it sees, of all layers; NaN where that is nothing."""
    k, v = (_host(x) for x in (cache.k, cache.v))
    table, lengths = _host(batch.page_table), _host(batch.lengths)
    starts = np.arange(len(lengths) + 1) if batch.q_starts is None else _host(batch.q_starts)
    wanted = range(len(_host(batch.ids))) if rows is None else _host(rows).tolist()
    layers, (heads, width) = np.arange(len(k)), k.shape[3:]
    P = k.shape[2]
    for at, token in enumerate(wanted):
        i = int(np.searchsorted(starts, token, "right")) - 1
        length = int(lengths[i]) - (int(starts[i + 1]) - 1 - token) if i < len(lengths) else 0
        if length <= 0:
            _host(out)[at] = np.nan
            continue
        place = np.arange(length)
        pages = table[i, place // P]
        if (pages < 0).any() or (pages >= k.shape[1]).any():
            raise AssertionError("a row sees a page that there is not")
        found = [  # [L, length], of one element of each row
            x[
                layers[:, None],
                pages,
                place % P,
                (layers % heads)[:, None],
                (layers * 5 % width)[:, None],
            ]
            for x in (k, v)
        ]
        with np.errstate(invalid="ignore"):
            whole = np.rint(np.stack(found).astype(np.float32) / _GAP)
            values = np.where(np.isfinite(whole), whole, 99).astype(np.int64).astype(np.uint64)
        mixed = (values + np.uint64(1)) * _FACTORS[place % 256]
        sums = (mixed ^ mixed >> np.uint64(29)).reshape(-1, length).sum(axis=1, dtype=np.uint64)
        state = np.uint64(hash((length, *sums.tolist())) % 2**64)
        products = state * _FACTORS[: out.shape[1]]
        _host(out)[at] = (products >> np.uint64(52)).astype(np.float32) / 256


def _forward(model, batch, cache, rows=None, *, out=None, queries=None, **options):
    """As model.forward."""
    hooks[0]()
    if out is None:
        count = len(batch.ids) if rows is None else len(rows)
        out = like(batch.ids, (count, model.config.vocab), np.float32)
    for layer in range(model.config.num_layers):
        cache.append_qkv(layer, (batch.ids, batch.positions), batch.slots)
    pools = getattr(cache, "_cache", cache)  # of SentPages
    _do(batch.ids, _logits, pools, batch, rows, out)
    return out


class _Forward(Argmax):
    """The phase of a step before its draw."""

    def checked(self, op):
        pass

    def touched(self):
        return Touched([], [])

    def run_alone(self):
        self.work()


def _token_phases(model, batch, cache):
    logits = np.empty((len(batch.ids), model.config.vocab), np.float32)
    peaks = np.empty(len(batch.ids), np.int32)
    step = _Forward(logits, peaks)
    step.work = partial(_forward, model, batch, _OnHost(cache), out=logits)
    return TokenPhases([step, Argmax(logits, peaks)], logits, peaks)


class _OnHost:
    """A cache of a GPU as the host's."""

    def __init__(self, cache):
        self.k, self.v = _host(cache.k), _host(cache.v)

    append_qkv = _append_qkv


class _Step(TokenStep):
    """One whose launches the host does, in the arrays of the GPU."""

    def __init__(self, model, batch, cache, blocks=None):
        of_host = Batch(*(_host(x) for x in vars(batch).values()))
        super().__init__(model, of_host, cache, blocks)
        self._is_device = on_gpu(batch.ids)
        if self._is_device:
            self._own, self.peaks = self.peaks, simt.ndarray(self.peaks)
            self._shown = simt.ndarray(self._logits)

    def __call__(self):
        if not self._is_device:
            return super().__call__()
        hooks[0]()  # a launch may fail, but no work that waits in a stream
        simt.enqueue(_unhooked, super().__call__)
        return self._shown

    def resident(self, asked):
        if not self._is_device:
            return super().resident(asked)
        simt.cuda.get_current_stream().synchronize()
        shown, self.peaks = self.peaks, self._own
        try:
            return super().resident(asked)
        finally:
            self.peaks = shown


def _unhooked(work):
    hook, hooks[0] = hooks[0], lambda: None
    try:
        work()
    finally:
        hooks[0] = hook


class _Eager(ResidentProgram):
    """One that goes on while the host does other things, as far as it may."""

    draws = random.Random(0)

    def _run_on(self):
        for _ in range(self.draws.choice([0, 0, 1, 2, 9])):
            if self._runs:
                _unhooked(super()._advance)

    def _advance(self):
        super()._advance()
        self._run_on()

    def _tell(self, command):
        self._run_on()
        return super()._tell(command)

    def end(self):
        self._run_on()
        super().end()


def opener(tmp_path, monkeypatch, draws):
    """Returns open_one(**options): an LLM of the model in place of one."""
    path, loaded, load = tmp_path / "tokens.gguf", {}, opening.load_with_bar
    tiny.write(path, "llama", context=256)

    def load_once(file, xp, *given):
        if (xp, simt.Device.current) not in loaded:
            loaded[xp, simt.Device.current] = load(file, xp, *given)
        return loaded[xp, simt.Device.current]

    monkeypatch.setattr(opening, "load_with_bar", load_once)
    monkeypatch.setattr(model, "forward", _forward)
    monkeypatch.setattr(runner, "forward", _forward)
    monkeypatch.setattr(PagedKVCache, "append_qkv", _append_qkv)
    monkeypatch.setattr(token_program, "token_phases", _token_phases)
    monkeypatch.setattr(token_program, "TokenStep", _Step)
    monkeypatch.setattr(token_program, "ResidentProgram", _Eager)
    monkeypatch.setattr(_Eager, "draws", draws)
    return lambda **options: LLM(path, **options)


def artefact_of(llm):
    """Of rows as they are: 8 bits for each element."""
    L, H, D = llm.cache.sizes
    F = L * H * D
    step = 2 * _GAP * _VALUES * 2**0.5 / 250
    plan = {2: Plan((F, *[0] * 7), np.full(F, step, np.float32), 0.01)}
    zeros, even = np.zeros(F, np.float16), np.tile(np.eye(D, dtype=np.float16), (L * H, 1, 1))
    side = Side(zeros, even, np.eye(F, dtype=np.float16), plan)
    return Artefact(llm.fingerprint, (Group(tuple(range(L)), side, side),), (), sinks=3, window=8)


class RandomStreams(peers.Streams):
    """Streams of which any that may goes on next: at times the same ones are always late."""

    def __init__(self, draws):
        self.draws, self.kept, self.lock = draws, [], threading.RLock()
        super().__init__()
        self.of_threads = [self.lanes] + [
            {gpu: self.make(gpu) for gpu in self.lanes} for _ in range(2)
        ]

    def switch(self):
        """As if another thread went on, whose current streams are others."""
        self.lanes = self.draws.choice(self.of_threads)

    def run(self, first=None, until=None, newest=None, most=None):
        """Do what waits, as of Streams.run; `most`: that many pieces of work, whatever is left."""
        order = None
        if self.draws.random() < 0.7:
            order = {lane: self.draws.random() for lane in self.made}
        while most is None or most > 0:
            with self.lock:  # threads of tiers wait, too
                due = [lane for lane in self.made if lane.queue]
                if not due or (until is not None and not until.queue):
                    return
                # Of all again: another thread adds a mark before the wait for it, which is due.
                lanes = [lane for lane in self.made if self._may_go_on(lane)]
                assert lanes, "a deadlock"
                if order:  # another thread's new ones go first
                    self._do_next(min(lanes, key=lambda lane: order.get(lane, 0)))
                else:
                    self._do_next(self.draws.choice(lanes))
            most = most and most - 1

    def _do_next(self, lane):
        item = lane.queue.popleft()
        if isinstance(item, peers.Record):
            self.reached.add(item.mark)
        elif callable(item):
            with simt.Device(lane.gpu):
                item()


def lazy_streams(monkeypatch, draws):
    """Let work wait in the streams of two GPUs of the SIMT machine, and the host wait for the
    stream that it reads from alone."""
    streams = RandomStreams(random.Random(draws.random()))
    monkeypatch.setattr(peers, "Streams", lambda: streams)
    peers.second_gpu(monkeypatch)
    peers.synchronise_as_cupy(monkeypatch, streams)

    def get(self, stream=None):
        streams.run(until=streams.current() if stream is None else stream)
        return self.host.copy()

    monkeypatch.setattr(simt.ndarray, "get", get)
    monkeypatch.setattr(simt, "_allocate", partial(_allocate, streams))
    return streams


def _allocate(streams, size):
    """Memory that, once nobody has it, others may get: in the stream that it was allocated on, as
    CuPy's pool gives it out. Till then, it is there."""
    buffer = bytearray(size)
    memory = np.frombuffer(buffer, np.uint8)
    if simt.Stream.captured is None:
        weakref.finalize(memory, _free, streams.current(), buffer)
    else:  # a graph's own
        streams.kept.append(memory)
    return memory


def _free(lane, buffer):
    """Give memory to others: they write something else there."""
    memory = np.frombuffer(buffer, np.uint8)
    first = memory.ctypes.data + simt.GUARD
    first += -first % simt.ALIGNMENT
    simt._live[first, first + len(memory) - 2 * simt.GUARD - simt.ALIGNMENT] = memory
    lane.queue.append(partial(memory.fill, 0xFF))
