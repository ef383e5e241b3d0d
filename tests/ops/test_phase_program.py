"""phase_program: phases of one launch, held to launches of their own."""

import gc
import weakref

import numpy as np
import pytest

from pykv import PagedKVCache, cuda
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_linear, block_rows
from pykv.ops import phase_program as op
from pykv.ops.phase_program import PhaseProgram
from pykv.programs.phases import AddNorm, Append, Argmax, Attend, Attention, Embed, Product
from pykv.programs.stages import Touched, check_stages, stages_of
from pykv.testing.blocks import random_blocks
from tests.helpers import assert_close_to_oracle, assert_same_bits, swept, to_numpy
from tests.simt import cupy as simt
from tests.simt import machine


def layers(rng, T, E, F, count):
    """Inputs of residual layers x += down @ (act @ x), as NumPy arrays."""
    x = rng.standard_normal((T, E)).astype(np.float32)
    shapes = [(F, E), (E, F)] * count
    return x, [(rng.standard_normal(s) / s[1] ** 0.5).astype(np.float16) for s in shapes]


def program_of(xp, x, matrices, **options):
    """The program, x, and what lies between."""
    x = xp.asarray(x.copy())
    middle = xp.asarray(np.full((len(x), len(matrices[0])), np.nan, np.float32))
    products = []
    for up, down in zip(matrices[::2], matrices[1::2], strict=True):
        products.append(Product(x, xp.asarray(up), "F16", middle))
        products.append(Product(middle, xp.asarray(down), "F16", x, accumulate=True))
    return PhaseProgram(products, **options), x


@pytest.mark.parametrize(
    "T, E, F, count, blocks",
    [(1, 64, 40, 3, None), (1, 1032, 96, 1, None), (8, 40, 1032, 1, None), (2, 64, 64, 2, 1)],
)
def test_residual_layers(xp_of_programs, rng, T, E, F, count, blocks):
    """Every phase reads what the one ahead has written, and writes what that has read."""
    x, matrices = layers(rng, T, E, F, count)
    program, got = program_of(xp_of_programs, x, matrices, blocks=blocks)
    assert program.stages == list(range(2 * count))
    for _ in range(2):
        program()

    def definition(y):
        for _ in range(2):
            for up, down in zip(matrices[::2], matrices[1::2], strict=True):
                y = y + (y @ up.T.astype(y.dtype)) @ down.T.astype(y.dtype)
        return y

    assert_close_to_oracle(got, definition(x), definition(x.astype(np.float64)))


def test_the_grid_changes_no_bit(device, rng, hopper):
    x, matrices = layers(rng, 1, 200, 168, 2)
    results = []
    for blocks in (1, 2, 3, None):
        program, got = program_of(device, x, matrices, blocks=blocks)
        program()
        results.append(to_numpy(got))
    for got in results[1:]:
        assert_same_bits(got, results[0])


def test_prepared_calls_hold_what_the_program_points_at(xp_of_programs, rng):
    xp, (x, matrices) = xp_of_programs, layers(rng, 1, 200, 168, 2)
    program, got = program_of(xp, x, matrices)
    call, kept = cuda.prepare(program), weakref.ref(program)
    del program
    gc.collect()
    assert kept() is not None
    call()
    assert to_numpy(got).any()


def test_stored_weights_with_a_gate(xp_of_programs, rng):
    xp = xp_of_programs
    x = rng.standard_normal((1, 256)).astype(np.float32)
    w = block_rows.pack(xp.asarray(random_blocks("Q4_K", 64, 256, rng)), "Q4_K")
    out, want = (xp.asarray(np.full((1, 32), np.nan, np.float32)) for _ in range(2))
    PhaseProgram([Product(xp.asarray(x), w, "Q4_K", out, gate="geglu")])()
    block_linear.multiply(xp.asarray(x), w, "Q4_K", gate="geglu", out=want)
    np.testing.assert_allclose(to_numpy(out), to_numpy(want), rtol=1e-4, atol=1e-4)


# --- Attention, embedding rows and the likeliest token --------------------------------------------


def attention_of(xp, rng, spec, heads, D, lengths):
    """An attention over random rows, with norms and rotation: at each call the same."""
    (HQ, H), B, P = heads, len(lengths), 4
    M = -(-max(lengths) // P)
    cache = PagedKVCache(1, B * M, H, D, page_size=P, spec=spec, xp=xp)
    table = rng.permutation(B * M).astype(np.int32).reshape(B, M)
    at = np.arange(M * P)
    slots = (table[:, at // P] * P + at % P).astype(np.int32)
    k, v = (rng.standard_normal((slots.size, H, D)).astype(np.float32) for _ in range(2))
    cache.append(0, xp.asarray(k), xp.asarray(v), xp.asarray(slots.reshape(-1)))
    last = np.array(lengths, np.int32) - 1
    qkv = rng.standard_normal((B, (HQ + 2 * H) * D)).astype(np.float32)
    q, out = (xp.asarray(np.full((B, HQ, D), np.nan, np.float32)) for _ in range(2))
    pools = cache.pools(0)
    asarray = xp.asarray
    append = Append(
        qkv=asarray(qkv),
        slots=asarray(np.where(last < 0, -1, slots[np.arange(B), last]).astype(np.int32)),
        q_out=q,
        positions=asarray(np.maximum(last, 0)),
        inv_freq=asarray(rng.uniform(0, 1, D // 2).astype(np.float32)),
        q_norm=asarray(rng.uniform(0.5, 2, D).astype(np.float32)),
        k_norm=asarray(rng.uniform(0.5, 2, D).astype(np.float32)),
        hadamard=cache.spec.wants_hadamard,
        **pools,
    )
    where = dict(page_table=asarray(table), lengths=asarray(last + 1))
    return Attention(append, Attend(q, out=out, **where, **pools, window=200)), cache


@pytest.mark.parametrize(
    "spec, heads, D, lengths",
    [
        ("fp16", (3, 1), 16, [5, 0, 700]),  # keys that are cut, and a row that nobody has
        ("int8", (6, 1), 8, [40, 3]),  # more query heads than a block serves
        ("bf16:HND", (4, 2), 72, [1, 130]),
        ("k8v4", (1, 1), 128, [259]),
    ],
)
def test_attention_appends_and_attends(xp_of_programs, rng, spec, heads, D, lengths):
    xp = xp_of_programs
    phase, cache = attention_of(xp, rng, spec, heads, D, lengths)
    before = [to_numpy(x).copy() for x in (cache.k, cache.v)]
    phase.run_alone()
    want = [to_numpy(x).copy() for x in (cache.k, cache.v, phase.attend.out)]
    assert any((a != b).any() for a, b in zip(before, want, strict=False))
    for array, old in zip((cache.k, cache.v), before, strict=True):
        array[...] = xp.asarray(old)
    phase.attend.out.fill(np.nan)
    program = PhaseProgram([phase], blocks=3)
    for _ in range(2):
        program()
    got = [to_numpy(x) for x in (cache.k, cache.v, phase.attend.out)]
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["sm_75", *swept(["sm_89"]), "sm_90"])
def test_a_program_of_much_shared_memory(xp_of_programs, rng, monkeypatch, arch):
    """Heads of 256 elements take 52 KB, weights on their way 64, slices of x 18 to 36."""
    xp = xp_of_programs
    if xp is simt:
        monkeypatch.setattr(machine, "ARCH", arch)
    elif arch != "sm_90":
        pytest.skip("a GPU is of one SM")
    attention, _ = attention_of(xp, rng, "fp16", (4, 1), 256, [9, 3])
    x = xp.asarray(rng.standard_normal((2, 4096)).astype(np.float32))
    w = xp.asarray(rng.standard_normal((8, 4096)).astype(np.float16))
    out, want = (xp.asarray(np.full((2, 8), np.nan, np.float32)) for _ in range(2))
    product = Product(x, w, "F16", out)
    PhaseProgram([product, attention, product], blocks=3)()
    got = to_numpy(attention.attend.out).copy()
    for phase in (attention, product._replace(out=want)):
        phase.run_alone()
    np.testing.assert_allclose(got, to_numpy(attention.attend.out), rtol=0, atol=1e-5)
    np.testing.assert_allclose(to_numpy(out), to_numpy(want), rtol=0, atol=1e-3)


def test_a_norm_of_what_is_added(xp_of_programs, rng):
    xp = xp_of_programs
    x, y = rng.standard_normal((2, 3, 1300)).astype(np.float32)
    norm = rng.uniform(0.5, 2, 1300).astype(np.float32)
    got = xp.asarray(x.copy())
    PhaseProgram([AddNorm(got, xp.asarray(y), xp.asarray(norm), 1e-3)], blocks=2)()

    def definition(x, y):
        return x + y / np.sqrt((y * y).mean(axis=1, keepdims=True) + 1e-3) * norm

    want = definition(x.astype(np.float64), y.astype(np.float64))
    assert_close_to_oracle(got, definition(x, y), want)


def test_a_product_merges_what_attention_left(xp_of_programs, rng):
    """Of keys that are cut: no block waits for the others of its head."""
    xp, lengths = xp_of_programs, [700, 3]
    phase, _ = attention_of(xp, rng, "fp16", (3, 1), 16, lengths)
    w = xp.asarray(rng.standard_normal((40, 48)).astype(np.float16))
    out, want = (xp.asarray(np.full((2, 40), np.nan, np.float32)) for _ in range(2))
    product = Product(phase.attend.out.reshape(2, 48), w, "F16", out)
    PhaseProgram([phase, product], blocks=3)()
    if xp is not np:
        assert np.isnan(to_numpy(phase.attend.out)).all()
    phase.run_alone()
    product._replace(out=want).run_alone()
    np.testing.assert_allclose(to_numpy(out), to_numpy(want), rtol=0, atol=2e-5)


@pytest.mark.parametrize("between", ["another attention", "a product", "the attention"])
def test_a_product_reads_what_came_last(xp_of_programs, rng, between):
    """Where its rows are no longer, or not yet, those whose parts the workspace has."""
    xp = xp_of_programs
    attention, other = (attention_of(xp, rng, "fp16", (1, 1), 8, [140])[0] for _ in range(2))
    rows = attention.attend.out.reshape(1, 8)
    rows[...] = xp.asarray(rng.standard_normal((1, 8)).astype(np.float32))
    w = xp.asarray(rng.standard_normal((8, 8)).astype(np.float16))
    outs = [xp.asarray(np.full((1, 8), np.nan, np.float32)) for _ in range(2)]
    product = Product(rows, w, "F16", outs[0])
    of_other = Product(other.attend.out.reshape(1, 8), w, "F16", outs[1])
    phases = {
        "another attention": [attention, other, product, of_other],
        "a product": [attention, Product(outs[1], w, "F16", rows), product],
        "the attention": [product, attention],
    }[between]
    first = [to_numpy(x).copy() for x in (rows, outs[1])]
    if between == "a product":
        first[1][...] = 0.5
    results = []
    for run in (PhaseProgram(phases, blocks=2), lambda: [p.run_alone() for p in phases]):
        for array, values in zip((rows, outs[1]), first, strict=True):
            array[...] = xp.asarray(values)
        run()
        results.append([to_numpy(x).copy() for x in outs])
    np.testing.assert_allclose(*results, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["F16", "Q6_K"])
def test_embedding_rows(xp_of_programs, rng, kind):
    """Rows outside the table are zeros on a GPU."""
    xp, O, I = xp_of_programs, 7, 768
    if kind == "F16":
        w = xp.asarray(rng.standard_normal((O, I)).astype(np.float16))
    else:
        w = block_rows.pack(xp.asarray(random_blocks(kind, O, I, rng)), kind)
    ids = xp.asarray(np.array([6, 0, 3 if xp is np else 7], np.int32))
    out, want = (xp.asarray(np.full((3, I), np.nan, np.float32)) for _ in range(2))
    phase = Embed(ids, w, kind, out, 0.3)
    PhaseProgram([phase])()
    phase._replace(out=want).run_alone()
    assert_same_bits(to_numpy(out), to_numpy(want))


def test_the_likeliest_token(xp_of_programs, rng):
    """Ties go to the lowest index, NaN to nobody, and infinity has none."""
    xp = xp_of_programs
    logits = rng.standard_normal((5, 1000)).astype(np.float32)
    logits[0, [700, 3, 999]] = 9
    logits[1, 5], logits[1, 999] = np.nan, 8
    logits[2, 17] = np.inf
    logits[3] = np.nan
    logits[4] = -1.5
    out = xp.asarray(np.full(5, -2, np.int32))
    program = PhaseProgram([Argmax(xp.asarray(logits), out)], blocks=2)
    for _ in range(2):
        program()
    assert to_numpy(out).tolist() == [3, 999, -1, -1, 0]


def test_a_model_of_two_types(xp_of_programs, rng):
    """Rows of several types fill columns of one array in one stage."""
    xp = xp_of_programs
    x = xp.asarray(rng.standard_normal((2, 256)).astype(np.float32))
    out, want = (xp.asarray(np.full((2, 60), np.nan, np.float32)) for _ in range(2))
    packed = {
        kind: block_rows.pack(xp.asarray(random_blocks(kind, rows, 256, rng)), kind)
        for kind, rows in (("Q4_K", 40), ("Q6_K", 20))
    }

    def products(to):
        columns = to[:, :40], to[:, 40:]
        pairs = zip(packed.items(), columns, strict=True)
        return [Product(x, w, kind, part) for (kind, w), part in pairs]

    program = PhaseProgram(products(out))
    assert program.stages == [0, 0]
    program()
    for phase in products(want):
        phase.run_alone()
    got, want = to_numpy(out), to_numpy(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


# --- The program ----------------------------------------------------------------------------------


def test_columns_beside_each_other_share_a_stage(rng):
    """Q, K and V are parts of the rows of one array, written side by side."""
    x, qkv = np.ones((2, 8), np.float32), np.zeros((2, 48), np.float32)
    w = rng.standard_normal((16, 8)).astype(np.float16)
    parts = [Product(x, w, "F16", qkv[:, first : first + 16]) for first in (0, 16, 32)]
    last = Product(qkv[:, 8:16], w, "F16", np.zeros((2, 16), np.float32))
    program = PhaseProgram([*parts, last])
    assert program.stages == [0, 0, 0, 1]


def test_stages_keep_every_order_that_matters(rng):
    """Against plain loops over bytes: no two phases of a stage touch a byte that one writes."""
    every = np.arange(100, dtype=np.uint8)  # each byte says where it is
    for _ in range(200):
        touched, memory = [], []
        for _ in range(6):
            rows = []
            for _ in range(3):
                start, width, n = (int(rng.integers(*x)) for x in ((0, 60), (1, 6), (1, 4)))
                rows.append(np.lib.stride_tricks.as_strided(every[start:], (n, width), (8, 1)))
            touched.append(Touched(rows[:2], rows[2:]))
            memory.append([set(x.ravel().tolist()) for x in rows])
        stages = stages_of(touched)
        check_stages("op", stages, touched)
        for i in range(6):
            for j in range(i):
                (a, b, to), (c, d, other) = memory[i], memory[j]
                if to & (c | d | other) or other & (a | b):
                    assert stages[j] < stages[i]


@pytest.mark.parametrize("stages", [[0, 0], [1, 2], [0, 2], [1, 0]], ids=str)
def test_a_program_that_would_race_or_spin_is_refused(stages):
    x, w, y = np.zeros((1, 8), "f4"), np.zeros((8, 8), "f2"), np.zeros((1, 8), "f4")
    touched = [Product(x, w, "F16", y).touched(), Product(y, w, "F16", x).touched()]
    check_stages("op", [0, 1], touched)
    with pytest.raises(ParameterError, match="op: (stages|phases)"):
        check_stages("op", stages, touched)


def test_wrong_products(xp):
    x, y = (xp.asarray(np.zeros((1, 8), np.float32)) for _ in range(2))
    w = xp.asarray(np.zeros((8, 8), np.float16))
    good = Product(x, w, "F16", y)
    nine = xp.asarray(np.zeros((9, 8), np.float32))
    one = xp.asarray(np.zeros((1, 8), np.float32))
    half_wide = xp.asarray(np.zeros((1, 4), np.float32))
    half = xp.asarray(np.zeros((1, 8), np.float16))
    seven = xp.asarray(np.zeros((1, 7), np.float32))
    for phases, error, text in (
        ([], ParameterError, "phases is empty"),
        ([good, 3], DtypeError, "phases has an int"),
        ([good._replace(out=None)], ParameterError, "a product has no out"),
        ([Product(nine, w, "F16", nine.copy())], ShapeError, r"x has shape \(9, 8\), expected 1 "),
        ([good, good._replace(out=seven)], ShapeError, "out"),
        ([good, Product(half, w, "F16", half.copy())], DtypeError, "x has dtype float16"),
        ([good, good._replace(out=one, norm=y[0])], ParameterError, "a phase writes norm"),
        ([good._replace(out=x)], ParameterError, "out shares memory with x"),
        ([good._replace(kind="F17")], UnsupportedError, "kind is 'F17'"),
        ([good._replace(kind="BF16")], DtypeError, "w has dtype float16"),
        ([good._replace(out=half_wide, gate="relu")], ParameterError, "gate is 'relu'"),
    ):
        with pytest.raises(error, match=text):
            PhaseProgram(phases)
    with pytest.raises(ParameterError, match="blocks is 0, expected"):
        PhaseProgram([good], blocks=0)


def test_parts_that_lack(xp, rng):
    attention, _ = attention_of(xp, rng, "fp16", (1, 1), 8, [5])
    logits = xp.asarray(np.zeros((1, 9), np.float32))
    as_hnd = attention.attend._replace(spec="fp16:HND")
    for phase, error, text in (
        (Argmax(logits, None), ParameterError, "an argmax has no out, expected an array"),
        (attention._replace(append=None), DtypeError, "has a NoneType, expected Append"),
        (attention._replace(attend=attention.append), DtypeError, "has an Append, expected Attend"),
        (
            attention._replace(attend=as_hnd),
            ParameterError,
            "reads fp16:HND, expected its append's",
        ),
    ):
        with pytest.raises(error, match=text):
            PhaseProgram([phase])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_of_16_bit_queries(xp, rng, dtype):
    """Products of a program do not round the heads that they merge; those of the ops do."""
    attention, _ = attention_of(xp, rng, "fp16", (1, 1), 8, [5])
    qkv, q, out = (
        xp.asarray(to_numpy(x).astype(dtype))
        for x in (attention.append.qkv, attention.append.q_out, attention.attend.out)
    )
    append = attention.append._replace(qkv=qkv, q_out=q)
    phase = attention._replace(append=append, attend=attention.attend._replace(q=q, out=out))
    with pytest.raises(DtypeError, match=f"qkv has dtype {dtype}, expected float32"):
        PhaseProgram([phase])


def test_a_graph_has_programs_that_were_made_before(xp_of_programs):
    xp = xp_of_programs
    x, y = (xp.asarray(np.ones((1, 8), np.float32)) for _ in range(2))
    product = Product(x, xp.asarray(np.eye(8, dtype=np.float16)), "F16", y, accumulate=True)
    step = cuda.graph(PhaseProgram([product]))
    for _ in range(3):
        step()
    assert (to_numpy(y) == 4).all()
    if xp is np:  # where a graph is the function itself
        return
    step = cuda.graph(lambda: PhaseProgram([product])())
    step()
    with pytest.raises(UnsupportedError, match="PhaseProgram: cannot be captured"):
        step()


def test_a_program_on_another_gpu(xp_of_programs, monkeypatch):
    xp = xp_of_programs
    x, y = (xp.asarray(np.ones((1, 8), np.float32)) for _ in range(2))
    program = PhaseProgram([Product(x, xp.asarray(np.eye(8, dtype=np.float16)), "F16", y)])
    program()
    monkeypatch.setattr(cuda, "current_device", lambda: 7)
    if xp is not np:
        with pytest.raises(DeviceError, match="GPU 7 is the current one, expected GPU"):
            program()


def test_a_matrix_of_no_rows(xp_of_programs):
    xp = xp_of_programs
    x, w = xp.asarray(np.ones((1, 8), np.float32)), xp.asarray(np.ones((8, 8), np.float16))
    PhaseProgram([Product(x, w[:0], "F16", xp.asarray(np.ones((1, 0), np.float32)))])()


def test_lengths_and_tables_are_read_before_blocks_wait(xp, rng):
    phase, _ = attention_of(xp, rng, "fp16", (1, 1), 8, [5])
    likeliest = Argmax(xp.asarray(np.zeros((1, 9), np.float32)), phase.attend.lengths)
    with pytest.raises(ParameterError, match="a phase writes lengths, expected arrays of its own"):
        PhaseProgram([likeliest, phase])


def _without_residual(cls):
    """Nothing is added to what out holds."""

    class Faulty(cls):
        def __init__(self, phases, **options):
            super().__init__([p._replace(accumulate=False) for p in phases], **options)

    return Faulty


def _without_norm(reference):
    return lambda phase: reference(phase._replace(norm=None))


# Faults that `pykv verify` must see, in the program and in its reference.
FAULTS = {"phase_program: no residual": (op, "PhaseProgram", _without_residual)}
REFERENCE_FAULTS = [(op, "reference", _without_norm)]
