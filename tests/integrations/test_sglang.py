"""HiCache's storage over the disk tier, called as SGLang's threads call it. The package itself
needs CUDA, so its base class is stood in for by one with the abstract methods that it documents."""

import abc
import importlib
import sys
from types import SimpleNamespace

import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError

torch = pytest.importorskip("torch")


class Base(abc.ABC):
    def register_mem_pool_host(self, pool):
        self.mem_pool_host = pool

    @abc.abstractmethod
    def get(self): ...

    batch_get = set = batch_set = exists = get

    def batch_exists(self, keys, extra_info=None):
        return next((i for i, key in enumerate(keys) if not self.exists(key)), len(keys))


class Pool:
    """Two tokens a page, three floats a token."""

    page_size = 2

    def __init__(self, layout="layer_first", dtype=torch.float32):
        self.layout, self.device_pool = layout, SimpleNamespace(dtype=dtype)
        self.data = torch.arange(24.0).reshape(8, 3)

    def get_dummy_flat_data_page(self):
        return torch.zeros(6)

    def get_data_page(self, index, flat=True):
        return self.data[index : index + 2].flatten()

    def set_from_flat_data_page(self, index, page):
        self.data[index : index + 2] = page.reshape(2, 3)


class LaterPool(Pool):
    """As SGLang 0.5.23 has them, which do not know the pool of the device."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        del self.device_pool


class OtherPool(Pool):
    """As large a page of another sort."""


CONFIG = dict(model_name="m", is_mla_model=False, tp_rank=0, tp_size=2, pp_rank=0, pp_size=1)


def backup(storage, keys, indices):
    """Pages of the pool go to the storage, by the calls of SGLang's cache controller."""
    pool = storage.mem_pool_host
    starts = indices[:: pool.page_size]
    return storage.batch_set(keys, [pool.get_data_page(i) for i in starts])


def prefetch(storage, keys, indices):
    """Pages come to the pool likewise, up to the first that is not there; how many."""
    pool = storage.mem_pool_host
    pages = storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    for count, page in enumerate(pages):
        if page is None:
            return count
        pool.set_from_flat_data_page(indices[count * pool.page_size], page)
    return len(pages)


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A function that makes a storage over one folder, as another process would."""
    name = "sglang.srt.mem_cache.hicache_storage"
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), SimpleNamespace())
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(HiCacheStorage=Base))
    monkeypatch.delitem(sys.modules, "pykv.integrations.sglang", raising=False)
    module = importlib.import_module("pykv.integrations.sglang")

    def make(extra=None, pool=None, registered=True, **config):
        words = dict(backend_name="pykv", folder=str(tmp_path / "kv"), limit="2MiB")
        words = CONFIG | dict(extra_config=words | (extra or {})) | config
        storage = module.Storage(SimpleNamespace(**words), {})
        if registered:
            storage.register_mem_pool_host(pool or Pool())
        return storage

    yield make
    sys.modules.pop("pykv.integrations.sglang", None)


def test_pages_come_back_in_another_process(made):
    one, other = made(), made()
    keys, indices = ["a", "b", "c"], torch.tensor([4, 5, 0, 1, 2, 3])
    want = one.mem_pool_host.data.clone()
    assert backup(one, keys, indices)
    other.mem_pool_host.data.zero_()
    assert other.batch_exists([*keys, "d"]) == 3
    assert prefetch(other, ["a", "c", "d", "b"], indices) == 2
    got = other.mem_pool_host.data
    assert torch.equal(got[4:6], want[4:6]) and torch.equal(got[:2], want[2:4])
    assert not got[2:4].any() and not got[6:].any()


@pytest.mark.parametrize(
    "words",
    [
        dict(model_name="n"),
        dict(tp_rank=1),
        dict(tp_size=4),
        dict(pp_rank=1),
        dict(attn_cp_rank=1),
        dict(is_mla_model=True),
        dict(dcp_size=2, dcp_rank=1),
        dict(pool=Pool("page_head")),
        dict(pool=Pool(dtype=torch.float8_e5m2)),
        dict(pool=type("Pool", (Pool,), dict(page_size=1))()),
        dict(pool=OtherPool()),
    ],
    ids=lambda words: next(iter(words)),
)
def test_other_bytes_have_files_of_their_own(made, words):
    """Pages as large, whose bytes mean something else."""
    assert backup(made(), ["a"], torch.tensor([0, 1]))
    assert made().exists("a") and not made(**words).exists("a")


def test_pools_that_do_not_know_the_devices(made):
    assert backup(made(pool=LaterPool()), ["a"], torch.tensor([0, 1]))
    assert made(pool=LaterPool()).exists("a")
    assert not made(pool=LaterPool(torch.int32)).exists("a")
    with pytest.raises(ParameterError, match="the pool holds bytes, expected kv_cache_dtype"):
        made(pool=LaterPool(torch.uint8))
    kinds = [dict(extra=dict(kv_cache_dtype=kind)) for kind in ("fp8_e4m3", "fp8_e5m2")]
    assert backup(made(pool=LaterPool(torch.uint8), **kinds[0]), ["b"], torch.tensor([0, 1]))
    there = [made(pool=LaterPool(torch.uint8), **words).exists("b") for words in kinds]
    assert there == [True, False]
    for kind, error in (("auto", ParameterError), (8, DtypeError)):
        with pytest.raises(error, match="expected kv_cache_dtype|kv_cache_dtype is an int"):
            made(pool=LaterPool(torch.uint8), extra=dict(kv_cache_dtype=kind))


def test_pools_that_say_their_dtype_are_told_apart_by_it(made):
    """Whatever kv_cache_dtype says: two bytes may be float16 or bfloat16."""
    extra = dict(extra=dict(kv_cache_dtype="auto"))
    assert backup(made(pool=LaterPool(torch.float16), **extra), ["a"], torch.tensor([0, 1]))
    there = [
        made(pool=LaterPool(dtype), **extra).exists("a")
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert there == [True, False]


def test_ranks_of_an_mla_model_share_what_the_first_writes(made):
    ranks = [made(is_mla_model=True, tp_rank=i) for i in range(2)]
    assert backup(ranks[0], ["a"], torch.tensor([0, 1]))
    assert [rank.batch_exists(["a"]) for rank in ranks] == [1, 1]
    assert prefetch(ranks[1], ["a"], torch.tensor([6, 7])) == 1
    data = ranks[1].mem_pool_host.data
    assert torch.equal(data[6:], data[:2])


def test_single_pages(made):
    storage, page = made(), torch.randn(12).bfloat16()
    assert storage.set("k", page) and storage.batch_set(["l"], [page * 2])
    for pages in ([page], [page] * 3):  # else the first would have been written
        with pytest.raises(ShapeError, match=f"values has {len(pages)} pages, expected 2 as ther"):
            storage.batch_set(["x", "y"], pages)
        with pytest.raises(ShapeError, match="target_locations has . pages, expected 2"):
            storage.batch_get(["k", "l"], pages)
    assert not storage.exists("x")
    assert torch.equal(storage.get("k", torch.zeros_like(page)), page)
    pages = storage.batch_get(["l", "none"], [torch.zeros_like(page) for _ in range(2)])
    assert torch.equal(pages[0], page * 2) and pages[1] is None


def test_calls_without_pages_have_answers(made):
    """SGLang's signatures let them be None; and before there is a pool, no page can be there."""
    storage, page = made(), torch.ones(6)
    assert storage.set("k", page)
    assert storage.get("k") is None and storage.batch_get(["k", "l"]) == [None, None]
    assert storage.set("m") is False and storage.batch_set(["m"]) is False
    assert storage.exists("k") and not storage.exists("m")
    early = made(registered=False)
    assert early.get("k", page) is None and not early.set("k", page) and not early.exists("k")


def test_damage_is_a_page_that_is_not_there(made, tmp_path):
    storage = made()
    assert backup(storage, ["a"], torch.tensor([0, 1]))
    (path,) = tmp_path.rglob("*.page")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert prefetch(storage, ["a"], torch.tensor([0, 1])) == 0 and storage.damaged == 1


def test_a_full_disk_refuses(made):
    storage = made(extra=dict(limit=100))
    assert not backup(storage, ["a"], torch.tensor([0, 1])) and storage.refused == 1


def test_clear_deletes_the_pages_of_the_registered_pool(made):
    """In one process for all of them, and of no other sort of pages."""
    storage, again, other = made(), made(), made(pool=OtherPool())
    for one in (storage, other):
        assert backup(one, ["a", "b"], torch.arange(4))
    storage.clear()
    assert not any(one.exists(key) for one in (storage, again) for key in "ab")
    assert prefetch(storage, ["a"], torch.tensor([0, 1])) == 0
    assert other.exists("a") and other.exists("b")
    assert backup(again, ["a"], torch.tensor([0, 1])) and storage.exists("a")


def test_refusals(made, tmp_path):
    for word in ("floder", "interface_v1"):  # the latter would make SGLang call what is not there
        with pytest.raises(ParameterError, match=f"sglang.Storage: {word} unknown"):
            made(extra={word: 1})
    with pytest.raises(ParameterError, match="limit"):
        made(extra=dict(limit="many"))
    with pytest.raises(ParameterError, match="target_location is not in one piece"):
        made().get("a", torch.zeros(6, 4)[:, 1])
    with pytest.raises(ShapeError, match="value has 20 bytes, expected 24"):
        made().set("a", torch.zeros(5))
    (tmp_path / "kv").chmod(0o777)
    with pytest.raises(PermissionError):
        made()
