"""HiCache's storage over the disk tier, called as SGLang's threads call it. The package itself
needs CUDA, so its base class is stood in for by one with the abstract methods that it documents."""

import abc
import importlib
import sys
from types import SimpleNamespace

import pytest

from pykv.errors import ParameterError

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

    def __init__(self):
        self.data = torch.arange(24.0).reshape(8, 3)

    def get_dummy_flat_data_page(self):
        return torch.zeros(6)

    def get_data_page(self, index, flat):
        return self.data[index : index + 2].flatten()

    def set_from_flat_data_page(self, index, page):
        self.data[index : index + 2] = page.reshape(2, 3)


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

    def make(extra=None, **config):
        words = dict(backend_name="pykv", folder=str(tmp_path / "kv"), limit="2MiB")
        storage = module.Storage(SimpleNamespace(extra_config=words | (extra or {}), **config), {})
        storage.register_mem_pool_host(Pool())
        return storage

    yield make
    sys.modules.pop("pykv.integrations.sglang", None)


def test_pages_come_back_in_another_process(made):
    one, other = made(model_name="m", tp_rank=0), made(model_name="m", tp_rank=0)
    keys, indices = ["a", "b", "c"], torch.tensor([4, 5, 0, 1, 2, 3])
    want = one.mem_pool_host.data.clone()
    assert one.batch_set_v1(keys, indices) == [True] * 3
    other.mem_pool_host.data.zero_()
    assert other.batch_exists([*keys, "d"]) == 3
    assert other.batch_get_v1(["a", "d", "c"], indices) == [True, False, True]
    got = other.mem_pool_host.data
    assert torch.equal(got[4:6], want[4:6]) and torch.equal(got[2:4], want[2:4])
    assert not got[:2].any() and not got[6:].any()
    assert made(model_name="m", tp_rank=1).batch_exists(keys) == 0


def test_single_pages(made):
    storage, page = made(), torch.randn(6).bfloat16()
    assert storage.set("k", page) and storage.batch_set(["l"], [page * 2])
    assert torch.equal(storage.get("k", torch.zeros_like(page)), page)
    pages = storage.batch_get(["l", "none"], [torch.zeros_like(page) for _ in range(2)])
    assert torch.equal(pages[0], page * 2) and pages[1] is None


def test_damage_is_a_page_that_is_not_there(made, tmp_path):
    storage = made()
    assert storage.batch_set_v1(["a"], torch.tensor([0, 1])) == [True]
    (path,) = tmp_path.rglob("*.page")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert storage.batch_get_v1(["a"], torch.tensor([0, 1])) == [False] and storage.damaged == 1


def test_a_full_disk_refuses(made, monkeypatch):
    storage = made(extra=dict(limit=100))
    assert storage.batch_set_v1(["a"], torch.tensor([0, 1])) == [False] and storage.refused == 1


def test_refusals(made):
    with pytest.raises(ParameterError, match="sglang.Storage: floder unknown"):
        made(extra=dict(floder="/"))
    with pytest.raises(ParameterError, match="limit"):
        made(extra=dict(limit="many"))
    with pytest.raises(ParameterError, match="target_location is not in one piece"):
        made().get("a", torch.zeros(4, 4)[:, 1])
