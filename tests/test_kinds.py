import math
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from pykv import kinds
from pykv.errors import DtypeError, ParameterError
from pykv.kinds import KINDS
from pykv.specs import KVSpec, as_spec, spec_of
from tests.helpers import assert_same_bits, to_numpy

CODES = [kind for kind in KINDS.values() if kind.largest]


def encode_by_hand(x, kind, scale_dtype):
    """One row in plain Python, in float64 where float32 would round: (codes as numbers, scale)."""
    if not all(np.isfinite(x)):
        return [0] * len(x), np.nan
    amax = max(max(abs(float(v)) for v in x), 1e-8)
    exact = np.float32(amax) / np.float32(kind.largest)
    scale = scale_dtype(min(exact, np.finfo(scale_dtype).max))
    if scale_dtype is np.float16 and exact < 2**-14:
        scale = scale_dtype(math.ceil(float(exact) * 2**24) / 2**24)
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
def test_rows_up_to_the_largest_float16_scale(kind):
    """Are not clamped; what lies beyond is, but for float32 scales."""
    most = 65504 * kind.largest
    stated = dict(int4=4.6e5, int8=8.3e6, e4m3=2.9e7, e5m2=3.8e9)[kind.name]
    assert abs(most / stated - 1) < 0.02
    x = np.float32([0.99, -0.5, 0.25, 0, 0, 0, 0, 0]) * np.float32(most)
    for factor, scale_dtype in ((1, np.float16), (100, np.float32)):
        codes = kinds.quantize(factor * x, kind, scale_dtype=np.dtype(scale_dtype))
        got = kinds.dequantize(*insert(codes, kind))
        assert np.abs(got / factor - x).max() < 0.15 * 0.99 * most
        assert abs(got[0] / factor / x[0] - 1) < 2e-3
    codes = kinds.quantize(100 * x, kind, scale_dtype=np.dtype(np.float16))
    assert kinds.dequantize(*insert(codes, kind))[0] == np.float32(most)


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)
def test_a_row_decodes_to_within_half_a_step(rng, kind):
    x = rng.standard_normal((7, 5, 64)).astype(np.float32)
    y = kinds.dequantize(*insert(kinds.quantize(x, kind), kind))
    amax = np.abs(x).max(-1, keepdims=True)
    # Integers are evenly spaced; a float's spacing is relative. 2^-10: float16 scales.
    steps = amax / kind.largest if kind.name.startswith("int") else np.abs(x) / 2 ** mantissa(kind)
    floor = amax / kind.largest * 2.0**-6  # an fp8's subnormals
    assert (np.abs(y - x) <= 0.5 * steps + floor + amax * 2.0**-10).all()


@pytest.mark.parametrize("scale_dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.name)
def test_rows_of_every_size_keep_their_precision(rng, kind, scale_dtype):
    """That of ideal scales, in float64; but a float16 scale adds 2^-24 to the steps of integers."""
    rows = rng.standard_normal((32, 128))
    rows /= np.abs(rows).max(-1, keepdims=True)
    grid = np.array(sorted(set(fp8_values(kind.name))) if mantissa(kind) else [])
    for size in 10.0 ** np.arange(-8, 4.01, 0.25):
        x = (rows * size).astype(np.float32)
        dtype = kinds.SCALE_DTYPES[scale_dtype]
        error = kinds.dequantize(*insert(kinds.quantize(x, kind, scale_dtype=dtype), kind)) - x
        scale = np.abs(x).max(-1, keepdims=True).astype(np.float64) / kind.largest
        if mantissa(kind):
            middles = (grid[1:] + grid[:-1]) / 2
            ideal = grid[np.searchsorted(middles, x / scale)] * scale - x
            assert np.sqrt((error**2).mean() / (ideal**2).mean()) < 1.15, size
        else:
            step = scale + (2.0**-24 if scale_dtype == "fp16" else 0)
            assert (np.abs(error) <= step / 2 * 1.08).all(), size  # 2^-11 of 127 steps: a clamp


def mantissa(kind):
    return {"e4m3": 3, "e5m2": 2}.get(kind.name)


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


@pytest.mark.parametrize("scale, is_one", [(1e-45, 0), (2**-128, 0), (2**-128 + 2**-149, 1)])
def test_a_given_scale_without_an_inverse_is_none(scale, is_one):
    """Zeros would become NaN, as products with infinity."""
    x, scale = np.array([0.0, -0.0, scale, 1.0], np.float32), np.float32(scale)
    for kind in CODES:
        codes, _ = kinds.quantize(x, kind, scale=scale)
        want = [0, 0, is_one, is_one * kind.largest]
        np.testing.assert_array_equal(kinds.decode(codes, kind), np.float32(want))


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
        (lambda: KVSpec.parse("int8+"), "'int8\\+' has nothing after \\+, expected a kind"),
        (lambda: KVSpec.parse("+int8"), "'\\+int8' has nothing before \\+, expected a kind"),
        (lambda: KVSpec.parse("int8:head:token"), "granularity given twice, expected 'head' or"),
        (lambda: KVSpec.parse("int8:HND:NHD"), "layout given twice, expected 'HND' or 'NHD'"),
        (lambda: KVSpec.parse("int8:fp16:fp32"), "scale_dtype given twice, expected 'fp16' or"),
        (lambda: KVSpec.parse("int8:row"), "'row' of 'int8:row' is unknown, expected one of token"),
        (lambda: KVSpec("int8", "int8", "row"), "granularity is 'row', expected one of token"),
        (lambda: KVSpec(layout="NDH"), "layout is 'NDH', expected one of NHD, HND"),
    ],
)
def test_unknown_names(make, message):
    with pytest.raises(ParameterError, match=message):
        make()


def test_equal_specs_are_one_key_in_another_process():
    """Each interpreter hashes texts in its own way."""
    code = (
        "import pickle, sys; from pykv import KVSpec; spec = pickle.load(sys.stdin.buffer); "
        "assert {KVSpec.parse('k8v4:HND'): 1}[spec] == 1 and spec.layout == 'HND'"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(KVSpec.parse("k8v4:HND")),
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )


def test_bytes_a_token_takes():
    sizes = {"fp16": 4096, "int8": 2080, "int8:fp32": 2112, "int8:head": 2048, "k8v4": 1568}
    for text, size in sizes.items():
        assert KVSpec.parse(text).bytes_per_token(8, 128) == size


# --- What a layout means ---

SHAPES = {  # K, V and scales of pools of 5 pages, 4 tokens, 3 heads and 16 elements, by hand
    "fp16": ((5, 4, 3, 16), (5, 4, 3, 16), (5, 4, 3)),
    "fp32+bf16:HND": ((5, 3, 4, 16), (5, 3, 4, 16), (5, 3, 4)),
    "int8": ((5, 4, 3, 16), (5, 4, 3, 16), (5, 4, 3)),
    "k8v4:HND": ((5, 3, 4, 16), (5, 3, 4, 8), (5, 3, 4)),
    "int4:head": ((5, 4, 3, 8), (5, 4, 3, 8), (3,)),
    "e4m3+int4:tensor:HND": ((5, 3, 4, 16), (5, 3, 4, 8), (1,)),
}


@pytest.mark.parametrize("text", SHAPES)
def test_shapes_by_hand(text):
    spec = KVSpec.parse(text)
    *pools, scales = SHAPES[text]
    assert spec.pool_shapes(5, 4, 3, 16) == tuple(pools)
    assert spec.scale_shape(5, 4, 3) == scales


@pytest.mark.parametrize("text", SHAPES)
def test_a_place_is_the_same_element_every_way(xp, text):
    """Page, token and head by the shapes, by `as_nhd`, and by strides from the start of a view into
    larger memory."""
    spec = KVSpec.parse(text)
    *pools, scales = SHAPES[text]
    for shape in (*pools, scales):
        wide = np.arange(np.prod([n + 2 for n in shape])).reshape([n + 2 for n in shape])
        view = xp.asarray(wide)[tuple(slice(1, n + 1) for n in shape)]
        host = wide[tuple(slice(1, n + 1) for n in shape)]
        page, token, head = spec.strides(view)
        for n, t, h in ((0, 0, 0), (4, 3, 2), (2, 1, 0), (1, 2, 2)):
            if len(shape) == 1:
                where = (h,) if shape == (3,) else (0,)
            else:
                where = (n, h, t) if "HND" in text else (n, t, h)
                assert (to_numpy(spec.as_nhd(view))[n, t, h] == host[where]).all()
            first = host[where].flat[0]  # which, like all, is its own address
            assert first - host.flat[0] == n * page + t * token + h * head
    assert spec.as_nhd(None) is None and spec.strides(None) == (0, 0, 0)


def test_strides_by_name():
    pool, scales = np.zeros((5, 3, 4, 16), np.int8), np.zeros((5, 3, 4), np.float16)
    arrays = dict(k_pool=pool, v_pool=pool[::2], k_scales=scales, v_scales=None)
    assert KVSpec.parse("int8+fp16:HND").pool_strides(**arrays) == {
        **{"k_pool_page": 192, "k_pool_token": 16, "k_pool_head": 64},
        **{"v_pool_page": 384, "v_pool_token": 16, "v_pool_head": 64},
        **{"k_scales_page": 12, "k_scales_token": 1, "k_scales_head": 4},
        **{"v_scales_page": 0, "v_scales_token": 0, "v_scales_head": 0},
    }


def test_scales_that_heads_or_all_share_have_no_other_strides():
    scales = np.zeros((6, 2), np.float16)[::2, 0]
    for layout in ("NHD", "HND"):
        assert KVSpec("int8", "int8", "head", layout=layout).strides(scales) == (0, 0, 4)
        assert KVSpec("int8", "int8", "tensor", layout=layout).strides(scales[:1]) == (0, 0, 0)


@pytest.mark.parametrize(
    "text, dims, scales",
    [
        ("int4", "N P H |", "N P H |"),
        ("k8v4:HND:fp32", "N H P |", "N H P |"),
        ("fp16+int8:head", "N P H |", "H"),
        ("int8:tensor:HND", "N H P |", "1"),
    ],
)
def test_rules(text, dims, scales):
    spec = KVSpec.parse(text)
    rules = spec.rules(("k", "v", "ks", "vs"), pages="M")
    for name, kind in zip(("k", "v"), spec.kinds, strict=True):
        words, dtype, alignment = rules[name]
        assert words == f"{dims} {'D/2' if kind.bits == 4 else 'D'}".replace("N", "M")
        assert dtype == kind.dtype and alignment == min(16, kind.bits)
        of_scales = rules[f"{name}s"]
        if not kind.largest:
            assert of_scales == f"None for {kind.name}"
            continue
        assert of_scales.spec == scales.replace("N", "M")
        assert of_scales.dtypes == kinds.SCALE_DTYPES[spec.scale_dtype]
        assert of_scales.what == f"scales for {kind.name}"


@pytest.mark.parametrize(
    "text, want",
    [
        ("fp16", ("f16", "f16", "f16")),
        ("fp32+bf16:fp32", ("float", "bf16", "f16")),  # there are no scales
        ("k8v4", ("i8", "i4", "f16")),
        ("e4m3+e5m2:fp32", ("e4m3", "e5m2", "float")),
    ],
)
def test_what_kernels_call_the_types(text, want):
    assert KVSpec.parse(text).type_defines == dict(
        zip(("K_T", "V_T", "SCALE_T"), want, strict=True)
    )


# --- Specs that ops are given ---


def test_a_spec_may_be_a_text():
    spec = KVSpec("int8", "int4", layout="HND")
    assert as_spec("op", spec) is spec and as_spec("op", "k8v4:HND") == spec
    assert as_spec("op", "k8v4:HND") is as_spec("op", "k8v4:HND")
    assert spec_of("op", "k8v4:HND", None, None) == spec


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: as_spec("op", np.float16), r"op: spec is a type, expected a KVSpec or a text"),
        (lambda: as_spec("op", None, "out_spec"), "op: out_spec is a NoneType, expected a KVSpec"),
        (lambda: spec_of("op", ["int8"], None, None), "op: spec is a list, expected a KVSpec"),
        (lambda: KVSpec.parse(None), "KVSpec.parse: text is a NoneType, expected one such as"),
        (lambda: KVSpec.parse(["fp16"]), "KVSpec.parse: text is a list, expected one such as"),
    ],
)
def test_a_spec_of_another_type(call, match):
    with pytest.raises(DtypeError, match=match):
        call()


@pytest.mark.parametrize("field", ["k", "v", "granularity", "scale_dtype", "layout"])
@pytest.mark.parametrize("name", [None, ["fp16"], np.dtype(np.float16)], ids=repr)
def test_a_name_that_is_no_text(field, name):
    with pytest.raises(ParameterError, match=f"KVSpec: {field} is .*, expected one of"):
        KVSpec(**{field: name})


def test_the_spec_that_arrays_show(xp):
    floats, codes = xp.zeros((2, 4, 3, 16), np.float32), xp.zeros((2, 4, 3, 16), np.int8)
    of_rows, of_heads, of_all = (xp.zeros(n, np.float32) for n in ((2, 4, 3), 3, 1))
    assert spec_of("op", None, floats, floats) == KVSpec("fp32", "fp32")
    of_codes = KVSpec("int8", "int8", scale_dtype="fp32")
    assert spec_of("op", None, codes, codes, of_rows, of_rows) == of_codes
    assert spec_of("op", None, codes, codes, of_heads, of_heads).granularity == "head"
    assert spec_of("op", None, codes, floats, of_all).granularity == "tensor"
    half = spec_of("op", None, floats, codes, None, of_rows.astype(np.float16))
    assert half == KVSpec("fp32", "int8")
    for arrays, name in (((codes.view(np.uint8), codes), "k"), ((codes, None), "v")):
        with pytest.raises(ParameterError, match=f"op: spec is missing, and {name}_pool is"):
            spec_of("op", None, *arrays)


def test_a_spec_of_one_kind_is_of_both():
    """Codes of keys beside floats of values are asked for, not left over."""
    for kind in kinds.KINDS:
        assert KVSpec(kind) == KVSpec.parse(kind) == KVSpec(kind, kind)
    assert KVSpec() == KVSpec("fp16", "fp16") and KVSpec(v="int8") == KVSpec("fp16", "int8")
    assert KVSpec("int8", "fp16") == KVSpec.parse("int8+fp16")
    assert repr(KVSpec("int8", layout="HND")) == repr(KVSpec.parse("int8:HND"))


@pytest.mark.parametrize("name", [name for name, kind in kinds.KINDS.items() if kind.largest])
def test_largest_codes_are_counted(name, rng):
    kind, scale = kinds.KINDS[name], np.float32(0.01)
    x = rng.standard_normal((7, 16)).astype(np.float32) * scale * kind.largest
    codes, _ = kinds.quantize(x, kind, scale=scale)
    want = (np.abs(kinds.decode(codes, kind)) == kind.largest).sum()
    assert 0 < want < x.size and kinds.count_largest(codes, kind) == want


def test_every_float16_is_decoded():
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = kinds.decode(codes.reshape(-1, 64), KINDS["fp16"])
    assert_same_bits(values.reshape(-1), codes.astype(np.float32))
