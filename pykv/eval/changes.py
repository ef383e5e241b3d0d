"""What is done to the rows of a cache before a text goes on.

A change is a function of an exact cache, the pages of a sequence, and a number of its first tokens.
It may overwrite their rows, and says what they would take as it keeps them:

    def change(cache: ExactCache, pages: list[int], tokens: int) -> Kept

One that evicts moves the rows that stay to the front, in their order; they may be others for each
layer and head. Keys are rotated already, so they know their positions; but a sliding window goes by
the distance of slots, so such layers keep their last rows, all heads as many.

Dimensions: T tokens, H KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pykv import blocks, eviction, kinds
from pykv.arrays import module_of, to_host
from pykv.errors import DtypeError, ParameterError, UnsupportedError, a_type, quoted
from pykv.eval.replay import QUERIES, ExactCache, Place
from pykv.eviction import AdaKV, Policy, Rotary
from pykv.eviction.policies import as_policy, base_of
from pykv.kinds import SCALE_DTYPES, Kind
from pykv.kvtc.codec import Codec
from pykv.llm.config import Config
from pykv.ops import paged_qkv
from pykv.options import check_type
from pykv.pages import copy_pages
from pykv.specs import KVSpec, as_spec


class Kept(NamedTuple):
    """What a change left.

    Attributes:
        nbytes: that its rows take; of exact ones as float16, an LLM's cache unless told otherwise.
        rows: of each head, or of the longest.
        missing: [L, H] int32, by how many rows heads are behind the longest; None: they are equal.
    """

    nbytes: int
    rows: int
    missing: Any = None


Change = Callable[[ExactCache, list[int], int], Kept]


def changed(
    change: Change, exact: ExactCache, pages: list[int], trial: ExactCache, tokens: int, more: int
) -> tuple[Place, Kept]:
    """Put a changed copy of a sequence into `trial`.

    Args:
        change: see above.
        exact, pages: the sequence's rows, of which the first `tokens` are changed.
        trial: a cache that nobody else uses, with pages for the copy.
        more: tokens that may be appended.

    Returns:
        Where the copy goes on, whose pages are the caller's to free, and what the change says that
        it kept.

    Raises:
        ParameterError: the change says that it kept a number of rows that there cannot be.
    """
    copy = trial.manager.allocate(len(pages) * trial.page_size)
    copy_pages(exact, trial, pages, copy)
    trial.queries = list(exact.queries)
    kept = change(trial, copy, tokens)
    if not 0 < kept.rows <= tokens:
        raise ParameterError(f"eval: a change keeps {kept.rows} rows, expected 1 to {tokens}")
    trial.extend(copy, kept.rows, kept.rows + more)
    return Place(copy, tokens, kept.rows, kept.missing), kept


def check_llm(op: str, llm: Any) -> None:
    """Check for `op` that `llm` is a pykv.LLM, or raise DtypeError."""
    from pykv.llm import LLM

    check_type(op, "llm", llm, LLM, "a pykv.LLM")


def check_job(op: str, llm: Any, changes: Any, progress: Any) -> None:
    """Check for `op` what every measurement is given.

    Raises:
        DtypeError: `llm` is no pykv.LLM, or `progress` no function.
        ParameterError: `changes` are not functions by name, or there are none.
    """
    check_llm(op, llm)
    is_mapping = isinstance(changes, Mapping) and changes
    if not is_mapping or not all(callable(change) for change in changes.values()):
        raise ParameterError(f"{op}: changes are {quoted(changes)}, expected functions by name")
    if not callable(progress):
        raise DtypeError(f"{op}: progress is {a_type(progress)}, expected a function")


def identity(cache: ExactCache, pages: list[int], tokens: int) -> Kept:
    """The change that changes nothing of the `tokens` of `pages` in `cache`."""
    config = cache.config
    return Kept(tokens * config.num_layers * config.kv_heads * _fp16_row(config), tokens)


def _fp16_row(config: Config) -> int:
    """Bytes of a token's key and value in one head."""
    return KVSpec("fp16", "fp16").bytes_per_token(1, config.head_dim)


def evict(policy: Policy | AdaKV | str) -> Change:
    """Rows that a policy of pykv.eviction keeps; it is shown the last queries, see ExactCache.
    Layers with a sliding window keep their last rows, as in an LLM.

    Args:
        policy: such as pykv.eviction.SnapKV(ratio=0.5), or its text, "snapkv:0.5".

    Raises:
        ParameterError: the text is unknown.
        DtypeError: it is no policy.
        UnsupportedError: the policy wants scores that somebody sums while the model runs, as H2O
            does, or more than QUERIES queries; or from the change, heads would keep different
            numbers of rows, and layers have sliding windows.
    """
    chosen = as_policy("eval.evict", policy)
    base = base_of(chosen)
    if base.needs == "scores":
        raise UnsupportedError(
            f"eval.evict: policy is {policy!r}, expected one that goes by rows or by queries: the "
            "attention that all queries gave is not kept here"
        )
    if base.asked > QUERIES:
        raise UnsupportedError(
            f"eval.evict: policy is {policy!r}, expected a window of {QUERIES} at most: no more of "
            "the last queries are kept here"
        )

    def change(cache: ExactCache, pages: list[int], tokens: int) -> Kept:
        config, queries = cache.config, None
        policies: list[Policy | AdaKV] = [chosen] * config.num_layers
        if any(config.windows):
            if base is not chosen or base.threshold is not None:
                raise UnsupportedError(
                    f"eval.evict: policy is {policy!r}, expected even budgets, as layers have "
                    "sliding windows"
                )
            recent = eviction.Streaming(budget=int(base.counts(np.array(tokens))))
            policies = [recent if window else chosen for window in config.windows]
        if asks := base.needs == "queries" and not all(config.windows):
            queries = [of_layer[None] for of_layer in cache.queries]
        looks_ahead = asks and base.looks_ahead
        left = eviction.evict(
            cache,
            [pages],
            [tokens],
            dict(enumerate(policies)),
            queries=queries,
            scale=config.attention_scales,
            logits_soft_cap=config.attention_cap,
            rotary=Rotary(config.inv_freq, config.kind.pairing) if looks_ahead else None,
        )
        lengths = left.lengths[:, 0]  # [L, H]
        missing = lengths.max() - lengths
        nbytes = int(lengths.sum()) * _fp16_row(config)
        return Kept(nbytes, int(lengths.max()), missing if missing.any() else None)

    return change


def code(codec: Codec) -> Change:
    """Rows that went through a codec of pykv.kvtc, with the sinks and the window that it exempts.

    Args:
        codec: of the model's artefact, on its device.

    Raises:
        DtypeError: it is no Codec.
    """
    check_type("eval.code", "codec", codec, Codec, "a pykv.kvtc.Codec")

    def change(cache: ExactCache, pages: list[int], tokens: int) -> Kept:
        table, positions = (np.array(x, np.int32) for x in (pages, range(tokens)))
        coded = codec.compress(cache, table, positions)
        codec.decompress(coded, cache, table)
        return Kept(coded.header.nbytes, tokens)

    return change


def requantise(spec: KVSpec | str) -> Change:
    """Rows as a cache of `spec` gives them back: encoded and decoded by pykv.kinds, with which all
    kernels agree bit for bit, and heads mixed by a Hadamard matrix meanwhile where pykv.LLM does
    so. Scales that heads or tensors share are those of the sequence itself, as good as any.

    Args:
        spec: a KVSpec, or a text such as "int8", "k8v4" or "fp8:head".

    Raises:
        ParameterError, DtypeError: the spec is unknown, or no spec.

    The change works on the host, a layer at a time.
    """
    wanted = as_spec("requantise", spec)

    def change(cache: ExactCache, pages: list[int], tokens: int) -> Kept:
        asarray = module_of(cache.k).asarray
        slots = asarray(blocks.slots(pages, 0, tokens, cache.page_size))
        for pair in cache.layers:
            for kind, pool in zip(wanted.kinds, pair, strict=True):
                of_slots = pool.reshape(-1, *pool.shape[2:])
                rows = of_slots[slots]
                scale = static_scale(rows, kind, wanted, wanted.wants_hadamard)
                of_slots[slots] = asarray(stored(rows, kind, wanted, scale, wanted.wants_hadamard))
        per_token = len(cache.layers) * wanted.bytes_per_token(*cache.k.shape[3:])
        return Kept(tokens * per_token, tokens)

    return change


def stored(rows: Any, kind: Kind, spec: KVSpec, scale: Any = None, hadamard: bool = False) -> Any:
    """What rows [..., D] are after a cache of `spec` had them as `kind`, float32 on the host.

    Args:
        scale: [H] or [1] where the spec wants to be given some, see `static_scale`.
        hadamard: mix heads before, and unmix them after.
    """
    dtype = SCALE_DTYPES[spec.scale_dtype]
    codes, scale = kinds.quantize(mixed(rows, hadamard), kind, scale=scale, scale_dtype=dtype)
    return mixed(kinds.dequantize(codes, kind, scale), hadamard)


def mixed(rows: Any, hadamard: bool) -> Any:
    """`rows` [..., D], times the Hadamard matrix if `hadamard`; on the host. Its own inverse."""
    return paged_qkv.hadamard_transform(to_host(rows)) if hadamard else to_host(rows)


def static_scale(rows: Any, kind: Kind, spec: KVSpec, hadamard: bool = False) -> Any:
    """The scales that a spec wants to be given of rows [T, H, D], which it has as `kind`, mixed if
    `hadamard`: [H] or [1], None if none."""
    if not kind.largest or spec.has_dynamic_scales:
        return None
    by_head = mixed(rows, hadamard).swapaxes(0, 1).reshape(rows.shape[1], -1)
    groups = by_head if spec.granularity == "head" else by_head.reshape(1, -1)
    return kinds.row_scales(groups, kind, SCALE_DTYPES[spec.scale_dtype])
