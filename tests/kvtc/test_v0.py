"""kvtc.v0: what kvbm-kernels' own tests ask, then what they leave out."""

import struct
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import pykv
from pykv.errors import (
    CapacityError,
    DtypeError,
    FormatError,
    ParameterError,
    PykvError,
    ShapeError,
)
from pykv.kvtc import stream_v0, v0
from pykv.kvtc.v0 import KvtcConfig, Range, compress, compressed_size, decompress
from pykv.ops import kvtc_quantize as quantize
from pykv.ops import kvtc_ranges as ranged
from pykv.ops.kvtc_blocks import gather_mean_subtract, mean_add_scatter
from tests.helpers import assert_close_to_oracle, assert_same_bits, to_numpy, without_simt

F32 = np.float32
DTYPES = [np.dtype(x) for x in ("float16", ml_dtypes.bfloat16, "float32", "float64")]


def config_of(xp, mean, projection, ranges):
    return KvtcConfig(xp.asarray(mean.astype(F32)), xp.asarray(projection.astype(F32)), ranges)


def orthonormal(rng, F, C):
    return np.linalg.qr(rng.standard_normal((F, C)))[0].astype(F32)


def low_rank(rng, N, F, rank=6):
    """Blocks that a few directions describe, as caches are."""
    weights = rng.standard_normal((N, rank)) * 8 / (1 + np.arange(rank))
    return (weights @ rng.standard_normal((rank, F)) + 2 * np.cos(0.3 * np.arange(F))).astype(F32)


# --- kvbm-kernels' tests --------------------------------------------------------------------------


def close_fp8(got, want):
    assert (abs(got - want)[want != 0] < 0.15 * abs(want)[want != 0]).all()
    assert (abs(got)[want == 0] < 0.5).all()


def test_fp8_roundtrip(xp):
    x = np.sin(7.3 * np.arange(128) - 50).astype(F32).reshape(4, 32) * 100
    x[2, 5] = 0
    back = quantize.dequantize_fp8(quantize.quantize_fp8(xp.asarray(x)), xp.zeros((4, 32), F32))
    close_fp8(to_numpy(back), x)
    assert to_numpy(back)[2, 5] == 0


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_intx_roundtrip(xp, bits):
    x = (np.arange(128) * 100 / 128).astype(F32).reshape(4, 32)
    extremes = quantize.minmax_reduce(xp.asarray(x))
    codes = quantize.quantize_intx(xp.asarray(x), *extremes, bits)
    back = to_numpy(quantize.dequantize_intx(codes, *extremes, bits, xp.zeros((4, 32), F32)))
    step = (x.max(1) - x.min(1))[:, None] / (2**bits - 1)
    assert (abs(back - x) <= step + 1e-5).all()


def test_minmax_reduce_correctness(xp):
    x = np.tile(np.linspace(0, 1, 16, dtype=F32), (3, 1))
    x = x * F32([[15], [300], [0]]) + F32([[-5], [-100], [42]])
    low, high = quantize.minmax_reduce(xp.asarray(x))
    assert to_numpy(low).tolist() == [-5, -100, 42] and to_numpy(high).tolist() == [10, 200, 42]


def test_range_header_roundtrip():
    packed = stream_v0.HEADER.pack(1, 4, 100, 200, 1234, 56)
    assert len(packed) == 40 and stream_v0.HEADER.unpack(packed) == (1, 4, 100, 200, 1234, 56)
    assert packed == struct.pack("<ii4Q", 1, 4, 100, 200, 1234, 56)


def test_multi_range_quantize_dequantize(xp):
    x = (50 * np.sin(3.7 * np.arange(256) - 100)).astype(F32).reshape(4, 64)
    ranges = [Range(0, 32), Range(32, 64, "intx", 4)]
    codes = ranged.quantize_ranges(xp.asarray(x), ranges)
    assert len(codes) == compressed_size(ranges, 4)
    back = to_numpy(ranged.dequantize_ranges(codes, ranges, 4))
    close_fp8(back[:, :32], x[:, :32])
    step = (x[:, 32:].max(1) - x[:, 32:].min(1))[:, None] / 15
    assert (abs(back - x)[:, 32:] <= step + 1e-4).all()


def test_gather_scatter_f32_roundtrip(xp):
    blocks = [xp.asarray((np.arange(16) * 0.7 + n).astype(F32)) for n in range(3)]
    mean, out = xp.zeros(16, F32), [xp.zeros(16, F32) for _ in range(3)]
    mean_add_scatter(gather_mean_subtract(blocks, mean), mean, out)
    for got, want in zip(out, blocks, strict=True):
        assert (abs(to_numpy(got) - to_numpy(want)) < 1e-5).all()


def test_gather_scatter_mean_roundtrip(xp):
    x = (np.arange(128) * 0.25).astype(F32).reshape(4, 32)
    mean = (0.5 * np.arange(32) - 8).astype(F32)
    centred = gather_mean_subtract(xp.asarray(x), xp.asarray(mean))
    assert (abs(to_numpy(centred) - (x - mean)) < 1e-5).all()
    out = xp.zeros((4, 32), F32)
    mean_add_scatter(centred, xp.asarray(mean), out)
    assert (abs(to_numpy(out) - x) < 1e-4).all()


def test_identity_projection_roundtrip(xp):
    x = (20 * np.sin(1.3 * np.arange(64))).astype(F32).reshape(4, 16)
    config = config_of(xp, np.zeros(16), np.eye(16), [Range(0, 16)])
    codes = compress(xp.asarray(x), config)
    assert len(codes) == config.compressed_size(4)
    decompress(codes, config, out := xp.zeros((4, 16), F32))
    close_fp8(to_numpy(out), x)


def test_orthogonal_projection_roundtrip(xp, rng):
    basis, mean = orthonormal(rng, 16, 8), 2 * np.cos(0.3 * np.arange(16))
    x = (5 * np.sin(0.9 * np.arange(64))).astype(F32).reshape(4, 16)
    config = config_of(xp, mean, basis, [Range(0, 8, "intx", 8)])
    decompress(compress(xp.asarray(x), config), config, out := xp.zeros((4, 16), F32))
    assert (abs(to_numpy(out) - ((x - mean) @ basis @ basis.T + mean)) < 1.0).all()


def test_full_pipeline_multi_range(xp, rng):
    basis, mean = orthonormal(rng, 32, 24), np.sin(0.1 * np.arange(32))
    x = (5 * np.sin(0.9 * np.arange(192))).astype(F32).reshape(6, 32)
    ranges = [Range(0, 8), Range(8, 16, "intx", 8), Range(16, 24, "intx", 2)]
    config = config_of(xp, mean, basis, ranges)
    codes = compress(xp.asarray(x), config)
    assert len(codes) == config.compressed_size(6)
    decompress(codes, config, out := xp.zeros((6, 32), F32))
    assert (abs(to_numpy(out) - ((x - mean) @ basis @ basis.T + mean)) < 5.0).all()


def test_config_helper_methods(rng):
    ranges = [Range(0, 60), Range(60, 100, "intx", 4)]
    config = config_of(np, np.zeros(256), orthonormal(rng, 256, 100), ranges)
    assert (config.features, config.components) == (256, 100)
    assert config.compressed_size(8) == compressed_size(ranges, 8)
    assert config.workspace_size(8) == v0.workspace_size(256, 100, 8) == 4 * 8 * (256 + 104)


def test_compressed_size_helper():
    ranges = [Range(0, 100), Range(100, 200, "intx", 4), Range(200, 300, "intx", 2)]
    assert compressed_size(ranges, 8) == 3 * 40 + 800 + 464 + 264 == 1648


# --- What they leave out --------------------------------------------------------------------------


@pytest.mark.parametrize("n, bits, payload", [(33, 2, 72), (1, 2, 8), (31, 4, 128), (9, 1, 16)])
def test_sizes_are_those_of_what_is_written(xp, rng, n, bits, payload):
    """Rows that do not fill whole bytes: kvbm-kernels' helper counts 66, 2, 124 and 9."""
    ranges = [Range(0, n, "intx", bits), Range(n, n + 2)]
    x = rng.standard_normal((8, n + 2)).astype(F32)
    want = 40 + 64 + payload + 40 + 16
    assert compressed_size(ranges, 8) == want == ranged.quantize_ranges(xp.asarray(x), ranges).size


CONFIGS = {  # F, C, ranges
    "plain": (32, 16, [Range(0, 4), Range(4, 16, "intx", 8)]),
    "odd": (27, 13, [Range(5, 13, "intx", 8), Range(0, 5, "fp8", 8)]),
    "of one": (16, 3, [Range(0, 1, "intx", 8), Range(1, 2), Range(2, 3, "intx", 8)]),
}


@pytest.mark.parametrize("gemm", ["own", "auto", "cublas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_against_float64(xp, rng, name, dtype, gemm):
    """Coefficients to rounding; blocks to that and the codes' own error, by codes as they are."""
    F, C, ranges = CONFIGS[name]
    basis, mean = orthonormal(rng, F, C), rng.standard_normal(F).astype(F32)
    blocks = low_rank(rng, 5, F).astype(dtype)
    config = config_of(xp, mean, basis, ranges)
    codes = compress(xp.asarray(blocks), config, gemm=gemm)
    decompress(codes, config, out := xp.zeros((5, F), dtype), gemm=gemm)

    exact = (blocks.astype(np.float64) - mean) @ basis.astype(np.float64)
    values = ranged.dequantize_ranges(to_numpy(codes), ranges, 5).astype(np.float64)
    for start, end, quant_type, bits in ranges:
        part, got = exact[:, start:end], values[:, start:end]
        step = (
            (part.max(1) - part.min(1))[:, None] / (2**bits - 1)
            if bits and quant_type == "intx"
            else 0
        )
        bound = step / 2 if quant_type == "intx" else np.maximum(abs(part) / 16, 2**-10)
        assert (abs(got - part) <= bound * 1.001 + 1e-4).all()
    low = (values.astype(F32) @ basis.T + mean).astype(dtype)
    assert_close_to_oracle(out, low, values @ basis.T.astype(np.float64) + mean)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_a_projection_of_16_bits(xp, rng, dtype):
    basis = orthonormal(rng, 32, 8).astype(dtype)
    config = KvtcConfig(xp.zeros(32, F32), xp.asarray(basis), [Range(0, 8, "intx", 8)])
    x = low_rank(rng, 4, 32)
    got = ranged.dequantize_ranges(compress(xp.asarray(x), config), config.ranges, 4)
    exact = x.astype(np.float64) @ basis.astype(np.float64)
    step = (exact.max(1) - exact.min(1))[:, None] / 255
    assert (abs(to_numpy(got) - exact) <= 0.501 * step + 1e-4).all()


def test_addresses_and_strides(xp, rng):
    """Two runs of blocks with gaps between them; the gaps stay."""
    F, stride = 16, 24
    config = config_of(xp, np.zeros(F), np.eye(F), [Range(0, F, "intx", 8)])
    blocks = rng.standard_normal((4, stride)).astype(np.float16)
    there, target = xp.asarray(blocks), xp.asarray(np.full((4, stride), 7, np.float16))
    options = dict(dtype=np.float16, block_stride=stride, num_blocks=4)
    options |= dict(device="cpu" if xp is np else "cuda")

    def runs(x):
        first = x.ctypes.data if xp is np else x.data.ptr
        return (first + np.array([2, 0]) * stride * 2).astype(np.uint64)

    codes = compress(runs(there), config, **options)
    assert_same_bits(
        codes,
        compress(blocks[[2, 3, 0, 1], :F], config_of(np, np.zeros(F), np.eye(F), config.ranges)),
    )
    decompress(codes, config, runs(target), **options)
    got = to_numpy(target)
    assert (got[:, F:] == 7).all() and abs(got[:, :F] - blocks[:, :F]).max() < 0.02


def test_outputs_and_workspace_that_are_given(xp, rng):
    F, C, ranges = CONFIGS["plain"]
    config = config_of(xp, np.zeros(F), orthonormal(rng, F, C), ranges)
    blocks, size = xp.asarray(low_rank(rng, 3, F)), config.workspace_size(3)
    workspace = xp.full(size, 0xFF, np.uint8)
    out = xp.full(config.compressed_size(3) + 5, 0xA5, np.uint8)
    codes = compress(blocks, config, out=out, workspace=workspace)
    assert_same_bits(codes, compress(blocks, config))
    assert to_numpy(out)[-5:].tolist() == [0xA5] * 5
    decompress(codes, config, first := xp.zeros((3, F), F32), workspace=workspace)
    decompress(codes, config, second := xp.zeros((3, F), F32))
    assert_same_bits(first, second)
    with pytest.raises(CapacityError, match=f"workspace has {size - 16} bytes, expected {size}"):
        compress(blocks, config, workspace=workspace[: size - 16])


@pytest.mark.parametrize("name", CONFIGS)
def test_prepared_and_captured(xp, rng, name):
    F, C, ranges = CONFIGS[name]
    config = config_of(xp, np.zeros(F), orthonormal(rng, F, C), ranges)
    x = low_rank(rng, 3, F)
    given, out = xp.zeros((3, F), F32), xp.zeros((3, F), F32)
    there = pykv.prepare(compress, given, config, gemm="own")
    back = pykv.prepare(decompress, there.result, config, out, gemm="own", check=False)
    assert name != "plain" or "(3 steps" in repr(there) and "(3 steps" in repr(back)
    graph = pykv.graph(lambda: (there(), back()))
    for factor in (1, 2, 3):
        given[...] = xp.asarray(x * F32(factor))
        graph()
        codes = compress(given, config, gemm="own")
        assert_same_bits(there.result, codes)
        decompress(codes, config, want := xp.zeros((3, F), F32), gemm="own")
        assert_same_bits(out, want)


@without_simt
def test_streams_of_several_threads(xp, rng):
    """Each with its own stream, without a wait between its calls, with one config."""
    F, C = 512, 96
    config = config_of(xp, np.zeros(F), orthonormal(rng, F, C), [Range(0, C, "intx", 8)])
    inputs = [xp.asarray(low_rank(rng, 200, F)) for _ in range(4)]

    def work(x, stream):
        codes = xp.zeros(config.compressed_size(200), np.uint8)
        out = xp.zeros((200, F), F32)
        if stream is not None:
            xp.cuda.get_current_stream().synchronize()
        compress(x, config, out=codes, gemm="own", stream=stream)
        decompress(codes, config, out, gemm="own", check=False, stream=stream)
        if stream is not None:
            stream.synchronize()
        return to_numpy(codes), to_numpy(out)

    def rounds(x):
        stream = None if xp is np else xp.cuda.Stream(non_blocking=True)
        return [work(x, stream) for _ in range(5)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(rounds, inputs))
    for x, pairs in zip(inputs, found, strict=True):
        want = work(x, None)
        for pair in pairs:
            for got, right in zip(pair, want, strict=True):
                assert_same_bits(got, right)


def test_a_block_that_is_not_finite_tells(xp, rng):
    """Its coefficients are NaN, and so is what comes back; the others are as without it."""
    F, C, ranges = CONFIGS["plain"]
    config = config_of(xp, np.ones(F), orthonormal(rng, F, C), [Range(0, C, "intx", 4)])
    x = low_rank(rng, 4, F)
    x[1, 3], x[2, 4] = np.nan, np.inf
    count = xp.zeros(4, np.int32)
    codes = compress(xp.asarray(x), config, nonfinite=count)
    assert to_numpy(count).tolist() == [0, C, C, 0]
    decompress(codes, config, out := xp.zeros((4, F), F32))
    is_nan = np.isnan(to_numpy(out))
    assert is_nan[1:3].all() and not is_nan[[0, 3]].any()


def test_no_blocks(xp, rng):
    F, C, ranges = CONFIGS["plain"]
    config = config_of(xp, np.zeros(F), orthonormal(rng, F, C), ranges)
    codes = compress(xp.zeros((0, F), F32), config)
    assert codes.size == config.compressed_size(0) == 0
    decompress(codes, config, xp.zeros((0, F), F32))


# --- Damage ---------------------------------------------------------------------------------------


def test_damaged_streams_are_refused_or_read_within_bounds(rng):
    """Bytes and lengths change: what a header says differently is refused, and blocks stay; what
    only codes say differently is read."""
    F, C, ranges = CONFIGS["odd"]
    config = config_of(np, np.zeros(F), orthonormal(rng, F, C), ranges)
    codes = compress(low_rank(rng, 3, F), config)
    starts = stream_v0.offsets(tuple(ranges), 3)
    in_header = np.zeros(len(codes), bool)
    for at in starts[:-1]:
        in_header[at : at + 40] = True
    refused = 0
    for _ in range(300):
        wrong = codes.copy()
        at = rng.integers(len(codes), size=rng.integers(1, 4))
        wrong[at] ^= rng.integers(1, 256, len(at)).astype(np.uint8)
        if rng.integers(4) == 0:
            wrong = wrong[: rng.integers(len(wrong))]
        out = np.full((3, F), 7, F32)
        changed = len(wrong) != len(codes) or bool((wrong != codes)[in_header].any())
        try:
            decompress(wrong, config, out)
            assert not changed
        except FormatError as error:
            assert changed and (out == 7).all() and str(error).isprintable()
            refused += 1
    assert 100 < refused < 300


def test_parse_trusts_no_header(rng):
    _, C, ranges = CONFIGS["odd"]
    x = rng.standard_normal((3, C)).astype(F32)
    codes = ranged.quantize_ranges(x, ranges)
    assert stream_v0.parse(codes, 2, 3, C) == tuple(ranges)
    assert stream_v0.parse(codes.tobytes(), 2, 3, C) == tuple(ranges)
    for wrong in ((1, 3, C), (3, 3, C), (2, 2, C), (2, 3, C - 1), (2, 3, C + 1)):
        with pytest.raises(FormatError):
            stream_v0.parse(codes, *wrong)
    for i in range(40):
        for bit in range(8):
            damaged = codes.copy()
            damaged[i] ^= 1 << bit
            try:
                read = stream_v0.parse(damaged, 2, 3, C)
                assert compressed_size(read, 3) == len(codes)
            except FormatError as error:
                assert str(error).isprintable()
    with pytest.raises(DtypeError, match="data is a list"):
        stream_v0.parse([1], 1, 1, 1)


def test_wrong_arguments(xp, rng):
    F, C, ranges = CONFIGS["plain"]
    mean, basis = xp.zeros(F, F32), xp.asarray(orthonormal(rng, F, C))
    config, blocks = KvtcConfig(mean, basis, ranges), xp.zeros((2, F), F32)
    with pytest.raises(ShapeError, match="projection has F=32, expected F=31"):
        KvtcConfig(mean[:31], basis, ranges)
    with pytest.raises(ParameterError, match="ranges cover 4 coefficients, expected C=16"):
        KvtcConfig(mean, basis, ranges[:1])
    with pytest.raises(ShapeError, match=r"projection has shape \(32, 0\)"):
        KvtcConfig(mean, basis[:, :0], [])
    with pytest.raises(DtypeError, match="config is a tuple, expected a KvtcConfig"):
        compress(blocks, (mean, basis, ranges))
    with pytest.raises(ParameterError, match="gemm is 'magma'"):
        compress(blocks, config, gemm="magma")
    codes = compress(blocks, config)
    with pytest.raises(ParameterError, match=f"out has 9 bytes, expected at least {codes.size}"):
        compress(blocks, config, out=xp.zeros(9, np.uint8))
    with pytest.raises(FormatError, match=f"codes has {codes.size} bytes"):
        decompress(codes, config, xp.zeros((3, F), F32))
    for wrong in (dict(dtype=F32), dict(num_blocks=2), dict(block_stride=3), dict(nonfinite=mean)):
        with pytest.raises(PykvError):
            compress(blocks, config, **wrong)


def test_what_is_written_lies_apart(xp):
    """A workspace over blocks made every row but the first one of them wrong."""
    memory = xp.zeros(1 << 14, np.uint8)
    config = config_of(xp, np.zeros(8), np.eye(8), [Range(0, 8, "intx", 4)])
    blocks, size = memory[:256].view(F32).reshape(8, 8), config.compressed_size(8)
    apart = xp.asarray(blocks)
    for name, given in {
        "out shares memory with blocks": dict(blocks=blocks, out=memory[:size]),
        "nonfinite shares memory with blocks": dict(
            blocks=blocks, nonfinite=memory[:32].view("i4")
        ),
        "workspace shares memory with blocks": dict(blocks=blocks, workspace=memory[128:]),
        "out shares memory with workspace": dict(
            blocks=xp.array(apart), out=memory[:size], workspace=memory
        ),
    }.items():
        with pytest.raises(ParameterError, match=f"v0.compress: {name}"):
            compress(**given, config=config)
    codes = compress(xp.array(apart), config)
    memory[:size] = codes
    with pytest.raises(ParameterError, match="v0.decompress: blocks shares memory with codes"):
        decompress(memory[:size], config, blocks)
    with pytest.raises(ParameterError, match="v0.decompress: workspace shares memory with codes"):
        decompress(memory[:size], config, xp.array(apart), workspace=memory)
    with pytest.raises(ParameterError, match="subtract: out shares memory with blocks"):
        gather_mean_subtract(blocks, config.mean, out=memory[32:288].view(F32).reshape(8, 8))
    with pytest.raises(ParameterError, match=r"scatter: blocks\[1\] shares memory with x"):
        mean_add_scatter(blocks[:2], config.mean, [xp.zeros(8, F32), blocks[1]])
