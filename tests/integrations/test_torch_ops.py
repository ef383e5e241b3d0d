"""Custom ops of torch: the same bits as the ops themselves, as torch.library and torch.compile have
them."""

import numpy as np
import pytest

import pykv
from pykv.errors import DeviceError, DtypeError, UnsupportedError
from pykv.ops import paged_append, paged_decode
from pykv.ops import prefill as paged_prefill
from tests.helpers import assert_same_bits

torch = pytest.importorskip("torch")

from pykv.integrations import torch as ours  # noqa: E402

FP8 = dict(e4m3=torch.float8_e4m3fn, e5m2=torch.float8_e5m2)
KINDS = ["fp32", "fp16", "bf16", "int8", "int4", "e4m3", "e5m2"]


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def made(kind, dtype=torch.float32):
    """Arguments of each op by name, for a cache of a kind: queries of 2 and 3 tokens."""
    torch.manual_seed(0)
    pool = pykv.PagedKVCache(1, 6, 2, 16, page_size=2, spec=kind)
    pools = [torch.zeros(x[0].shape, dtype=torch.float32) for x in (pool.k, pool.v)]
    types = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16, int8=torch.int8)
    pools = [x.to(FP8.get(kind, types.get(kind, torch.uint8))) for x in pools]
    cache = dict(k_pool=pools[0], v_pool=pools[1])
    if pool.spec.has_scales:
        cache |= {x: torch.zeros(6, 2, 2, dtype=torch.float16) for x in ("k_scales", "v_scales")}
    if kind == "int4":
        cache["spec"] = kind
    int32 = dict(dtype=torch.int32)
    new = dict(k=numbers(5, 2, 16, dtype=dtype), v=numbers(5, 2, 16, dtype=dtype))
    new["slots"] = torch.tensor([6, 7, 0, 1, 4], **int32)
    seen = dict(page_table=torch.tensor([[3, -1], [0, 2]], **int32))
    seen["lengths"] = torch.tensor([2, 3], **int32)
    return dict(
        append=dict(k_scales=None, v_scales=None) | cache | new,
        decode=cache | seen | dict(q=numbers(2, 4, 16, dtype=dtype)),
        prefill=cache
        | seen
        | dict(q=numbers(5, 4, 16, dtype=dtype), q_starts=torch.tensor([0, 2, 5], **int32)),
    )


def arrays(kind, given):
    """The same arguments as arrays of their own."""

    def array(x):
        is_fp8 = x.dtype in FP8.values()
        return pykv.asarray((x.view(torch.uint8) if is_fp8 else x).clone())

    return {n: array(x) if torch.is_tensor(x) else x for n, x in given.items()} | dict(spec=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_the_ops(kind, dtype):
    given = made(kind, dtype)
    ours.append(**given["append"])
    own = arrays(kind, made(kind, dtype)["append"])
    paged_append.append(**own)
    for name in ("k_pool", "v_pool", "k_scales", "v_scales"):
        x = given["append"].get(name)
        if x is not None:
            assert bool(x.float().any())
            got = pykv.asarray(x.view(torch.uint8) if x.dtype in FP8.values() else x)
            assert_same_bits(got, own[name])
    for op, name in ((paged_decode.decode, "decode"), (paged_prefill.prefill, "prefill")):
        got = getattr(torch.ops.pykv, name)(**given[name])
        assert got.dtype == dtype
        assert_same_bits(pykv.asarray(got), op(**arrays(kind, given[name])))


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
@pytest.mark.parametrize("name", ["append", "decode", "prefill"])
def test_opcheck(kind, name):
    """FP8 as codes as well, since torch's check of what is written multiplies what it compares."""
    op, given = getattr(torch.ops.pykv, name).default, made(kind, torch.bfloat16)[name]
    if kind in FP8:
        some = ("test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, (), given, test_utils=some)
        given |= {n: given[n].view(torch.uint8) for n in ("k_pool", "v_pool")} | dict(spec=kind)
    torch.library.opcheck(op, (), given)


@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_compiles_whole(kind):
    """One graph of an append and two attentions; what it writes is seen by what reads behind it."""

    def step(append, decode, prefill):
        torch.ops.pykv.append(**append)
        last = torch.ops.pykv.decode(**decode, window=2)
        return last * 2, torch.ops.pykv.prefill(**prefill, logits_soft_cap=30.0) + 1

    given, again = made(kind, torch.bfloat16), made(kind, torch.bfloat16)
    want = step(**given)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(**again)
    assert all(map(torch.equal, got, want))
    pools = [x["append"]["k_pool"].view(torch.uint8) for x in (given, again)]
    assert torch.equal(*pools) and bool(pools[0].any())


def test_refusals():
    given = made("fp32")["decode"]
    with pytest.raises(UnsupportedError, match="pykv.decode: q requires a gradient"):
        ours.decode(**given | dict(q=given["q"].requires_grad_()))
    given["q"] = given["q"].detach()
    with pytest.raises(DeviceError, match="pykv.decode: lengths is on device meta, expected cpu"):
        ours.place_of("pykv.decode", q=given["q"], lengths=given["lengths"].to("meta")).__enter__()
    with pytest.raises(DtypeError, match="paged_decode.decode: lengths has dtype int64"):
        ours.decode(**given | dict(lengths=given["lengths"].long()))
    with pytest.raises(UnsupportedError, match="pykv.decode: q has layout torch.sparse_coo"):
        ours.decode(**given | dict(q=given["q"].to_sparse()))
    with pytest.raises(DtypeError, match="paged_decode.decode: q has dtype uint8"):
        ours.decode(**given | dict(q=given["q"].to(torch.float8_e5m2)))
    with pytest.raises(ValueError, match="scales for e4m3"):
        ours.append(**made("e4m3")["append"] | dict(k_scales=None))


def test_slots_as_torch_makes_them():
    """Slots may be int64, as torch makes them."""
    given = made("fp32")["append"]
    ours.append(**given | dict(slots=given["slots"].long()))
    np.testing.assert_array_equal(given["k_pool"][3, 0], given["k"][0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_behind_work_of_the_stream(kind):
    """Ops run on torch's current stream: they see what it has not written yet when they are called,
    and what reads behind them sees their results."""
    if not torch.cuda.is_available():
        pytest.skip("torch is a build without CUDA")

    def on_gpu(given):
        return {name: x.cuda() if torch.is_tensor(x) else x for name, x in given.items()}

    given = {name: on_gpu(some) for name, some in made(kind, torch.bfloat16).items()}
    given["decode"] |= {n: x for n, x in given["append"].items() if n in given["decode"]}
    own = {name: arrays(kind, some) for name, some in given.items()}
    paged_append.append(**own["append"])
    pools = {n: x for n, x in own["append"].items() if n in own["decode"]}
    want = paged_decode.decode(**own["decode"] | pools)
    k, late = given["append"]["k"].clone(), torch.zeros_like(given["append"]["k"])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # clocks; some hundredths of a second
        late.copy_(k)
        ours.append(**given["append"] | dict(k=late))
        got = torch.ops.pykv.decode(**given["decode"])
        seen = got.clone().cpu()
    assert got.is_cuda and bool(seen.float().any())
    assert_same_bits(pykv.asarray(got), want)
    assert_same_bits(pykv.asarray(seen), want)
    x = given["append"]["k_pool"]
    codes = pykv.asarray(x.view(torch.uint8) if x.dtype in FP8.values() else x)
    assert_same_bits(codes, own["append"]["k_pool"])
