"""A codec: tokens of a cache to coded tokens and back."""

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import pykv
from pykv import KVSpec, PagedKVCache, cuda
from pykv.errors import CapacityError, DtypeError, FormatError, ParameterError, ShapeError
from pykv.kvtc import Codec, Coded, coder, parse
from pykv.ops import rope
from tests.helpers import assert_same_bits, to_numpy
from tests.kvtc import made
from tests.kvtc.made import D, F, H, L, P

KINDS = ["fp16", "int8", "int4:HND"]
KINDS += [pytest.param(x, marks=pytest.mark.sweep) for x in ("fp32", "bf16", "fp8", "int8:head")]


def empty_like(cache, xp, spec=None):
    pages = cache.k.shape[1]
    made = PagedKVCache(L, pages, H, D, page_size=P, spec=spec or cache.spec, xp=xp)
    if made.spec.has_given_scales:
        made.k_scales[...], made.v_scales[...] = cache.k_scales, cache.v_scales
    return made


def codec_of(rng, xp, n, **options):
    """A codec, and a cache, table and positions of n tokens for it."""
    artefact = made.artefact(rng)
    return Codec(artefact, 4, xp), *made.sequence(rng, xp, artefact, n, **options)[:3]


def rows_of(codec, cache, table, positions):
    """Keys without rotation and values of a cache, [2, n, L, H, D] float32, by its own decode."""
    table, positions = to_numpy(table), to_numpy(positions)
    where = table[positions // P], positions % P
    found = np.empty((2, len(positions), L, H, D), np.float32)
    sides = zip(cache.spec.kinds, (cache.k, cache.v), (cache.k_scales, cache.v_scales), strict=True)
    for side, (kind, pools, scales) in enumerate(sides):
        for i in range(L):
            pool = cache.spec.as_nhd(to_numpy(pools)[i])[where]
            scale = None if scales is None else cache.spec.as_nhd(to_numpy(scales)[i])
            if scale is not None and cache.spec.granularity == "token":
                scale = scale[where]
            x = pykv.kinds.dequantize(np.ascontiguousarray(pool), kind, scale)
            if side == 0:
                rope.rotate(x, x[:, :0], -positions, codec.model.inv_freq[i])
            found[side, :, i] = x
    return found


def relative(got, want, mean):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want - mean))


@pytest.mark.parametrize("spec", KINDS)
def test_tokens_come_back(xp, rng, spec):
    """As near as the artefact predicts; sinks and window as near as their own kinds."""
    artefact = made.artefact(rng)
    n = 40
    cache, table, positions, k, v = made.sequence(rng, xp, artefact, n, spec=spec)
    codec = Codec(artefact, 4, xp, tokens=16)
    coded = codec.compress(cache, table, positions)
    assert coded.header.tokens == n and (coded.header.sinks, coded.header.window) == (2, 3)
    back = empty_like(cache, xp)
    codec.decompress(coded, back, table)
    got, was = (rows_of(codec, c, table, positions) for c in (back, cache))
    for side, name in enumerate("kv"):
        of_side = getattr(artefact.groups[0], name)
        mean = of_side.mean.astype(np.float32).reshape(L, H, D)
        error = relative(got[side, 2:-3], was[side, 2:-3], mean)
        own = relative(was[side], (k, v)[side], mean)  # what the kind itself costs
        predicted = of_side.plans[4].error
        assert abs(error - predicted) <= 0.15 * predicted + 2 * own, (error, predicted, own)
        scale = np.abs(was[side]).max()
        assert np.abs(got[side, :2] - was[side, :2]).max() <= (1e-3 + 2 * own) * scale
        assert np.abs(got[side, -3:] - was[side, -3:]).max() <= (0.02 + 2 * own) * scale


def test_against_loops(xp, rng):
    """Rows are the codes of projected rows; what comes back is the middle of their intervals."""
    artefact = made.artefact(rng, layers=((0, 2), (1,)), sinks=0, window=0)
    cache, table, positions, k, v = made.sequence(rng, xp, artefact, 6, spec="fp32")
    codec = Codec(artefact, 4, xp, gemm="own")
    coded = codec.compress(cache, table, positions)
    stored = parse(coded.to_bytes()).arrays()["rows"]
    back = empty_like(cache, xp)
    codec.decompress(coded, back, table)
    got = rows_of(codec, back, table, positions)
    at = 0
    for group in artefact.groups:
        some = list(group.layers)
        for side, (x, of_side) in enumerate(((k, group.k), (v, group.v))):
            plan = of_side.plans[4]
            basis = of_side.basis[:, : sum(plan.widths)].astype(np.float64)
            weights = made.block_diagonal(of_side.weights.astype(np.float64))
            x = x[:, some].reshape(6, -1) - of_side.mean.astype(np.float64)
            codes = coder.unpack(stored[:, at : at + plan.row_bytes], plan.widths)
            levels = np.floor(x @ weights @ basis / plan.steps)
            half = 2.0 ** (coder.bits_of(plan.widths) - 1.0)
            wrong = codes - np.clip(levels, -half, half - 1)
            assert np.abs(wrong).max() <= 1 and (wrong != 0).mean() < 0.02
            want = (codes + 0.5) * plan.steps @ basis.T @ np.linalg.inv(weights) + of_side.mean
            mine = got[side][:, some].reshape(6, -1)
            np.testing.assert_allclose(mine, want, atol=4e-3 * np.abs(want).max())
            at += plan.row_bytes
    assert at == stored.shape[1] == codec.row_bytes == artefact.row_bytes(4)


def test_a_token_that_is_not_finite_comes_back_as_nan(xp, rng):
    """In its side and its group of layers, also a number that float16 does not hold; other tokens
    are as without it."""
    artefact = made.artefact(rng, layers=((0, 2), (1,)), sinks=1, window=1)
    cache, table, positions, *_ = made.sequence(rng, xp, artefact, 9, spec="bf16")
    codec, good, bad = Codec(artefact, 4, xp), empty_like(cache, xp), empty_like(cache, xp)
    codec.decompress(codec.compress(cache, table, positions), good, table)
    page = to_numpy(table)
    for pools, layer, at, value in (
        (cache.k, 0, 3, np.nan),
        (cache.v, 1, 4, np.inf),
        (cache.v, 2, 5, 1e9),
    ):
        pools[layer, page[at // P], at % P, 0, 1] = value
    codec.decompress(codec.compress(cache, table, positions), bad, table)
    got, was = (rows_of(codec, c, table, positions) for c in (bad, good))
    want = np.zeros(got.shape, bool)
    want[0, 3, [0, 2]] = want[1, 4, 1] = want[1, 5, [0, 2]] = True
    np.testing.assert_array_equal(np.isnan(got), want)
    np.testing.assert_array_equal(got[~want], was[~want])


def test_threads_take_turns(rng):
    """Each gets what it would alone, though all share a workspace."""
    artefact = made.artefact(rng)
    codec = Codec(artefact, 4)
    given = [made.sequence(rng, np, artefact, 30)[:3] for _ in range(4)]
    want = [codec.compress(*one).to_bytes() for one in given]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(20):
                found = threads.map(lambda one: codec.compress(*one).to_bytes(), given)
                assert list(found) == want
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_turn(rng):
    artefact = made.artefact(rng)
    codec, given = Codec(artefact, 4), made.sequence(rng, np, artefact, 9)[:3]
    want, held, over = codec.compress(*given).to_bytes(), threading.Event(), threading.Event()

    def hold():
        with codec._turn:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            os._exit(codec.compress(*given).to_bytes() != want)
        finally:
            os._exit(2)
    over.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_layers_alone(xp, rng):
    artefact = made.artefact(rng, layers=((0, 2), (1,)))
    cache, table, positions, *_ = made.sequence(rng, xp, artefact, 12)
    codec = Codec(artefact, 8, xp)
    coded = codec.compress(cache, table, positions)
    whole, parts = empty_like(cache, xp), empty_like(cache, xp)
    codec.decompress(coded, whole, table)
    codec.decompress(coded, parts, table, layers=range(1, 3))
    assert not to_numpy(parts.k)[0].any()
    np.testing.assert_array_equal(to_numpy(parts.k)[1:], to_numpy(whole.k)[1:])
    codec.decompress(coded, parts, table, layers=range(0, 1))
    np.testing.assert_array_equal(to_numpy(parts.k), to_numpy(whole.k))
    np.testing.assert_array_equal(to_numpy(parts.v), to_numpy(whole.v))


def test_a_cache_of_another_kind_and_place(xp, rng):
    """Into other pages of an int8 cache whose heads are Hadamard-rotated, and out of that."""
    codec, cache, table, positions = codec_of(rng, xp, 20, spec="fp32", start=3)
    coded = codec.compress(cache, table, positions)
    other = PagedKVCache(L, 9, H, D, page_size=P, spec="int8:HND", xp=xp)
    elsewhere = xp.asarray(np.arange(8, 2, -1, dtype=np.int32))
    codec.decompress(coded, other, elsewhere, hadamard=True)
    again = codec.compress(other, elsewhere, positions, hadamard=True)
    third = empty_like(cache, xp)
    codec.decompress(again, third, table)
    direct = empty_like(cache, xp)
    codec.decompress(coded, direct, table)
    got, want = (rows_of(codec, c, table, positions) for c in (third, direct))
    for side in range(2):
        assert relative(got[side], want[side], 0) < 0.1


def test_pieces_and_no_rows(xp, rng):
    """Tokens are the same however many are coded at a time; some may be exempt alone."""
    artefact = made.artefact(rng)
    cache, table, positions, *_ = made.sequence(rng, xp, artefact, 19)
    streams = [
        Codec(artefact, 4, xp, tokens=tokens).compress(cache, table, positions).to_bytes()
        for tokens in (1024, 5)
    ]
    assert streams[0] == streams[1]
    codec = Codec(artefact, 4, xp, tokens=5)
    for n in (0, 1, 4, 5):
        coded = codec.compress(cache, table, positions[:n])
        assert parse(coded.to_bytes()).header.tokens == n
        back = empty_like(cache, xp)
        codec.decompress(coded, back, table)
        got, was = (rows_of(codec, c, table, positions[:n]) for c in (back, cache))
        np.testing.assert_allclose(got, was, atol=0.2)


def test_lists_and_outputs(xp, rng):
    codec, cache, table, positions = codec_of(rng, xp, 10)
    want = codec.compress(cache, table, positions).to_bytes()
    size = codec.header(10, cache.spec).nbytes
    out = xp.zeros(size + 5, np.uint8)
    coded = codec.compress(cache, to_numpy(table).tolist(), range(10), out=out)
    assert coded.to_bytes() == want and to_numpy(out)[size:].sum() == 0
    back = empty_like(cache, xp)
    codec.decompress(parse(want).to(xp), back, to_numpy(table).tolist(), positions=range(10))
    assert to_numpy(back.k).any()
    with pytest.raises(CapacityError, match=f"out has {size - 1} bytes, expected at least {size}"):
        codec.compress(cache, table, positions, out=out[: size - 1])


def test_pinned_memory(device, rng):
    codec, cache, table, positions = codec_of(rng, device, 10)
    want = codec.compress(cache, table, positions)
    size = want.header.nbytes
    memory = device.cuda.alloc_pinned_memory(size)
    out = np.frombuffer(memory, np.uint8, size)
    coded = codec.compress(cache, table, positions, out=out)
    cuda.synchronize()
    assert isinstance(coded.data, np.ndarray) and coded.to_bytes() == want.to_bytes()
    direct, back = empty_like(cache, device), empty_like(cache, device)
    codec.decompress(coded, back, table)
    codec.decompress(want, direct, table)
    np.testing.assert_array_equal(to_numpy(back.k), to_numpy(direct.k))


def test_memory_at_odd_addresses(device, rng):
    codec, cache, table, positions = codec_of(rng, device, 10)
    coded = codec.compress(cache, table, positions)
    size = coded.header.nbytes
    pinned = np.frombuffer(device.cuda.alloc_pinned_memory(size + 16), np.uint8, size + 16)
    pinned[:] = 0
    for memory in (device.zeros(size + 16, np.uint8), pinned):
        odd = memory[8 : 8 + size]
        text = "Codec.compress: out has address 0x.*, expected a multiple of 16 bytes"
        with pytest.raises(ShapeError, match=text):
            codec.compress(cache, table, positions, out=odd)
        with pytest.raises(ShapeError, match="Codec.decompress: coded has address 0x"):
            codec.decompress(replace(coded, data=odd), cache, table)
        assert not to_numpy(memory).any()


def test_coded_tokens_made_by_hand(xp, rng):
    artefact = made.artefact(rng)
    cache, table, positions, *_ = made.sequence(rng, xp, artefact, 10)
    coded = Codec(artefact, 4, xp).compress(cache, table, positions)
    size = coded.header.nbytes
    for error, text, data in (
        (CapacityError, f"data has {size - 1} bytes, expected at least {size}", coded.data[:-1]),
        (DtypeError, "data is of int8, expected an array of uint8", coded.data.view(np.int8)),
        (DtypeError, "data is of bytes, expected an array of uint8", b"bytes"),
        (ShapeError, "data has shape", coded.data[None]),
        (ShapeError, "data has shape", coded.data.repeat(2)[::2]),
    ):
        with pytest.raises(error, match=f"Coded: {text}"):
            Coded(coded.header, data)
    with pytest.raises(DtypeError, match="Coded: header is a NoneType, expected a pykv.kvtc.Head"):
        Coded(None, coded.data)
    for error, text, fields in (
        (DtypeError, "tokens is a float, expected a whole number", dict(tokens=1.5)),
        (ParameterError, "sinks is -1, expected 0 to", dict(sinks=-1)),
        (ParameterError, "head_dim is 0, expected 1 to", dict(head_dim=0)),
        (ParameterError, "sinks and window are 9 and 2, expected", dict(sinks=9, window=2)),
        (ParameterError, "artefact is 'ff', expected 64 hexadecimal digits", dict(artefact="ff")),
        (ParameterError, "spec: 'int9' is no kind", dict(spec="int9")),
    ):
        with pytest.raises(error, match=f"Header: {text}"):
            Coded(replace(coded.header, **fields), coded.data)


def test_prepared_and_captured(xp, rng):
    artefact = made.artefact(rng)
    cache, table, positions, k, v = made.sequence(rng, xp, artefact, 10)
    codec = Codec(artefact, 4, xp, gemm="own")
    back, out = empty_like(cache, xp), xp.zeros(codec.header(10, "fp16").nbytes, np.uint8)

    def there_and_back():
        codec.decompress(codec.compress(cache, table, positions, out=out), back, table)

    pages = to_numpy(table).tolist()
    call = pykv.prepare(codec.compress, cache, pages, range(10), out=out)
    step = pykv.graph(there_and_back)
    step()
    first = to_numpy(back.k).copy()
    made.fill(xp, artefact, cache, to_numpy(table), to_numpy(positions), k[::-1], v[::-1])
    step()
    step()
    assert np.abs(to_numpy(back.k).astype(np.float32) - first).max() > 0.1
    want = codec.compress(cache, table, positions).to_bytes()
    out[...] = 0
    assert call().to_bytes() == want


@pytest.mark.parametrize("layers, launches", [(((0, 1, 2),), 3), (((0, 2), (1,)), 6)])
def test_three_launches_each_way(device, rng, layers, launches):
    """For each group of layers."""
    artefact = made.artefact(rng, layers=layers)
    cache, table, positions, *_ = made.sequence(rng, device, artefact, 10)
    codec = Codec(artefact, 4, device, gemm="own")
    there = pykv.prepare(codec.compress, cache, table, positions)
    back = pykv.prepare(codec.decompress, there(), empty_like(cache, device), table)
    assert f"({launches} steps" in repr(there) and f"({launches} steps" in repr(back)


def test_a_token_alone(xp, rng):
    """Its position and its bytes in a stream of its own are enough."""
    codec, cache, table, positions = codec_of(rng, xp, 12)
    coded = codec.compress(cache, table, positions, sinks=0, window=0)
    codec.decompress(coded, whole := empty_like(cache, xp), table)
    header = codec.header(1, cache.spec, sinks=0, window=0)
    one = Coded(header, xp.zeros(header.nbytes, np.uint8))
    for name, x in one.arrays().items():
        x[...] = coded.arrays()[name][7:8]
    codec.decompress(one, alone := empty_like(cache, xp), table, positions=[7])
    got, want = (rows_of(codec, c, table, positions) for c in (alone, whole))
    np.testing.assert_allclose(got[:, 7], want[:, 7], atol=1e-2)
    assert np.abs(got[:, 7]).max() > 0.1 and not to_numpy(alone.v)[:, to_numpy(table)[0]].any()


def test_other_positions_and_codecs_are_noticed(xp, rng):
    artefact = made.artefact(rng)
    cache, table, positions, *_ = made.sequence(rng, xp, artefact, 10)
    codec = Codec(artefact, 4, xp)
    coded = codec.compress(cache, table, positions)
    before = to_numpy(cache.k).copy()

    def refused(error, text, codec=codec, coded=coded, cache=cache, **options):
        with pytest.raises(error, match=text):
            codec.decompress(coded, cache, table, **options)

    shuffled = [0, 2, 1, *range(3, 10)]
    refused(FormatError, "coded has position 1 at 1, expected 2", positions=shuffled)
    refused(FormatError, "coded has 10 positions, expected 9", positions=range(9))
    with pytest.raises(ParameterError, match="positions fall or are negative"):
        codec.compress(cache, table, xp.asarray(np.array(shuffled, np.int32)), check=True)
    foreign = made.artefact(np.random.default_rng(5))
    refused(FormatError, "coded has artefact=", codec=Codec(foreign, 4, xp))
    refused(FormatError, "coded has ratio=4, expected 8", codec=Codec(artefact, 8, xp))
    small = PagedKVCache(L, 3, H, 2 * D, page_size=P, xp=xp)
    refused(ParameterError, f"cache has head_dim={2 * D}, expected {D} as", cache=small)
    refused(DtypeError, "coded is a bytes, expected a pykv.kvtc.Coded", coded=b"")
    refused(DtypeError, r"layers is \[0\], expected a range of step 1", layers=[0])
    refused(DtypeError, "expected a range of step 1", layers=range(0, 3, 2))
    for layers in (range(2, 4), range(1, 1), range(-1, 2)):
        refused(ParameterError, r"expected some of range\(0, 3\)", layers=layers)
    unset = PagedKVCache(L, 4, H, D, page_size=P, spec="int8:head", xp=xp)
    refused(ParameterError, "decompress: cache.k_scales are unset", cache=unset)
    np.testing.assert_array_equal(to_numpy(cache.k), before)


def test_lists_are_looked_at_wherever_the_codec_is(xp, rng):
    """A stream of falling positions could be written, but not be read."""
    artefact = made.artefact(rng)
    cache, table, _, *_ = made.sequence(rng, xp, artefact, 12)
    codec = Codec(artefact, 4, xp)
    for positions, text in (
        ([3, 2], "positions fall"),
        ([3, 3], "positions fall"),
        ([3, 12], r"positions(\[1\] is 12, expected 0 to 11| go to 12, expected below 12)"),
    ):
        with pytest.raises(ParameterError, match=text):
            codec.compress(cache, table, positions)
    coded, before = codec.compress(cache, table, [0, 1, 5]), to_numpy(cache.k).copy()
    for twice in ([1, 1, 2], xp.asarray(np.array([1, 1, 2], np.int32))):
        with pytest.raises(ParameterError, match="table has page 1 twice, expected it once"):
            codec.decompress(coded, cache, twice, check=True)
    np.testing.assert_array_equal(to_numpy(cache.k), before)


def test_wrong_codecs(rng):
    artefact = made.artefact(rng)
    with pytest.raises(ParameterError, match="ratio is 5, expected one of 4, 8"):
        Codec(artefact, 5)
    with pytest.raises(DtypeError, match="artefact is a str"):
        Codec("artefact", 4)
    with pytest.raises(ParameterError, match="gemm is 'mine'"):
        Codec(artefact, 4, gemm="mine")
    plan = artefact.groups[0].k.plans[4]
    large = replace(plan, steps=plan.steps * np.float32(1e5))
    side = replace(artefact.groups[0].k, plans={4: large, 8: artefact.groups[0].k.plans[8]})
    group = replace(artefact.groups[0], k=side)
    with pytest.raises(ParameterError, match="expected coefficients within float16"):
        Codec(replace(artefact, groups=(group,)), 4)


def test_size_is_what_it_says(rng):
    codec = Codec(made.artefact(rng), 8)
    header = codec.header(1000, KVSpec())
    assert codec.row_bytes == 2 * (2 * L * F // 8)
    exempt = 2 * 2 * L * F * 2 + 3 * (2 * L * F + 2 * L * H * 2)
    assert 0 <= header.nbytes - (4 * 1000 + exempt + 995 * codec.row_bytes) < 4 * 128


def test_keys_and_values_may_have_one_array_of_scales(xp, rng):
    """One that a cache was given is only read, as in all ops."""
    artefact = made.artefact(rng)
    cache, table, positions, *_ = made.sequence(rng, xp, artefact, 30, spec="int8:head")
    cache.k_scales = cache.v_scales
    codec = Codec(artefact, 4, xp)
    coded = codec.compress(cache, table, positions)
    cache.k[...] = 0
    codec.decompress(coded, cache, table)
    assert (to_numpy(cache.k) != 0).any()


def test_codes_and_pages_share_no_memory(xp, rng):
    """Of a first call and of one whose layout is known."""
    codec, cache, table, positions = codec_of(rng, xp, 30)
    nbytes = codec.header(30, cache.spec).nbytes
    memory = cache.k.reshape(-1).view(np.uint8)
    for _ in range(2):
        with pytest.raises(ParameterError, match="Codec.compress: out shares memory with cache.k"):
            codec.compress(cache, table, positions, out=memory[:nbytes])
        coded = codec.compress(cache, table, positions, out=xp.zeros(nbytes, np.uint8))
    memory[:nbytes] = coded.data
    kept = to_numpy(cache.k).copy()
    for _ in range(2):
        with pytest.raises(ParameterError, match="decompress: cache.k shares memory with coded"):
            codec.decompress(Coded(coded.header, memory[:nbytes]), cache, table)
        assert_same_bits(cache.k, kept)
