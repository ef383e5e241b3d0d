"""The wrappers around inline PTX: on a GPU the instructions, on the SIMT machine their twins, both
held to NumPy and ml_dtypes. What passes on both is a proof that the twins tell the truth."""

import re
import shutil
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pykv import cuda, kinds
from tests.helpers import assert_same_bits, bits, launch, to_numpy
from tests.simt import cupy as simt
from tests.simt import machine

HERE = Path(__file__).parent
KINDS = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
FP8 = ["e4m3", "e5m2"]
NAN_BITS = 0x7FFFFFFF  # the NaN that the instructions make


class Probe:
    """The kernels of kernels/ptx.cu on one device."""

    def __init__(self, device):
        self.device = device
        self.sm = None if device is simt else int(cuda.current_arch().split("_")[1])
        self.imitate(90)  # has every instruction

    def imitate(self, sm):
        """The SIMT machine is as any SM."""
        if self.device is simt:
            self.sm, machine.ARCH = sm, f"sm_{sm}"

    def needs(self, sm):
        if self.sm < sm:
            pytest.skip(f"sm_{sm} is the first with this instruction, this is sm_{self.sm}")

    def run(self, name, out, *inputs, n=None, block=128, kind="f16", codes="i8"):
        """`out` as the kernel leaves it; over n items, or by one block."""
        arrays = [self.device.asarray(x) for x in (out, *inputs)]
        sizes = [] if n is None else [n]
        grid = 1 if n is None else -(-n // block)
        kernel = cuda.kernel("ptx", name, SM=self.sm, KIND=kind, CODES=codes)
        launch(kernel, grid, block, *arrays, *sizes)
        return to_numpy(arrays[0])

    def widen(self, codes, kind="f16", name="widen"):
        out = np.zeros(codes.size, np.float32)
        return self.run(name, out, bits(codes), n=codes.size, kind=kind)

    def narrow(self, x, kind="f16", name="narrow"):
        out = np.zeros(x.size, f"u{KINDS[kind].itemsize}")
        return self.run(name, out, x, n=x.size, kind=kind).view(KINDS[kind])


@pytest.fixture
def probe(device, kernel_folder, monkeypatch):
    shutil.copy(HERE / "kernels" / "ptx.cu", kernel_folder)
    monkeypatch.setattr(machine, "ARCH", machine.ARCH)  # to be restored
    return Probe(device)


# --- Conversions ----------------------------------------------------------------------------------


def all_codes(kind):
    dtype = KINDS[kind]
    return np.arange(256**dtype.itemsize).astype(f"u{dtype.itemsize}").view(dtype)


def values(codes):
    """The floats that codes mean. A bf16 keeps its NaN's bits, the others get NAN_BITS."""
    if codes.dtype == ml_dtypes.bfloat16:
        return (bits(codes).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        x = codes.astype(np.float32)
    return np.where(np.isnan(x), np.uint32(NAN_BITS).view(np.float32), x)


def halfway(kind):
    """What lies halfway from each finite magnitude to the next, the last to one step beyond."""
    x = values(all_codes(kind))
    finite = np.unique(np.abs(x[np.isfinite(x)])).astype(np.float64)
    following = np.append(finite[1:], 2 * finite[-1] - finite[-2])
    return ((finite + following) / 2).astype(np.float32)


def floats(rng, kind):
    """Every f16 and bf16 value, every halfway point with both floats beside it, random bits."""
    middle = halfway(kind)
    beside = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))]
    random = rng.integers(0, 2**32, 20_000, np.uint32).view(np.float32)
    x = [
        values(all_codes("f16")),
        values(all_codes("bf16")),
        random,
        *beside,
        *map(np.negative, beside),
    ]
    x = np.concatenate(x)
    x.view(np.uint32)[np.isnan(x)] |= 1 << 22  # quiet: processors differ on signalling ones
    return x


def rounded(x, kind):
    """What pykv stores: to the fp8 kinds all that exceeds the largest finite value becomes it."""
    if kind in FP8:
        largest = np.float32(ml_dtypes.finfo(KINDS[kind]).max)
        x = np.clip(x, -largest, largest)
    with np.errstate(over="ignore"):
        return x.astype(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_widens(probe, kind):
    codes = all_codes(kind)
    assert_same_bits(probe.widen(codes, kind), values(codes))


@pytest.mark.parametrize("kind", KINDS)
def test_every_float_narrows(probe, rng, kind):
    x = floats(rng, kind)
    assert_same_bits(probe.narrow(x, kind), rounded(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_even_code(probe, kind):
    """Codes of growing magnitude are consecutive, so the truth needs no other conversion."""
    middle = halfway(kind)
    below = np.arange(middle.size)
    last = below[-1] if kind in FP8 else below[-1] + 1  # saturated, or infinity
    even = below + below % 2
    for x, want in (
        (np.nextafter(middle, np.float32(0)), below),
        (middle, even),
        (np.nextafter(middle, np.float32(np.inf)), below + 1),
    ):
        want = np.minimum(want, last).astype(f"u{KINDS[kind].itemsize}")
        assert_same_bits(bits(probe.narrow(x, kind)), want)
        sign = want.dtype.type(1 << 8 * want.itemsize - 1)
        assert_same_bits(bits(probe.narrow(-x, kind)), want | sign)


def test_f16_instructions(probe, rng):
    codes, x = all_codes("f16"), floats(rng, "f16")
    assert_same_bits(probe.widen(codes, name="widen_f16"), values(codes))
    want = np.where(np.isnan(x), np.uint16(0x7FFF), bits(rounded(x, "f16")))
    assert_same_bits(bits(probe.narrow(x, name="narrow_f16")), want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_words_of_two(probe, rng, kind):
    """The instruction, then eight at a time, where NaN gets what NumPy gives it."""
    x = floats(rng, kind)
    x = x[: x.size // 8 * 8]
    out = np.zeros(x.size, np.uint16)
    probe.needs(80)
    want = np.where(np.isnan(x), np.uint16(0x7FFF), bits(rounded(x, kind)))
    assert_same_bits(probe.run("narrow_words", out, x, n=x.size // 2, kind=kind), want)
    for sm in (90, 75):
        probe.imitate(sm)
        got = probe.run("store_eight", out, x, n=x.size // 8, kind=kind)
        assert_same_bits(got, bits(rounded(x, kind)))


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS.values() if kind.largest], ids=str)
def test_eight_codes_load(probe, rng, kind):
    """Every byte in every place, with the instructions and without."""
    row = rng.permutation(np.arange(256).astype(np.uint8))
    codes = np.stack([np.roll(row, i) for i in range(kind.bits)])  # bytes of eight codes
    want = kinds.decode(codes.view(kind.dtype), kind)
    want = np.where(np.isnan(want), np.uint32(NAN_BITS).view(np.float32), want)
    for sm in (90, 75):
        probe.imitate(sm)
        out = np.zeros(want.size, np.float32)
        got = probe.run("load_eight", out, codes, n=want.size // 8, codes=kind.c_type)
        assert_same_bits(got.reshape(want.shape), want)


@pytest.mark.parametrize("kind", FP8)
def test_fp8_without_instructions(probe, rng, kind):
    """The functions that older SMs take: by name, and on such an SM by the usual way."""
    codes, x = all_codes(kind), floats(rng, kind)
    finite = x[~np.isnan(x)]
    assert_same_bits(probe.narrow(finite, kind, "narrow_plain"), rounded(finite, kind))
    if kind == "e4m3":
        assert_same_bits(probe.widen(codes, kind, "widen_plain"), values(codes))

    probe.imitate(75)
    assert_same_bits(probe.narrow(x, kind), rounded(x, kind))
    assert_same_bits(probe.widen(codes, kind), values(codes))


@pytest.mark.parametrize("kind", FP8)
def test_fp8_instructions(probe, rng, kind):
    probe.needs(89)
    x = rng.permutation(floats(rng, kind))[: 2**17]
    want = np.where(np.isnan(x), np.uint8(0x7F), bits(rounded(x, kind)))
    out = np.zeros(x.size, np.uint8)
    assert_same_bits(probe.run("narrow_pairs", out, x, n=x.size // 2, kind=kind), want)


def test_e4m3_pairs_widen(probe):
    probe.needs(89)
    pairs = np.arange(2**16).astype(np.uint16)
    x = values(pairs.view(KINDS["e4m3"]))
    want = np.where(np.isnan(x), np.uint16(0x7FFF), bits(x.astype(np.float16)))
    out = np.zeros(2 * pairs.size, np.uint16)
    assert_same_bits(probe.run("widen_e4m3x2", out, pairs, n=pairs.size), want)
    out = np.zeros(pairs.size, np.uint32)  # two words of pairs are four codes each
    got = probe.run("widen_e4m3x4", out, pairs.view(np.uint32), n=pairs.size // 2)
    assert_same_bits(got.view(np.uint16), want)


# --- Copies and fragments -------------------------------------------------------------------------


def test_async_copies_arrive(probe, rng):
    x = rng.integers(0, 2**32, (2, 128, 4), np.uint32)
    assert_same_bits(probe.run("copy", np.zeros_like(x), x), x[:, ::-1])


def test_copies_arrive_at_mbarriers(probe, rng):
    if cuda.current_arch() != "sm_90":
        pytest.skip("sm_90 alone has fence_async_proxy here, in cubins")
    x = rng.integers(0, 2**32, (2, 128, 4), np.uint32)
    assert_same_bits(probe.run("copy_to_mbarrier", np.zeros_like(x), x), x[:, ::-1])


def test_matrices_load(probe):
    probe.needs(75)
    x = np.arange(256).astype(np.uint16).reshape(4, 8, 8)
    got = probe.run("load_matrices", np.zeros((2, 4, 32), np.uint32), x.reshape(32, 8), block=32)
    for matrices, registers in zip((x, x.transpose(0, 2, 1)), got, strict=True):
        want = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32)
        assert_same_bits(registers, want)


def registers(matrix):
    """A matrix of 16-bit elements as registers, [M, 32] uint32: one for each 8 x 8 part, down the
    columns of parts. Two neighbours in a row share a lane, and the lanes follow the rows."""
    rows, columns = matrix.shape
    parts = [matrix[i : i + 8, j : j + 8] for j in range(0, columns, 8) for i in range(0, rows, 8)]
    return np.stack([bits(part).view(np.uint32).ravel() for part in parts])


def accumulators(matrix):
    """A 16 x 8 matrix as the accumulators of a warp, [4, 32]."""
    return np.ascontiguousarray(matrix.reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, 32))


def matrix_of(accumulators):
    """The reverse."""
    return accumulators.reshape(2, 2, 8, 4).transpose(0, 2, 3, 1).reshape(16, 8)


MMAS = [
    ("mma_k8_f16", 75, 8, "f16"),
    ("mma_k16_f16", 80, 16, "f16"),
    ("mma_k16_bf16", 80, 16, "bf16"),
]


def multiply_add(probe, name, a, b, c, kind):
    """A B + C by one mma."""
    a, b = a.astype(KINDS[kind]), b.astype(KINDS[kind])
    inputs = registers(a), registers(b.T)
    return matrix_of(probe.run(name, accumulators(c.astype(np.float32)), *inputs, block=32))


@pytest.mark.parametrize("name, sm, K, kind", MMAS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-24])
def test_matrices_multiply(probe, rng, name, sm, K, kind, scale):
    """Distinct integers, and their multiples of a tiny number (f16: subnormals): sums are exact."""
    probe.needs(sm)
    a = (rng.permutation(16 * K).reshape(16, K) - 8 * K) * scale
    b = (rng.permutation(8 * K).reshape(K, 8) - 4 * K).astype(np.float64)
    c = (rng.permutation(128).reshape(16, 8) - 64) * scale
    want = (a @ b + c).astype(np.float32)
    assert_same_bits(multiply_add(probe, name, a, b, c, kind), want)


@pytest.mark.parametrize("name, sm, K, kind", MMAS)
def test_matrices_multiply_infinities(probe, name, sm, K, kind):
    """inf * x, inf * 0, inf - inf, NaN, and what must stay finite beside them."""
    probe.needs(sm)
    a, b, c = np.ones((16, K)), np.ones((K, 8)), np.zeros((16, 8))
    a[1, 0], a[2, :2], a[9, K - 1], a[15, 3] = np.inf, (np.inf, -np.inf), -np.inf, np.nan
    b[0, 3], b[5, 6], c[4, 4] = 0, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        want = (a @ b + c).astype(np.float32)
    got = multiply_add(probe, name, a, b, c, kind)
    assert np.isnan(want).any() and np.isinf(want).any() and np.isfinite(want).any()
    np.testing.assert_array_equal(got, want)


def test_loaded_matrices_multiply(probe, rng):
    probe.needs(80)
    a, b = rng.integers(-50, 50, (2, 16, 16))
    codes = [bits(x.astype(np.float16)) for x in (a, b)]
    got = probe.run("multiply", np.zeros((16, 16), np.float32), *codes, block=32)
    assert_same_bits(got, (a @ b).astype(np.float32))


@pytest.mark.parametrize("name, kind", [("f16", "f16"), ("bf16", "bf16"), ("columns", "f16")])
def test_groups_of_warps_multiply(probe, rng, name, kind):
    """Small integers, whose sums are exact."""
    if cuda.current_arch() != "sm_90":
        pytest.skip("sm_90 alone has wgmma, in cubins")
    a, b = rng.integers(-50, 50, (64, 64)), rng.integers(-50, 50, (128, 64))
    codes = [
        bits(np.ascontiguousarray(x).astype(KINDS[kind]))
        for x in (a, b.T if name == "columns" else b)
    ]
    got = probe.run(f"wgmma_{name}", np.zeros((64, 128), np.float32), *codes, block=128)
    assert_same_bits(got, (a @ b.T).astype(np.float32))


@pytest.mark.parametrize("columns", [8, 16, 32, 64])
def test_groups_of_warps_multiply_registers(probe, rng, columns):
    """Small integers, whose sums are exact."""
    if cuda.current_arch() != "sm_90":
        pytest.skip("sm_90 alone has wgmma, in cubins")
    a, b = rng.integers(-50, 50, (64, 64)), rng.integers(-50, 50, (columns, 64))
    codes = [bits(x.astype(np.float16)) for x in (a, b)]
    out = np.zeros((64, columns), np.float32)
    got = probe.run(f"wgmma_f16_{columns}", out, *codes, block=128)
    assert_same_bits(got, (a @ b.T).astype(np.float32))


# --- Operands of mma ------------------------------------------------------------------------------


def random_halves(rng, n):
    """Two f16 of any finite bits in each u32."""
    halves = rng.integers(0, 2**16, (n, 2)).astype(np.uint16)
    halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000
    return halves.view(np.float16)


def nearest_half(x):
    """The f16 nearest to a Fraction, ties to even."""
    with np.errstate(over="ignore"):
        guess = np.float16(float(x))
    if not np.isfinite(guess):
        return guess
    near = [
        guess,
        np.nextafter(guess, np.float16(np.inf)),
        np.nextafter(guess, np.float16(-np.inf)),
    ]
    near = [y for y in near if np.isfinite(y)]
    return min(near, key=lambda y: (abs(Fraction(float(y)) - x), int(y.view(np.uint16)) & 1))


def test_halves_subtract(probe, rng):
    probe.needs(75)
    a, b = random_halves(rng, 4096), random_halves(rng, 4096)
    with np.errstate(over="ignore"):
        exact = a.astype(np.float64) - b.astype(np.float64)
        want = exact.astype(np.float16)
    words = [x.view(np.uint32)[:, 0] for x in (a, b, want)]
    assert_same_bits(
        probe.run("subtract_halves", np.zeros_like(words[0]), *words[:2], n=4096), words[2]
    )


def test_halves_stand_twice(probe, rng):
    x = random_halves(rng, 500)
    got = probe.run("double_halves", np.zeros(1000, np.uint32), x.view(np.uint32)[:, 0], n=500)
    assert_same_bits(got, x.repeat(2).view(np.uint32))


def test_halves_multiply_and_add(probe, rng):
    probe.needs(75)
    a, b, c = (random_halves(rng, 1500) for _ in range(3))
    a[:500] *= np.float16(2**-8)  # products as large as c: their sums are rounded at any place
    with np.errstate(over="ignore"):
        c[500:800] = np.nan_to_num(-a[500:800] * b[500:800])  # rounding's rest of a product is left
    finite = [[Fraction(float(y)) for y in x.ravel()] for x in (a, b, c)]
    want = [nearest_half(x * y + z) for x, y, z in zip(*finite, strict=True)]
    words = [np.ascontiguousarray(x).view(np.uint32)[:, 0] for x in (a, b, c)]
    got = probe.run("fuse_halves", np.zeros_like(words[0]), *words, n=1500).view(np.float16)
    np.testing.assert_array_equal(got, np.array(want))


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS.values() if kind.largest], ids=str)
def test_words_become_pairs(probe, rng, kind):
    """Every byte in every place; alone, and zipped with another word."""
    probe.needs(75)
    row = rng.permutation(np.arange(256).astype(np.uint8))
    codes = np.stack([np.roll(row, i) for i in range(8)]).reshape(-1, 4)
    words, n = codes.view(np.uint32)[:, 0], len(codes)
    values = kinds.decode(codes.view(kind.dtype), kind)  # [n, elements]
    elements = values.shape[1]
    pair = np.arange(elements // 2)
    near = kind.name in FP8
    first, second = (2 * pair, 2 * pair + 1) if near else (pair, pair + elements // 2)
    for sm in (90, 75):
        probe.imitate(sm)
        unit = 256 if kind.name == "e4m3" and probe.sm < 89 else 1
        out = np.zeros((n, elements // 2), np.uint32)
        got = probe.run("pair_words", out, words, n=n, codes=kind.c_type).view(np.float16)
        want = np.stack([values[:, first], values[:, second]], -1) / unit
        np.testing.assert_array_equal(got.reshape(want.shape), want)
        out = np.zeros((n // 2, elements), np.uint32)
        got = probe.run("pair_zipped", out, words, n=n // 2, codes=kind.c_type).view(np.float16)
        want = values.reshape(n // 2, 2, elements).swapaxes(1, 2) / unit
        np.testing.assert_array_equal(got.reshape(want.shape), want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_floats_split(probe, rng, kind):
    x = rng.standard_normal((2048, 2)).astype(np.float32)
    halves, rest = probe.device.zeros(2048, np.uint32), probe.device.zeros((2048, 2), np.float32)
    kernel = cuda.kernel("ptx", "split_floats", SM=probe.sm, KIND=kind, CODES="i8")
    launch(kernel, 16, 128, halves, rest, probe.device.asarray(x), 2048)
    want = x.astype(KINDS[kind])
    assert_same_bits(bits(to_numpy(halves)).view(np.uint16), bits(want).ravel())
    assert_same_bits(rest, x - want.astype(np.float32))


# --- Powers ---------------------------------------------------------------------------------------


def test_powers_of_two(probe, rng):
    """To within 2^-22, and no subnormal numbers: last bits differ from the machine's."""
    whole = np.arange(-160, 130)
    x = np.concatenate([whole, rng.uniform(-130, 128, 4096), [-np.inf, np.inf, np.nan]])
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        want = np.exp2(x.astype(np.float64))
        want = np.where(want < 2.0**-126, 0, np.where(want >= 2.0**128, np.inf, want))
    got = probe.run("power", np.zeros_like(x), x, n=x.size)
    np.testing.assert_allclose(got, want, rtol=2.0**-22, atol=0)
    assert_same_bits(got[: whole.size], want[: whole.size].astype(np.float32))


def test_inverses(probe, rng):
    """To within 2^-23, likewise."""
    x = (rng.choice([-1, 1], 4096) * np.exp2(rng.uniform(-126, 126, 4096))).astype(np.float32)
    got = probe.run("inverse", np.zeros_like(x), x, n=x.size)
    np.testing.assert_allclose(got, 1 / x.astype(np.float64), rtol=2.0**-23, atol=0)
    ends = np.array([0, -0.0, 1e-39, -1e-39, np.inf, -np.inf, 2.0**127, -(2.0**127)], np.float32)
    got = probe.run("inverse", np.zeros_like(ends), ends, n=ends.size)
    assert_same_bits(got, np.array([np.inf, -np.inf] * 2 + [0, -0.0] * 2, np.float32))


# --- Integers -------------------------------------------------------------------------------------


def test_dot4_with_extremes(probe, rng):
    edges = np.array([-128, -127, -1, 0, 1, 127], np.int8)
    a, b = rng.choice(edges, (2, 4096, 4))
    a[:2], b[:2] = -128, [[-128], [127]]  # the largest sums of either sign
    c = rng.choice(np.array([-(2**31), -1, 0, 1, 2**31 - 1], np.int32), 4096)
    c[:2] = 2**31 - 1, -(2**31)  # which wrap
    want = (a.astype(np.int64) * b).sum(1) + c
    assert (want != want.astype(np.int32)).any()
    got = probe.run(
        "dot", np.zeros_like(c), a.view(np.int32)[:, 0], b.view(np.int32)[:, 0], c, n=4096
    )
    assert_same_bits(got, want.astype(np.int32))


# --- Where they stand -----------------------------------------------------------------------------


def signatures(text):
    """Every inline function: name to result and parameters."""
    text = " ".join(text.split())
    text = re.sub(r"(, )?SIMT_SITE", "", text)
    for short, long in (
        ("u16", "unsigned short"),
        ("u32", "unsigned"),
        ("u64", "unsigned long long"),
    ):
        text = text.replace(short, long)
    found = re.findall(r"inline(?:__)? ([\w ]+\*?) (\w+)\((.*?)\) {", text)
    return {name: (result, parameters) for result, name, parameters in found}


def test_inline_ptx_stands_in_two_headers_and_has_twins():
    files = {path.name: path.read_text() for path in cuda.KERNELS.glob("*.cu*")}
    own = {name: text for name, text in files.items() if re.search(r"\basm\b", text)}
    assert own.keys() == {"ptx.cuh", "wgmma.cuh"}
    for text in own.values():
        before, section = re.split("#if.*PYKV_SIMT.*\n", text)
        assert section.endswith("#endif  // PYKV_SIMT\n") and not signatures(before)

    wrappers, twins = signatures("".join(own.values())), signatures((HERE / "ptx.hpp").read_text())
    assert len(wrappers) == 63
    code = re.sub("//.*", "", "".join(files.values()))
    assert not [name for name in wrappers if len(re.findall(rf"\b{name}\b", code)) == 1]  # unused
    assert wrappers == {name: twins.get(name) for name in wrappers}
