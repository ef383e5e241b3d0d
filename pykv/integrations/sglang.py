"""HiCache's storage of SGLang over the disk tier: pages in one folder that several servers share.

SGLang loads it by name, without a change of its own:

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "pykv", "module_path": "pykv.integrations.sglang", "class_name": "Storage",
      "folder": "/var/cache/kv", "limit": "50GiB"}'

Files are those of pykv.tiers.disk: renamed when whole, with a checksum, the least recently used
going first. Interface: sglang.srt.mem_cache.hicache_storage, as of 2026; its threads end in silence
on anything but answers, so what fails on the disk is a page that is not there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from pykv.errors import FormatError, ParameterError
from pykv.integrations.tensors import codes_of  # first: names the extra that is missing
from pykv.tiers.disk import DiskTier
from pykv.tiers.sizes import parse_bytes

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage  # isort: skip

LOADED_BY = {"backend_name", "module_path", "class_name"}  # words for SGLang itself
# Of its config: what bytes of a page depend on, beside tokens.
FACTS = (
    *("model_name", "tp_rank", "tp_size", "pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size"),
    *("is_mla_model", "is_page_first_layout"),
)


class Storage(HiCacheStorage):  # type: ignore[misc]
    """Pages by their keys, texts that SGLang makes from all tokens up to their end.

    Args:
        storage_config: SGLang's HiCacheStorageConfig, of whose `extra_config` are `folder`, and
            `limit` in bytes or as "50GiB".
        words: ignored.

    Attributes:
        refused: pages that the disk did not take, for want of room or by an error.
        damaged: files that did not hold what they should.

    Raises:
        ParameterError: `folder` or `limit` is missing or wrong, or there is another word.
        UnsupportedError, DtypeError: later, a page is no tensor on the host.

    Its methods wait for the disk, and may be called from several threads.
    """

    def __init__(self, storage_config: Any, words: Any = None):
        op = "sglang.Storage"
        given = dict(storage_config.extra_config or {})
        if unknown := given.keys() - LOADED_BY - {"folder", "limit"}:
            raise ParameterError(f"{op}: {', '.join(sorted(unknown))} unknown, expected none")
        for name in ("folder", "limit"):
            if name not in given:
                raise ParameterError(f"{op}: {name} is missing in the backend's extra config")
        self._folder = Path(given["folder"]).expanduser()
        self._limit = parse_bytes(op, "limit", given["limit"])
        self._facts = {name: str(getattr(storage_config, name, "")) for name in FACTS}
        self._tiers: dict[tuple[str, int], DiskTier] = {}  # by elements and bytes of a page
        self.refused = self.damaged = 0

    def _opened(self, name: str, tensor: Any) -> tuple[DiskTier, Any]:
        """The tier of pages like a tensor that lies in one piece, and its bytes, shared."""
        array = codes_of("sglang.Storage", name, tensor)
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise ParameterError(f"sglang.Storage: {name} is not in one piece on the host")
        sort = str(tensor.dtype), array.nbytes
        if sort not in self._tiers:
            facts = self._facts | dict(dtype=sort[0])
            self._tiers[sort] = DiskTier(self._folder, self._limit, facts, sort[1])
        return self._tiers[sort], array.reshape(-1).view(np.uint8)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Fill `target_location` with a page and return it; None where there is none."""
        tier, row = self._opened("target_location", target_location)
        try:
            return target_location if tier.read(_key(key), row) else None
        except FormatError:
            self.damaged += 1
        except OSError:
            self.refused += 1
        return None

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Keep the page `value`; whether it is there now."""
        tier, row = self._opened("value", value.contiguous())
        try:
            if _key(key) not in tier:
                tier.write(_key(key), row)
        except OSError:
            self.refused += 1
            return False
        return True

    def exists(self, key: str) -> bool:
        """Whether there is a page, of the sort of one of those that were got or set or are the
        registered pool's."""
        pool = getattr(self, "mem_pool_host", None)
        if pool is not None and not self._tiers:
            self._opened("page", pool.get_dummy_flat_data_page())
        return any(_key(key) in tier for tier in self._tiers.values())

    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any:
        return [self.get(*pair) for pair in zip(keys, target_locations, strict=True)]

    def batch_set(
        self, keys: Any, values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all([self.set(*pair) for pair in zip(keys, values, strict=True)])

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Read pages into the registered pool at host_indices[i * page_size]; which there were."""
        found, pool = [], self.mem_pool_host
        for key, index in zip(keys, host_indices[:: pool.page_size].tolist(), strict=True):
            page = self.get(key, pool.get_dummy_flat_data_page())
            if page is not None:
                pool.set_from_flat_data_page(index, page)
            found.append(page is not None)
        return found

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Keep pages of the registered pool; which are there now."""
        pool = self.mem_pool_host
        indices = host_indices[:: pool.page_size].tolist()
        return [
            self.set(key, pool.get_data_page(index, flat=True))
            for key, index in zip(keys, indices, strict=True)
        ]


def _key(key: str) -> bytes:
    """16 bytes, as the tier's keys are."""
    return hashlib.sha256(key.encode()).digest()[:16]
