"""A storage backend for SGLang's HiCache on the disk tier: a folder of pages that servers share.

An unchanged SGLang loads it by name:

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "pykv", "module_path": "pykv.integrations.sglang", "class_name": "Storage",
      "folder": "/var/cache/kv", "limit": "50GiB"}'

Files are those of pykv.tiers.disk: renamed when complete, with a checksum, evicted by least recent
use. Exceptions would end SGLang's threads silently, so a disk failure counts as a missing page.
Interface: sglang.srt.mem_cache.hicache_storage and managers.cache_controller of 0.5.23, and of
earlier versions, whose host pools refer to the device's pool. Their `interface_v1` would copy pages
as `get` and `set` do, so it is not offered.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from pykv.arrays import is_numpy
from pykv.errors import FormatError, ParameterError, ShapeError
from pykv.integrations.tensors import codes_of  # first: names the extra that is missing
from pykv.options import check_type
from pykv.tiers.disk import DiskTier
from pykv.tiers.sizes import parse_bytes

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage  # isort: skip

LOADED_BY = {"backend_name", "module_path", "class_name"}  # options for SGLang itself


class Storage(HiCacheStorage):  # type: ignore[misc]
    """Pages by their keys, texts that SGLang derives from all tokens up to the page's end.

    Args:
        storage_config: SGLang's HiCacheStorageConfig. Its `extra_config` has `folder` and `limit`,
            in bytes or as "50GiB"; and, for pools of bytes without their FP8 kind, as in SGLang
            0.5.23, `kv_cache_dtype`, such as "fp8_e4m3".
        words: ignored.

    Attributes:
        refused: pages that could not be written or read, for lack of room or by an error.
        damaged: files whose contents did not match their checksum or metadata.

    Raises:
        ParameterError: `folder` or `limit` is missing or wrong, or there is an unknown option.
        ShapeError, ParameterError: later, if a page has another size than the registered pool's,
            is not contiguous, or pages and keys differ in number.

    Methods block on the disk. Thread-safe.
    """

    def __init__(self, storage_config: Any, words: Any = None):
        op = "sglang.Storage"
        given = dict(storage_config.extra_config or {})
        if unknown := given.keys() - LOADED_BY - {"folder", "limit", "kv_cache_dtype"}:
            raise ParameterError(f"{op}: {', '.join(sorted(unknown))} unknown, expected none")
        for name in ("folder", "limit"):
            if name not in given:
                raise ParameterError(f"{op}: {name} is missing in the backend's extra config")
        self._folder = Path(os.path.expanduser(given["folder"]))
        self._limit = parse_bytes(op, "limit", given["limit"])
        self._kv_cache_dtype = given.get("kv_cache_dtype", "auto")
        check_type(op, "kv_cache_dtype", self._kv_cache_dtype, str, 'a text such as "fp8_e4m3"')
        self._facts = _facts(storage_config)
        self._tier: DiskTier | None = None
        self._nbytes = 0  # bytes of a page
        self._lock = threading.Lock()  # guards the fields below
        self.refused = self.damaged = 0

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Open the folder for pages of this pool. Before this call, no page exists.

        Raises:
            ParameterError: the pool holds bytes, and `kv_cache_dtype` is missing.
            PermissionError: others can write to the folder.
            OSError: it cannot be made or read.
        """
        super().register_mem_pool_host(mem_pool_host)
        pool = mem_pool_host
        # Host pools hold uint8 for either FP8 kind; newer ones lack the device's pool.
        dtype = str((getattr(pool, "device_pool", None) or pool).dtype)
        if dtype.endswith("uint8"):
            dtype = self._kv_cache_dtype
        if dtype == "auto":
            raise ParameterError(
                "sglang.Storage: the pool holds bytes, expected kv_cache_dtype in the backend's "
                "extra config, which says what they mean"
            )
        facts = self._facts | dict(
            pool=type(pool).__name__,
            layout=pool.layout,
            page_size=str(pool.page_size),
            dtype=dtype,
        )
        self._nbytes = pool.get_dummy_flat_data_page().nbytes
        self._tier = DiskTier(self._folder, self._limit, facts, self._nbytes)

    def _row(self, name: str, page: Any) -> Any:
        """The bytes of a page, as a view."""
        array = codes_of("sglang.Storage", name, page)
        if not is_numpy(array) or not array.flags.c_contiguous:
            raise ParameterError(f"sglang.Storage: {name} is not in one piece on the host")
        if array.nbytes != self._nbytes:
            raise ShapeError(
                f"sglang.Storage: {name} has {array.nbytes:,} bytes, expected {self._nbytes:,} as "
                "a page of the registered pool"
            )
        return array.reshape(-1).view(np.uint8)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Fill `target_location` with a page and return it; None if the page is missing."""
        if self._tier is None or target_location is None:
            return None
        row = self._row("target_location", target_location)
        try:
            return target_location if self._tier.read(_key(key), row) else None
        except FormatError:
            with self._lock:
                self.damaged += 1
        except OSError:
            with self._lock:
                self.refused += 1
        return None

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store the page `value`; returns whether it is stored now."""
        if self._tier is None or value is None:
            return False
        row = self._row("value", value.contiguous())
        try:
            if _key(key) not in self._tier:
                self._tier.write(_key(key), row)
        except OSError:
            with self._lock:
                self.refused += 1
            return False
        return True

    def exists(self, key: str) -> bool:
        """Whether a page of the registered pool is stored."""
        return self._tier is not None and _key(key) in self._tier

    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any:
        return [self.get(*pair) for pair in _pairs("target_locations", keys, target_locations)]

    def batch_set(
        self, keys: Any, values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all([self.set(*pair) for pair in _pairs("values", keys, values)])

    def clear(self) -> None:
        """Delete the pages of the registered model, rank and pool, and no others.

        Raises:
            OSError: the system refuses; without it SGLang would report success.
        """
        if self._tier is not None:
            self._tier.clear()


def _pairs(name: str, keys: Any, pages: Any) -> list[tuple[str, Any]]:
    """Pairs of a key and its page; None for each page if `pages` is None."""
    pages = [None] * len(keys) if pages is None else pages
    if len(pages) != len(keys):
        raise ShapeError(
            f"sglang.Storage: {name} has {len(pages)} pages, expected {len(keys)} as there are keys"
        )
    return list(zip(keys, pages, strict=True))


def _facts(config: Any) -> dict[str, str]:
    """The facts that page contents depend on, besides tokens and the pool. Ranks of a
    tensor-parallel model hold different heads. Each rank of an MLA model holds all; only rank 0
    writes."""
    facts = dict(model_name=str(config.model_name))
    if not config.is_mla_model:
        facts |= dict(tp_rank=str(config.tp_rank), tp_size=str(config.tp_size))
    others = ["pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size"]  # absent in some versions
    if getattr(config, "dcp_size", 1) > 1:  # ranks that hold a part of each page's tokens
        others += ["dcp_rank", "dcp_size", "logical_page_size"]
    return facts | {name: str(getattr(config, name, "")) for name in others}


def _key(key: str) -> bytes:
    """A 16-byte key for the tier."""
    return hashlib.sha256(key.encode()).digest()[:16]
