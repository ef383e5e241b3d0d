"""Decoding over what is kept of a cache beside decoding over all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pykv.arrays import FLOATS
from pykv.bench import elastic
from pykv.checker import checker
from pykv.elastic.timed import MOST_CALLS, Timed, counts, time_calls
from pykv.errors import ParameterError, ShapeError
from pykv.options import check_number, check_whole
from pykv.specs import KVSpec

FLOAT16 = (FLOATS[1],)


@dataclass(frozen=True)
class Cycle:
    """Decoding over what is kept beside decoding over everything, by the same kernels.

    Attributes:
        baseline, elastic: samples of whole cycles; bytes are those of keys and values that are
            read. The elastic cycle begins with the eviction.
        decode_steps: tokens of a cycle.
        kept: tokens of each sequence that stay, of those before the first step.
        kv_bytes: resident without and with the eviction.
        relative_l2, retained_mass: of the last query, see `pykv bench elastic`.
    """

    baseline: Timed
    elastic: Timed
    decode_steps: int
    kept: int
    kv_bytes: tuple[int, int]
    relative_l2: float
    retained_mass: float

    @property
    def baseline_ms(self) -> float | None:
        """The median of the whole cycle over all keys."""
        return self.baseline.median_ms

    @property
    def elastic_ms(self) -> float | None:
        """The median of the whole cycle over those that are kept, eviction included."""
        return self.elastic.median_ms

    @property
    def speedup(self) -> float | None:
        """baseline_ms / elastic_ms."""
        return self.baseline_ms / self.elastic_ms if self.baseline_ms and self.elastic_ms else None


def inference_cycle(
    kv: Any, q: Any, decode_steps: int, keep: float, *, repetitions: int = 20, warmup: int = 3
) -> Cycle:
    """Time tokens that are appended and attend, with and without an eviction before the first.

    Args:
        kv: [2, B, L + decode_steps, H, D] float16: keys and values; the last `decode_steps` tokens
            are appended one by one.
        q: [B, n, HQ, D] float16, n = bench.elastic.WINDOW + decode_steps + 1: the queries that
            score the keys, those of the steps, and one more for the errors.
        decode_steps: at least 1.
        keep: which part of the L tokens stays, above 0 and below 1: those with most attention mass,
            the count being exact. It takes the place of a threshold, which cannot say how much is
            kept.
        repetitions, warmup: timed and untimed cycles.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype, or an option another type.
        ParameterError: an option is out of its range.
        DeviceError: host and device arrays are mixed.

    The Elastic KV core's output arrays have no twin: what is kept lies in a cache of its own.
    """
    op = "elastic.inference_cycle"
    steps = check_whole(op, "decode_steps", decode_steps, 1)
    keep = check_number(op, "keep", keep, positive=True)
    if keep >= 1:
        raise ParameterError(f"{op}: keep is {keep}, expected a number below 1")
    how = check_whole(op, "repetitions", repetitions, 1, MOST_CALLS), *counts(op, warmup=warmup)
    _check_cycle(op, kv, q, steps)
    spec = KVSpec.parse("fp16")
    whole, some = (elastic.Layer(kv[0], kv[1], q, part, spec, steps) for part in (1, keep))

    def timed(layer: elastic.Layer) -> Timed:
        tokens = sum(range(layer.kept + 1, layer.kept + steps + 1))
        return Timed(time_calls(kv, layer.cycle, *how), layer.B * tokens * layer.bytes_per_token)

    baseline, evicted = timed(whole), timed(some)
    of_token, quality = some.B * some.bytes_per_token, some.quality()
    return Cycle(
        baseline=baseline,
        elastic=evicted,
        decode_steps=steps,
        kept=some.kept,
        kv_bytes=(some.L * of_token, some.kept * of_token),
        relative_l2=quality["relative_l2"],
        retained_mass=quality["retained_mass"][0],
    )


def _check_cycle(op: str, kv: Any, q: Any, steps: int) -> None:
    dims = checker(op, kv=("2 B T H D", FLOAT16), q=("B n HQ D", FLOAT16))(kv, q)
    if dims["T"] <= steps:
        raise ShapeError(f"{op}: kv has T={dims['T']}, expected more than decode_steps={steps}")
    if dims["n"] != elastic.WINDOW + steps + 1:
        expected = f"n={elastic.WINDOW + steps + 1} for decode_steps={steps}"
        raise ShapeError(f"{op}: q has n={dims['n']}, expected {expected}")
    if 0 in dims.values() or dims["HQ"] % dims["H"]:
        expected = f"a positive multiple of H={dims['H']}, and no empty dimension"
        raise ShapeError(f"{op}: q has HQ={dims['HQ']}, expected {expected}")
