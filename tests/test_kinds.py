import ml_dtypes
import numpy as np
import pytest

from pykv import kinds
from pykv.errors import ParameterError
from pykv.kinds import KINDS, KVSpec

CODES = [kind for kind in KINDS.values() if kind.largest]


def encode_by_hand(x, kind, scale_dtype):
    """One row in plain Python, in float64 where float32 would round: (codes as numbers, scale)."""
    if not all(np.isfinite(x)):
        return [0] * len(x), np.nan
    amax = max(max(abs(float(v)) for v in x), 1e-8)
    scale = scale_dtype(min(np.float32(amax) / np.float32(kind.largest), np.finfo(scale_dtype).max))
    codes = []
    for value in x:
        inverse = np.float32(1) / np.float32(scale) if scale > 0 else np.float32(0)
        y = min(max(float(np.float32(value) * inverse), -kind.largest), kind.largest)
        if kind.name.startswith("int"):
            codes.append(round(y))  # Python rounds halves to even
        else:
            grid = [float(v) for v in fp8_values(kind.name)]
            best = min(abs(v - y) for v in grid)
            near = [v for v in grid if abs(v - y) == best]
            even = [v for v in near if fp8_code(kind.name, v) % 2 == 0]
            codes.append((near if len(near) == 1 else even)[0])
    return codes, scale


def fp8_values(name):
    """Every finite value of an fp8 kind, from its definition."""
    mantissa, bias, top = (3, 7, 0x7E) if name == "e4m3" else (2, 15, 0x7B)
    for code in range(top + 1):
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        if exponent:
            value = (1 + fraction / 2**mantissa) * 2.0 ** (exponent - bias)
        else:
            value = fraction / 2**mantissa * 2.0 ** (1 - bias)
        yield value
        if value:
            yield -value


def fp8_code(name, value):
    dtype = ml_dtypes.float8_e4m3fn if name == "e4m3" else ml_dtypes.float8_e5m2
    return int(np.array(value, dtype).view(np.uint8))


ROWS = {
    "random": lambda rng: rng.standard_normal(16),
    "zeros": lambda rng: np.zeros(16),
    "tiny": lambda rng: rng.standard_normal(16) * 1e-6,
    "below the floor": lambda rng: rng.standard_normal(16) * 1e-10,
    "subnormal scale": lambda rng: rng.standard_normal(16) * 1e-4,
    "huge": lambda rng: rng.standard_normal(16) * 1e9,
    "outlier": lambda rng: np.r_[1000.0, rng.standard_normal(15) * 1e-3],
    "halves": lambda rng: np.r_[127.0, np.arange(15) - 7.5],
    "infinity": lambda rng: np.r_[np.inf, np.ones(15)],
    "NaN": lambda rng: np.r_[np.nan, np.ones(15)],
}


@pytest.mark.parametrize("scale_dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_encoded_as_by_hand(rng, row, kind, scale_dtype):
    x = ROWS[row](rng).astype(np.float32)
    dtype = kinds.SCALE_DTYPES[scale_dtype]
    codes, scale = kinds.quantize(x, kind, scale_dtype=dtype)

    with np.errstate(over="ignore"):
        want, want_scale = encode_by_hand(x, kind, dtype.type)
    assert codes.dtype == kind.dtype and scale.dtype == dtype
    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_array_equal(kinds.decode(codes, kind), np.array(want, np.float32))


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)
def test_a_row_decodes_to_within_half_a_step(rng, kind):
    x = rng.standard_normal((7, 5, 64)).astype(np.float32)
    y = kinds.dequantize(*insert(kinds.quantize(x, kind), kind))
    amax = np.abs(x).max(-1, keepdims=True)
    # Integers are evenly spaced; a float's spacing is relative. 2^-10: float16 scales.
    steps = amax / kind.largest if kind.name.startswith("int") else np.abs(x) / 2 ** mantissa(kind)
    floor = amax / kind.largest * 2.0**-6  # an fp8's subnormals
    assert (np.abs(y - x) <= 0.5 * steps + floor + amax * 2.0**-10).all()


def mantissa(kind):
    return 3 if kind.name == "e4m3" else 2


def insert(pair, kind):
    return pair[0], kind, pair[1]


def test_rows_with_what_is_not_finite_decode_to_nan():
    for kind in CODES:
        for bad in (np.nan, np.inf, -np.inf):
            x = np.ones((2, 8), np.float32)
            x[0, 3] = bad
            y = kinds.dequantize(*insert(kinds.quantize(x, kind), kind))
            assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_given_scales_clamp():
    x = np.array([1.0, -1.0, 1e9, -np.inf, np.inf, np.nan, 0.25, 0.0], np.float32)
    scale = np.float32(0.5)
    want = {
        "int8": [2, -2, 127, -127, 127, 0, 0, 0],
        "int4": [2, -2, 7, -7, 7, 0, 0, 0],
        "e4m3": [2, -2, 448, -448, 448, np.nan, 0.5, 0],
        "e5m2": [2, -2, 57344, -57344, 57344, np.nan, 0.5, 0],
    }
    for kind in CODES:
        codes, stored = kinds.quantize(x, kind, scale=scale)
        assert stored is scale
        np.testing.assert_array_equal(kinds.decode(codes, kind), np.float32(want[kind.name]))


def test_int4_codes_share_bytes():
    codes = np.array([[1, -1, 7, -7, 0, 3, -4, 2]], np.int8)
    packed = kinds.pack(codes)
    assert packed.tolist() == [[0xF1, 0x97, 0x30, 0x2C]]
    np.testing.assert_array_equal(kinds.unpack(packed), codes)


@pytest.mark.parametrize(
    "text, spec",
    [
        ("fp16", KVSpec()),
        ("int8", KVSpec("int8", "int8")),
        ("fp8:tensor:fp32", KVSpec("e4m3", "e4m3", "tensor", "fp32")),
        ("k8v4:HND", KVSpec("int8", "int4", layout="HND")),
        ("bf16+int4:head", KVSpec("bf16", "int4", "head")),
    ],
)
def test_a_spec_is_read_from_text_and_back(text, spec):
    assert KVSpec.parse(text) == spec
    assert KVSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: KVSpec.parse("int7"), "'int7' is no kind, expected one of fp32, fp16"),
        (lambda: KVSpec.parse("int8:row"), "'row' of 'int8:row' is unknown, expected one of token"),
        (lambda: KVSpec("int8", "int8", "row"), "granularity is 'row', expected one of token"),
        (lambda: KVSpec(layout="NDH"), "layout is 'NDH', expected one of NHD, HND"),
    ],
)
def test_unknown_names(make, message):
    with pytest.raises(ParameterError, match=message):
        make()


def test_bytes_a_token_takes():
    sizes = {"fp16": 4096, "int8": 2080, "int8:fp32": 2112, "int8:head": 2048, "k8v4": 1568}
    for text, size in sizes.items():
        assert KVSpec.parse(text).bytes_per_token(8, 128) == size
