"""Pages between a cache of a stated shape and its tiers: what a prefix takes to come back, and what
it costs others.

    host    a prefix of `tokens` comes back from host memory, by a codec or none, until its pages
            are there; GB/s are those of the pages in the cache, and without a codec there is a
            share of the link
    disk    from files, which the system has forgotten; `raw_gbps` is what as many threads read of
            the same files without a look at what is in them
    look    in which rows of host memory `pages` are; their hashes are at hand
    spill   a decode step of a model of noise while `pages` fall to host memory; `alone_ms` is the
            same step without them

Times are by the clock, from the call to the stream's end. Shapes are those of bench.synthetic and
of SmolLM2; the basis of KVTC is noise, as time does not depend on it, and its pages are not
compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from pykv.bench import Work, memory, model, options, report, synthetic
from pykv.bench.kvtc_codec import RATIO, artefact_of
from pykv.bench.options import Case
from pykv.bench.report import Record
from pykv.bench.tiers import drop_cached, speeds
from pykv.blocks import prefix_keys
from pykv.kvtc import Codec
from pykv.llm.matrices import STORED
from pykv.page_arrays import moving_arrays
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec
from pykv.testing import host
from pykv.tiers import Tiers, disk
from pykv.tiers.threads import THREADS

P = 16  # tokens a page
SAMPLES, STEPS = 7, 40  # of prefixes; decode steps of one sample
CHECKED = 4  # pages
_NOISE = 1_000_003  # random numbers, repeated; a prime count, so that no two pages are alike
SHAPES = {
    "smollm2": dict(L=30, H=3, D=64, r=1504),
    "8b": dict(L=32, H=8, D=128, r=8192),
    "tiny": dict(L=2, H=2, D=32, r=32),
}


def _cases(shape: str, tokens: int, pages: int, falling: tuple[int, ...], noise: str) -> list[Case]:
    one: Case = dict(shape=shape, tokens=tokens)
    listed: list[Case] = [
        dict(one, op="host", codec=codec) for codec in ("none", "int8", "int4", "kvtc")
    ]
    listed += [dict(one, op="disk", codec="none"), dict(op="look", pages=pages)]
    spilled = dict(shape=shape, op="spill", model=noise)
    return listed + [dict(spilled, pages=count) for count in falling]


CASES = [
    *_cases("8b", 8192, 10_000, (4, 16), "8b-q4_k"),
    *(dict(shape="smollm2", tokens=8192, op="host", codec=codec) for codec in ("none", "kvtc")),
]
QUICK = _cases("tiny", 80, 50, (2,), "")
row = report.row_with_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", help="where files go, on the disk in question; a temporary one")


def select(args: argparse.Namespace) -> list[Case]:
    """The cases, with a folder of one's own."""
    cases = QUICK if args.quick else CASES
    if args.folder is None:
        return cases
    folder = options.check_folder("bench tier_moves", args.folder)
    return [case | dict(folder=folder) for case in cases]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case."""
    op = case["op"]
    if op == "look":
        return _look(case["pages"])
    sizes = SHAPES[case["shape"]]
    L, H, D, r = (sizes[name] for name in "LHDr")
    tokens = case.get("tokens", 4 * P * case.get("pages", 0))
    nbytes = tokens * L * KVSpec("fp16", "fp16").bytes_per_token(H, D)
    if not memory.fits(xp, 3 * nbytes + 16 * L * H * D * r):
        return None
    cache = PagedKVCache(L, -(-tokens // P), H, D, page_size=P, xp=xp)
    folder = tempfile.TemporaryDirectory(dir=case.get("folder"))
    codec = {"kvtc": f"made.kvtc:{RATIO}", None: "none"}.get(case.get("codec"), case.get("codec"))
    disks = f"{folder.name}/tier:1TiB:{codec}" if op == "disk" else None
    own = None if op == "disk" else f"{2 * nbytes + (1 << 20)}B:{codec}"
    tiers = Tiers(cache, host=own, disk=disks, open_codec=partial(_open_codec, sizes))
    weakref.finalize(tiers, folder.cleanup)
    noise = rng.standard_normal(_NOISE)
    for x in moving_arrays(cache).values():
        for i in range(L):
            x[i] = xp.asarray(np.resize(noise[i:], x.shape[1:]).astype(x.dtype))
    if op == "spill":
        return _spill(case, cache, tiers, xp, rng)
    return _prefix(case, cache, tiers, tokens, xp, rng)


def _open_codec(sizes: dict[str, int], name: str, text: str, xp: Any) -> Codec:
    """KVTC of a basis of noise, by which all tokens are coded."""
    L, H, D, r = (sizes[name] for name in "LHDr")
    p = L * H * D
    noise = (np.random.default_rng(0).random(1 << 16) - 0.5).astype(np.float16)
    basis, mean = np.resize(noise * np.float16((12 / p) ** 0.5), (p, r)), np.zeros(p, np.float16)
    artefact = artefact_of(L, H, D, [(mean, basis)] * 2)
    return Codec(artefact, RATIO, xp)


def _wait(xp: Any) -> None:
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def _forget(cache: PagedKVCache) -> None:
    """Have all published pages fall."""
    manager = cache.manager
    manager.free(manager.allocate(manager.num_free * P))


# --- A prefix -------------------------------------------------------------------------------------


def _prefix(
    case: Case, cache: PagedKVCache, tiers: Tiers, tokens: int, xp: Any, rng: np.random.Generator
) -> Work:
    """A prefix that falls, and comes back."""
    manager, ids = cache.manager, rng.integers(0, 1000, tokens).tolist()
    pages = manager.allocate(tokens)
    some = [0, 1, len(pages) // 2, len(pages) - 1][: min(CHECKED, len(pages))]
    arrays = list(moving_arrays(cache).values())
    want = [host(x[:, [pages[i] for i in some]]) for x in arrays]
    manager.publish(pages, ids)
    manager.free(pages)
    tiers.flush()
    _forget(cache)
    facts: dict[str, Any] = {}
    folder = tiers.folder
    nbytes = tokens // P * P * cache.bytes_per_token

    def run() -> float:
        _forget(cache)
        if folder is not None:
            tiers.clear_host()
            facts["raw_gbps"] = _read_raw(folder)
            drop_cached(folder)
        _wait(xp)
        began = perf_counter()
        tiers.fetch(ids)
        _wait(xp)
        seconds = perf_counter() - began
        facts.update(speeds(tiers))
        if folder is not None:
            size = sum(entry.nbytes for entry in disk.entries(folder))
            facts["share_of_raw"] = size / 1e9 / seconds / facts["raw_gbps"]
        return seconds

    def check() -> bool:
        """Pages are what they were, as far as the codec keeps them."""
        found = manager.reuse(ids)
        is_whole = len(found) == tokens // P
        near = dict(none=0.0, int8=0.05, int4=0.7).get(case["codec"], np.inf)
        for x, y in zip(arrays, want, strict=True):
            got = host(x[:, [found[i] for i in some]]) if is_whole else y + np.float16(1e4)
            off = np.abs(got.astype(np.float32) - y.astype(np.float32)).max()
            is_whole = is_whole and bool(off <= near * np.abs(y).max())
        manager.free(found)
        return is_whole

    is_raw = case["op"] == "host" and case["codec"] == "none"  # codes are fewer bytes on the link
    ceiling = "h2d" if is_raw and xp is not np else None
    return Work(run, check, nbytes, ceiling=ceiling, clocked=True, samples=SAMPLES, facts=facts)


def _read_raw(folder: Path) -> float:
    """GB/s of as many threads as tiers have, who read all files into memory that is there."""
    drop_cached(folder)
    paths = [entry.path for entry in disk.entries(folder)]
    buffers = [bytearray(max(os.path.getsize(path) for path in paths)) for _ in range(THREADS)]

    def read(n: int) -> int:
        total = 0
        for path in paths[n::THREADS]:
            with open(path, "rb", buffering=0) as file:
                total += file.readinto(buffers[n]) or 0
        return total

    with ThreadPoolExecutor(THREADS) as threads:
        began = perf_counter()
        return sum(threads.map(read, range(THREADS))) / 1e9 / (perf_counter() - began)


# --- Others ---------------------------------------------------------------------------------------


def _look(count: int) -> Work:
    """Pages in rows of host memory, found by their hashes."""
    cache = PagedKVCache(1, 1, 1, 8, page_size=1)
    row = Tiers(cache, host="1MiB")._rows[-1].form.nbytes
    tiers = Tiers(cache, host=count * row)
    keys = list(prefix_keys.of_pages("bench", list(range(count)), 1))
    for key, slot in zip(keys, tiers._rows[-1].host.claim(count), strict=True):
        tiers._rows[-1].add(key, slot, 0)
    found = 0

    def run() -> float:
        nonlocal found
        began = perf_counter()
        found = tiers.find(keys, 0)
        return perf_counter() - began

    return Work(run, lambda: found == count, bytes=0, clocked=True, samples=4 * SAMPLES)


def _spill(case: Case, cache: PagedKVCache, tiers: Tiers, xp: Any, rng: Any) -> Work | None:
    """Decode steps, each of which makes pages fall; once they would repeat, host memory forgets."""
    step = _step_of(case, xp, rng)
    if step is None:
        return None
    manager, facts = cache.manager, dict[str, Any]()
    pages = manager.allocate(manager.num_free * P)
    manager.publish(pages, list(range(len(pages) * P)))
    published, most = manager.published, case["pages"]

    def steps(falls: bool) -> float:
        _wait(xp)
        began = perf_counter()
        for n in range(STEPS):
            if falls:
                at = n * most % len(published)
                tiers.fall(published[at : at + most])
                if at + most >= len(published):
                    for rows in tiers._rows:
                        rows.host.clear()
            step()
        _wait(xp)
        return (perf_counter() - began) / STEPS

    def run() -> float:
        alone, beside = steps(False), steps(True)
        tiers.clear_host()
        facts.update(alone_ms=1e3 * alone, slower=beside / alone - 1)
        return beside

    nbytes = most * P * cache.bytes_per_token
    return Work(run, lambda: True, nbytes, clocked=True, samples=SAMPLES, facts=facts)


def _step_of(case: Case, xp: Any, rng: Any) -> Callable[[], object] | None:
    """A decode step of 16 sequences of 512 tokens; without a model something to do."""
    if not case["model"]:
        return lambda: None
    assert synthetic.is_name(case["model"])
    work = model.make(
        dict(model=case["model"], weights=STORED, kv="fp16", B=16, Q=1, L=512), xp, rng
    )
    return None if work is None else work.run


def conclude(records: list[Record]) -> str:
    """What codecs are worth, and what decoding loses."""
    medians = {
        (r["case"]["shape"], r["case"]["codec"]): r["median"]
        for r in records
        if r["ok"] and r["case"]["op"] == "host"
    }
    lines = []
    for (shape, codec), median in medians.items():
        raw = medians.get((shape, "none"))
        if raw and codec != "none":
            lines.append(f"{shape}, host, {codec}: {raw / median:.2f} of the rate without a codec")
    for r in records:
        facts, case = r.get("facts") or {}, r["case"]
        if "share_of_raw" in facts:
            share = facts["share_of_raw"]
            lines.append(f"{case['shape']}, disk, {case['codec']}: {share:.2f} of plain reading")
        if case["op"] == "look" and r["ok"]:
            lines.append(f"{case['pages']:,} pages are found in {r['median'] / 1e3:.2f} ms")
        if "slower" in facts:
            pages, slower = case["pages"], facts["slower"]
            lines.append(f"decode beside {pages} falling pages a step: {slower:+.1%}")
    return "\n".join(lines)
