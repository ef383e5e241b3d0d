"""Plans: the errors of baracuda's protocol in their order, and the results of the functions."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

import pykv
from pykv.errors import (
    CapacityError,
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
)
from pykv.ops import page_table, paged_append, paged_check, paged_decode
from pykv.plan import (
    ContiguousAppendArgs,
    ContiguousAppendDescriptor,
    ContiguousAppendPlan,
    PagedAppendArgs,
    PagedAppendDescriptor,
    PagedAppendPlan,
    PagedCacheDescriptor,
    PagedDecodeArgs,
    PagedDecodeDescriptor,
    PagedDecodePlan,
    PrecisionGuarantee,
    Preference,
)
from pykv.specs import KVSpec
from tests.helpers import assert_same_bits, to_numpy

CACHE = PagedCacheDescriptor(page_size=4, num_total_pages=7, num_kv_heads=2, head_dim=64)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


def pools(xp, cache):
    """Zeros: pools, and scales or None."""
    (k, v), scales = cache.shapes()
    dtype = np.float16 if cache.spec.scale_dtype == "fp16" else np.float32
    of_kinds = [xp.ones(scales, dtype) if kind.largest else None for kind in cache.spec.kinds]
    kinds = cache.spec.kinds
    return xp.zeros(k, kinds[0].dtype), xp.zeros(v, kinds[1].dtype), *of_kinds


def append_args(xp, rng, cache, element=F16):
    """Three requests: 2 pages and 6 tokens, none, and 1 page that is full."""
    key, value = (
        xp.asarray(rng.standard_normal((3, cache.num_kv_heads, cache.head_dim)).astype(element))
        for _ in range(2)
    )
    lists = [xp.asarray(np.array(x, np.int32)) for x in ([5, 1, 3], [0, 2, 2, 3], [2, 0, 4])]
    k, v, k_scales, v_scales = pools(xp, cache)
    return PagedAppendArgs(key, value, k, v, *lists, k_scales, v_scales)


@pytest.mark.parametrize("text", ["fp16:HND", "int8:head", "k8v4:HND"])
def test_a_descriptor_takes_a_text(text):
    cache = PagedCacheDescriptor(4, 7, 2, 64, text)
    assert cache == replace(CACHE, spec=KVSpec.parse(text))
    N, P, H, D = 7, 4, 2, 64
    assert cache.shapes() == (cache.spec.pool_shapes(N, P, H, D), cache.spec.scale_shape(N, P, H))
    with pytest.raises(DtypeError, match="PagedCacheDescriptor: spec is a type, expected a KVSpec"):
        replace(cache, spec=np.float16)


# --- Paged append ---


@pytest.mark.parametrize("text", ["fp16:HND", "fp32", "int8", "k8v4:HND:fp32", "e4m3:head"])
@pytest.mark.parametrize("counts", ["before", "after"])
def test_append_is_append_decode(xp, rng, text, counts):
    cache = replace(CACHE, spec=KVSpec.parse(text))
    descriptor = PagedAppendDescriptor(3, cache, counts=counts)
    plan = PagedAppendPlan.select(descriptor, F16, xp=xp)
    args = append_args(xp, rng, cache)
    want = args._replace(
        **{
            name: xp.array(getattr(args, name))
            for name in ("k_data", "v_data", "k_scales", "v_scales")
            if getattr(args, name) is not None
        }
    )
    options = dict(k_scales=want.k_scales, v_scales=want.v_scales, spec=cache.spec)
    paged_append.append_decode(*want[:7], counts=counts, **options, check=False)
    plan.run(args, check=False)  # unchecked: with "before" the last page is full
    for got, expected in zip(args, want, strict=True):
        if got is not None:
            assert_same_bits(got, expected)
    assert to_numpy(args.k_data).any()


def test_arguments_are_not_kept(xp, rng):
    plan = PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE, advance=True), F16, xp=xp)
    alive = []
    for _ in range(20):
        args = append_args(xp, rng, CACHE)
        plan.run(args, check=False)  # a full page would be refused
        assert to_numpy(args.last_page_len).tolist() == [3, 0, 4]
        alive += map(weakref.ref, args[:7])
    del args
    gc.collect()
    assert not any(array() is not None for array in alive)


def test_layouts_that_fitted_are_looked_at_once(xp, rng, monkeypatch):
    """Baracuda's order of errors costs nothing where there is no error."""
    plan = PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE, advance=True), F16, xp=xp)
    looks = []
    check = plan._check_in_order
    monkeypatch.setattr(plan, "_check_in_order", lambda args: (looks.append(args), check(args)))
    args, other = append_args(xp, rng, CACHE), append_args(xp, rng, CACHE)
    for n in (3, 4, 4):  # then the page is full
        for given in (args, other):
            plan.run(given, check=False)
            assert to_numpy(given.last_page_len).tolist() == [n, 0, 4]
    assert len(looks) == 1
    for page, rows in ((1, 2 * 2), (5, 0)):
        assert (to_numpy(args.k_data)[page] != 0).any(-1).sum() == rows
    with pytest.raises(ShapeError, match="key has shape"):
        plan.run(args._replace(key=args.key[:2]))
    cut = CACHE.num_total_pages - 1  # sound arrays, but not those of the descriptor
    with pytest.raises(ShapeError, match="k_data has shape"):
        plan.run(args._replace(k_data=args.k_data[:cut], v_data=args.v_data[:cut]))
    plan.run(args, check=False)


def test_a_prepared_run_runs_at_each_call(xp, rng):
    plan = PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE, advance=True), F16, xp=xp)
    args, plain = append_args(xp, rng, CACHE), append_args(xp, rng, CACHE)
    plain.key[...], plain.value[...] = args.key, args.value
    run = pykv.prepare(plan.run, args, check=False)
    assert not to_numpy(args.k_data).any() and to_numpy(args.last_page_len).tolist() == [2, 0, 4]
    for n in (3, 4):
        args.key[...] = plain.key[...] = plain.key * 2
        assert run() is run.result is None
        plan.run(plain, check=False)
        assert to_numpy(args.last_page_len).tolist() == [n, 0, 4]
        for got, want in zip(args[:7], plain[:7], strict=True):
            assert_same_bits(got, want)

    args = append_args(xp, rng, CACHE)
    args.last_page_len[2] = 3
    run = pykv.prepare(plan.run, args, check=True)
    run()
    with pytest.raises(ParameterError, match=r"plan.PagedAppendPlan.run: last_page_len\[2\] is 4"):
        run()
    with pytest.raises(ParameterError, match=r"plan.PagedAppendPlan.run: last_page_len\[2\] is 4"):
        pykv.prepare(plan.run, args, check=True)


def test_wrong_entries_are_found(xp, rng, monkeypatch):
    """Each time, although the arguments are those of before."""
    plan = PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE, advance=True), F16, xp=xp)
    args = append_args(xp, rng, CACHE)
    args.last_page_len[2] = 3
    plan.run(args, check=True)
    text = r"PagedAppendPlan.run: last_page_len\[2\] is 4, expected 0 to 3"
    with pytest.raises(ParameterError, match=text):
        plan.run(args, check=True)
    monkeypatch.setattr(paged_check, "ALWAYS", True)
    with pytest.raises(ParameterError, match=text):
        plan.run(args)
    assert to_numpy(args.last_page_len).tolist() == [3, 0, 4]
    args.last_page_len[2], args.indices[2] = 3, 7
    with pytest.raises(ParameterError, match=r"indices\[2\] is 7, expected below 7"):
        plan.run(args)

    plan = PagedDecodePlan.select(PagedDecodeDescriptor(3, 4, CACHE, max_pages=2), F16, xp=xp)
    q = xp.ones((3, 4, 64), np.float16)
    lists = (args.indices, args.indptr, args.last_page_len)
    of_read = PagedDecodeArgs(q, args.k_data, args.v_data, *lists, xp.zeros(q.shape, np.float16))
    workspace = None if xp is np else xp.zeros(plan.workspace_size(), np.uint8)
    with pytest.raises(ParameterError, match=r"PagedDecodePlan.run: indices\[2\] is 7, expected 0"):
        plan.run(of_read, workspace=workspace)
    args.indices[2] = 6
    plan.run(of_read, workspace=workspace)


def test_append_select_errors_in_order():
    select = PagedAppendPlan.select

    def refused(error, match, element=F16, preference=None, **changes):
        given = {"batch_size": 3, "counts": "before", "advance": False, **changes}
        cache = replace(CACHE, **{k: v for k, v in given.items() if hasattr(CACHE, k)})
        rest = {k: v for k, v in given.items() if not hasattr(CACHE, k)}
        with pytest.raises(error, match=match):
            select(PagedAppendDescriptor(cache=cache, **rest), element, preference=preference)

    for size in ("batch_size", "num_kv_heads", "page_size", "num_total_pages"):
        refused(ParameterError, f"select: {size} is 0, expected", **{size: 0}, head_dim=60)
    refused(ParameterError, "select: head_dim is 0, expected at least 1", head_dim=0)
    refused(UnsupportedError, "head_dim is 60, expected a multiple of 8", np.int32, head_dim=60)
    refused(UnsupportedError, "head_dim is 520, expected .* up to 512", head_dim=520)
    refused(UnsupportedError, "element is float64, expected one of float32", "f8", counts="then")
    refused(ParameterError, "counts is 'then'", counts="then", advance=True)
    wants = Preference(backend="FlashInfer")
    refused(ParameterError, "advance is True", preference=wants, counts="after", advance=True)
    refused(UnsupportedError, "backend is 'FlashInfer', expected pykv", preference=wants)
    for changes in ({"head_dim": 8}, {"head_dim": 512}, {"page_size": 1}):
        select(PagedAppendDescriptor(1, replace(CACHE, **changes)), F32)


def test_append_argument_errors_in_order(xp, rng):
    plan = PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE), F16)
    args = append_args(xp, rng, CACHE)

    def refused(error, match, **changes):
        with pytest.raises(error, match=rf"PagedAppendPlan.can_implement: {match}"):
            plan.can_implement(args._replace(**changes))

    plan.can_implement(args)
    flat, cut = xp.zeros((4, 2, 64), np.float16), args.k_data[:6]
    loose = xp.zeros((7, 2, 4, 128), np.float16)[..., ::2]
    refused(ShapeError, r"key has shape \(4, 2, 64\), expected \(3, 2, 64\)", key=flat, k_data=cut)
    refused(ShapeError, "value has shape", value=flat, k_data=cut)
    refused(ShapeError, r"k_data has shape \(6, 2, 4, 64\), expected", k_data=cut, indptr=flat)
    refused(ShapeError, "v_data has shape", v_data=cut, indptr=flat)
    refused(ShapeError, r"indptr has shape \(3,\), expected \(4,\)", indptr=args.indptr[:3])
    refused(ShapeError, "last_page_len has shape", last_page_len=args.indptr, k_data=loose)
    refused(UnsupportedError, "k_data has strides .* expected contiguous rows", k_data=loose)
    refused(DtypeError, "key is a list, expected a NumPy or CuPy array", key=[1])
    wide = args.key.astype(np.float32)
    refused(DtypeError, "key has dtype float32, expected float16", key=wide, value=wide)
    refused(DtypeError, "value has dtype float32, expected float16", value=wide)
    refused(DtypeError, "k_data has dtype", k_data=args.k_data.astype(np.float32))
    refused(DtypeError, "indices has dtype float16", indices=args.key[0, 0])
    refused(ParameterError, "k_scales is given, expected None", k_scales=args.key)
    if xp is not np:
        refused(DeviceError, "value is on the host", value=to_numpy(args.value))
    with pytest.raises(ShapeError, match="key has shape"):
        plan.run(args._replace(key=flat))
    assert not to_numpy(args.k_data).any()


def test_facts_of_an_append_plan():
    plan = PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE), F16)
    assert plan.workspace_size() == 0
    assert plan.precision_guarantee() == PrecisionGuarantee("float32", "float16", True, True)
    sku = plan.sku()
    assert (sku.category, sku.op, sku.element) == ("attention", "paged_append", "float16")
    assert (sku.layout, sku.aux_element, sku.arch) == ("HND", "fp16:HND", "cpu")
    assert (sku.backend, sku.epilogue, sku.precision) == ("pykv", None, plan.precision_guarantee())
    assert "multiples of 8 up to 512" in sku.covers
    assert hash(sku) == hash(PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE), F16).sku())


def test_an_sku_names_the_sm(device):
    plan = PagedAppendPlan.select(PagedAppendDescriptor(3, CACHE), F16, xp=device)
    assert plan.sku().arch.startswith(("sm_", "compute_"))


# --- What is no argument at all ---

SELECTED = [
    (PagedAppendPlan, PagedAppendDescriptor(3, CACHE)),
    (ContiguousAppendPlan, ContiguousAppendDescriptor(2, 3, 2, 5, 16, 8)),
    (PagedDecodePlan, PagedDecodeDescriptor(3, 6, CACHE)),
]
NAMES = [plan.__name__ for plan, _ in SELECTED]


@pytest.mark.parametrize("plan, descriptor", SELECTED, ids=NAMES)
def test_what_no_descriptor_is(plan, descriptor):
    def refused(match, *given):
        with pytest.raises(DtypeError, match=f"plan.{plan.__name__}.select: {match}"):
            plan.select(*given)

    expected = f"expected a {type(descriptor).__name__}"
    refused(f"descriptor is a NoneType, {expected}", None, F16)
    refused(f"descriptor is a PagedCacheDescriptor, {expected}", CACHE, F16)
    refused("element is 'x', expected a dtype", descriptor, "x")
    refused(
        "batch_size is a float, expected a whole number", replace(descriptor, batch_size=2.0), F16
    )
    refused("batch_size is a str", replace(descriptor, batch_size="2"), F16)


@pytest.mark.parametrize("size", ["page_size", "head_dim", "num_kv_heads", "num_total_pages"])
@pytest.mark.parametrize("plan, descriptor", SELECTED[::2], ids=NAMES[::2])
def test_sizes_of_pages_are_whole_numbers(plan, descriptor, size):
    cache = replace(CACHE, **{size: 8.0})
    with pytest.raises(DtypeError, match=f"select: {size} is a float, expected a whole number"):
        plan.select(replace(descriptor, cache=cache), F16)
    with pytest.raises(DtypeError, match="descriptor.cache is a NoneType, expected a PagedCache"):
        plan.select(replace(descriptor, cache=None), F16)


def test_an_element_of_the_cache_that_is_no_dtype():
    with pytest.raises(DtypeError, match="cache_element is 'x', expected a dtype"):
        ContiguousAppendPlan.select(replace(SELECTED[1][1], cache_element="x"), F16)


@pytest.mark.parametrize("plan, descriptor", SELECTED, ids=NAMES)
def test_what_no_arguments_are(plan, descriptor):
    made = plan.select(descriptor, F16)
    others = [PagedAppendArgs(*range(7)), PagedDecodeArgs(*range(7))]
    for args in (None, [1, 2], (1, 2), *others):
        if not isinstance(args, plan.args_type):
            text = f"args is a {type(args).__name__}, expected a {plan.args_type.__name__}"
            with pytest.raises(DtypeError, match=f"plan.{plan.__name__}.can_implement: {text}"):
                made.run(args)
    with pytest.raises(DtypeError, match=f"plan.{plan.__name__}.run: workspace is a str"):
        made.run(None, workspace="x")


# --- Contiguous append ---

CONTIGUOUS = ContiguousAppendDescriptor(2, 3, 2, 5, 16, 8)


def contiguous_args(xp, rng, descriptor, element=F32, cache=F16):
    B, H, T, C = (
        getattr(descriptor, s) for s in ("batch_size", "num_heads", "new_tokens", "max_tokens")
    )
    nhd = descriptor.layout == "NHD"
    arrays = []
    for n, dtype in ((T, element), (C, cache)):
        for D in (descriptor.k_dim, descriptor.v_dim):
            shape = (B, n, H, D) if nhd else (B, H, n, D)
            arrays.append(xp.asarray(rng.standard_normal(shape).astype(dtype)))
    return ContiguousAppendArgs(*arrays, xp.asarray(np.array([1, 4][:B], np.int64)))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("advance", [False, True])
def test_contiguous_append(xp, rng, layout, tokens, advance):
    """cache[b, h, offset[b] + l] = new[b, h, l]; what passes the end is dropped."""
    descriptor = replace(
        CONTIGUOUS, layout=layout, new_tokens=tokens, advance=advance, cache_element=F16
    )
    plan = ContiguousAppendPlan.select(descriptor, F32, xp=xp)
    args = contiguous_args(xp, rng, descriptor)
    want = [to_numpy(x).copy() for x in args]
    offsets = [1, 4]
    for _ in range(2):
        for b, offset in enumerate(offsets):
            for t in range(tokens):
                if offset + t < 5:
                    for new, cache in zip(want[:2], want[2:4], strict=True):
                        if layout == "HND":
                            cache[b, :, offset + t] = new[b, :, t]
                        else:
                            cache[b, offset + t] = new[b, t]
        if advance:
            offsets = [min(5, offset + tokens) for offset in offsets]
        plan.run(args)
    for got, expected in zip(args[:4], want, strict=False):
        assert_same_bits(got, expected)
    assert to_numpy(args.cache_offsets).tolist() == offsets


def test_a_prepared_contiguous_append(xp, rng):
    descriptor = replace(CONTIGUOUS, cache_element=F16, advance=True)
    plan = ContiguousAppendPlan.select(descriptor, F32, xp=xp)
    args = contiguous_args(xp, rng, descriptor)
    plain = ContiguousAppendArgs(*map(xp.array, args))
    run = pykv.prepare(plan.run, args)
    for got, want in zip(args, plain, strict=True):
        assert_same_bits(got, want)
    for _ in range(2):
        run()
        plan.run(plain)
        for got, want in zip(args, plain, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("size", ["batch_size", "num_heads", "new_tokens"])
def test_nothing_to_append(xp, rng, size):
    descriptor = replace(CONTIGUOUS, **{size: 0})
    args = contiguous_args(xp, rng, descriptor, F32, F32)
    before = to_numpy(args.k_cache).copy()
    ContiguousAppendPlan.select(descriptor, F32, xp=xp).run(args)
    assert_same_bits(args.k_cache, before)


def test_contiguous_errors_in_order(xp, rng):
    select = ContiguousAppendPlan.select
    for size in ("batch_size", "num_heads", "new_tokens", "max_tokens", "k_dim", "v_dim"):
        with pytest.raises(ParameterError, match=f"select: {size} is -1, expected at least 0"):
            select(replace(CONTIGUOUS, **{size: -1, "layout": "x"}), F32)
    with pytest.raises(ParameterError, match="layout is 'x'"):
        select(replace(CONTIGUOUS, layout="x", v_dim=12), F32)
    for v_dim in (0, 12):
        text = f"v_dim is {v_dim}, expected a multiple of 8 up to 1024"
        with pytest.raises(UnsupportedError, match=text):
            select(replace(CONTIGUOUS, v_dim=v_dim), "f8")
    with pytest.raises(UnsupportedError, match="element is float64"):
        select(CONTIGUOUS, "f8")
    with pytest.raises(UnsupportedError, match="cache_element is int8"):
        select(replace(CONTIGUOUS, cache_element=np.int8), F32)

    plan = select(replace(CONTIGUOUS, cache_element=F16), F32)
    args = contiguous_args(xp, rng, CONTIGUOUS)

    def refused(error, match, **changes):
        with pytest.raises(error, match=f"can_implement: {match}"):
            plan.can_implement(args._replace(**changes))

    plan.can_implement(args)
    for name in args._fields:
        refused(ShapeError, f"{name} has shape", **{name: getattr(args, name)[:1]})
    loose = xp.zeros((2, 3, 5, 32), np.float16)[..., ::2]
    refused(UnsupportedError, "k_cache has strides", k_cache=loose, k_new=args.k_new)
    refused(DtypeError, "k_new has dtype float16", k_new=args.k_new.astype(F16))
    refused(DtypeError, "v_new has dtype float16", v_new=args.v_new.astype(F16))
    refused(DtypeError, "k_cache has dtype float32", k_cache=args.k_cache.astype(F32))
    refused(DtypeError, "cache_offsets has dtype", cache_offsets=args.cache_offsets.astype("f4"))
    assert plan.workspace_size() == 0
    assert plan.precision_guarantee().accumulator == "float32"
    assert "apart" in plan.sku().covers and plan.sku().aux_element == "fp16:HND"


# --- Paged decode ---


def decode_args(xp, rng, cache, HQ, element=F32, lse=True):
    append = append_args(xp, rng, cache, element)
    for pool in (append.k_data, append.v_data):
        numbers = rng.integers(-100, 100, pool.shape)
        pool[...] = xp.asarray((numbers / (1 if pool.dtype == np.int8 else 50)).astype(pool.dtype))
    q = xp.asarray(rng.standard_normal((3, HQ, cache.head_dim)).astype(element))
    out, sums = xp.zeros(q.shape, element), xp.zeros(q.shape[:2], np.float32) if lse else None
    scales = append.k_scales, append.v_scales
    return PagedDecodeArgs(q, *append[2:7], out, sums, *scales)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("text", ["fp16", "fp16:HND", "int8", "int8:HND:head"])
def test_decode_is_attention_over_the_listed_pages(xp, rng, text, lse):
    cache = replace(CACHE, spec=KVSpec.parse(text))
    descriptor = PagedDecodeDescriptor(3, 6, cache, max_pages=3, sm_scale=0.1)
    plan = PagedDecodePlan.select(descriptor, F32, xp=xp)
    args = decode_args(xp, rng, cache, 6, lse=lse)
    workspace = None if xp is np else xp.zeros(plan.workspace_size(), np.uint8)
    plan.run(args, workspace=workspace)

    table, lengths = page_table.from_lists(*args[3:6], page_size=4, width=3)
    assert to_numpy(lengths).tolist() == [6, 0, 4]
    options = dict(k_scales=args.k_scales, v_scales=args.v_scales, spec=cache.spec)
    given = (args.q, args.k_data, args.v_data, table, lengths)
    want, sums = paged_decode.decode(*given, scale=0.1, return_lse=True, **options)
    np.testing.assert_allclose(to_numpy(args.o), to_numpy(want), rtol=1e-5, atol=1e-6)
    assert not to_numpy(args.o)[1].any() and to_numpy(args.o)[0].any()
    if lse:
        np.testing.assert_allclose(to_numpy(args.lse), to_numpy(sums) / np.log(2), rtol=1e-5)


def test_later_runs_take_their_own_arrays(xp, rng):
    """By one plan and another scale, of the layouts of the first and of others."""
    sizes = dict(batch_size=3, num_q_heads=6, cache=CACHE, max_pages=3)
    plans = {
        scale: PagedDecodePlan.select(PagedDecodeDescriptor(**sizes, sm_scale=scale), F32, xp=xp)
        for scale in (0.1, 0.3)
    }
    for i in range(8):
        args, strided, scale = decode_args(xp, rng, CACHE, 6), i % 4 > 1, (0.1, 0.3)[i % 3 == 2]
        plan = plans[scale]
        if strided:
            apart = xp.zeros((3, 7, args.q.shape[2]), np.float32)
            apart[:, :6] = args.q
            args = args._replace(q=apart[:, :6])
        size = plan.workspace_size()
        workspace = None if xp is np else xp.zeros(size + 64 * strided, np.uint8)
        plan.run(args, workspace=workspace)
        table, lengths = page_table.from_lists(*args[3:6], page_size=4, width=3)
        want = paged_decode.decode(
            args.q,
            args.k_data,
            args.v_data,
            table,
            lengths,
            spec=CACHE.spec,
            return_lse=True,
            lse_base="2",
            scale=scale,
        )
        for got, expected in zip((args.o, args.lse), want, strict=True):
            assert_same_bits(got, expected)


def test_overlaps_of_later_runs_are_refused(xp, rng):
    plan = PagedDecodePlan.select(PagedDecodeDescriptor(3, 6, CACHE, max_pages=3), F32, xp=xp)
    args = decode_args(xp, rng, CACHE, 6)
    workspace = None if xp is np else xp.zeros(plan.workspace_size(), np.uint8)
    plan.run(args, workspace=workspace)
    with pytest.raises(ParameterError, match="o shares memory with q"):
        plan.run(args._replace(o=args.q), workspace=workspace)


def test_a_prepared_decode(xp, rng):
    """The lists of pages are read at each call."""
    plan = PagedDecodePlan.select(PagedDecodeDescriptor(3, 6, CACHE, max_pages=3), F16, xp=xp)
    args = decode_args(xp, rng, CACHE, 6, F16)
    workspace = None if xp is np else xp.zeros(plan.workspace_size(), np.uint8)
    run = pykv.prepare(plan.run, args, workspace=workspace)
    assert not to_numpy(args.o).any()
    results = []
    for length in (2, 4):
        args.last_page_len[0] = length
        run()
        results.append((to_numpy(args.o).copy(), to_numpy(args.lse).copy()))
        plan.run(args, workspace=workspace)
        for got, want in zip(results[-1], (args.o, args.lse), strict=True):
            assert_same_bits(got, want)
    assert (results[0][0] != results[1][0]).any()


def test_decode_errors_in_order(xp, rng):
    cache = replace(CACHE, spec=KVSpec())
    select = PagedDecodePlan.select

    def excluded(error, match, element=F32, preference=None, HQ=6, max_pages=3, B=3, **changes):
        descriptor = PagedDecodeDescriptor(B, HQ, replace(cache, **changes), max_pages)
        with pytest.raises(error, match=f"PagedDecodePlan.select: {match}"):
            select(descriptor, element, preference=preference)

    excluded(ParameterError, "num_q_heads is 0", HQ=0)
    excluded(ParameterError, "max_pages is 0", max_pages=0)
    excluded(ParameterError, "max_pages is 2147483648, expected 1 to 2147483647", max_pages=2**31)
    excluded(ParameterError, "batch_size is 0", B=0, head_dim=4)
    excluded(ParameterError, "num_total_pages is 0", max_pages=None, num_total_pages=0)
    excluded(UnsupportedError, "head_dim is 4", head_dim=4, element="f8")
    excluded(UnsupportedError, "element is float64", element="f8", HQ=7)
    excluded(ParameterError, "num_q_heads is 7, expected a multiple of num_kv_heads=2", HQ=7)

    plan = select(PagedDecodeDescriptor(3, 6, cache, 3), F32, xp=xp)
    args = decode_args(xp, rng, cache, 6, lse=False)

    def refused(error, match, **changes):
        with pytest.raises(error, match=f"can_implement: {match}"):
            plan.can_implement(args._replace(**changes))

    plan.can_implement(args)
    refused(ShapeError, "q has shape", q=args.q[:, :2], k_data=args.q)
    refused(ShapeError, "o has shape", o=args.o[:2])
    refused(ShapeError, "k_data has shape", k_data=args.k_data[:2], indptr=args.q)
    refused(ShapeError, "indptr has shape", indptr=args.last_page_len)
    refused(ShapeError, "lse has shape", lse=args.last_page_len)
    refused(UnsupportedError, "q has strides", q=xp.zeros((3, 6, 128), F32)[..., ::2])
    refused(DtypeError, "o has dtype float16, expected float32", o=args.o.astype(F16))
    refused(DtypeError, "k_data has dtype", k_data=args.k_data.astype(F32))
    assert plan.precision_guarantee().accumulator == "float32"
    assert plan.sku().op == "paged_decode"


def test_a_scale_is_refused_before_any_run():
    for scale in (1e16, -np.inf, np.nan):
        with pytest.raises(ParameterError, match="PagedDecodePlan.select: sm_scale is"):
            PagedDecodePlan.select(PagedDecodeDescriptor(3, 6, CACHE, sm_scale=scale), F16)


def test_a_table_is_as_wide_as_requests_need(rng):
    """On the host, whatever they could have; another would take gigabytes."""
    args, outs = decode_args(np, rng, CACHE, 6, F16), []
    for most in (3, 2**31 - 1):
        plan = PagedDecodePlan.select(PagedDecodeDescriptor(3, 6, CACHE, max_pages=most), F16)
        plan.run(args)
        outs.append(args.o.copy())
    assert_same_bits(*outs)
    few = PagedDecodePlan.select(PagedDecodeDescriptor(3, 6, CACHE, max_pages=1), F16)
    with pytest.raises(CapacityError, match="width is 1, but a request has"):
        few.run(args)


def test_results_lie_apart_from_lists_of_pages(xp, rng):
    """A second run would have read the lists that the first one wrote over."""
    plan = PagedDecodePlan.select(PagedDecodeDescriptor(3, 6, CACHE, max_pages=3), F32, xp=xp)
    args = decode_args(xp, rng, CACHE, 6)
    workspace = None if xp is np else xp.zeros(plan.workspace_size(), np.uint8)
    for name in ("indices", "indptr", "last_page_len"):
        of_list = getattr(args, name)
        memory = xp.zeros(args.o.size, F32)
        memory[: of_list.size].view(np.int32)[...] = of_list
        given = {name: memory[: of_list.size].view(np.int32), "o": memory.reshape(args.o.shape)}
        with pytest.raises(ParameterError, match=f"o shares memory with {name}|{name} .* with o"):
            plan.run(args._replace(**given), workspace=workspace)


def test_appends_name_what_shares_memory_as_the_plan_does(xp, rng):
    append = PagedAppendPlan.select(
        PagedAppendDescriptor(3, CACHE, advance=True), np.float16, xp=xp
    )
    args = append_args(xp, rng, CACHE)
    for given, text in (
        (args._replace(v_data=args.k_data), "k_data shares memory with v_data"),
        (args._replace(last_page_len=args.indices), "last_page_len shares memory with indices"),
    ):
        with pytest.raises(ParameterError, match=f"PagedAppendPlan.can_implement: {text}"):
            append.run(given)
    contiguous = ContiguousAppendPlan.select(
        ContiguousAppendDescriptor(2, 1, 1, 4, 8, 8), np.float16, xp=xp
    )
    new, old = xp.zeros((2, 1, 1, 8), np.float16), xp.zeros((2, 1, 4, 8), np.float16)
    given = ContiguousAppendArgs(new, new, old, old, xp.zeros(2, np.int32))
    with pytest.raises(ParameterError, match="can_implement: k_cache shares memory with v_cache"):
        contiguous.run(given)


def test_decode_says_what_workspace_it_needs(device, rng):
    cache = replace(CACHE, spec=KVSpec())
    descriptor = PagedDecodeDescriptor(3, 6, cache, 3)
    plan = PagedDecodePlan.select(descriptor, F32, xp=device)
    needed = plan.workspace_size()
    assert needed >= 4 * (3 * 3 + 3)
    args = decode_args(device, rng, cache, 6, lse=False)
    short = device.zeros(needed - 1, np.uint8)
    for workspace, given in ((None, 0), (short, needed - 1)):
        text = f"the workspace has {given} bytes, expected at least {needed}"
        with pytest.raises(CapacityError, match=text):
            plan.run(args, workspace=workspace)
    with pytest.raises(DtypeError, match="workspace has dtype float32, expected uint8"):
        plan.run(args, workspace=device.zeros(needed, np.float32))
    preference = Preference(max_workspace_bytes=needed - 1)
    with pytest.raises(CapacityError, match=f"takes {needed} bytes, expected at most {needed - 1}"):
        PagedDecodePlan.select(descriptor, F32, preference=preference, xp=device)


def test_a_workspace_that_kernels_cannot_address_is_refused(device):
    cache = PagedCacheDescriptor(4, 8, 1, 8)
    plan = PagedDecodePlan.select(PagedDecodeDescriptor(1, 1, cache), np.float32, xp=device)
    floats, ints = (
        (lambda *s: device.zeros(s, np.float32)),
        (lambda *x: device.asarray(np.array(x, np.int32))),
    )
    pools = [device.zeros((8, 1, 4, 8), np.float16) for _ in range(2)]
    args = PagedDecodeArgs(floats(1, 1, 8), *pools, ints(0), ints(0, 1), ints(3), floats(1, 1, 8))
    memory = device.zeros(plan.workspace_size() + 16, np.uint8)
    with pytest.raises(ShapeError, match="workspace has address .*, expected a multiple of 16"):
        plan.run(args, workspace=memory[1:])
    plan.run(args, workspace=memory)
