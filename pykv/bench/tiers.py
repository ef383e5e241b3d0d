"""Time to the first token of a prompt, by where its keys and values come from.

    compute  nowhere: all tokens are computed
    cache    the cache of the model, which has them
    host     the host tier: full pages are copied to the cache, see pykv.tiers
    disk     files, which are read past the system's own cache

The last tokens, up to a page, are computed in any case. A codec makes pages smaller, and not exact.
Times are by the clock, of a whole call. Bytes are those of the full pages in their tier. The model
is fetched like that of `pykv run`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import weakref
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from pykv.bench import Work, report
from pykv.bench.options import Case
from pykv.bench.report import Record
from pykv.tiers import disk

DEVICE = "auto"
MODEL = "smollm2-135m"
TOKENS = 8000
SAMPLES = 5  # of each case: a call may take seconds
_PLACES = (
    *(("compute", "none"), ("cache", "none")),
    *((place, codec) for codec in ("none", "int8") for place in ("host", "disk")),
)
CASES: list[Case] = [
    dict(model=MODEL, tokens=TOKENS, kv="fp16", place=place, codec=codec)
    for place, codec in _PLACES
]
QUICK: list[Case] = [{**case, "tokens": 40} for case in CASES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help="as of pykv run", metavar="NAME|FILE")
    parser.add_argument("--tokens", type=int, help=f"of the prompt ({TOKENS})")
    parser.add_argument("--kv-dtype", default="fp16", help="of the cache (%(default)s)")
    parser.add_argument("--folder", help="where files go, on the disk in question; a temporary one")


def select(args: argparse.Namespace) -> list[Case]:
    """The cases, of a model, prompt and cache of one's own."""
    change: Case = dict(model=args.model, kv=args.kv_dtype)
    if args.tokens is not None:
        change["tokens"] = args.tokens
    if args.folder is not None:
        change["folder"] = args.folder
    return [{**case, **change} for case in (QUICK if args.quick else CASES)]


def make(case: Case, xp: Any, rng: np.random.Generator) -> Work | None:
    """The work of a case: one call of a model whose cache holds nothing else."""
    from pykv.llm import SamplingParams

    place, L = str(case["place"]), int(case["tokens"])
    folder = tempfile.TemporaryDirectory(dir=case.get("folder"))
    llm = _open(case, Path(folder.name, "tier"), "cpu" if xp is np else "cuda")
    weakref.finalize(llm, folder.cleanup)
    prompt = rng.integers(0, llm.model.config.vocab, L).tolist()
    first = SamplingParams(max_tokens=1, ignore_eos=True)
    found = (L - 1) // llm.cache.page_size * llm.cache.page_size if place != "compute" else 0
    facts: dict[str, Any] = {}
    answers = [llm.generate([prompt], first)[0].token_ids]  # of tokens that were all computed

    def run() -> float:
        _forget(llm, place)
        began = perf_counter()
        answers[1:] = [llm.generate([prompt], first)[0].token_ids]
        seconds = perf_counter() - began  # the token is on the host
        facts.update(_speeds(llm))
        return seconds

    def check() -> bool:
        """The token is the first call's, unless a codec may change it; all pages were found."""
        facts["same_token"] = answers[1] == answers[0]
        is_right = facts["same_token"] or case["codec"] != "none"
        return bool(is_right and llm.stats.reused_tokens == found)

    nbytes = found * llm.cache.bytes_per_token
    return Work(run, check, bytes=nbytes, clocked=True, samples=SAMPLES, facts=facts)


def _open(case: Case, folder: Path, device: str) -> Any:
    """A model with the tiers of a case, which have room for its prompt."""
    from pykv.llm import LLM, gguf, memory, models
    from pykv.llm.config import read_config
    from pykv.specs import KVSpec

    spec, L = KVSpec.parse(case["kv"]), case["tokens"]
    file = gguf.read_model(models.fetch(case["model"]))
    need = memory.needed(file, read_config(file), None, spec, 2 * L + 64, np)
    size, place = f"{need.cache}B", case["place"]
    tiers: dict[str, Any] = {}
    if place == "host":
        tiers["host_cache"] = f"{size}:{case['codec']}"
    if place == "disk":
        tiers |= dict(host_cache=size, disk_cache=f"{folder}:1TiB:{case['codec']}")
    return LLM(
        case["model"],
        device=device,
        kv_dtype=spec,
        pool_tokens=L + 32,
        prefix_cache=place != "compute",
        **tiers,
    )


def _forget(llm: Any, place: str) -> None:
    """Leave the pages of the cache to a tier alone; not timed."""
    if llm.tiers is None:
        return
    with llm.turn():
        manager = llm.cache.manager
        manager.free(manager.allocate(manager.num_free * manager.page_size))
        if place == "disk":
            llm.tiers.clear_host()
            _drop_cached(llm.tiers.folder)


def _drop_cached(folder: Path) -> None:
    """Have the system forget what it keeps of files, where it can be told."""
    for entry in disk.entries(folder) if hasattr(os, "posix_fadvise") else ():
        with open(entry.path, "rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet stays in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _speeds(llm: Any) -> dict[str, float]:
    """GB/s of the copies alone, so far; of files those of all threads, one by one."""
    if llm.tiers is None:
        return {}
    flows = {way: getattr(llm.tiers.counters, way) for way in ("from_host", "from_disk")}
    return {
        f"{way}_gbps": flow.bytes / flow.seconds / 1e9 for way, flow in flows.items() if flow.pages
    }


def row(record: Record) -> dict[str, Any]:
    return {**report.row(record), **record.get("facts", {})}


def conclude(records: list[Record]) -> str:
    """Each place beside computing, and what does not pay."""
    medians = {(r["case"]["place"], r["case"]["codec"]): r["median"] for r in records if r["ok"]}
    computed = medians.get(("compute", "none"))
    lines = []
    for (place, codec), median in medians.items():
        line = f"{place} ({codec}): {median / 1e3:,.1f} ms to the first token"
        if computed and place != "compute":
            line += f", {median / computed:.2f} of the time of computing it"
            if median > 0.8 * computed:
                line += ": this does not pay here"
                line += "; a codec, or a faster disk, may" if place == "disk" else ""
        lines.append(line)
    return "\n".join(lines)
