"""A small valid call of every op that takes arrays: what tests of all ops start from."""

import numpy as np

from pykv import KVSpec
from pykv.kvtc.stream_v0 import Range
from pykv.ops import (
    activation,
    adjust_logits,
    attention_scores,
    bandwidth,
    block_linear,
    block_queries,
    block_rows,
    contiguous_append,
    dequant,
    kv_compact,
    kv_scores,
    kv_select,
    kvtc_code,
    kvtc_project,
    kvtc_quantize,
    kvtc_ranges,
    kvtc_rows,
    linear,
    logprobs,
    merge_states,
    norm,
    page_table,
    paged_append,
    paged_convert,
    paged_decode,
    paged_qkv,
    prefill,
    rope,
    sample,
)


def zeros(dtype, *shape):
    return np.zeros(shape, dtype)


# Arrays that pass, whatever is in them; every other argument is a plain value. CONTENTS has what
# those of integers hold where zeros would be no valid call.
ROWS = dict(k=zeros("f4", 2, 2, 16), v=zeros("f4", 2, 2, 16))
POOLS = dict(k_pool=zeros("i1", 4, 2, 2, 16), v_pool=zeros("i1", 4, 2, 2, 16))
POOLS |= dict(k_scales=zeros("f2", 4, 2, 2), v_scales=zeros("f2", 4, 2, 2))
OUTS = dict(zip(("k_out", "v_out", "k_out_scales", "v_out_scales"), POOLS.values(), strict=True))
TABLE = dict(page_table=zeros("i4", 2, 2), lengths=zeros("i4", 2))
LISTS = dict(indices=zeros("i4", 2), indptr=zeros("i4", 3))
SPEC = KVSpec("int8", "int8")
STEPS = dict(k_steps=zeros("f4", 32), v_steps=zeros("f4", 64))
WIDTHS = dict(k_widths=(0, 0, 0, 0, 0, 0, 32, 0), v_widths=(0, 0, 0, 0, 0, 0, 64, 0))
BASES = dict(k_basis=zeros("f2", 16, 8), v_basis=zeros("f2", 16, 24))
LAYERS = dict(k_pools=zeros("i1", 2, 4, 2, 2, 16), v_pools=zeros("i1", 2, 4, 2, 2, 16))
LAYERS |= dict(k_scales=zeros("f2", 2, 4, 2, 2), v_scales=zeros("f2", 2, 4, 2, 2))
SEQUENCE = dict(table=zeros("i4", 2), positions=zeros("i4", 3), places=zeros("i4", 1, 2))
SEQUENCE |= dict(mean=zeros("f2", 2, 32), inv_freq=zeros("f4", 1, 8))
EXEMPT = dict(sinks=zeros("f2", 1, 2, 2, 2, 16), window=zeros("i1", 1, 2, 2, 2, 16))
EXEMPT |= dict(window_scales=zeros("f2", 1, 2, 2, 2))
PARAMETERS = dict(temperature="f4", top_k="i4", top_p="f4", min_p="f4", seeds="u8", steps="i4")
BIASES = dict(bias_indptr=zeros("i4", 3), bias_ids=zeros("i4", 2), bias_values=zeros("f4", 2))
PENALTIES = dict(tallies=zeros("i4", 3, 5), penalties=zeros("f4", 2, 3), tokens=zeros("i4", 2))
MASKS = dict(masks=zeros("i4", 2, 1), mask_rows=zeros("i4", 2))
EXTREMES = dict(min_vals=zeros("f4", 2), max_vals=zeros("f4", 2))
RANGES = [Range(0, 2), Range(2, 8, "intx", 4)]
OPS = [
    (activation.add, dict(x=zeros("f4", 3, 8), y=zeros("f4", 3, 8))),
    (
        adjust_logits.adjust,
        dict(logits=zeros("f4", 2, 5), **PENALTIES, tally_rows=zeros("i4", 2), **BIASES, **MASKS),
    ),
    (activation.embed, dict(table=zeros("f4", 3, 8), ids=zeros("i4", 2))),
    (activation.swiglu, dict(x=zeros("f4", 3, 8))),
    (activation.geglu, dict(x=zeros("f4", 3, 8))),
    (
        attention_scores.score,
        dict(q=zeros("f4", 2, 2, 16), k_pool=POOLS["k_pool"], k_scales=POOLS["k_scales"], **TABLE)
        | dict(lse=zeros("f4", 2, 2)),
    ),
    (
        block_queries.ask,
        dict(q=zeros("f4", 2, 4, 8), lengths=zeros("i4", 2))
        | dict(heads=2, block=2, recent=1, blocks=1),
    ),
    (bandwidth.read, dict(x=zeros("u4", 4, 4), sums=zeros("u4", 2))),
    (bandwidth.copy, dict(x=zeros("u4", 4, 4), out=zeros("u4", 4, 4))),
    (
        block_linear.multiply,
        dict(x=zeros("f4", 3, 32), w=zeros("u1", 6, 48), kind="Q8_0", norm=zeros("f4", 32))
        | dict(eps=1e-6, gate="swiglu", early=True, exact=False),
    ),
    (block_rows.take, dict(w=zeros("u1", 5, 48), kind="Q8_0", I=32, ids=zeros("i4", 2))),
    (
        contiguous_append.append,
        dict(k=zeros("f4", 1, 2, 2, 8), v=zeros("f4", 1, 2, 2, 8), lengths=zeros("i4", 1))
        | dict(k_cache=zeros("f2", 1, 4, 2, 8), v_cache=zeros("f2", 1, 4, 2, 8)),
    ),
    (dequant.dequantize, dict(blocks=zeros("u1", 2, 34), kind="Q8_0")),
    (
        kv_compact.compact,
        dict(**POOLS, page_table=TABLE["page_table"], kept=zeros("i4", 2, 2, 4))
        | dict(counts=zeros("i4", 2, 2)),
    ),
    (
        kv_scores.score,
        dict(pool=POOLS["k_pool"], scales=POOLS["k_scales"], **TABLE, measure="squares")
        | dict(vectors=zeros("f4", 2, 4, 16), factors=zeros("f4", 2, 4, 3, 16)),
    ),
    (
        kv_scores.means,
        dict(pool=POOLS["k_pool"], scales=POOLS["k_scales"], **TABLE, run=3),
    ),
    (
        kv_select.select,
        dict(scores=zeros("f4", 2, 2, 4), lengths=zeros("i4", 2, 2), budgets=zeros("i4", 2)),
    ),
    (
        kvtc_code.encode,
        dict(k=zeros("f4", 2, 32), v=zeros("f4", 2, 64), **STEPS, out=zeros("u1", 2, 24)) | WIDTHS,
    ),
    (kvtc_code.decode, dict(rows=zeros("u1", 2, 24), **STEPS) | WIDTHS),
    (kvtc_project.project, dict(k=zeros("f2", 3, 16), v=zeros("f2", 3, 16), **BASES)),
    (kvtc_project.restore, dict(k=zeros("f2", 3, 8), v=zeros("f2", 3, 24), **BASES)),
    (kvtc_rows.gather, dict(**LAYERS, **SEQUENCE, **EXEMPT, kept_positions=zeros("i4", 3))),
    (kvtc_rows.scatter, dict(**LAYERS, **SEQUENCE, **EXEMPT, rows=zeros("f2", 2, 1, 32))),
    (kvtc_quantize.quantize_fp8, dict(x=zeros("f4", 2, 8), start_feature=1, range_features=4)),
    (kvtc_quantize.dequantize_fp8, dict(codes=zeros("u1", 2, 4), out=zeros("f4", 2, 8))),
    (kvtc_quantize.minmax_reduce, dict(x=zeros("f4", 2, 8), start_feature=1, range_features=4)),
    (
        kvtc_quantize.quantize_intx,
        dict(x=zeros("f4", 2, 8), **EXTREMES, int_bits=4, start_feature=1, range_features=4),
    ),
    (
        kvtc_quantize.dequantize_intx,
        dict(codes=zeros("u1", 2, 2), **EXTREMES, int_bits=4, out=zeros("f4", 2, 8))
        | dict(start_feature=1, range_features=4),
    ),
    (kvtc_ranges.quantize_ranges, dict(x=zeros("f4", 2, 8), ranges=RANGES)),
    (linear.linear, dict(x=zeros("f4", 3, 8), w=zeros("f2", 5, 8))),
    (
        logprobs.top,
        dict(logits=zeros("f4", 2, 5), tokens=zeros("i4", 2), wanted=zeros("i4", 2), K=3),
    ),
    (merge_states.merge, dict(values=zeros("f4", 2, 3, 2, 8), lse=zeros("f4", 2, 3, 2))),
    (norm.rms_norm, dict(x=zeros("f4", 3, 8), weight=zeros("f4", 8))),
    (page_table.from_lists, dict(**LISTS, last_page_len=zeros("i4", 2), page_size=2, width=2)),
    (
        page_table.of_blocks,
        dict(page_table=TABLE["page_table"], rows=zeros("i4", 2), chosen=zeros("i4", 4, 2))
        | dict(counts=zeros("i4", 4), old=zeros("i4", 4), page_size=2, block_pages=1, width=2),
    ),
    (paged_append.append, dict(**ROWS, **POOLS, slots=zeros("i4", 2))),
    (
        paged_append.append_decode,
        dict(**ROWS, **POOLS, **LISTS, last_page_len=zeros("i4", 2), counts="before"),
    ),
    (
        paged_append.append_ragged,
        dict(**ROWS, **POOLS, **LISTS, append_indptr=zeros("i4", 3), counts="before")
        | dict(last_page_len=zeros("i4", 2)),
    ),
    (
        paged_append.append_indexed,
        dict(**ROWS, **POOLS, **LISTS, batch_indices=zeros("i4", 2), positions=zeros("i4", 2)),
    ),
    (paged_convert.gather, dict(**POOLS)),
    (paged_convert.scatter, dict(k=zeros("f4", 4, 2, 2, 16), v=zeros("f4", 4, 2, 2, 16), **POOLS)),
    (paged_convert.convert, dict(**POOLS, **OUTS, spec=SPEC, out_spec=SPEC)),
    (paged_decode.decode, dict(q=zeros("f4", 2, 2, 16), **POOLS, **TABLE)),
    (paged_qkv.append, dict(qkv=zeros("f4", 2, 96), **POOLS, slots=zeros("i4", 2))),
    (prefill.prefill, dict(q=zeros("f4", 2, 2, 16), **POOLS, **TABLE, q_starts=zeros("i4", 3))),
    (
        prefill.prefill_contiguous,
        dict(q=zeros("f4", 4, 2, 2, 16), k=POOLS["k_pool"], v=POOLS["v_pool"])
        | dict(k_scales=POOLS["k_scales"], v_scales=POOLS["v_scales"]),
    ),
    (
        rope.rotate,
        dict(q=zeros("f4", 3, 2, 8), k=zeros("f4", 3, 1, 8), positions=zeros("i4", 3))
        | dict(inv_freq=zeros("f4", 4)),
    ),
    (sample.argmax, dict(logits=zeros("f4", 2, 5))),
    (
        sample.sample,
        dict(logits=zeros("f4", 2, 5))
        | {name: zeros(dtype, 2) for name, dtype in PARAMETERS.items()},
    ),
]

CONTENTS = dict(
    slots=[3, 1],
    page_table=[[0, 1], [2, 3]],
    lengths=[3, 2],
    kept=[[[0, 2, -1, -1], [1, 3, -1, -1]], [[1, -1, -1, -1], [-1, -1, -1, -1]]],
    counts=[[2, 2], [1, 0]],
    rows=[3, 2],
    chosen=[[0, -1], [0, -1], [-1, -1], [0, -1]],
    old=[1, 1, 0, 1],
    indices=[2, 1],
    indptr=[0, 1, 2],
    last_page_len=[1, 0],
    append_indptr=[0, 1, 2],
    batch_indices=[1, 0],
    positions=[0, 1, 3],
    places=[[1, 0]],
    q_starts=[0, 1, 2],
    ids=[2, 0],
    temperature=[0.8, 0],
    top_p=[1, 1],
    min_p=[0.1, 0],
    seeds=[1, 2],
    penalties=[[1.5, 0.5, 0.25], [1, 0, 1]],
    tally_rows=[2, 0],
    bias_indptr=[0, 2, 2],
    bias_ids=[3, 1],
    masks=[[7], [30]],
    mask_rows=[1, -1],
    wanted=[3, 0],
)
CONTENTS_BY_RANK = {("counts", 1): [1, 0, 0, 1], ("table", 1): [0, 1]}


def filled(arguments, rng, xp):
    """Arguments whose arrays hold random floats and codes, and valid integers."""
    return {
        name: xp.asarray(_contents(name, x, rng)) if isinstance(x, np.ndarray) else x
        for name, x in arguments.items()
    }


def _contents(name, x, rng):
    if (name, x.ndim) in CONTENTS_BY_RANK:
        return np.array(CONTENTS_BY_RANK[name, x.ndim], x.dtype)
    if name in CONTENTS and (name, x.ndim) != ("rows", 3):
        return np.resize(np.array(CONTENTS[name], x.dtype), x.shape)
    if name.endswith("_scales"):
        return rng.uniform(0.01, 0.02, x.shape).astype(x.dtype)
    if x.dtype.kind == "f":
        return rng.standard_normal(x.shape).astype(x.dtype)
    if x.ndim > 1:  # codes and blocks
        return rng.integers(0, 100, x.shape).astype(x.dtype)
    return x.copy()
