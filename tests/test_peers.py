"""From GPU to GPU: access by a driver that answers as told, moves on two GPUs of the SIMT machine,
whose streams run in either order, and of this machine where it has two."""

import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import calibration, copy_ways, cuda, pages, ranges, transfer
from pykv.errors import CudaError, DeviceError, ParameterError, UnsupportedError
from pykv.ops import block_copy, norm, paged_convert, permute
from pykv.pages import Pages
from tests import peers
from tests.conftest import MACHINES, array_module
from tests.helpers import assert_same_bits, to_numpy
from tests.test_pages import host, make

load = calibration.load
ORDERS = ("the current GPU first", "the other GPU first")


@pytest.fixture(params=MACHINES)
def gpus(request, monkeypatch):
    """The array module, the current GPU, another one, and a function that runs what waits in
    streams; no sides are calibrated."""
    xp = array_module(request)
    monkeypatch.setattr(calibration, "_pairs", {})
    monkeypatch.setattr(calibration, "load", lambda ways, pair=None: None)
    if request.param == "simt":
        driver, streams = peers.second_gpu(monkeypatch)
        here, other = xp.DEVICE, xp.OTHER

        def run(order=ORDERS[0]):
            streams.run((here, other)[ORDERS.index(order)])

        yield SimpleNamespace(xp=xp, here=here, other=other, run=run, driver=driver)
        return
    if xp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU, and this needs two")

    def run(order=None):
        for gpu in (0, 1):
            xp.cuda.Device(gpu).synchronize()

    with xp.cuda.Device(0):
        yield SimpleNamespace(xp=xp, here=0, other=1, run=run, driver=None)


# --- Access ---------------------------------------------------------------------------------------


@pytest.fixture
def simt_gpus(request, monkeypatch):
    request.param = "simt"
    xp = array_module(request)
    driver, streams = peers.second_gpu(monkeypatch)
    monkeypatch.setattr(calibration, "_pairs", {})
    monkeypatch.setattr(calibration, "load", lambda ways, pair=None: None)
    return SimpleNamespace(xp=xp, here=xp.DEVICE, other=xp.OTHER, driver=driver, run=streams.run)


@pytest.mark.simt
@pytest.mark.parametrize("status", ["CUDA_SUCCESS", "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"])
def test_access_is_given_once_for_each_direction(simt_gpus, status):
    here, other, driver = simt_gpus.here, simt_gpus.other, simt_gpus.driver
    driver.status = status
    gate = threading.Barrier(4)

    def enable():
        gate.wait()
        cuda.enable_peer_access(here, other)

    threads = [threading.Thread(target=enable) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert driver.opened == [(here, other)] and cuda.current_device() == here
    pools = [f"{which} of {other}" for which in ("default", "current")]
    assert driver.pools == [(pool, here, "a device", "both") for pool in pools]
    cuda.enable_peer_access(other, here)
    assert driver.opened == [(here, other), (other, here)] and cuda.current_device() == here
    assert driver.pools[2:] == [
        (f"{x} of {here}", other, "a device", "both") for x in ("default", "current")
    ]


@pytest.mark.simt
def test_a_gpu_without_pools_has_none_to_open(simt_gpus):
    simt_gpus.driver.pool_status = "CUDA_ERROR_NOT_SUPPORTED"
    cuda.enable_peer_access(simt_gpus.here, simt_gpus.other)
    assert simt_gpus.driver.opened and not simt_gpus.driver.pools


@pytest.mark.simt
@pytest.mark.parametrize(
    "status, error, text",
    [
        (
            "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
            DeviceError,
            "GPU 1000 to GPU 1001.*pykv doctor.*fallback_only",
        ),
        ("CUDA_ERROR_TOO_MANY_PEERS", DeviceError, "GPU 1000 to GPU 1001.*TOO_MANY_PEERS"),
        (
            "CUDA_ERROR_INVALID_CONTEXT",
            CudaError,
            "cuCtxEnablePeerAccess: CUDA_ERROR_INVALID_CONTEXT",
        ),
    ],
)
def test_refusals_of_the_driver(simt_gpus, status, error, text):
    simt_gpus.driver.status = status
    for _ in range(2):  # what failed is tried again
        with pytest.raises(error, match=f"^cuda.enable_peer_access: .*{text}"):
            cuda.enable_peer_access(simt_gpus.here, simt_gpus.other)
        assert cuda.current_device() == simt_gpus.here


def test_gpus_that_cannot_be_a_pair(gpus):
    here = gpus.here
    with pytest.raises(DeviceError, match=f"GPU {here} to GPU {here}: that is one GPU"):
        cuda.enable_peer_access(here, here)
    with pytest.raises(DeviceError, match=f"GPU {here} to GPU 4000: there are [0-9,]+ GPUs"):
        cuda.enable_peer_access(here, 4000)
    with pytest.raises(DeviceError, match=f"GPU -1 to GPU {here}: there are"):
        cuda.enable_peer_access(-1, here)


def test_gpus_of_a_move():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.peers, "current_device", lambda: 0)
        pair = partial(cuda.gpu_pair, "op")
        assert pair({}, {}) is pair({0: "a"}, {0: "b"}) is pair({}, {0: "b"}) is None
        assert pair({0: "a"}, {1: "b"}) == (0, 1) and pair({1: "a"}, {0: "b"}) == (1, 0)
        assert pair({0: "a", 1: "c"}, {0: "b", 1: "d"}) == (0, 1)  # both ways
        assert pair({1: "a"}, {1: "b"}, anywhere=True) is None
        for sources, targets, text in (
            ({1: "a"}, {1: "b"}, "op: a is on GPU 1, expected the current one, GPU 0"),
            ({1: "a"}, {}, "op: a is on GPU 1, expected the current one, GPU 0"),
            ({1: "a"}, {2: "b"}, "b is on GPU 2 and a on GPU 1.*current one, GPU 0.*use_device"),
            ({0: "a", 1: "c"}, {2: "b"}, "b is on GPU 2 and c on GPU 1"),
        ):
            with pytest.raises(DeviceError, match=text):
                pair(sources, targets)


# --- Moves ----------------------------------------------------------------------------------------


def arrays(xp, rng, *shapes, dtype="u2"):
    return [xp.asarray(rng.integers(0, 60_000, shape).astype(dtype)) for shape in shapes]


def of_arrays(xp, rng, source, target, move):
    """Pieces that are odd in length and place."""
    with source:
        (whole,) = arrays(xp, rng, 9000)
        src = [whole[:5000], whole[5001:5004], whole[5005:]]
    with target:
        (room,) = arrays(xp, rng, 9000)
        dst = [room[4:5004], room[:3], room[5005:]]
    return [whole], [room], partial(move, src, dst)


def by_address(move, xp, src, dst):
    tables = [np.array([ranges.address_of(x) for x in xs], np.uint64) for xs in (src, dst)]
    sizes = np.array([x.nbytes for x in src])
    move(*tables, sizes, device="cpu" if xp is np else "cuda")


def start(xp, src, dst, **options):
    transfer.start(src, dst, **options)


def of_blocks(xp, rng, source, target, by_table=False):
    """Heads 1 and 2 of NHD blocks: all that a rank holds in universal ones."""
    with source:
        (src,) = arrays(xp, rng, (3, 2, 2, 4, 4, 8))  # N L O P H D
    with target:
        (dst,) = arrays(xp, rng, (3, 2, 2, 2, 4, 8))  # N H L O P D
    layout = permute.Layout("universal", heads=(1, 3))
    if by_table and xp is not np:
        shape = permute.BlockShape(H=4, L=2, O=2, P=4, D=8, itemsize=2)
        chunks = np.array(
            [ranges.address_of(x) for block in src for y in block for x in y], np.uint64
        )
        table = np.array([ranges.address_of(x) for x in dst], np.uint64)
        return [src], [dst], partial(permute.permute, table, layout, chunks, "NHD", shape)
    return [src], [dst], partial(permute.permute, dst, layout, src, "NHD")


def of_pages(xp, rng, source, target, move, spec, out_spec, H=2, out_H=2, **options):
    sizes = dict(L=3, N=5, P=4, D=16)
    with source:
        from_ = make(xp, rng, spec, H=H, **sizes)
    with target:
        to = make(xp, rng, out_spec, H=out_H, **sizes)
    call = partial(move, from_, to, [4, 0, 1], [1, 3, 2], **options)
    lists = ([x for x in (c.k, c.v, c.k_scales, c.v_scales) if x is not None] for c in (from_, to))
    return *lists, call


def convert(spec, out_spec, **options):
    return partial(of_pages, move=pages.convert_pages, spec=spec, out_spec=out_spec, **options)


RESHARD = dict(H=8, out_H=2, heads=(4, 6))
MOVES = {
    "copy_arrays": lambda xp, *args: of_arrays(xp, *args, move=block_copy.copy_arrays),
    "vectorized_copy": lambda xp, *args: of_arrays(
        xp, *args, move=partial(by_address, block_copy.vectorized_copy, xp)
    ),
    "memcpy_batch": lambda xp, *args: of_arrays(
        xp,
        *args,
        move=partial(by_address, partial(transfer.memcpy_batch, mode="fallback_only"), xp),
    ),
    "start": lambda xp, *args: of_arrays(xp, *args, move=partial(start, xp)),
    "start by the loop": lambda xp, *args: of_arrays(
        xp, *args, move=partial(start, xp, mode="fallback_only")
    ),
    "permute": of_blocks,
    "permute by tables": partial(of_blocks, by_table=True),
    "copy_pages": partial(of_pages, move=pages.copy_pages, spec="int8", out_spec="int8"),
    "convert_pages": convert("fp16", "int8:HND"),
    "reshard": convert("fp16", "int8:HND", **RESHARD),
    "reshard rows": convert("int8", "int8:HND", **RESHARD),
    "gather ranks": convert("int8:HND", "int8", H=2, out_H=8, target_heads=(4, 6)),
}
BY_ENGINE = ("memcpy_batch", "start by the loop")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("side", ["push", "pull"])
@pytest.mark.parametrize("outwards", [True, False], ids=["out", "in"])
@pytest.mark.parametrize("name", MOVES)
def test_moves(gpus, monkeypatch, name, outwards, side, order):
    """Behind what made the source, ahead of what reads the target and of what overwrites the
    source, whichever GPU is ahead of the other and whichever does the work."""
    xp, ends = gpus.xp, (gpus.here, gpus.other)[:: 1 if outwards else -1]
    times = (
        dict(push=1.0, pull=2.0, loop=9.0) if side == "push" else dict(push=2.0, pull=1.0, loop=9.0)
    )
    table = {"p2p": {way: {1: {1: us}} for way, us in times.items()}}
    monkeypatch.setattr(calibration, "_pairs", {ends: table})
    copy_ways._fastest.cache_clear()
    _, want, call = MOVES[name](np, np.random.default_rng(5), nullcontext(), nullcontext())
    call()
    source, target = map(xp.cuda.Device, ends)
    src, dst, call = MOVES[name](xp, np.random.default_rng(5), source, target)
    with source:
        made = [x.copy() for x in src]
        for x in src:
            x.view("u1")[...] = 7
        gpus.run()
        for x, y in zip(src, made, strict=True):
            x.view("u1")[...] = y.view("u1")
    call()
    with target:
        seen = [xp.zeros_like(x) for x in dst]
        for x, y in zip(seen, dst, strict=True):
            x.view("u1")[...] = y.view("u1")
    with source:
        for x in src:
            x.view("u1")[...] = 9
    assert cuda.current_device() == gpus.here
    gpus.run(order)
    for x, y in zip(seen, want, strict=True):
        assert_same_bits(to_numpy(x), y)
    if gpus.driver:
        runner = gpus.here if name in BY_ENGINE else ends[side == "pull"]
        assert gpus.driver.opened[-1] == (runner, sum(ends) - runner)


@pytest.mark.parametrize("busy", ["source", "target"])
def test_many_moves_of_one_buffer(gpus, busy):
    """On streams of the caller, one of them far behind the other."""
    xp, repeats = gpus.xp, 3 if gpus.driver else 100
    source, target = (xp.cuda.Device(gpu) for gpu in (gpus.here, gpus.other))
    with target:
        dst, seen = xp.zeros(10_000, np.uint32), xp.zeros((repeats, 10_000), np.uint32)
    src, load = xp.zeros(10_000, np.uint32), {}
    for name, gpu in (("source", source), ("target", target)):
        with gpu:
            load[name] = xp.zeros(1 if gpus.driver else 1 << 26, np.uint32)
    gpus.run()
    streams = []
    for gpu in (source, target):
        with gpu:
            streams.append(xp.cuda.Stream(non_blocking=True))
    with target, streams[1], source, streams[0]:
        for i in range(repeats):
            if busy == "source":
                load[busy][...] = i
            src[...] = i + 1
            block_copy.copy_arrays([src], [dst])
            with target:
                if busy == "target":
                    load[busy][...] = i
                seen[i] = dst
        gpus.run(ORDERS[busy == "source"])
    assert (to_numpy(seen) == np.arange(1, repeats + 1)[:, None]).all()


def test_a_prepared_move_runs_again(gpus, rng):
    xp = gpus.xp
    (src,) = arrays(xp, rng, 5000)
    with xp.cuda.Device(gpus.other):
        (dst,) = arrays(xp, rng, 5000)
    call = cuda.prepare(block_copy.copy_arrays, [src[:2500], src[2500:]], [dst[2500:], dst[:2500]])
    for value in (3, 4):
        src[...] = value
        src[:7] = 5
        call()
        gpus.run(ORDERS[1])
        assert_same_bits(np.roll(to_numpy(dst), 2500), to_numpy(src))


def test_a_graph_is_refused(gpus, rng):
    (src,) = arrays(gpus.xp, rng, 100)
    with gpus.xp.cuda.Device(gpus.other):
        (dst,) = arrays(gpus.xp, rng, 100)
    step = cuda.graph(lambda: block_copy.copy_arrays([src], [dst]))
    step()
    with pytest.raises(UnsupportedError, match="copy_arrays: .*the streams of two GPUs"):
        step()


def test_what_is_no_move_is_refused_by_name(gpus):
    xp, here, other = gpus.xp, gpus.here, gpus.other
    x = xp.ones((2, 8), xp.float32)
    with xp.cuda.Device(other):
        weight = xp.ones(8, xp.float32)
        pool, *others = (xp.zeros((2, 4, 1, 8), xp.float16) for _ in range(3))
    text = f"is on GPU {other}, expected the current one, GPU {here}"
    with pytest.raises(DeviceError, match=f"weight {text}"):
        norm.rms_norm(x, weight)
    with pytest.raises(DeviceError, match=f"k_pool {text}"):
        paged_convert.gather(pool, pool)
    ours, out = (xp.zeros((2, 4, 1, 8), xp.float16) for _ in range(2))
    with pytest.raises(DeviceError, match=f"v_out is on GPU {here}, expected like the others, GPU"):
        paged_convert.convert(ours, ours, pool, out, spec="fp16", out_spec="fp16")
    with pytest.raises(DeviceError, match=f"k_pool is on GPU {other}, expected the current one"):
        paged_convert.convert(pool, pool, *others, spec="fp16", out_spec="fp16")
    with pytest.raises(DeviceError, match=rf"sources\[0\] is on GPU {other}, expected the current"):
        block_copy.copy_arrays([pool], [pool])


def test_caches_that_are_both_elsewhere(gpus, rng):
    with gpus.xp.cuda.Device(gpus.other):
        cache = make(gpus.xp, rng, "int8", L=1, N=3, P=4, H=1, D=8)
    for op in (pages.copy_pages, pages.convert_pages):
        with pytest.raises(DeviceError, match=f"source.k is on GPU {gpus.other}, expected the cur"):
            op(cache, cache, [0], [1])
    with pytest.raises(DeviceError, match=f"cache.k is on GPU {gpus.other}, expected the current"):
        pages.zero_pages(cache, [0])


@pytest.mark.simt
def test_without_a_direct_way(simt_gpus, rng, monkeypatch):
    """Kernels cannot; copy engines go by the host, in the same order."""
    xp, here, other = simt_gpus.xp, simt_gpus.here, simt_gpus.other
    monkeypatch.setattr(xp.cuda.runtime, "deviceCanAccessPeer", lambda a, b: 0)
    (src,) = arrays(xp, rng, 100)
    with xp.cuda.Device(other):
        (dst,) = arrays(xp, rng, 100)
    text = f"from GPU {here} to GPU {other}: the two have no direct way; `pykv doctor` shows"
    with pytest.raises(DeviceError, match=text):
        block_copy.copy_arrays([src], [dst])
    copy = transfer.start(src, dst)
    assert (copy.stats.path, simt_gpus.driver.opened) == ("loop", [])
    assert copy.stats.reason == f"GPU {here} and GPU {other} have no direct way"
    simt_gpus.run()
    assert_same_bits(to_numpy(dst), to_numpy(src))


@pytest.mark.simt
def test_addresses_are_looked_at_where_a_second_gpu_is_used(simt_gpus, rng, monkeypatch):
    (src, dst) = arrays(simt_gpus.xp, rng, 100, 100)
    tables = [np.array([ranges.address_of(x)], np.uint64) for x in (src, dst)]
    simt_gpus.driver.used = {simt_gpus.here}
    monkeypatch.setattr(ranges, "memory_at", None)
    block_copy.vectorized_copy(*tables, 200)
    simt_gpus.run()
    assert_same_bits(to_numpy(dst), to_numpy(src))


# --- Sides ----------------------------------------------------------------------------------------


@pytest.mark.simt
def test_calibrated_sides(simt_gpus, rng, monkeypatch, tmp_path):
    """Measured at the first "auto" between two GPUs, kept for this direction alone, and what ops
    go by from then on."""
    xp, here, other = simt_gpus.xp, simt_gpus.here, simt_gpus.other
    measured = []

    def measure(ways, pair=None):
        measured.append((tuple(ways), pair))
        src, dst = (np.array([ranges.address_of(x)], np.uint64) for x in (a, b))
        for way in ways.values():
            way(src, dst, 200)
        return {"p2p": {name: {200: {1: 1.0 if name == "pull" else 5.0}} for name in ways}}

    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "load", load)
    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(calibration, "_identity", lambda gpu: ("H200", f"GPU-{gpu}", "13000"))
    copy_ways._fastest.cache_clear()
    (a,) = arrays(xp, rng, 100)
    with xp.cuda.Device(other):
        (b,) = arrays(xp, rng, 100)
    assert calibration.pick_runner(here, other, 100, 1) == (here, other)  # writes need no answer
    report = transfer.start(a, b).stats
    assert (report.path, report.reason) == (
        "pull",
        "calibrated: push 5 us, pull 1 us, loop 5 us predicted",
    )
    assert measured == [(("push", "pull", "loop"), (here, other))]
    assert simt_gpus.driver.opened == [(here, other), (other, here)]
    assert calibration.pick_runner(here, other, 100, 1) == (other, here)
    assert calibration.pick_runner(other, here, 100, 1) == (other, here)
    (file,) = (tmp_path / "calibration").iterdir()
    assert file.name == "H200-GPU-1000-to-GPU-1001-driver-13000-v1.json"
    monkeypatch.setattr(calibration, "_pairs", {})  # as if in a new process
    assert calibration.pick_runner(here, other, 100, 1) == (other, here)
    assert transfer.calibrate(peer=other)["p2p"]["pull"] == {200: {1: 1.0}} and len(measured) == 1
    transfer.calibrate(peer=other, force=True)
    assert len(measured) == 2
    with pytest.raises(UnsupportedError, match="transfer.calibrate: cannot be prepared"):
        tables = (np.array([ranges.address_of(x)], np.uint64) for x in (b, a))
        cuda.prepare(transfer.memcpy_batch, *tables, 200, mode="auto")


# --- A range of heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 3], ids=["one launch", "a launch a layer"])
@pytest.mark.parametrize(
    "spec, out_spec", [("fp16", "int8"), ("int8:HND", "fp16"), ("fp16", "k8v4:head:HND")]
)
def test_heads_become_those_of_a_rank(xp, rng, monkeypatch, spec, out_spec, gap):
    """As the same heads of a cache of all, and nothing else changes."""
    sizes = dict(L=2, N=4, P=4, D=16)
    source, every = make(xp, rng, spec, H=6, **sizes), make(xp, rng, out_spec, H=6, **sizes)
    rank = make(xp, rng, out_spec, H=3, **sizes)
    for name in ("k_scales", "v_scales"):
        for cache in (source, every):
            scales = getattr(cache, name)
            if scales is not None:
                scales[...] = xp.asarray((rng.random(scales.shape) + 0.1).astype(scales.dtype))
        if rank.spec.granularity == "head":
            getattr(rank, name)[...] = getattr(every, name)[:, 2:5]
    if gap:  # layers that are no whole number of pages apart
        made = {}
        for letter in "kv":
            pool = getattr(source, letter)
            room = xp.zeros((2, pool[0].size + gap * 8), pool.dtype)
            made[letter] = room[:, : pool[0].size].reshape(pool.shape)
            made[letter][...] = pool
        source = Pages(**made, k_scales=source.k_scales, v_scales=source.v_scales, spec=spec)
    before, calls, move = host(rank), [], paged_convert.convert
    monkeypatch.setattr(paged_convert, "convert", lambda *a, **b: (calls.append(a), move(*a, **b)))
    pages.convert_pages(source, every, [3, 1], [0, 2])
    assert len(calls) == (2 if gap or rank.spec.granularity == "head" else 1)
    pages.convert_pages(source, rank, [3, 1], [0, 2], heads=(3, 5), target_heads=(1, 3))
    after, want = host(rank), host(every)
    for name, x in after.items():
        if x.ndim > 2:
            axis = 3 if rank.spec.layout == "NHD" else 2
            got, was, all_heads = (np.moveaxis(y, axis, 0) for y in (x, before[name], want[name]))
            assert_same_bits(got[1:, :, [0, 2]], all_heads[3:5, :, [0, 2]])
            assert_same_bits(got[1:, :, [1, 3]], was[1:, :, [1, 3]])
            assert_same_bits(got[0], was[0])


def test_heads_that_are_none(xp, rng):
    source, rank = (make(xp, rng, "fp16", L=1, N=2, P=4, H=H, D=8) for H in (4, 2))
    for options, text in (
        (dict(heads=(3, 5)), r"heads is \(3, 5\), expected a range in 0 .. 4"),
        (dict(heads=(0, 2), target_heads=(1, 3)), r"target_heads is \(1, 3\), expected a range in"),
        (dict(heads=(0, 3)), "target has heads=2, expected 3"),
    ):
        with pytest.raises(ParameterError, match=f"^pages.convert_pages: {text}"):
            pages.convert_pages(source, rank, [0], [0], **options)
