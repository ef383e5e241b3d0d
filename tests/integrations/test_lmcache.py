"""The serde of LMCache, called as its adapters call one: objects with a `tensor`, the bytes at
their exact size. The package itself brings torch for CUDA, so its objects are stood in for."""

import sys
from types import SimpleNamespace

import pytest

import pykv
from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError
from pykv.kinds import KINDS, dequantize, quantize

torch = pytest.importorskip("torch")

from pykv.integrations import lmcache  # noqa: E402
from pykv.integrations.lmcache import Serde  # noqa: E402

SHAPE = (2, 3, 16, 64)  # K and V, layers, tokens, heads * D


def memory(tensor):
    return SimpleNamespace(tensor=tensor)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back(kind, dtype):
    """What comes back is what the kind's definition gives, row by row."""
    torch.manual_seed(0)
    x, serde = torch.randn(SHAPE).to(dtype), Serde(kind)
    size = serde.estimate_serialized_size(
        SimpleNamespace(shapes=[torch.Size(SHAPE)], dtypes=[dtype])
    )
    assert size == 2 * 3 * 16 * (64 * KINDS[kind].bits // 8 + 2)
    raw = torch.full((size + 8,), 0x55, dtype=torch.uint8)
    assert serde.serialize(memory(x), memory(raw), "key") == size
    assert (raw[size:] == 0x55).all()
    back = torch.full_like(x, float("nan"))
    assert serde.deserialize(memory(raw[:size]), memory(back), key="key") is None
    codes, scales = quantize(pykv.asarray(x), KINDS[kind])
    want = torch.from_numpy(dequantize(codes, KINDS[kind], scales)).to(dtype)
    assert torch.equal(back, want)
    assert (back.float() - x.float()).abs().max() < x.float().abs().max() / KINDS[kind].largest


def test_refusals():
    serde, x = Serde("int8"), torch.ones(4, 8)
    with pytest.raises(ParameterError, match="kind is 'kvtc', expected int8 or int4"):
        Serde("kvtc")
    with pytest.raises(CapacityError, match="39 bytes are given, expected 40"):
        serde.serialize(memory(x), memory(torch.empty(39, dtype=torch.uint8)))
    with pytest.raises(DtypeError, match="dst has no tensor"):
        serde.serialize(memory(x), memory(None))
    with pytest.raises(DtypeError, match="dst is not of contiguous bytes"):
        serde.serialize(memory(x), memory(torch.empty(40)))
    with pytest.raises(DtypeError, match="src has dtype int64"):
        serde.serialize(memory(x.long()), memory(torch.empty(40, dtype=torch.uint8)))
    with pytest.raises(ShapeError, match=r"src has shape \(4, 7\)"):
        serde.serialize(memory(torch.ones(4, 7)), memory(torch.empty(99, dtype=torch.uint8)))


def test_chunks_without_rows_and_shapes_that_are_none():
    serde, none = Serde("int4"), torch.empty(0, dtype=torch.uint8)
    assert serde.nbytes([(0, 64), (2, 0, 8)]) == 0
    assert serde.serialize(memory(torch.ones(0, 64)), memory(none)) == 0
    serde.deserialize(memory(none), memory(torch.ones(0, 64)))
    wrong = {ShapeError: [(), (2, 0), (2, 5)], ParameterError: [(-1, 4)]}
    wrong[DtypeError] = ["ab", None, (2.0, 4)]
    for error, shapes in wrong.items():
        for shape in shapes:
            with pytest.raises(error, match="lmcache.Serde: shapes"):
                serde.nbytes([shape])


def test_what_holds_no_tensors():
    serde, x = Serde("int8"), torch.ones(1, 8)
    raw = torch.zeros(serde.nbytes([(1, 8)]), dtype=torch.uint8)
    for other in (None, x.numpy(), x.tolist()):
        with pytest.raises(DtypeError, match="src has no tensor, expected a MemoryObj"):
            serde.serialize(memory(other), memory(raw))
        with pytest.raises(DtypeError, match="dst has no tensor, expected a MemoryObj"):
            serde.deserialize(memory(raw), memory(other))
    with pytest.raises(DtypeError, match="shapes is a NoneType, expected a list of shapes"):
        serde.nbytes(None)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bytes_of_another_shape(kind):
    """Their scales lie elsewhere."""
    serde, x = Serde(kind), torch.ones(4, 8)
    raw = torch.zeros(serde.nbytes([(4, 8)]), dtype=torch.uint8)
    serde.serialize(memory(x), memory(raw))
    for rows, error in ((2, ShapeError), (5, CapacityError)):
        back, expected = torch.full((rows, 8), 7.0), serde.nbytes([(rows, 8)])
        with pytest.raises(
            error, match=rf"{len(raw)} bytes.*, expected {expected} for \({rows}, 8"
        ):
            serde.deserialize(memory(raw), memory(back))
        assert (back == 7).all()


def test_register(monkeypatch):
    """With modules that stand in for LMCache's: the names, and what its factory is called with."""
    made, name = {}, "lmcache.v1.distributed.serde"
    factory = SimpleNamespace(
        register_serde_factory=lambda name, make: (
            made.update({name: make})
            if name not in made
            else pytest.fail("LMCache refuses a name that it knows")
        ),
        get_registered_serde_types=lambda: list(made),
    )
    processor = SimpleNamespace(AsyncSerdeProcessor=lambda *x, max_workers: (*x, max_workers))
    package = SimpleNamespace(factory=factory, async_processor=processor)
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), SimpleNamespace())
    monkeypatch.setitem(sys.modules, name, package)
    lmcache.register()
    lmcache.register()
    assert sorted(made) == ["pykv-int4", "pykv-int8"]
    serializer, deserializer, workers = made["pykv-int4"]({"max_workers": 2})
    assert serializer.nbytes([(1, 8)]) == 6 and serializer is deserializer and workers == 2
    with pytest.raises(ParameterError, match="bits, kind, size unknown, expected max_workers"):
        made["pykv-int8"](dict.fromkeys(("size", "kind", "bits")))
