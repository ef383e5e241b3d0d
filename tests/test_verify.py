"""pykv.verify judged by hand-worked numbers and by faults planted in every op."""

import json

import numpy as np
import pytest

from pykv import cuda, verify
from pykv.arrays import BFLOAT16
from pykv.kinds import KVSpec
from pykv.ops import (
    activation,
    attention_mass,
    bandwidth,
    block_copy,
    contiguous_append,
    dequant,
    linear,
    merge_states,
    norm,
    page_table,
    paged_append,
    paged_check,
    paged_convert,
    paged_decode,
    paged_qkv,
    permute,
    prefill,
    rope,
    sample,
)
from tests.helpers import without_simt

F16, F32, F64 = np.float16, np.float32, np.float64


def judge(op, xp):
    return [verify.Row(op, *case) for case in verify.FAMILIES[op](np.random.default_rng(0), xp)]


# --- The whole ---


def test_every_op_appears_and_holds():
    rows = list(verify.run())
    assert [row.as_text() for row in rows if not row.ok] == []
    ops = [row.op for row in rows]
    assert list(dict.fromkeys(ops)) == list(verify.FAMILIES)
    assert set(ops) == set(cuda.stems())
    assert len({(row.op, row.case) for row in rows}) == len(rows)


def test_the_seed_decides(monkeypatch):
    monkeypatch.setattr(verify, "FAMILIES", {"norm": verify.FAMILIES["norm"]})
    first, again, other = ([row.error for row in verify.run(seed)] for seed in (1, 1, 2))
    assert first == again and first != other


@pytest.mark.parametrize("text", ["fp16", "int8", "int4:fp32:HND", "fp8:head", "fp32+e5m2:tensor"])
def test_the_ops_of_one_cache(text):
    spec = KVSpec.parse(text)
    rows = list(verify.run(spec=spec))
    assert [row.as_text() for row in rows if not row.ok] == []
    ops = ["paged_append", "paged_convert", "paged_decode", "prefill"]
    assert list(dict.fromkeys(row.op for row in rows)) == ops
    for row in rows:
        assert str(spec) in row.case or row.case == "rows of sequences"


@without_simt
def test_every_block_type_is_judged(xp):
    assert [row.case for row in judge("dequant", xp)] == list(dequant.KINDS)


def test_without_gguf_there_is_no_judge_of_blocks(monkeypatch):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    assert judge("dequant", np) == []


@pytest.mark.gpu
def test_cublas_is_judged_where_it_is_found():
    import cupy

    has_rows = any("cublas" in row.case for row in judge("linear", cupy))
    assert has_rows == linear.has_cublas()


# --- Errors and bounds, worked by hand ---


@pytest.mark.parametrize(
    "dtype, ulps",
    [(F16, 2.0**-10), (BFLOAT16, 2.0**-7), (F32, 2.0**-23), (F64, 2.0**-52)],
    ids=str,
)
def test_error_and_bound(dtype, ulps):
    oracle = np.array([1.0, 0.5, -4.0])
    low = np.array([1.0, 0.5 + 2**-5, -4.0]).astype(dtype)  # errs by 2^-5
    got = np.array([1.25, 0.5, -4.0]).astype(dtype)  # errs by 2^-2
    # Twice 2^-5, and four units in the last place of numbers between 1 and 2, times 4.
    assert verify.error_and_bound(got, low, oracle) == (0.25, 2**-4 + 16 * ulps)


def test_an_exact_result_passes_and_nothing_is_no_error():
    oracle = np.array([3.0, -8.0])
    got = oracle.astype(F32)
    assert verify.error_and_bound(got, got, oracle) == (0.0, 4 * 2.0**-23 * 8)
    assert verify.error_and_bound(got[:0], got[:0], oracle[:0]) == (0.0, 0.0)


def test_the_bound_separates():
    """An error at the bound passes, one above it does not."""
    oracle = np.array([1.0])
    low = oracle.astype(F32)
    for got, ok in ((1 + 4 * 2.0**-23, True), (1 + 5 * 2.0**-23, False)):
        result = verify.error_and_bound(np.array([got], F32), low, oracle)
        assert verify.Row("op", "case", *result).ok is ok


@pytest.mark.parametrize(
    "got",
    [
        np.array([1.0, np.nan], F32),
        np.array([np.inf, 2.0], F32),
        np.array([1.0, 2.0, 2.0], F32),
        np.array([[1.0, 2.0]], F32),
        np.array([], F32),
        np.array([1.0, 2.0], F16),  # right, but less exact than was asked for
        np.array([1.0, 2.0], F64),
    ],
    ids=repr,
)
def test_what_can_never_pass(got):
    oracle = np.array([1.0, 2.0])
    assert not verify.Row("", "", *verify.error_and_bound(got, oracle.astype(F32), oracle)).ok
    assert not verify.Row("", "", verify.wrong_values(got, oracle.astype(F32)), 0.0).ok


def test_wrong_values_count_bits():
    want = np.array([0.0, np.nan, 1.0, 2.0], F32)
    assert verify.wrong_values(want.copy(), want) == 0
    assert verify.wrong_values(np.array([-0.0, np.nan, 1.0, 2.0], F32), want) == 1
    assert verify.wrong_values(np.array([0.0, -np.nan, 1.0, 3.0], F32), want) == 2
    assert verify.wrong_values(np.repeat(want, 2)[::2], want) == 0  # strided
    halves = want.astype(BFLOAT16)
    assert verify.wrong_values(halves, halves) == 0
    assert verify.wrong_values(halves.astype(F16), halves) == np.inf


# --- Rows ---


@pytest.mark.parametrize(
    "error, bound, ok",
    [(0, 0, True), (1, 1, True), (2, 1, False), (np.nan, 1, False), (0, np.nan, False)],
)
def test_row(error, bound, ok):
    row = verify.Row("op", "a case", float(error), float(bound))
    assert row.ok is ok
    assert row.as_text().split()[0] == ("ok" if ok else "WRONG")
    assert "a case" in row.as_text()
    kept = json.loads(json.dumps(row.as_dict(), allow_nan=False))
    assert kept == {
        "op": "op",
        "case": "a case",
        "error": None if np.isnan(error) else error,
        "bound": None if np.isnan(bound) else bound,
        "ok": ok,
    }


# --- Planted faults: each must turn at least one row of its op WRONG ---


def scaled(by):
    """The result is off by a fraction of itself."""
    return lambda op: lambda *args, **kwargs: op(*args, **kwargs) * F32(1 + by)


def with_option(**change):
    """An option that the caller gives is not obeyed."""
    return lambda op: lambda *args, **kwargs: op(*args, **{**kwargs, **change})


def with_argument(index, change, **options):
    """One positional argument is misread, with options that let it pass."""

    def plant(op):
        def faulty(*args, **kwargs):
            given = list(args)
            given[index] = change(given[index])
            return op(*given, **kwargs, **options)

        return faulty

    return plant


def last_bit(op):
    """One code of one row is off by one."""

    def faulty(*args, **kwargs):
        out = op(*args, **kwargs)
        out.view("u2")[-1, -1] ^= 1
        return out

    return faulty


def keys_for_values(op):
    return lambda k, v, *rest, **options: op(k, k, *rest, **options)


def half_the_scales(op):
    """The scales that are stored are half of what codes were made with."""

    def faulty(*args, **options):
        op(*args, **options)
        if options["k_scales"] is not None:
            options["k_scales"][...] = options["k_scales"] * F16(0.5)

    return faulty


def truncated(op):
    """Rows are cut to what sixteen bits less hold, before they become codes."""

    def faulty(k, v, *rest, **options):
        bits = k.view("u4") if k.itemsize == 4 else k.view("u2")
        op((bits >> 3 << 3).view(k.dtype), v, *rest, **options)

    return faulty


def ties_to_the_last(op):
    return lambda logits: (logits.shape[1] - 1 - op(logits[:, ::-1].copy())).astype(np.int32)


def as_int64(op):
    return lambda *args: op(*args).astype(np.int64)


def without_the_last_byte(op):
    return lambda *lists: op(*([x[:-1] for x in arrays] for arrays in lists))


def with_changed_option(name, change):
    return lambda op: (
        lambda *args, **options: op(*args, **{**options, name: change(options.get(name))})
    )


def halved(x):
    return x if x is None else x * F16(0.5)


def without_the_first_state(op):
    return lambda values, lse, **options: op(values[1:], lse[1:], **options)


FAULTS = {
    "copy: pairs mixed up": (block_copy, "copy_arrays", with_argument(0, lambda x: x[::-1])),
    "copy: a byte too few": (block_copy, "copy_arrays", without_the_last_byte),
    "append: keys for values": (paged_append, "append", keys_for_values),
    "append: padding is written": (paged_append, "append", with_argument(4, abs, check=False)),
    "append: scales halved": (paged_append, "append", half_the_scales),
    "append: rows truncated": (paged_append, "append", truncated),
    "append: one slot late": (paged_append, "append", with_argument(4, lambda x: x ^ (x > 0))),
    "qkv: a position late": (
        *(paged_qkv, "append"),
        with_changed_option("positions", lambda x: x + 1),
    ),
    "qkv: always half": (paged_qkv, "append", with_option(pairing="half")),
    "qkv: K by the norm of Q": (
        *(paged_qkv, "append"),
        lambda op: lambda *args, **options: op(*args, **options | {"k_norm": options["q_norm"]}),
    ),
    "qkv: epsilon doubled": (paged_qkv, "append", with_changed_option("eps", lambda x: 2 * x)),
    "qkv: padding is written": (paged_qkv, "append", with_argument(3, abs, check=False)),
    "contiguous: a position late": (contiguous_append, "append", with_argument(4, lambda n: n + 1)),
    "contiguous: always half": (contiguous_append, "append", with_option(pairing="half")),
    "contiguous: no values": (
        *(contiguous_append, "append"),
        lambda op: lambda k, v, *rest, **options: op(k, v * 0, *rest, **options),
    ),
    "convert: pages in reverse": (
        *(paged_convert, "convert"),
        with_changed_option("out_pages", lambda pages: pages[::-1].copy()),
    ),
    "convert: skipped pages are read": (
        *(paged_convert, "convert"),
        with_changed_option("pages", abs),
    ),
    "rows: one too few": (paged_convert, "gather_rows", with_argument(4, lambda x: x - (x > 5))),
    "check: slots are never wrong": (paged_check, "check_slots", lambda op: lambda *args: None),
    "check: page 600 is fine": (paged_check, "check_page_table", with_argument(2, lambda n: n + 1)),
    "table: other pages": (page_table, "from_lists", with_argument(0, lambda pages: pages ^ 1)),
    "table: lengths one more": (page_table, "from_lists", with_argument(2, lambda n: n + 1)),
    "permute: heads in reverse": (
        *(permute, "universal_from_block"),
        with_argument(1, lambda blocks: blocks[..., ::-1, :]),
    ),
    "permute: a head too few": (permute, "block_from_universal", with_option(heads=(0, 3))),
    "decode: 1e-4 off": (paged_decode, "decode", scaled(1e-4)),
    "decode: one key too few": (paged_decode, "decode", with_argument(4, lambda x: x - (x > 1))),
    "decode: no window": (paged_decode, "decode", with_option(window=None)),
    "decode of codes: no sinks": (
        *(paged_decode, "decode", with_option(sinks=None)),
        "paged_decode_mma",
    ),
    "decode of codes: scales halved": (
        *(paged_decode, "decode", with_changed_option("v_scales", halved)),
        "paged_decode_mma",
    ),
    "mass: one key too few": (*(attention_mass, "mass", with_argument(3, lambda x: x - (x > 1))),),
    "mass: no window": (attention_mass, "mass", with_option(window=None)),
    "merge: a state is left out": (merge_states, "merge", without_the_first_state),
    "merge: another base": (merge_states, "merge", with_option(lse_base="2")),
    "decode: window one too wide": (paged_decode, "decode", with_option(window=101)),
    "prefill: 1e-4 off": (prefill, "prefill", scaled(1e-4)),
    "prefill of codes: scales halved": (
        *(prefill, "prefill", with_changed_option("k_scales", halved)),
        "prefill_mma",
    ),
    "prefill of codes: no soft cap": (
        *(prefill, "prefill", with_option(soft_cap=None)),
        "prefill_mma",
    ),
    "prefill: no window": (prefill, "prefill", with_option(window=None)),
    "prefill: not causal": (prefill, "prefill", with_option(window=None, causal=False)),
    "norm: 1e-5 off": (norm, "rms_norm", scaled(1e-5)),
    "norm: epsilon doubled": (norm, "rms_norm", with_option(eps=2e-5)),
    "norm: no offset": (norm, "rms_norm", with_option(offset=0.0)),
    "rope: one position late": (rope, "rotate", with_argument(2, lambda x: x + 1)),
    "rope: always half": (rope, "rotate", with_option(pairing="half")),
    "rope: frequencies 1e-6 off": (rope, "rotate", with_argument(3, lambda x: x * F32(1 + 1e-6))),
    "swiglu: 1e-4 off": (activation, "swiglu", scaled(1e-4)),
    "geglu: is swiglu": (activation, "geglu", lambda op: activation.swiglu),
    "add: 1e-6 off": (activation, "add", with_argument(1, lambda y: y * F32(1 + 1e-6))),
    "embed: no scale": (activation, "embed", with_option(scale=1.0)),
    "embed: a row late": (activation, "embed", with_argument(1, lambda ids: 4 - ids)),
    "linear: 1e-5 off": (linear, "linear", scaled(1e-5)),
    "dequant: one bit": (dequant, "dequantize", last_bit),
    "argmax: last of a tie": (sample, "argmax", ties_to_the_last),
    "argmax: another dtype": (sample, "argmax", as_int64),
    "sample: no temperature": (sample, "sample", with_argument(1, lambda x: x / x)),
    "sample: no top-k": (sample, "sample", with_argument(2, lambda x: x * 0)),
    "sample: no top-p": (sample, "sample", with_argument(3, lambda x: x / x)),
    "sample: no min-p": (sample, "sample", with_argument(4, lambda x: x * 0)),
    "sample: another seed": (sample, "sample", with_argument(5, lambda x: x + 1)),
    "sample: another step": (sample, "sample", with_argument(6, lambda x: x + 1)),
    "read: other words": (bandwidth, "read", with_argument(0, lambda x: x + 1)),
    "write: another seed": (bandwidth, "write", with_argument(1, lambda seed: seed + 1)),
    "copy: other words": (bandwidth, "copy", with_argument(0, lambda x: x + 1)),
}


def family_of(fault):
    """The name of the op's module, unless the fault names another family."""
    module, _, _, *family = fault
    return family[0] if family else module.__name__.rpartition(".")[2]


@without_simt
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(monkeypatch, xp, name):
    module, function, plant, *_ = FAULTS[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    rows = judge(family_of(FAULTS[name]), xp)
    assert any(not row.ok for row in rows), [row.as_text() for row in rows]
    assert any(row.as_text().startswith("WRONG") for row in rows)


def test_every_op_has_a_planted_fault():
    assert set(map(family_of, FAULTS.values())) == set(verify.FAMILIES)
