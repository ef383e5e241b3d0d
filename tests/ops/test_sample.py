"""sample: the likeliest token, and draws that follow the filtered distribution."""

import math

import numpy as np
import pytest

from pykv import cuda
from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import sample
from tests.helpers import assert_same_bits, product, swept, to_numpy, without_simt

MASK = 2**64 - 1
OFF = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
DTYPES = dict(
    temperature=np.float32,
    top_k=np.int32,
    top_p=np.float32,
    min_p=np.float32,
    seeds=np.uint64,
    steps=np.int32,
)


def splitmix64(seed, count):
    """The generator as published: the first outputs from a seed."""
    for _ in range(count):
        seed = seed + 0x9E3779B97F4A7C15 & MASK
        z = seed
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        yield z ^ z >> 31


def random_bits(seed, step):
    """As documented: output number `step` of the generator that the finalised seed starts."""
    z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return list(splitmix64(z ^ z >> 31, step + 1))[-1]


def seed_for(bits):
    """The seed whose step 0 gives these random bits: the finaliser, undone twice."""
    z = bits
    for increment in (0x9E3779B97F4A7C15, 0):
        z ^= z >> 31 ^ z >> 62
        z = z * pow(0x94D049BB133111EB, -1, 2**64) & MASK
        z ^= z >> 27 ^ z >> 54
        z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
        z ^= z >> 30 ^ z >> 60
        z = z - increment & MASK
    return z


def draw(xp, logits, **parameters):
    """`sample` of [B, V] logits with parameters that are one value or one for each row."""
    logits = np.asarray(logits, np.float32)
    values = {**OFF, "seeds": 0, "steps": 0, **parameters}
    arrays = [
        xp.asarray(np.broadcast_to(np.asarray(values[name], dtype), len(logits)).copy())
        for name, dtype in DTYPES.items()
    ]
    return to_numpy(sample.sample(xp.asarray(logits), *arrays))


def repeat(row, count):
    return np.repeat(np.asarray([row], np.float32), count, axis=0)


def plain(logits, temperature, top_k, top_p, min_p, uniform=0.5):
    """Kept tokens and the drawn one in Python floats, and how near any decision was to tipping."""
    logits = [float(v) for v in logits]
    largest = max(logits)
    p = [math.exp((v - largest) / temperature) for v in logits]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    margins = [abs(p[i] - min_p) for i in order] if min_p else []
    order = [i for i in order if p[i] >= min_p]
    if top_k:
        order = order[:top_k]
    mass, kept, total = 0.0, [], math.fsum(p[i] for i in order)
    for i in order:
        if kept and mass / total >= top_p:
            break
        kept.append(i)
        mass += p[i]
        if top_p < 1:
            margins.append(abs(mass / total - top_p))
    total, mass, drawn = math.fsum(p[i] for i in kept), 0.0, None
    for i in sorted(kept):
        mass += p[i]
        margins.append(abs(mass / total - uniform))
        if drawn is None and mass / total > uniform:
            drawn = i
    return set(kept), drawn, min(margins)


# --- Argmax ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 2, 31, 32, 33, 1023, 1024, 1025, 5000, 128256])
def test_argmax_takes_the_lowest_index_of_the_largest(xp, rng, V):
    logits = np.round(rng.standard_normal((4, V)) * 2).astype(np.float32)  # many ties
    got = sample.argmax(xp.asarray(logits))
    want = [row.index(max(row)) for row in logits.tolist()]
    assert_same_bits(got, np.array(want, np.int32))


def test_argmax_of_unusual_rows(xp):
    nan, inf = math.nan, math.inf
    rows = [
        ([nan, nan, nan], -1),
        ([nan, -inf, -inf], -1),
        ([-inf, -inf, -inf], -1),
        ([-inf, -3e38, nan], 1),
        ([nan, 1, inf], -1),
        ([nan, 1, 3e38], 2),
        ([-nan, -1, -2], 1),
        ([-0.0, 0.0, -1], 0),
        ([-1, 0.0, -0.0], 1),
        ([-2, -1, -1], 1),
        ([1e-45, 0, 1e-45], 0),
    ]
    out = xp.full(len(rows), -9, np.int32)
    got = sample.argmax(xp.asarray(np.array([row for row, _ in rows], np.float32)), out=out)
    assert got is out
    assert to_numpy(got).tolist() == [index for _, index in rows]
    assert sample.argmax(xp.zeros((0, 3), np.float32)).shape == (0,)


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}], ids=str)
def test_greedy_rows_take_argmax(xp, rng, greedy):
    logits = rng.standard_normal((6, 3000)).astype(np.float32)
    logits[:, 7] = logits[:, 2000] = logits.max(axis=1)
    logits[0, 2500] = np.nextafter(logits[0, 7], np.float32(np.inf))
    got = draw(xp, logits, **{"temperature": 1000, **greedy}, seeds=np.arange(6))
    assert got.tolist() == [2500, 7, 7, 7, 7, 7]


# --- Random numbers and weights -------------------------------------------------------------------


def test_random_numbers_are_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert list(splitmix64(1234567, 3)) == published
    for seed, step in ((0, 0), (1, 5), (2**64 - 1, 2), (12345, 1)):
        assert sample._random(seed, step) == random_bits(seed, step)


def test_weights_are_powers_of_two():
    seams = np.arange(41, dtype=np.uint64) << np.uint64(26)
    levels = np.unique(np.concatenate([seams, seams[1:] - 1, seams[:-1] + 1, seams[:-1] + 2**25]))
    levels = np.append(levels, np.arange(10**6, 10**6 + 10**5, dtype=np.uint64))
    got = sample._weights(levels).astype(np.float64)
    want = 2.0 ** (40 - levels.astype(np.float64) / 2**26)
    assert (np.abs(got - want) <= 5e-9 * want + 1).all()
    assert (np.diff(sample._weights(np.sort(levels)).astype(np.int64)) <= 0).all()
    assert sample._weights(seams).tolist() == [2**n for n in range(40, -1, -1)]


@pytest.mark.parametrize("V", [1, 2, 3, 32, 33, 1000, 1025, 40000, *swept([262144])])
def test_equal_logits_draw_an_exact_index(xp, V):
    """With n tokens kept, the index is floor(n * random / 2^64); the lowest indices are kept."""
    seeds = np.arange(5 if V < 10_000 else 2) + 10**12
    random = [random_bits(int(seed), 3) for seed in seeds]
    logits = np.full((len(seeds), V), -7.25, np.float32)
    for options, kept in (
        ({}, V),
        ({"top_k": min(V, 77)}, min(V, 77)),
        ({"top_k": V + 1}, V),
        ({"top_p": 0.25}, -(-V // 4)),
        ({"top_p": 1e-9}, 1),
        ({"min_p": 1.0}, V),
        ({"top_k": max(V // 2, 1), "top_p": 0.5}, -(-max(V // 2, 1) // 2)),
    ):
        got = draw(xp, logits, **options, seeds=seeds, steps=3)
        want = [0 if options.get("top_k") == 1 else kept * bits >> 64 for bits in random]
        assert got.tolist() == want, options


def test_a_border_belongs_to_the_upper_token(xp):
    """Of four equal tokens, token i gets the random numbers from i * 2^62 on."""
    borders = [i * 2**62 + offset for i in range(5) for offset in (-1, 0)][1:-1]
    seeds = [seed_for(bits) for bits in borders]
    assert [random_bits(seed, 0) for seed in seeds] == borders
    got = draw(xp, np.zeros((8, 4)), seeds=np.array(seeds, np.uint64))
    assert got.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# --- Filters and draws ----------------------------------------------------------------------------

FILTERS = (
    {},
    *({"temperature": t} for t in (0.05, 0.5, 3.0, 100.0)),
    *({"top_k": k} for k in (1, 2, 5, 11, 12, 50)),
    *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
    *({"min_p": m} for m in (0.01, 0.2, 0.9, 1.0)),
    {"top_k": 6, "top_p": 0.7},
    {"top_k": 6, "min_p": 0.1, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 8, "min_p": 0.3, "top_p": 0.6},
)


@pytest.mark.parametrize("options, ties", product(FILTERS, [True, False]), ids=str)
def test_draws_equal_a_plain_loop(xp, rng, options, ties):
    """Only decisions that tip within 1e-6 may fall differently; they are left out, and rare."""
    options, count = {**OFF, **options}, 60 if xp is np else 20
    logits = (2 * rng.standard_normal((count, 12))).astype(np.float32)
    if ties:
        logits = np.round(logits)
    seeds = rng.integers(0, 2**63, count).astype(np.uint64)
    got = draw(xp, logits, **options, seeds=seeds, steps=4)
    clear = 0
    for row, seed, token in zip(logits, seeds.tolist(), got.tolist(), strict=True):
        as_stored = {name: float(DTYPES[name](value)) for name, value in options.items()}
        as_stored["top_k"] = options["top_k"]
        kept, want, margin = plain(row, **as_stored, uniform=random_bits(seed, 4) / 2**64)
        if margin > 1e-6:
            clear += 1
            assert token == want, (row, kept)
    # min_p = 1 and ties at top_p lie on the border, exactly; other tests look at them.
    assert clear > count - 4 or options["min_p"] == 1 or (ties and options["top_p"] < 1)


@without_simt
@pytest.mark.parametrize("options", FILTERS[1:], ids=str)
def test_no_dropped_token_is_drawn(xp, options):
    """And every kept one of 30 expected draws or more is."""
    logits = [2.0, -1.0, 0.5, 2.5, 0.0, 1.0, 1.5, -0.5, 2.2, 1.1, 0.7, -2.0]
    options, count = {**OFF, **options}, 3000
    kept, _, _ = plain(logits, **options)
    mass = {i: math.exp(logits[i] / options["temperature"]) for i in kept}
    likely = {i for i in kept if count * mass[i] / sum(mass.values()) > 30}
    got = set(draw(xp, repeat(logits, count), **options, seeds=np.arange(count)).tolist())
    assert likely <= got <= kept


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.9, "min_p": 0.05}], ids=str
)
@pytest.mark.parametrize("vary", ["seeds", "steps"])
@without_simt
def test_frequencies_follow_the_distribution(xp, options, vary):
    """Chi-square at a fixed set of seeds, or of steps; 0.1 percent of good generators exceed it."""
    limits = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}  # by degree of freedom
    logits = [1.0, -0.5, 0.0, 2.0, 0.5, 1.5, -1.0, 0.8]
    options, count = {**OFF, **options}, 8000
    kept, _, _ = plain(logits, **options)
    mass = {i: math.exp(logits[i] / options["temperature"]) for i in kept}
    got = draw(xp, repeat(logits, count), **options, **{vary: np.arange(count)}).tolist()
    assert set(got) <= kept
    chi_square = 0.0
    for i in kept:
        expected = count * mass[i] / sum(mass.values())
        chi_square += (got.count(i) - expected) ** 2 / expected
    assert 0.05 < chi_square < limits[len(kept) - 1]


def test_a_draw_does_not_depend_on_the_batch(xp, rng):
    count = 24
    logits = (3 * rng.standard_normal((count, 4000))).astype(np.float32)
    options = dict(
        temperature=rng.choice([0, 0.7, 1.5], count),
        top_k=rng.choice([0, 40], count),
        top_p=rng.choice([0.8, 1.0], count),
        min_p=rng.choice([0, 0.02], count),
        seeds=rng.integers(0, 2**63, count).astype(np.uint64),
        steps=rng.integers(0, 10**6, count),
    )
    together = draw(xp, logits, **options)
    assert_same_bits(draw(xp, logits, **options), together)
    order = rng.permutation(count)
    shuffled = {name: values[order] for name, values in options.items()}
    assert_same_bits(draw(xp, logits[order], **shuffled), together[order])
    for b in (0, 11):
        alone = {name: values[b] for name, values in options.items()}
        assert draw(xp, logits[b : b + 1], **alone) == together[b]


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), (1e-45, 0.9999), *swept([(1.0, 0.9999), (1e-30, 1.0)])]
)
def test_unusual_logits(xp, temperature, top_p):
    nan, inf = math.nan, math.inf
    rows = [
        ([-inf, 0, -inf, 0], {1, 3}),
        ([nan, 0, nan, 0], {1, 3}),
        ([3e38, -3e38, 3e38, 0], {0, 2}),
        ([inf, 0, inf, 3e38], {-1}),
        ([nan, -inf, -inf, nan], {-1}),
        ([nan, nan, nan, nan], {-1}),
        ([-3e38, -3e38, -inf, -3e38], {0, 1, 3}),
        ([1e-45, 0, -0.0, -1e-45], {0, 1, 2, 3}),
        ([0, -29, -27, -100], {0}),  # exp(-27) is 2^-39: possible, but not in 20 draws
    ]
    for row, want in rows:
        if temperature == 1e-45 and 1e-45 in row:
            want = {0}  # 2^26 log2(e) / temperature overflows
        got = draw(xp, repeat(row, 20), temperature=temperature, top_p=top_p, seeds=np.arange(20))
        assert set(got.tolist()) == want, row


def test_out_is_filled_and_empty_batches_pass(xp):
    logits = xp.asarray(np.array([[0, 5], [5, 0]], np.float32))
    zeros = [xp.zeros(2, dtype) for dtype in DTYPES.values()]
    zeros[2] += 1  # top_p
    out = xp.full(4, -9, np.int32)
    got = sample.sample(logits, *zeros, out=out[1:3])
    assert to_numpy(out).tolist() == [-9, 1, 0, -9] and to_numpy(got).tolist() == [1, 0]
    assert len(draw(xp, np.zeros((0, 5)))) == 0


# --- Kernel and reference -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "V, kind",
    product([32000, 1, 100, 1025, 151936, 262144], ["normal", "ties", "peaked", "flat", "holes"]),
)
def test_kernel_draws_what_numpy_draws(device, rng, V, kind):
    B = 48 if V < 2000 else 8
    logits = rng.standard_normal((B, V)).astype(np.float32) * np.float32(2.5)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "peaked":
        logits[:, rng.integers(0, V, 3)] += 15
    elif kind == "flat":
        logits *= np.float32(1e-4)
    elif kind == "holes":
        logits[rng.random((B, V)) < 0.5] = -np.inf
        logits[rng.random((B, V)) < 0.01] = np.nan
    options = dict(
        temperature=rng.choice([0, 0.01, 0.3, 1, 1, 2, 50], B),
        top_k=rng.choice([0, 0, 1, 2, 40, 1000, V, V + 1], B),
        top_p=rng.choice([1, 1, 0.01, 0.5, 0.9, 0.99], B),
        min_p=rng.choice([0, 0, 1e-9, 0.05, 0.5, 1], B),
        seeds=rng.integers(0, 2**64, B, dtype=np.uint64),
        steps=rng.integers(0, 2**31, B),
    )
    assert_same_bits(draw(device, logits, **options), draw(np, logits, **options))


def test_kernel_clamps_parameters(device, rng):
    logits = rng.standard_normal((20, 300)).astype(np.float32)
    best = to_numpy(sample.argmax(device.asarray(logits)))
    seeds = np.arange(20)
    for temperature in (-1, math.nan, -math.inf):
        assert_same_bits(draw(device, logits, temperature=temperature, seeds=seeds), best)
    free = draw(np, logits, seeds=seeds)
    for off in ({"top_k": -5}, {"top_p": 1.5}, {"top_p": math.inf}, {"min_p": -1}):
        assert_same_bits(draw(device, logits, **off, seeds=seeds), free)
    assert_same_bits(draw(device, logits, min_p=math.nan, seeds=seeds), free)
    for tight in ({"top_p": 0}, {"top_p": -1}, {"top_p": math.nan}, {"min_p": 2}):
        assert_same_bits(draw(device, logits, **tight, seeds=seeds), best)


# --- Errors ---------------------------------------------------------------------------------------


def test_errors_name_the_argument(xp):
    logits = xp.zeros((2, 5), np.float32)
    arrays = [xp.zeros(2, dtype) for dtype in DTYPES.values()]
    with pytest.raises(ShapeError, match="sample.argmax: logits has V=0, expected 1 to 8388608"):
        sample.argmax(xp.zeros((2, 0), np.float32))
    with pytest.raises(ShapeError, match="sample.sample: logits has V=0"):
        sample.sample(xp.zeros((2, 0), np.float32), *arrays)
    with pytest.raises(DtypeError, match="logits has dtype float16, expected float32"):
        sample.argmax(logits.astype(np.float16))
    with pytest.raises(ShapeError, match="out has B=3, expected B=2"):
        sample.argmax(logits, out=xp.zeros(3, np.int32))
    for i, name in enumerate(DTYPES):
        short = [*arrays[:i], arrays[i][:1], *arrays[i + 1 :]]
        with pytest.raises(ShapeError, match=f"{name} has B=1, expected B=2"):
            sample.sample(logits, *short)
        wrong = [*arrays[:i], arrays[i].astype(np.float64), *arrays[i + 1 :]]
        with pytest.raises(DtypeError, match=f"{name} has dtype float64"):
            sample.sample(logits, *wrong)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"temperature": -0.5}, r"temperature\[1\] is -0.5, expected a finite number of at least"),
        ({"temperature": math.nan}, r"temperature\[1\] is nan"),
        ({"temperature": math.inf}, r"temperature\[1\] is inf"),
        ({"top_k": -1}, r"top_k\[1\] is -1, expected at least 0"),
        ({"top_p": 0}, r"top_p\[1\] is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p\[1\] is 1.5"),
        ({"min_p": -0.25}, r"min_p\[1\] is -0.25, expected 0 to 1"),
        ({"min_p": math.nan}, r"min_p\[1\] is nan"),
        ({"steps": -1}, r"steps\[1\] is -1, expected at least 0"),
    ],
    ids=str,
)
def test_host_checks_values(options, text):
    name, value = next(iter(options.items()))
    good = {**OFF, "steps": 0}[name]
    with pytest.raises(ParameterError, match=text):
        draw(np, np.zeros((3, 4)), **{name: [good, value, good]})


def test_prepared_draws_follow_logits_and_steps(xp, rng):
    logits = rng.standard_normal((3, 50)).astype(np.float32)
    columns = {name: np.full(3, OFF.get(name, 7), dtype) for name, dtype in DTYPES.items()}
    given = {name: xp.asarray(x) for name, x in dict(logits=logits, **columns).items()}
    draw = cuda.prepare(sample.sample, **given)
    best = cuda.prepare(sample.argmax, given["logits"])
    for step in (7, 8):
        given["steps"][...] = step
        given["logits"][...] = xp.asarray(logits * (step - 5))
        assert draw() is draw.result and best() is best.result
        want = sample.sample(**{name: to_numpy(x) for name, x in given.items()})
        assert_same_bits(draw.result, want)
        assert_same_bits(best.result, logits.argmax(1).astype(np.int32))


def test_a_prepared_draw_looks_at_its_parameters():
    """On the host, as a plain call."""
    columns = {name: np.full(3, OFF.get(name, 7), dtype) for name, dtype in DTYPES.items()}
    logits = np.zeros((3, 50), np.float32)
    draw = cuda.prepare(sample.sample, logits, **columns)
    columns["top_k"][1] = -1
    for call in (draw, lambda: cuda.prepare(sample.sample, logits, **columns)):
        with pytest.raises(ParameterError, match=r"top_k\[1\] is -1, expected at least 0"):
            call()
