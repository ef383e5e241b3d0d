"""kv_compact: kept rows move together, with their scales, and nothing else moves."""

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import kv_compact as op
from pykv.specs import KVSpec
from pykv.testing import paged
from tests.faults import does_nothing, misread
from tests.helpers import assert_same_bits, to_numpy

POOLS = ("k_pool", "v_pool", "k_scales", "v_scales")
CASES = (
    dict(),
    *({"spec": spec} for spec in ("fp32:HND", "bf16", "int8", "int8+int4:HND", "e4m3:fp32")),
    *({"spec": spec} for spec in ("int8:head", "int4:tensor", "int8+fp16")),
    *({"D": D} for D in (8, 40, 512)),
    *({"P": P} for P in (1, 17)),
    {"lengths": (1, 0, 256, 257)},
    {"D": 512, "spec": "fp32", "lengths": (140, 3)},  # blocks take two chunks of eight rows
    {"share": 1.0},
    {"share": 0.0},
    {"A": 1},
)


def case_of(rng, spec="fp16", D=64, P=16, lengths=(5, 0, 47, 130), A=2, share=0.5):
    spec = KVSpec.parse(spec)
    cache = paged.filled(rng, spec, lengths, P, 2, D)
    C = cache["page_table"].shape[1] * P
    kept = np.full((len(lengths), A, C), -1, np.int32)
    counts = np.zeros((len(lengths), A), np.int32)
    for b, a in np.ndindex(len(lengths), A):
        slots = np.flatnonzero(rng.random(lengths[b]) < share)
        counts[b, a] = len(slots)
        kept[b, a, : len(slots)] = slots
    return spec, cache, dict(kept=kept, counts=counts)


def expected(spec, cache, kept, counts, out_table=None):
    table = cache["page_table"]
    to = table if out_table is None else out_table
    want = {name: cache[name] if cache[name] is None else cache[name].copy() for name in POOLS}
    for name in POOLS:
        if want[name] is None or want[name].ndim < 3:
            continue
        old, new = paged.nhd(spec, cache[name]), paged.nhd(spec, want[name])
        P = old.shape[1]
        for b, head in np.ndindex(len(table), 2):
            a = head % kept.shape[1]
            for j in range(counts[b, a]):
                slot = kept[b, a, j]
                row = old[table[b, slot // P], slot % P, head]
                new[to[b, j // P], j % P, head] = row
    return want


def run(xp, spec, cache, tables, **options):
    sent = paged.send(xp, {name: x for name, x in cache.items() if name != "lengths"})
    op.compact(**sent, **{n: xp.asarray(x) for n, x in tables.items()}, spec=spec, **options)
    return sent


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_move_as_one_by_one(xp, rng, case):
    spec, cache, tables = case_of(rng, **case)
    got = run(xp, spec, cache, tables)
    for name, want in expected(spec, cache, **tables).items():
        if want is not None:
            assert_same_bits(got[name], want)


def test_shared_pages_stay_as_they_are(xp, rng):
    """Rows of pages that others read move to new ones."""
    spec, cache, tables = case_of(rng, "int8")
    for name in POOLS:
        cache[name] = np.concatenate([cache[name], np.zeros_like(cache[name][:3])])
    old = cache["page_table"]
    to = old.copy()
    to[3, :3] = np.arange(len(cache["k_pool"]) - 3, len(cache["k_pool"]))
    got = run(xp, spec, cache, tables | dict(out_table=to))
    for name, want in expected(spec, cache, **tables, out_table=to).items():
        assert_same_bits(got[name], want)
        assert_same_bits(to_numpy(got[name])[old[3, :3]], cache[name][old[3, :3]])


@pytest.mark.parametrize("D", [128, pytest.param(512, marks=pytest.mark.sweep)])
def test_long_rows_in_place(xp, rng, D):
    """More rows than a block holds at once, of which a few at the start go: all others move by
    little, onto rows that other threads, and other blocks, read. A call that is prepared begins
    anew each time."""
    spec, cache, _ = case_of(rng, "fp16", D=D, lengths=(400,))
    kept = np.full((1, 1, cache["page_table"].shape[1] * 16), -1, np.int32)
    kept[0, 0, :397] = np.arange(3, 400)
    tables = dict(kept=kept, counts=np.array([[397]], np.int32))
    sent = paged.send(xp, {name: x for name, x in cache.items() if name != "lengths"})
    call = cuda.prepare(op.compact, **sent, **{n: xp.asarray(x) for n, x in tables.items()})
    for _ in range(2):
        call()
        cache |= expected(spec, cache, **tables)
        for name in ("k_pool", "v_pool"):
            assert_same_bits(sent[name], cache[name])


def test_strided_pools(xp, rng):
    """Rows of pools inside larger ones, whose strides allow units of eight bytes alone."""
    spec, cache, tables = case_of(rng, "int8", D=64)
    wide = {name: np.zeros((*cache[name].shape[:-1], 72), np.int8) for name in POOLS[:2]}
    for name, x in wide.items():
        x[..., :64] = cache[name]
    sent = paged.send(xp, {n: x for n, x in cache.items() if n not in ("lengths", *wide)})
    pools = {name: xp.asarray(x)[..., :64] for name, x in wide.items()}
    op.compact(**pools, **sent, **{n: xp.asarray(x) for n, x in tables.items()}, spec=spec)
    for name, want in expected(spec, cache, **tables).items():
        assert_same_bits((pools | sent)[name], want)


def test_errors_name_the_argument(xp, rng):
    spec, cache, tables = case_of(rng)
    for change, error, text in (
        (dict(kept=tables["kept"][:, :1].copy()), ShapeError, "counts has A=2"),
        (
            dict(kept=np.repeat(tables["kept"], 2, 1), counts=np.repeat(tables["counts"], 2, 1)),
            ShapeError,
            "kept has A=4, expected 1 or H=2",
        ),
        (dict(kept=tables["kept"].astype(np.int64)), DtypeError, "kept has dtype int64"),
        (dict(out_table=cache["page_table"][:, :1].copy()), ShapeError, "out_table has M=1"),
    ):
        with pytest.raises(error, match=text):
            run(xp, spec, cache, tables | change)
    cache |= {name: cache[name][:, :0].copy() for name in POOLS[:2]}
    with pytest.raises(ShapeError, match="k_pool has P=0, expected at least 1"):
        run(xp, spec, cache, tables)


def test_rows_go_to_pages_of_their_own(xp):
    """No page that another sequence writes or reads, nor one twice; always on the host, on a GPU
    when asked. Pages whose rows stay where they are may be anybody's."""
    pools = {name: xp.zeros((6, 2, 1, 8), np.float16) for name in POOLS[:2]}

    def call(table, slots, out=None):
        tables = dict(page_table=table, out_table=table if out is None else out)
        tables = {name: xp.asarray(np.array(x, np.int32)) for name, x in tables.items()}
        kept = xp.asarray(np.array(slots, np.int32)[:, None])
        counts = xp.asarray(np.full((len(slots), 1), len(slots[0]), np.int32))
        op.compact(**pools, **tables, kept=kept, counts=counts, check=True)

    moving, staying = [1, 2, 3], [0, 1, 2]
    call([[0, 1], [2, 3]], [moving, moving])
    call([[0, 1], [0, 1]], [staying, staying])
    call([[0, 1], [0, 1]], [moving, moving], [[2, 3], [4, 5]])
    for table, slots, out, text in (
        (
            [[0, 1], [0, 2]],
            [moving, moving],
            None,
            r"out_table\[0, 0\] is 0, as out_table\[1, 0\] is",
        ),
        (
            [[0, 1], [0, 2]],
            [moving, staying],
            None,
            r"out_table\[0, 0\] is 0, as page_table\[1, 0\]",
        ),
        ([[0, 1]], [moving], [[4, 4]], r"out_table\[0, 0\] is 4, as out_table\[0, 1\] is"),
    ):
        with pytest.raises(ParameterError, match=f"compact: {text}"):
            call(table, slots, out)


def test_contents_are_looked_at(xp, rng):
    spec, cache, tables = case_of(rng, share=1.0)
    wrong = {name: x.copy() for name, x in tables.items()}
    wrong["kept"][2, 1, 3:5] = 4, 3
    with pytest.raises(ParameterError, match=r"kept\[2, 1, 4\] is 3, expected ascending slots"):
        run(xp, spec, cache, wrong, check=True)
    wrong = {name: x.copy() for name, x in tables.items()}
    wrong["counts"][0, 0] = 9999
    with pytest.raises(ParameterError, match=r"counts\[0, 0\] is 9999, expected at most C="):
        run(xp, spec, cache, wrong, check=True)
    cache["page_table"][2, 1] = 9999
    with pytest.raises(ParameterError, match=r"page_table\[2, 1\] is 9999, expected 0 to"):
        run(xp, spec, cache, tables, check=True)


# Faults that `pykv verify` must see, in the function and in its reference.
FAULTS = {
    "compact: nothing moves": (op, "compact", does_nothing),
    "compact: onto shared pages": (op, "compact", misread(out_table=lambda x: None)),
}


def _keys_alone(reference):
    return lambda spec, pools, **tables: reference(spec, dict(k_pool=pools["k_pool"]), **tables)


REFERENCE_FAULTS = [(op, "reference", _keys_alone)]
