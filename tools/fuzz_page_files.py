"""Load damaged page files; see fuzz.py.

    python tools/fuzz_page_files.py [COUNT] [--seed N] [--keep FOLDER]

Half of the inputs are files whose bytes, lengths or ends are damaged, the others ones whose header
is replaced, or in which an entry has another type or a wild value, with a checksum that holds or
not. A file that is refused must leave the cache as it was. Exits with 1 if there is a fault; --keep
writes the inputs that are faults.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import fuzz  # noqa: I001 - first, as it sets the number of threads

import numpy as np

from pykv import PagedKVCache, page_files
from pykv.errors import PykvError

SPECS = ("fp16", "int8", "k8v4:HND", "e4m3:head")
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 1e308, "", "\x1b[2J\n", "9" * 5000, [], [[]], {}, "int8", "F16"),
    *([0, 2**62], [-8, 0], [2**31, 2**31, 2**31]),
)


def make_cache(spec: str) -> PagedKVCache:
    """A small cache of random bits."""
    cache = PagedKVCache(2, 3, 2, 16, page_size=4, spec=spec)
    rng = np.random.default_rng(7)
    for x in arrays_of(cache):
        x[...] = rng.integers(1, 9, x.shape)
    return cache


def arrays_of(cache: PagedKVCache) -> list[Any]:
    return [x for x in (cache.k, cache.v, cache.k_scales, cache.v_scales) if x is not None]


def other_headers(data: bytes, count: int, seed: int) -> Iterator[fuzz.Mutant]:
    """Inputs whose header is well formed, or deeply nested."""
    size = int.from_bytes(data[:8], "little")
    for n in range(count):
        rng = random.Random(seed + n)
        header = json.loads(data[8 : 8 + size])
        for _ in range(rng.choice((1, 1, 3))):
            part = rng.choice([header, *header.values()])
            if isinstance(part, dict):
                part[rng.choice([*part, "other", "\x1b[1m"])] = copy.deepcopy(rng.choice(VALUES))
        if rng.randrange(2) and isinstance(header.get("__metadata__"), dict):
            header["__metadata__"]["sha256"] = digest_of(header, data[8 + size :])
        text = json.dumps(header).encode()
        if not rng.randrange(4):
            opening = rng.choice((b"[", b'{"a":', b'{"__metadata__":'))
            text = opening * rng.choice((1, 900, 100_000))
        yield f"{n} of seed {seed}: header", _file(text) + data[8 + size :]


def _file(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def digest_of(header: dict[str, Any], arrays: bytes) -> str:
    """The checksum that a file of this header, whose metadata are a dict, and these bytes needs."""
    metadata = header["__metadata__"]
    facts = {name: text for name, text in metadata.items() if name != "sha256"}
    table = {name: entry for name, entry in header.items() if name != "__metadata__"}
    text = json.dumps([facts, table], sort_keys=True).encode()
    return hashlib.sha256(text + arrays).hexdigest()


def attempt(data: bytes, path: Path) -> None:
    """Load into a cache of each spec; if none takes the file, the last refusal stands."""
    path.write_bytes(data)
    refusal = None
    for spec in SPECS:
        cache = make_cache(spec)
        try:
            page_files.load(path, cache)
            return
        except PykvError as error:
            refusal = error
        for x, old in zip(arrays_of(cache), arrays_of(make_cache(spec)), strict=True):
            assert x.tobytes() == old.tobytes(), "a file that is refused has changed the cache"
    assert refusal is not None
    raise refusal


def main() -> int:
    given = fuzz.arguments("Load damaged page files.", 150)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "mutant")
        inputs: list[fuzz.Mutant] = []
        for n, spec in enumerate(SPECS):
            page_files.save(path, make_cache(spec), model="m")
            data = path.read_bytes()
            attempt(data, path)  # the undamaged input must pass
            count = given.count * (n + 1) // len(SPECS) - given.count * n // len(SPECS)
            inputs += fuzz.mutants(data, count // 2, given.seed)
            inputs += other_headers(data, count - count // 2, given.seed)
        report = fuzz.run(lambda data: attempt(data, path), inputs)
    return report.finish(given.keep, ".safetensors")


if __name__ == "__main__":
    sys.exit(main())
