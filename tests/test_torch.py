"""torch tensors: pykv.asarray takes them as they are, on the host and on a GPU, and what no array
can say is refused; streams and graphs of torch."""

import ml_dtypes
import numpy as np
import pytest

import pykv
from pykv import cuda
from pykv.errors import DeviceError, DtypeError, UnsupportedError
from pykv.kinds import KINDS, decode
from pykv.ops import activation, block_copy, norm, paged_append, paged_decode, prefill
from tests.helpers import assert_same_bits, bits, to_numpy
from tests.ops.calls import OPS, filled

torch = pytest.importorskip("torch")

places = pytest.mark.parametrize(
    "xp, place",
    [("numpy", "cpu"), pytest.param("cupy", "cuda", marks=pytest.mark.gpu)],
    indirect=["xp"],
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_torch(x, place):
    """A tensor of its own with the bits of a NumPy array."""
    if x.dtype == BFLOAT16:
        return to_torch(x.view(np.int16), place).view(torch.bfloat16)
    return torch.from_numpy(x.copy()).to(place)


def convert(arguments, make):
    return {name: make(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def arrays_in(x):
    parts = x if isinstance(x, tuple | list) else (x,)
    return [part for part in parts if hasattr(part, "shape")]


@places
@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_op_on_tensors(xp, rng, place, op, arguments):
    """Same bits in the results and in the tensors that it writes."""
    given = filled(arguments, rng, np)
    own = convert(given, lambda x: xp.asarray(x.copy()))
    tensors = convert(given, lambda x: to_torch(x, place))
    shared = {
        name: pykv.asarray(x) if isinstance(x, torch.Tensor) else x for name, x in tensors.items()
    }
    want, got = op(**own), op(**shared)
    for x, y in zip(arrays_in(got), arrays_in(want), strict=True):
        assert_same_bits(x, y)
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor):
            assert x.device.type == place
            assert_same_bits(x.cpu().numpy(), own[name])


@places
@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_attention_over_tensors(xp, rng, place, kind):
    """An append, a decode and a prefill over pools of torch; one of FP8 goes in as its codes."""
    spec = pykv.KVSpec(kind, kind)
    k, v, q = rng.standard_normal((3, 3, 2, 16)).astype(BFLOAT16)
    lengths, starts = (np.array(x, np.int32) for x in ([3], [0, 3]))
    slots, table = pykv.blocks.slots([2, 0], 0, 3, 2), pykv.blocks.page_table([[2, 0]], 2)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn

    def attend(make, pools):
        names = ("k_scales", "v_scales") if spec.has_scales else ()
        options = {name: make(np.zeros((4, 2, 2), np.float16)) for name in names}
        options["spec"] = spec
        paged_append.append(make(k), make(v), *pools, make(slots), **options)
        places = make(table), make(lengths)
        yield paged_decode.decode(make(q[:1]), *pools, *places, **options)
        yield prefill.prefill(make(q), *pools, *places, make(starts), **options)

    tensors = [torch.zeros((4, 2, 2, 16), device=place).to(dtype) for _ in range(2)]
    views = [pykv.asarray(x.view(torch.uint8) if kind == "e4m3" else x) for x in tensors]
    own = [xp.zeros((4, 2, 2, 16), spec.kinds[0].dtype) for _ in range(2)]
    got = attend(lambda x: pykv.asarray(to_torch(x, place)), views)
    for x, y in zip(got, attend(xp.asarray, own), strict=True):
        assert_same_bits(x, y)
    for t, x in zip(tensors, own, strict=True):
        assert bool((t.view(torch.uint8).cpu().numpy() == bits(x).view(np.uint8)).all())
        assert bool(t.view(torch.uint8).any())


@places
def test_bfloat16_both_ways(xp, place):
    """Every bit pattern; the same memory on both ways."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    t = to_torch(codes.view(BFLOAT16), place)
    a = pykv.asarray(t)
    assert a.dtype == BFLOAT16 and isinstance(a, xp.ndarray)
    assert (bits(a) == codes).all()
    back = torch.from_dlpack(a.view("int16")).view(torch.bfloat16)  # as pykv/README.md says
    assert back.data_ptr() == t.data_ptr() and back.dtype == t.dtype and back.shape == t.shape
    if place == "cuda":  # CuPy exports bfloat16 itself
        assert torch.from_dlpack(a).data_ptr() == t.data_ptr()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_codes_mean_what_they_mean_to_torch(kind):
    dtype = dict(e4m3=torch.float8_e4m3fn, e5m2=torch.float8_e5m2)[kind]
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(dtype).float().numpy()
    got = decode(pykv.asarray(codes), KINDS[kind])
    np.testing.assert_array_equal(got, want)


@places
def test_views_share_memory(xp, place):
    """Any strides, no dimensions, no elements; written through both sides."""
    t = torch.arange(24.0, device=place).reshape(4, 6)
    for view in (t, t[::2, 1:4], t.T, t[3, 5], t[:0], t.bfloat16()[:, ::3]):
        a = pykv.asarray(view)
        assert isinstance(a, xp.ndarray) and a.shape == tuple(view.shape)
        assert [s // a.itemsize for s in a.strides if a.size] == list(view.stride() * bool(a.size))
        a[...] = 7
        assert bool((view == 7).all())
        view[...] = 5
        assert (to_numpy(a) == 5).all()


@places
def test_copies_between_lists_of_tensors(xp, place):
    sources = [torch.full((3, n), float(n), device=place) for n in (4, 8)]
    destinations = [torch.zeros_like(x) for x in sources]
    block_copy.copy_arrays(sources, destinations)
    assert all(map(torch.equal, sources, destinations))


def functional(x):
    """What torch.func.functionalize passes to a function: a wrapper without memory of its own."""
    seen = []
    torch.func.functionalize(lambda x: (seen.append(x), x)[1])(x)
    return seen[0]


def shrunk(nbytes):
    """Elements 8 to 15 of a storage that then was given fewer bytes."""
    x = torch.ones(16)[8:]
    x.untyped_storage().resize_(nbytes)
    return x


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


def refused():
    grad = torch.ones(3, requires_grad=True)
    complex_ = torch.view_as_complex(torch.ones(3, 2)).conj()
    detach, codes = (
        r"its \.detach\(\): pykv has none",
        r"expected its codes, \.view\(torch.uint8\)",
    )
    return dict(
        grad=(grad, UnsupportedError, f"requires a gradient, expected {detach}"),
        result=(grad * 2, UnsupportedError, f"requires a gradient, expected {detach}"),
        parameter=(torch.nn.Parameter(grad), UnsupportedError, detach),
        meta=(torch.empty(3, device="meta"), DeviceError, "is on device meta, expected one on cpu"),
        sparse=(
            torch.eye(3).to_sparse(),
            UnsupportedError,
            "has layout torch.sparse_coo, expected",
        ),
        conj=(complex_, UnsupportedError, r"has torch's conj bit, expected .* \.resolve_conj\(\)"),
        neg=(complex_.imag, UnsupportedError, r"has torch's neg bit, .* \.resolve_neg\(\)"),
        e4m3=(torch.ones(3).to(torch.float8_e4m3fn), DtypeError, codes),
        e5m2=(torch.ones(3).to(torch.float8_e5m2), DtypeError, codes),
        nested=(
            torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
            UnsupportedError,
            "is nested, expected a dense tensor",
        ),
        functional=(functional(torch.ones(3)), UnsupportedError, "has 0 bytes in memory"),
        view=(functional(torch.ones(3)[1:].bfloat16()), UnsupportedError, "has 0 bytes in memory"),
        fake=(fake(torch.ones(3)), DtypeError, "is a FakeTensor, "),
        freed=(shrunk(0), UnsupportedError, "has 0 bytes in memory, expected 64 for its elements"),
        shrunk=(shrunk(60), UnsupportedError, "has 60 bytes in memory, expected 64"),
        list=([torch.ones(3)], DtypeError, "is a list, expected an array with __dlpack__"),
    )


@pytest.mark.parametrize("name", refused())
def test_what_no_array_can_say_is_refused(name):
    x, error, text = refused()[name]
    with pytest.raises(error, match=rf"^asarray: x .*{text}"):
        pykv.asarray(x)
    with pytest.raises(error, match=rf"^block_copy.copy_arrays: sources\[1\] .*{text}"):
        block_copy.copy_arrays([np.ones(3), x], [np.ones(3), np.ones(3)])


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own calls
def test_tangents_are_refused():
    """As gradients are."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(UnsupportedError, match=r"x has a tangent, expected its \.detach\(\)"):
            pykv.asarray(x)
        assert (pykv.asarray(x.detach()) == 1).all()


def test_storages_that_are_just_large_enough_pass():
    assert (pykv.asarray(shrunk(64)) == 1).all()
    assert pykv.asarray(shrunk(0)[:0]).shape == (0,)


def test_resolved_tensors_pass():
    x = torch.view_as_complex(torch.arange(6.0).reshape(3, 2)).conj()
    np.testing.assert_array_equal(pykv.asarray(x.resolve_conj()), [0 - 1j, 2 - 3j, 4 - 5j])
    np.testing.assert_array_equal(pykv.asarray(x.imag.resolve_neg()), [-1, -3, -5])


@pytest.mark.parametrize("op, arguments", OPS, ids=lambda x: getattr(x, "__name__", ""))
def test_tensors_themselves_are_refused_by_name(rng, op, arguments):
    """Ops take arrays, and say how a tensor becomes one."""
    given = filled(arguments, rng, np)
    for name, x in given.items():
        if isinstance(x, np.ndarray):
            with pytest.raises(
                DtypeError, match=rf"{name}(_pool)? is a Tensor, expected .*pykv\.asarray"
            ):
                op(**{**given, name: torch.from_numpy(x)})


# --- Streams --------------------------------------------------------------------------------------


def late(t, value):
    """Fill a tensor on torch's current stream, some 50 ms after that is asked for."""
    torch.cuda._sleep(100_000_000)
    t.fill_(value)


@pytest.fixture
def side():
    """A stream that no default stream waits for, kernels that are compiled, and ones."""
    x = torch.ones((2, 8), device="cuda")
    a = pykv.asarray(x)
    activation.swiglu(a)
    norm.rms_norm(a, a[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield x
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_one_stream_for_both(side):
    """Inside of on_stream torch's work and pykv's take turns, in place and with views kept."""
    a, b = pykv.asarray(side), pykv.asarray(side.clone())
    out = torch.zeros_like(side)
    with cuda.on_stream(torch.cuda.current_stream()):
        for value in (3.0, 5.0):
            late(side, value)
            activation.add(a, b)
            out += side
    torch.cuda.current_stream().synchronize()
    assert out.tolist() == [[10.0] * 8] * 2


@pytest.mark.gpu
def test_the_stream_of_a_call(side):
    a, out = pykv.asarray(side), torch.zeros((2, 4), device="cuda")
    view = pykv.asarray(out)
    late(side, 30.0)
    activation.swiglu(a, out=view, stream=torch.cuda.current_stream())
    assert out.tolist() == [[900.0] * 4] * 2


@pytest.mark.gpu
def test_conversions_order_streams(side):
    """asarray puts torch's work before CuPy's, from_dlpack CuPy's before torch's."""
    late(side, 30.0)
    assert torch.from_dlpack(activation.swiglu(pykv.asarray(side))).tolist() == [[900.0] * 4] * 2


@pytest.mark.gpu
def test_torch_captures(side):
    """A plain call into outputs that are given, and a prepared one, in torch.cuda.graph."""
    a, first, second = pykv.asarray(side), *torch.zeros((2, 2, 8), device="cuda")
    call = pykv.prepare(norm.rms_norm, a, a[0], out=pykv.asarray(second))
    out, graph = pykv.asarray(first), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream()
        norm.rms_norm(a, a[0], out=out, stream=stream)
        call(stream)
    for value in (2.0, 7.0):
        side.fill_(value)
        graph.replay()
        assert torch.allclose(first, torch.full_like(first, value)) and torch.equal(first, second)
