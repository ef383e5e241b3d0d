"""Feed damaged page files to pykv.page_files.load: none may crash it, keep it for long, end in an
error that is not pykv's own, or change a cache that refuses it.

    tools/fuzz_page_files.py 1500 --seed 1000
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fuzz import main, mutate_bytes
from pykv import PagedKVCache, page_files

SPECS = ("fp16", "int8", "k8v4:HND", "e4m3:head")
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 1e308, "", "\x1b[2J\n", "9" * 5000, [], [[]], {}, "int8", "F16"),
    *([0, 2**62], [-8, 0], [2**31, 2**31, 2**31]),
)


def make_cache(spec: str) -> PagedKVCache:
    """A small cache of random bits."""
    cache = PagedKVCache(2, 3, 2, 16, page_size=4, spec=spec)
    rng = np.random.default_rng(7)
    for x in (cache.k, cache.v, cache.k_scales, cache.v_scales):
        if x is not None:
            x[...] = rng.integers(1, 9, x.shape)
    return cache


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, or the header's entries; of these the checksum is made to hold, half of the
    time. Or a header that only looks like one."""
    size = int.from_bytes(data[:8], "little")
    match rng.randrange(5):
        case 0:
            opening = rng.choice((b"[", b'{"a":', b'{"__metadata__":'))
            text = opening * rng.choice((1, 900, 100_000))
            return len(text).to_bytes(8, "little") + text
        case 1 | 2:
            return mutate_bytes(rng, data)
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 3))):
        part = rng.choice([header, *header.values()])
        if isinstance(part, dict):
            part[rng.choice([*part, "other", "\x1b[1m"])] = rng.choice(VALUES)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and rng.randrange(2):
        facts = {name: text for name, text in metadata.items() if name != "sha256"}
        table = {name: entry for name, entry in header.items() if name != "__metadata__"}
        digest = hashlib.sha256(json.dumps([facts, table], sort_keys=True).encode())
        digest.update(data[8 + size :])
        metadata["sha256"] = digest.hexdigest()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read(path: Path) -> None:
    """Load into a cache of each spec; the last refusal stands."""
    refusal = None
    for spec in SPECS:
        cache = make_cache(spec)
        try:
            page_files.load(path, cache)
        except Exception as error:
            refusal = error
            if "\n" in str(error) or "\x1b" in str(error):
                raise ValueError(f"the text of an error is {str(error)!r}") from error
            if cache.k.tobytes() != make_cache(spec).k.tobytes():
                raise ValueError("a file that is refused has changed the cache") from error
            if not isinstance(error, page_files.FormatError):
                raise
        else:
            return
    if refusal is not None:
        raise refusal


def good_files() -> list[bytes]:
    """A file of each spec."""
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for spec in SPECS:
            page_files.save(f"{folder}/x", make_cache(spec), model="m")
            files.append(Path(folder, "x").read_bytes())
    return files


if __name__ == "__main__":
    raise SystemExit(main(good_files(), read, mutate))
