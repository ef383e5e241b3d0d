"""A small valid call of every op that takes arrays: what tests of all ops start from."""

import numpy as np

from pykv import KVSpec
from pykv.kvtc.stream_v0 import Range
from pykv.ops import (
    activation,
    adjust_logits,
    attention_scores,
    bandwidth,
    block_choice,
    block_linear,
    block_rows,
    block_scores,
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
    qkv_decode,
    rope,
    sample,
)


def zeros(dtype, *shape):
    return np.zeros(shape, dtype)


def taking(*arrays, **plain):
    """The arguments of a call: zeros for arrays, which texts list as "name dtype sizes", and plain
    values."""
    listed = [text.split() for text in ", ".join(arrays).split(", ") if text]
    return {name: zeros(dtype, *map(int, sizes)) for name, dtype, *sizes in listed} | plain


def call(op, *arrays, **plain):
    return op, taking(*arrays, **plain)


# Arrays that pass, whatever is in them. CONTENTS has what those of integers hold where zeros would
# be no valid call.
ROWS = "k f4 2 2 16, v f4 2 2 16"
POOLS = "k_pool i1 4 2 2 16, v_pool i1 4 2 2 16, k_scales f2 4 2 2, v_scales f2 4 2 2"
OUTS = "k_out i1 4 2 2 16, v_out i1 4 2 2 16, k_out_scales f2 4 2 2, v_out_scales f2 4 2 2"
TABLE = "page_table i4 2 2, lengths i4 2"
LISTS = "indices i4 2, indptr i4 3"
SPEC = KVSpec("int8", "int8")
STEPS = "k_steps f4 32, v_steps f4 64"
WIDTHS = dict(k_widths=(0, 0, 0, 0, 0, 0, 32, 0), v_widths=(0, 0, 0, 0, 0, 0, 64, 0))
BASES = "k_basis f2 16 8, v_basis f2 16 24"
LAYERS = "k_pools i1 2 4 2 2 16, v_pools i1 2 4 2 2 16, k_scales f2 2 4 2 2, v_scales f2 2 4 2 2"
SEQUENCE = "table i4 2, positions i4 3, places i4 1 2, mean f2 2 32, inv_freq f4 1 8"
EXEMPT = "sinks f2 1 2 2 2 16, window i1 1 2 2 2 16, window_scales f2 1 2 2 2"
PARAMETERS = "temperature f4 2, top_k i4 2, top_p f4 2, min_p f4 2, seeds u8 2, steps i4 2"
BIASES = "bias_indptr i4 3, bias_ids i4 2, bias_values f4 2"
PENALTIES = "tallies i4 3 5, penalties f4 2 3, tokens i4 2"
MASKS = "masks i4 2 1, mask_rows i4 2"
EXTREMES = "min_vals f4 2, max_vals f4 2"
COLUMNS = dict(start_feature=1, range_features=4)
RANGES = [Range(0, 2), Range(2, 8, "intx", 4)]
OPS = [
    call(activation.add, "x f4 3 8, y f4 3 8"),
    call(adjust_logits.adjust, "logits f4 2 5, tally_rows i4 2", PENALTIES, BIASES, MASKS),
    call(activation.embed, "table f4 3 8, ids i4 2"),
    call(activation.swiglu, "x f4 3 8"),
    call(activation.geglu, "x f4 3 8"),
    call(
        attention_scores.score,
        "q f4 2 2 16, lse f4 2 2, k_pool i1 4 2 2 16, k_scales f2 4 2 2",
        TABLE,
    ),
    call(
        block_choice.choose,
        "lengths i4 2, page_table i4 2 2, scores f4 2 2 2",
        page_size=2,
        block=2,
        recent=1,
        blocks=1,
        width=2,
    ),
    call(block_scores.score, "q f4 2 4 8, means f4 2 2 2 8, lengths i4 2", block=2, recent=1),
    call(bandwidth.read, "x u4 4 4, sums u4 2"),
    call(bandwidth.copy, "x u4 4 4, out u4 4 4"),
    call(
        block_linear.multiply,
        "x f4 3 32, w u1 6 48, norm f4 32",
        kind="Q8_0",
        eps=1e-6,
        gate="swiglu",
        early=True,
        exact=False,
    ),
    call(block_rows.take, "w u1 5 48, ids i4 2", kind="Q8_0", I=32),
    call(
        contiguous_append.append,
        "k f4 1 2 2 8, v f4 1 2 2 8, lengths i4 1, k_cache f2 1 4 2 8, v_cache f2 1 4 2 8",
    ),
    call(dequant.dequantize, "blocks u1 2 34", kind="Q8_0"),
    call(kv_compact.compact, "kept i4 2 2 4, counts i4 2 2, page_table i4 2 2", POOLS),
    call(
        kv_scores.score,
        "vectors f4 2 4 16, factors f4 2 4 3 16, pool i1 4 2 2 16, scales f2 4 2 2",
        TABLE,
        measure="squares",
    ),
    call(kv_scores.means, "pool i1 4 2 2 16, scales f2 4 2 2", TABLE, run=3),
    call(kv_select.select, "scores f4 2 2 4, lengths i4 2 2, budgets i4 2"),
    call(kvtc_code.encode, "k f4 2 32, v f4 2 64, out u1 2 24", STEPS, **WIDTHS),
    call(kvtc_code.decode, "rows u1 2 24", STEPS, **WIDTHS),
    call(kvtc_project.project, "k f2 3 16, v f2 3 16", BASES),
    call(kvtc_project.restore, "k f2 3 8, v f2 3 24", BASES),
    call(kvtc_rows.gather, "kept_positions i4 3", LAYERS, SEQUENCE, EXEMPT),
    call(kvtc_rows.scatter, "rows f2 2 1 32", LAYERS, SEQUENCE, EXEMPT),
    call(kvtc_quantize.quantize_fp8, "x f4 2 8", **COLUMNS),
    call(kvtc_quantize.dequantize_fp8, "codes u1 2 4, out f4 2 8"),
    call(kvtc_quantize.minmax_reduce, "x f4 2 8", **COLUMNS),
    call(kvtc_quantize.quantize_intx, "x f4 2 8", EXTREMES, int_bits=4, **COLUMNS),
    call(
        kvtc_quantize.dequantize_intx, "codes u1 2 2, out f4 2 8", EXTREMES, int_bits=4, **COLUMNS
    ),
    call(kvtc_ranges.quantize_ranges, "x f4 2 8", ranges=RANGES),
    call(linear.linear, "x f4 3 8, w f2 5 8"),
    call(logprobs.top, "logits f4 2 5, tokens i4 2, wanted i4 2", K=3),
    call(merge_states.merge, "values f4 2 3 2 8, lse f4 2 3 2"),
    call(norm.rms_norm, "x f4 3 8, weight f4 8"),
    call(page_table.from_lists, "last_page_len i4 2", LISTS, page_size=2, width=2),
    call(paged_append.append, "slots i4 2", ROWS, POOLS),
    call(paged_append.append_decode, "last_page_len i4 2", ROWS, POOLS, LISTS, counts="before"),
    call(
        paged_append.append_ragged,
        "append_indptr i4 3, last_page_len i4 2",
        ROWS,
        POOLS,
        LISTS,
        counts="before",
    ),
    call(paged_append.append_indexed, "batch_indices i4 2, positions i4 2", ROWS, POOLS, LISTS),
    call(paged_convert.gather, POOLS),
    call(paged_convert.scatter, "k f4 4 2 2 16, v f4 4 2 2 16", POOLS),
    call(paged_convert.convert, POOLS, OUTS, spec=SPEC, out_spec=SPEC),
    call(paged_decode.decode, "q f4 2 2 16", POOLS, TABLE),
    call(paged_qkv.append, "qkv f4 2 96, slots i4 2", POOLS),
    call(qkv_decode.decode, "qkv f4 2 96, slots i4 2", POOLS, TABLE),
    call(prefill.prefill, "q f4 2 2 16, q_starts i4 3", POOLS, TABLE),
    call(
        prefill.prefill_contiguous,
        "q f4 4 2 2 16, k i1 4 2 2 16, v i1 4 2 2 16, k_scales f2 4 2 2, v_scales f2 4 2 2",
    ),
    call(rope.rotate, "q f4 3 2 8, k f4 3 1 8, positions i4 3, inv_freq f4 4"),
    call(sample.argmax, "logits f4 2 5"),
    call(sample.sample, "logits f4 2 5", PARAMETERS),
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
    if name.endswith(("_scales", "_steps")):
        return rng.uniform(0.01, 0.02, x.shape).astype(x.dtype)
    if x.dtype.kind == "f":
        return rng.standard_normal(x.shape).astype(x.dtype)
    if x.ndim > 1:  # codes and blocks
        return rng.integers(0, 100, x.shape).astype(x.dtype)
    return x.copy()
