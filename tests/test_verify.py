"""pykv.verify, by hand-worked numbers, and by faults planted in every op and in its reference."""

import json
import re
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pykv import attention, cuda, kinds, testing, verify
from pykv.arrays import BFLOAT16
from pykv.errors import ParameterError
from pykv.kinds import KVSpec
from pykv.ops import (
    activation,
    attention_scores,
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
from tests.faults import (
    all_alike,
    an_eighth_more,
    as_int64,
    does_nothing,
    fixed,
    half_the_scales,
    halved,
    keys_for_values,
    last_bit,
    scaled,
    second_halved,
    ties_to_the_last,
    toward_zero,
    truncated,
    with_argument,
    with_changed_option,
    with_option,
    without,
    without_the_first_state,
    without_the_last_byte,
    zeros,
)
from tests.helpers import without_simt

F16, F32, F64 = np.float16, np.float32, np.float64


def judge(op, xp):
    """The rows of a family, made as they are asked for."""
    family = verify.families()[op]
    return (verify.Row(op, *case) for case in family(np.random.default_rng(0), xp))


# --- The whole ---


def test_every_op_appears_and_holds():
    rows = list(verify.run())
    assert [row.as_text() for row in rows if not row.ok] == []
    assert list(dict.fromkeys(row.op for row in rows)) == cuda.stems()
    assert len({(row.op, row.case) for row in rows}) == len(rows)


def test_a_family_is_found_by_its_stem_or_in_its_op(monkeypatch):
    """What a new kernel needs is an op with cases; without them it is named as wrong."""
    op = ModuleType("pykv.ops.tripled")
    op.__spec__ = ModuleSpec(op.__name__, None)
    monkeypatch.setitem(sys.modules, op.__name__, op)
    monkeypatch.setattr(cuda, "stems", lambda: ["norm", "tripled", "without_op"])
    *rows, tripled, without_op = verify.run()
    assert {row.op for row in rows} == {"norm"} and all(row.ok for row in rows)
    for row, name in ((tripled, "tripled"), (without_op, "without_op")):
        assert not row.ok
        assert row.as_text().split()[:4] == ["WRONG", name, "has", "no"]
    op.cases = lambda rng, xp: iter([("of three", 0.0, 0.0)])
    assert verify.Row("tripled", "of three", 0.0, 0.0) in list(verify.run())


def test_judges_share_no_code_with_ops():
    """Oracles import no op, families name no reference, and of kinds both take names alone."""
    for package in (testing, verify):
        for path in Path(package.__file__).parent.glob("[a-z]*.py"):
            text = path.read_text(encoding="utf-8")
            assert ".reference" not in text, path
            assert package is verify or "pykv.ops" not in text, path
            taken = re.findall(r"^from pykv(?: import .*|.kinds import) (.*)$", text, re.M)
            names = {name for line in taken for name in line.split(", ")}
            assert names <= {"KVSpec", "Kind", "SCALE_DTYPES"}, path


def test_the_seed_decides(monkeypatch):
    monkeypatch.setattr(cuda, "stems", lambda: ["norm"])
    first, again, other = ([row.error for row in verify.run(seed)] for seed in (1, 1, 2))
    assert first == again and first != other
    with pytest.raises(ParameterError, match="seed is -1, expected at least 0"):
        verify.run(-1)


@pytest.mark.parametrize("text", ["fp16", "int8", "int4:fp32:HND", "fp8:head", "fp32+e5m2:tensor"])
def test_the_ops_of_one_cache(text):
    spec = KVSpec.parse(text)
    rows = list(verify.run(spec=spec))
    assert [row.as_text() for row in rows if not row.ok] == []
    ops = (
        "attention_scores",
        "paged_append",
        "paged_convert",
        "paged_decode",
        "paged_qkv",
        "prefill",
    )
    assert tuple(dict.fromkeys(row.op for row in rows)) == ops
    for row in rows:
        assert str(spec) in row.case


@without_simt
def test_every_block_type_is_judged(xp):
    assert [row.case for row in judge("dequant", xp)] == list(dequant.KINDS)


def test_without_gguf_there_is_no_judge_of_blocks(monkeypatch):
    from pykv.verify import dequant as family

    monkeypatch.setattr(family, "find_spec", lambda name: None)
    assert list(judge("dequant", np)) == []


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
    assert testing.error_and_bound(got, low, oracle) == (0.25, 2**-4 + 16 * ulps)


def test_an_exact_result_passes_and_nothing_is_no_error():
    oracle = np.array([3.0, -8.0])
    got = oracle.astype(F32)
    assert testing.error_and_bound(got, got, oracle) == (0.0, 4 * 2.0**-23 * 8)
    assert testing.error_and_bound(got[:0], got[:0], oracle[:0]) == (0.0, 0.0)


def test_the_bound_separates():
    """An error at the bound passes, one above it does not."""
    oracle = np.array([1.0])
    low = oracle.astype(F32)
    for got, ok in ((1 + 4 * 2.0**-23, True), (1 + 5 * 2.0**-23, False)):
        result = testing.error_and_bound(np.array([got], F32), low, oracle)
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
    assert not verify.Row("", "", *testing.error_and_bound(got, oracle.astype(F32), oracle)).ok
    assert not verify.Row("", "", testing.wrong_values(got, oracle.astype(F32)), 0.0).ok


def test_wrong_values_count_bits():
    want = np.array([0.0, np.nan, 1.0, 2.0], F32)
    assert testing.wrong_values(want.copy(), want) == 0
    assert testing.wrong_values(np.array([-0.0, np.nan, 1.0, 2.0], F32), want) == 1
    assert testing.wrong_values(np.array([0.0, -np.nan, 1.0, 3.0], F32), want) == 2
    assert testing.wrong_values(np.repeat(want, 2)[::2], want) == 0  # strided
    halves = want.astype(BFLOAT16)
    assert testing.wrong_values(halves, halves) == 0
    assert testing.wrong_values(halves.astype(F16), halves) == np.inf


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


# --- Faults planted in public functions: each must turn at least one row of its op WRONG ---


def op_tests(stem):
    """The tests of an op, which may have faults of its own: nothing here is edited for a new op."""
    name = f"tests.ops.test_{stem}"
    return import_module(name) if find_spec(name) else None


TESTS = {stem: op_tests(stem) for stem in cuda.stems()}


FAULTS = {
    "copy: pairs mixed up": (block_copy, "copy_arrays", with_argument(0, lambda x: x[::-1])),
    "copy: a byte too few": (block_copy, "copy_arrays", without_the_last_byte),
    "append: keys for values": (paged_append, "append", keys_for_values),
    "append: padding is written": (paged_append, "append", with_changed_option("slots", abs)),
    "append: scales halved": (paged_append, "append", half_the_scales),
    "append: rows truncated": (paged_append, "append", truncated),
    "append: one slot late": (
        *(paged_append, "append"),
        with_changed_option("slots", lambda x: x ^ (x > 0)),
    ),
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
    "qkv: padding is written": (paged_qkv, "append", with_changed_option("slots", abs)),
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
    "decode: one key too few": (
        *(paged_decode, "decode"),
        with_changed_option("lengths", lambda x: x - (x > 1)),
    ),
    "decode: no window": (paged_decode, "decode", with_option(window=None)),
    "decode of codes: no sinks": (
        *(paged_decode, "decode", with_option(sinks=None)),
        "paged_decode_mma",
    ),
    "decode of codes: scales halved": (
        *(paged_decode, "decode", with_changed_option("v_scales", halved)),
        "paged_decode_mma",
    ),
    "scores: one key too few": (
        *(attention_scores, "score"),
        with_changed_option("lengths", lambda x: x - (x > 1)),
    ),
    "scores: no window": (attention_scores, "score", with_option(window=None)),
    "merge: a state is left out": (merge_states, "merge", without_the_first_state),
    "merge: another base": (merge_states, "merge", with_option(lse_base="2")),
    "decode: window one too wide": (paged_decode, "decode", with_option(window=101)),
    "prefill: 1e-4 off": (prefill, "prefill", scaled(1e-4)),
    "prefill of codes: scales halved": (
        *(prefill, "prefill", with_changed_option("k_scales", halved)),
        "prefill_mma",
    ),
    "prefill of codes: no soft cap": (
        *(prefill, "prefill", with_option(logits_soft_cap=None)),
        "prefill_mma",
    ),
    "prefill: no window": (prefill, "prefill", with_option(window=None)),
    "prefill: not causal": (prefill, "prefill", with_option(window=None, causal=False)),
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


for stem, tests in TESTS.items():
    FAULTS |= {name: (*fault, stem) for name, fault in getattr(tests, "FAULTS", {}).items()}


def family_of(fault):
    """The name of the op's module, unless the fault names another family."""
    module, _, _, *family = fault
    return family[0] if family else module.__name__.rpartition(".")[2]


def fails(family, xp):
    wrong = next((row for row in judge(family, xp) if not row.ok), None)
    assert wrong is not None, f"verify sees nothing wrong with {family}"
    assert wrong.as_text().startswith("WRONG")


@without_simt
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(monkeypatch, xp, name):
    module, function, plant, *_ = FAULTS[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    fails(family_of(FAULTS[name]), xp)


@pytest.mark.simt
@pytest.mark.parametrize(
    "name",
    [
        *("norm: epsilon doubled", "rope: one position late", "swiglu: 1e-4 off"),
        *("merge: a state is left out", "table: lengths one more", "append: scales halved"),
        *("convert: pages in reverse", "qkv: always half", "contiguous: no values"),
        *("permute: heads in reverse", "copy: a byte too few", "write: another seed"),
    ],
)
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_a_planted_fault_shows_where_kernels_run(monkeypatch, device, name):
    module, function, plant, *_ = FAULTS[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    fails(family_of(FAULTS[name]), device)


# --- Faults planted in what runs on a CPU: the judge must not share them ---


REFERENCE_FAULTS = [  # families, module, function, plant
    (["block_copy"], block_copy, "bytes_at", lambda op: lambda *args: op(*args).copy()),
    (["paged_append"], paged_append, "reference", does_nothing),
    (["paged_append", "paged_qkv"], paged_append, "reference", fixed(1, lambda v: v * 2)),
    (["paged_append", "paged_convert", "paged_qkv"], kinds, "encode", toward_zero),
    (["paged_append", "paged_convert"], kinds, "row_scales", zeros),
    (["paged_qkv"], paged_qkv, "hadamard_transform", lambda op: lambda x: x),
    (["paged_qkv"], norm, "reference", lambda op: lambda x, *args: x),
    (["paged_qkv", "rope", "contiguous_append"], rope, "reference", does_nothing),
    (["paged_qkv", "rope"], rope, "reference", fixed(2, lambda positions: positions + 1)),
    (["rope"], rope, "frequencies", lambda op: lambda *args, **options: op(*args)),
    (["contiguous_append"], contiguous_append, "reference", does_nothing),
    (["paged_convert"], paged_convert, "reference", does_nothing),
    (["paged_convert"], kinds, "decode", an_eighth_more),
    (["paged_decode_mma", "prefill_mma"], attention, "decode", an_eighth_more),
    (["paged_check"], paged_check, "reference", does_nothing),
    (["page_table"], page_table, "reference", does_nothing),
    (["page_table"], page_table, "reference", fixed(3, lambda page_size: page_size + 1)),
    (["permute"], permute, "reference", does_nothing),
    (["permute"], permute, "reference", fixed(1, lambda chunk: chunk[::-1])),
    (["paged_decode", "paged_decode_mma"], attention, "masked_scores", all_alike),
    (["attention_scores"], attention, "masked_scores", all_alike),
    (["prefill", "prefill_mma"], prefill, "masked_scores", all_alike),
    (["paged_decode", "paged_decode_mma"], paged_decode, "weigh", zeros),
    (["paged_decode"], paged_decode, "weigh", second_halved),
    (["paged_decode"], paged_decode, "reference", fixed(6, lambda window: None)),
    (["paged_decode_mma"], paged_decode, "reference", without("sinks")),
    (["paged_decode_mma"], paged_decode, "reference", without("logits_soft_cap")),
    (["attention_scores"], attention_scores, "reference", zeros),
    (["attention_scores"], attention_scores, "reference", fixed(6, lambda window: None)),
    (["prefill", "prefill_mma"], prefill, "weigh", zeros),
    (["prefill", "prefill_mma"], prefill, "reference", fixed(7, lambda window: None)),
    (["prefill_mma"], prefill, "reference", without("logits_soft_cap")),
    (["prefill"], prefill, "weigh", second_halved),
    (["merge_states"], merge_states, "reference", fixed(1, lambda lse: np.minimum(lse, 0))),
    (["merge_states"], merge_states, "reference", second_halved),
    (["activation"], activation, "reference", fixed(0, lambda name: "swiglu")),
    (["activation"], activation, "reference_add", does_nothing),
    (["activation"], activation, "reference_embed", fixed(2, lambda scale: 1.0)),
    (["linear"], linear, "reference", fixed(2, lambda bias: None)),
    (["linear"], linear, "reference", fixed(1, lambda w: w[::-1])),
    (["dequant"], dequant, "reference", fixed(0, lambda blocks: blocks[::-1])),
    (["sample"], sample, "reference", zeros),
    (["sample"], sample, "reference", fixed(1, lambda temperature: temperature * 2)),
    (["sample"], sample, "reference", fixed(2, lambda top_k: top_k * 0)),
    (["sample"], sample, "reference", fixed(3, lambda top_p: top_p * 0 + 1)),
    (["sample"], sample, "reference", fixed(4, lambda min_p: min_p * 0)),
    (["sample"], sample, "reference", fixed(6, lambda steps: steps + 1)),
    (["sample"], sample, "reference_argmax", zeros),
    (["bandwidth"], bandwidth, "reference_read", does_nothing),
    (["bandwidth"], bandwidth, "reference_write", fixed(1, lambda seed: seed + 1)),
    (["bandwidth"], bandwidth, "reference_copy", does_nothing),
]

for stem, tests in TESTS.items():
    REFERENCE_FAULTS += [([stem], *fault) for fault in getattr(tests, "REFERENCE_FAULTS", [])]


@pytest.mark.parametrize(
    "families, module, function, plant",
    REFERENCE_FAULTS,
    ids=[f"{module.__name__}.{function}" for _, module, function, _ in REFERENCE_FAULTS],
)
def test_a_fault_of_a_reference_shows(monkeypatch, families, module, function, plant):
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    for family in families:
        fails(family, np)


def test_every_family_has_planted_faults():
    assert set(map(family_of, FAULTS.values())) == set(cuda.stems())
    assert {name for names, *_ in REFERENCE_FAULTS for name in names} == set(cuda.stems())
