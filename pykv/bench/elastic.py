"""A cache that forgets: attention over the keys that are kept beside attention over all of them.

    attention  one decode step of a layer, over all keys (keep=1: the baseline) or over those kept
    evict      what leads there: score every key, select, compact, copy the rows that stay
    cycle      `steps` tokens, each an append and attention, after one evict where keep is below 1;
               with --inference

Baseline and evicted cache run the same kernels in the same run. Keys and values are noise; queries
resemble each other and are large, so that logits have a standard deviation of about 3. A key's
score is the attention mass that the last queries before the step gave it (H2O, SnapKV), summed over
the heads. Errors are those of this data; `facts` of a record has them:

    relative_l2    of the step's output against that over all keys
    cosine         of both, as vectors of all heads of all sequences
    retained_mass  of its softmax, mean and least over KV heads; the error may not exceed
                   2 (1 - mass) max |v|, or the case is wrong
    kv_bytes       of keys, values and scales that a step reads

Records gain `results`, and of cycles `inference_cycle`, by the names of the Elastic KV core's JSON
where those mean something; `baseline` says what a speed-up is over. Break-even is the number of
steps after which evicting has paid.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pykv.arrays import module_of
from pykv.bench import Work, memory
from pykv.bench.options import Case
from pykv.bench.report import Record, label
from pykv.errors import ParameterError
from pykv.ops import attention_scores, kv_select, paged_convert, paged_decode
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec
from pykv.testing import caches, host, is_by_definition

KEEPS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
SHAPES = (
    dict(B=1, L=1024, HQ=16, H=16, D=64),  # as the Elastic KV core measures
    dict(B=1, L=4096, HQ=32, H=32, D=128),
    dict(B=1, L=131072, HQ=32, H=8, D=128),
    dict(B=8, L=16384, HQ=32, H=8, D=128),
    dict(B=64, L=16384, HQ=32, H=8, D=128),
)
TINY = dict(B=2, L=200, HQ=4, H=2, D=32)
STEPS = 64
OPTIONS = ("batch", "seq", "equal_heads", "dim", "row_kv", "compress", "keep", "decode_tokens")
BASELINE = "attention over all keys, the same kernel in the same run"
WINDOW = 16  # the last so many queries score the keys
_PAGE = 16
_QUERY = 5.0  # size of queries: with keys of standard deviation 0.58 logits have about 3


def _cases(shapes: Sequence[Case], keeps: Sequence[float], steps: int = 0) -> list[Case]:
    what = ("attention", "evict", "cycle") if steps else ("attention", "evict")
    return [
        {**shape, "kv": "fp16", "keep": keep, "what": one, "steps": steps * (one == "cycle")}
        for shape in shapes
        for one in what
        for keep in keeps
        if keep < 1 or one != "evict"
    ]


CASES, QUICK = _cases(SHAPES, KEEPS), _cases([TINY], (1.0, 0.5, 0.25))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inference", action="store_true", help=f"cycles of {STEPS} tokens, or --decode-tokens"
    )
    parser.add_argument(
        "--reps", dest="samples", type=int, default=argparse.SUPPRESS, help="the same as --samples"
    )


def select(args: argparse.Namespace) -> list[Case]:
    if args.compress is not None and args.keep is not None:
        raise ParameterError("bench elastic: --compress and --keep are given, expected one")
    if args.decode_tokens is not None and not args.inference:
        raise ParameterError("bench elastic: --decode-tokens is given, expected --inference")
    steps = (4 if args.quick else STEPS) * args.inference
    return _cases([TINY], (1.0, 0.5), steps) if args.quick else _cases(SHAPES, KEEPS, steps)


def own_cases(cases: Sequence[Case], change: Case) -> list[Case]:
    """The first shape with other values; beside each kept part the baseline."""
    shape = {name: x for name, x in cases[0].items() if name in TINY}
    keeps = (1.0, change["keep"]) if "keep" in change else {case["keep"]: None for case in cases}
    steps = change.get("steps", max(case["steps"] for case in cases))
    rest = {name: x for name, x in change.items() if name not in ("keep", "steps")}
    return [{**case, **rest} for case in _cases([shape], list(keeps), steps)]


# --- What is measured -----------------------------------------------------------------------------


class Store:
    """A layer with room for `tokens` of each of B sequences, on pages in order, so that the token
    at position p of sequence b has slot b * room + p."""

    def __init__(self, xp: Any, spec: KVSpec, B: int, tokens: int, H: int, D: int) -> None:
        pages = -(-tokens // _PAGE)
        self.room, self._B, self._xp = pages * _PAGE, B, xp
        self.cache = PagedKVCache(1, B * pages, H, D, page_size=_PAGE, spec=spec, xp=xp)
        self._table = xp.arange(B * pages, dtype=np.int32).reshape(B, pages)

    def slots(self, start: int, count: int) -> Any:
        """[B * count] int32: of positions start .. start + count - 1 of each sequence."""
        at = np.arange(self._B)[:, None] * self.room + np.arange(start, start + count)
        return self._xp.asarray(at.reshape(-1).astype(np.int32))

    def pages_of(self, b: int) -> Any:
        """The pages of sequence b."""
        return np.arange(b * self.room, (b + 1) * self.room, _PAGE) // _PAGE

    def at(self, length: int) -> dict[str, Any]:
        """What attention is told, where each sequence has so many keys."""
        lengths = self._xp.full(self._B, length, np.int32)
        return dict(page_table=self._table, lengths=lengths, spec=self.cache.spec)


class Layer:
    """A store of all keys of B sequences, and another for those that are kept.

    Args:
        k, v: [B, L + steps, H, D] floats; the last `steps` tokens are appended one by one.
        q: [B, WINDOW + steps + 1, HQ, D] floats: queries that score, those of the steps, and the
            one of `attend`.
        keep: which part of the L keys stays; 1: all.
        spec: what the stores hold: a kind that finds a scale for each row, in NHD.
        steps: tokens of `cycle`.
    """

    def __init__(self, k: Any, v: Any, q: Any, keep: float, spec: KVSpec, steps: int = 0) -> None:
        xp, (B, tokens, H, D) = module_of(k), k.shape
        self.xp, self.B, self.H, self.HQ, self.steps = xp, B, H, q.shape[2], steps
        self.L = tokens - steps
        self.kept = max(round(keep * self.L), 1)
        self.bytes_per_token = spec.bytes_per_token(H, D)
        self.all = self.some = Store(xp, spec, B, tokens, H, D)
        if self.kept < self.L:
            self.some = Store(xp, spec, B, self.kept + steps, H, D)
        rows = [x[:, : self.L].reshape(-1, H, D) for x in (k, v)]
        self.all.cache.append(0, rows[0], rows[1], slots=self.all.slots(0, self.L))
        values = v.astype(np.float32)
        self.v_max = (values * values).sum(-1).max(1) ** 0.5  # [B, H]
        self._window, self.last = (xp.ascontiguousarray(x) for x in (q[:, :WINDOW], q[:, -1]))
        out = self.out = xp.full(self.last.shape, np.nan, q.dtype)
        workspace = memory.workspace(xp, B, self.HQ, H, D, self.all.room)

        def step(query: Any, store: Store, length: int) -> Callable[[], Any]:
            told = caches.layer(store.cache) | store.at(length) | dict(out=out, workspace=workspace)
            return partial(paged_decode.decode, query, **told)

        self.attend = step(self.last, self.some, self.kept)  # over the kept keys alone
        self.attend_to_all = step(self.last, self.all, self.L)
        self._steps: list[Callable[[], Any]] = []  # each an append, and attention
        for t in range(steps):
            row = {
                name: xp.ascontiguousarray(x[:, self.L + t]) for name, x in dict(k=k, v=v).items()
            }
            slots = self.some.slots(self.kept + t, 1)
            append = partial(self.some.cache.append, 0, **row, slots=slots)
            query = xp.ascontiguousarray(q[:, WINDOW + t])
            self._steps += [append, step(query, self.some, self.kept + t + 1)]
        self._places = self.some.slots(0, self.kept)
        self._limits = xp.full((B, 1), self.L, np.int32), xp.full(B, self.kept, np.int32)
        self._kept = xp.zeros((B, 1, self.all.room), np.int32)
        self._counts = xp.zeros((B, 1), np.int32)
        self._starts = xp.asarray(self.all.room * np.arange(B, dtype=np.int32)[:, None])

    def masses(self, q: Any) -> Any:
        """[B, H, room] float32: the attention that queries behind the last key give each key, over
        the query heads of a KV head."""
        told, arrays = self.all.at(self.L) | dict(causal=False), caches.layer(self.all.cache)
        _, lse = paged_decode.decode(q, **arrays, **told, return_lse=True)
        keys = {name: arrays[name] for name in ("k_pool", "k_scales")}
        return attention_scores.score(q, **keys, **told, lse=lse)

    def evict(self) -> None:
        """Score every key, select the best of each sequence, and copy their rows, in order."""
        scores = self.masses(self._window).sum(1)  # over heads, which all keep the same tokens
        kv_select.select(scores[:, None], *self._limits, kept=self._kept, counts=self._counts)
        tokens = [self._as_tokens(store) for store in (self.all, self.some)]
        outs = {name.replace("_", "_out_").replace("_pool", ""): x for name, x in tokens[1].items()}
        spec = self.all.cache.spec
        where = dict(pages=self.slots_kept, out_pages=self._places)
        paged_convert.convert(**tokens[0], **outs, spec=spec, out_spec=spec, **where)

    @property
    def slots_kept(self) -> Any:
        """[B * kept] int32: slots of all keys, of those that `evict` keeps."""
        return (self._kept[:, 0, : self.kept] + self._starts).reshape(-1)

    def is_evicted(self) -> bool:
        """Whether `evict` chose as many as it should, the best ones, and copied their rows."""
        if (host(self._counts) != self.kept).any():
            return False
        scores = host(self.masses(self._window).sum(1))
        best = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, : self.kept], axis=1)
        slots = best + np.arange(self.B)[:, None] * self.all.room
        if not np.array_equal(host(self.slots_kept), slots.reshape(-1)):
            return False
        source, target = (self._as_tokens(store) for store in (self.all, self.some))
        return all(
            bool((x[self.slots_kept].view("u1") == target[name][self._places].view("u1")).all())
            for name, x in source.items()
            if x is not None
        )

    def is_attention(self, b: int, q: Any, length: int) -> bool:
        """Whether `out` is what queries [B, HQ, D] find of sequence b, by the definition."""
        where = caches.of_sequence(caches.layer(self.some.cache), self.some.pages_of(b))
        where |= dict(lengths=np.array([length]), spec=self.all.cache.spec)
        scale = q.shape[-1] ** -0.5
        return is_by_definition(
            host(self.out[b : b + 1]),
            lambda x: paged_decode.reference(x, **where, scale=scale)[0],
            host(q[b : b + 1]),
        )

    @staticmethod
    def _as_tokens(store: Store) -> dict[str, Any]:
        """The arrays of a store as pages of one token."""
        return {
            name: x if x is None else x.reshape(-1, 1, *x.shape[2:])
            for name, x in caches.layer(store.cache).items()
        }

    def cycle(self) -> None:
        """Evict, where not all is kept, then append and attend token by token."""
        if self.some is not self.all:
            self.evict()
        for step in self._steps:
            step()

    @np.errstate(over="ignore", invalid="ignore")  # of what callers give, perhaps NaN
    def quality(self) -> dict[str, Any]:
        """How the last query's output differs from that over all keys: see this module."""
        exact, mass = self.attend_to_all().copy(), self.masses(self.last)
        got = self.attend().astype(np.float32) - exact.astype(np.float32)
        lost = host(got.reshape(self.B, self.H, -1, got.shape[-1])).astype(np.float64)
        kept = host(mass.swapaxes(0, 1).reshape(self.H, -1)[:, self.slots_kept])
        kept = kept.reshape(self.H, self.B, -1).sum(-1, dtype=np.float64).T  # [B, H]
        G = self.HQ // self.H
        error = np.sqrt((lost**2).sum(-1)).sum(-1)  # summed over the heads of a group
        bound = 2 * np.maximum(G - kept, 0) * host(self.v_max)
        slack = 1e-2 * G * host(self.v_max)  # allows for rounding and quantisation
        of_all = host(exact).astype(np.float64).reshape(lost.shape)
        of_kept = of_all + lost
        sizes = [float(np.sqrt((x**2).sum())) for x in (lost, of_all, of_kept)]
        return dict(
            relative_l2=sizes[0] / (sizes[1] or 1.0),
            cosine=float((of_all * of_kept).sum()) / (sizes[1] * sizes[2] or 1.0),
            retained_mass=[float((kept / G).mean()), float((kept / G).min())],
            within_bound=bool((error <= bound + slack).all()),
        )


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: `what` with B sequences of L keys of which a part `keep` stays, HQ query
    heads and H KV heads of D elements, in kind `kv`."""
    spec, what, steps = KVSpec.parse(case["kv"]), case["what"], case["steps"]
    if spec.layout != "NHD":
        raise ParameterError(f"bench elastic: --kv is {spec}, expected a kind in NHD")
    B, L, HQ, H, D = (case[name] for name in ("B", "L", "HQ", "H", "D"))
    if not memory.fits(xp, 24 * B * (L + steps) * H * D):
        return None
    k, v = caches.values(xp, rng, (B, L + steps, H, D), np.dtype(np.float16))
    common, own = (rng.standard_normal((B, n, HQ, D)) for n in (1, WINDOW + steps + 1))
    q = xp.asarray((_QUERY * (0.8 * common + 0.6 * own)).astype(np.float16))
    layer = Layer(k, v, q, case["keep"], spec, steps)
    resident = B * layer.kept * layer.bytes_per_token
    facts: dict[str, Any] = dict(kv_bytes=resident)
    # Bytes of evicting: all keys are read once, what is kept is read and written.
    moved = (B * L * layer.bytes_per_token // 2 + 2 * resident) * (layer.some is not layer.all)
    if what == "evict":
        return Work(layer.evict, layer.is_evicted, moved, ceiling="copy", wall=True, facts=facts)
    b = int(rng.integers(B))
    if what == "cycle":
        # Bytes of the steps: each reads once the keys, values and scales that it sees.
        moved += sum(range(1, steps + 1)) * B * layer.bytes_per_token + steps * resident
        is_right = partial(layer.is_attention, b, q[:, WINDOW + steps - 1], layer.kept + steps)
        return Work(layer.cycle, is_right, moved, ceiling="read", wall=True, facts=facts)
    if layer.some is not layer.all:
        layer.evict()

    def check() -> bool:
        """By the definition; and no further from attention over all keys than the bound."""
        if not layer.is_attention(b, layer.last, layer.kept):
            return False
        if layer.some is not layer.all:
            facts.update(layer.quality())
        return bool(facts.get("within_bound", True))

    attend = layer.attend
    options: dict[str, Any] = dict(ceiling="read", reads_only=True, graph=(attend,), facts=facts)
    return Work(attend, check, resident, **options)


# --- What it comes to -----------------------------------------------------------------------------


def derive(records: Sequence[Record]) -> None:
    """Add `results`, and `inference_cycle` where there is one, to records that are right."""
    for one in records:
        if not one["ok"]:
            continue
        case, ms = one["case"], one["median"] / 1e3
        spread = statistics.stdev(one["samples"]) / 1e3
        base, evict = _other(records, case, keep=1.0), _other(records, case, what="evict")
        faster = base["median"] / one["median"] if base else None
        results = dict(attention_time_ms=ms, attention_time_std=spread)
        results |= dict(coefficient_of_variation=spread / statistics.fmean(one["samples"]) * 1e3)
        if case["what"] == "cycle":
            tokens = case["B"] * case["steps"]
            one["inference_cycle"] = dict(
                decode_tokens=case["steps"],
                baseline_total_ms=base and base["median"] / 1e3,
                elastic_total_ms=ms,
                baseline_tokens_per_sec=base and 1e6 * tokens / base["median"],
                elastic_tokens_per_sec=1e3 * tokens / ms,
                speedup_vs_baseline=faster,
                baseline=BASELINE,
            )
        if case["what"] != "attention":
            continue
        results |= dict(
            tokens_per_sec=1e3 * case["B"] / ms,
            baseline=BASELINE,
            baseline_tokens_per_sec=base and 1e6 * case["B"] / base["median"],
            speedup_vs_baseline=faster,
            memory_bandwidth_gbs=one["gbps"],
            roofline_fraction=one["share"],
            break_even_steps=None,
        )
        if base and evict and base["median"] > one["median"]:
            results["break_even_steps"] = evict["median"] / (base["median"] - one["median"])
        one["results"] = results


def _other(records: Sequence[Record], case: Case, **change: Any) -> Record | None:
    """The right record of a case with other values."""
    wanted = {**case, **change}
    return next((one for one in records if one["ok"] and one["case"] == wanted), None)


def conclude(records: Sequence[Record]) -> str:
    """Speed-up, error and break-even of every evicted cache."""
    lines = []
    for one in records:
        found = one.get("results") or one.get("inference_cycle")
        if found and one["case"]["keep"] < 1 and found["speedup_vs_baseline"]:
            text = f"{label(one['case'])}: {found['speedup_vs_baseline']:.2f} x {BASELINE}"
            if "relative_l2" in one["facts"]:
                text += f", error {one['facts']['relative_l2']:.1%}"
            if steps := found.get("break_even_steps"):
                text += f", paid after {steps:.0f} steps"
            lines.append(text)
    return "\n".join(lines)
