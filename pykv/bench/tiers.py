"""Time to the first token of a prompt, by where its keys and values come from.

    compute  nowhere: all tokens are computed
    cache    the cache of the model, which has them
    host     the host tier: full pages are copied to the cache, see pykv.tiers
    disk     files, which are read past the system's own cache
    process  shared memory, as that of another process of this machine: see pykv.transport

The last tokens, up to a page, are computed in any case. A codec makes pages smaller, and not exact.
Times are by the clock, of a whole call. Bytes are those of the full pages in their tier. The model
is fetched like that of `pykv run`. Cases of KVTC are those of an artefact that is given.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import uuid4

import numpy as np

from pykv.bench import Work, options, report
from pykv.bench.options import Case
from pykv.bench.report import Record
from pykv.errors import ParameterError
from pykv.kvtc import Artefact
from pykv.options import check_whole
from pykv.specs import KVSpec
from pykv.tiers import Tiers, disk
from pykv.tiers.sizes import artefact_of

DEVICE = "auto"
MODEL = "smollm2-135m"
TOKENS = 8000
SAMPLES = 5  # of each case: a call may take seconds
row = report.row_with_facts
_PLACES = (
    *(("compute", "none"), ("cache", "none"), ("process", "none")),
    *((place, codec) for codec in ("none", "int8", "int4") for place in ("host", "disk")),
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
    parser.add_argument(
        "--artefact", metavar="FILE:RATIO", help="of KVTC, as another codec: smollm2.kvtc:16"
    )
    parser.add_argument("--folder", help="where files go, on the disk in question; a temporary one")


def select(args: argparse.Namespace) -> list[Case]:
    """The cases, of a model, prompt and cache of one's own; what is given is looked at before any
    of them runs."""
    from pykv.llm import models

    op = "bench tiers"
    models.check(args.model)
    change: Case = dict(model=args.model, kv=str(KVSpec.parse(args.kv_dtype)))
    if args.tokens is not None:
        change["tokens"] = check_whole(op, "--tokens", args.tokens, 1)
    if args.folder is not None:
        change["folder"] = options.check_folder(op, args.folder)
    cases = list(QUICK if args.quick else CASES)
    if args.artefact is not None:
        found = artefact_of(args.artefact)
        if found is None:
            raise ParameterError(f"{op}: --artefact is {args.artefact!r}, expected FILE:RATIO")
        Artefact.load(found[0]).check_ratio(op, found[1])
        cases += [{**cases[0], "place": x, "codec": args.artefact} for x in ("host", "disk")]
    return [{**case, **change} for case in cases]


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
    take = _other_process(llm, case, prompt) if place == "process" else None
    answers = [llm.generate([prompt], first)[0].token_ids]  # no token was taken from a tier

    def run() -> float:
        _forget(llm, place)
        began = perf_counter()
        if take is not None:
            facts.update(take())
        answers[1:] = [llm.generate([prompt], first)[0].token_ids]
        seconds = perf_counter() - began  # no wait needed: the token is on the host
        facts.update({} if llm.tiers is None else speeds(llm.tiers))
        return seconds

    def check() -> bool:
        """The token is the first call's, unless a codec may change it; all pages were found."""
        facts["same_token"] = answers[1] == answers[0]
        is_right = facts["same_token"] or not llm.is_exact
        return bool(is_right and llm.stats.reused_tokens == found)

    nbytes = found * llm.cache.bytes_per_token
    return Work(run, check, bytes=nbytes, clocked=True, samples=SAMPLES, facts=facts)


def _open(case: Case, folder: Path, device: str) -> Any:
    """A model with the tiers of a case, which have room for its prompt; where a fourth of them is
    for first pages, too."""
    from pykv.llm import LLM, gguf, memory, models
    from pykv.llm.config import read_config

    spec, L = KVSpec.parse(case["kv"]), case["tokens"]
    file = gguf.read_model(models.fetch(case["model"]))
    need = memory.needed(file, read_config(file), None, spec, 2 * L + 64, np)
    size, place = f"{2 * need.cache}B", case["place"]
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


def _other_process(llm: Any, case: Case, prompt: list[int]) -> Callable[[], dict[str, float]]:
    """A function that takes the pages of a prompt from a region of shared memory, which another
    model would fill as this one does; it returns what it measured."""
    from pykv.llm import SamplingParams
    from pykv.transport import Handover, Local

    names = [f"bench-{os.getpid()}-{uuid4().hex[:8]}-{i}" for i in range(2)]
    local = [Local(name) for name in names]
    size = 2 * llm.cache.manager.page_size * llm.cache.bytes_per_token
    size = max(size, len(prompt) * llm.cache.bytes_per_token)
    source, target = (Handover(llm, transport, size=size) for transport in local)
    for transport in local:
        weakref.finalize(llm, transport.close)
    llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    source.offer(prompt)

    def take() -> dict[str, float]:
        before, began = target.taken_bytes, perf_counter()
        target.take(names[0], prompt)
        return dict(take_gbps=(target.taken_bytes - before) / 1e9 / (perf_counter() - began))

    return take


def _forget(llm: Any, place: str) -> None:
    """Leave the pages of the cache to a tier alone; not timed."""
    if llm.tiers is None and place != "process":
        return
    with llm.turn():
        manager = llm.cache.manager
        manager.free(manager.allocate(manager.num_free * manager.page_size))
        if place == "disk":
            llm.tiers.clear_host()
            drop_cached(llm.tiers.folder)


def drop_cached(folder: Path) -> None:
    """Have the system forget what it keeps of files, where it can be told."""
    for entry in disk.entries(folder) if hasattr(os, "posix_fadvise") else ():
        with open(entry.path, "rb") as file:
            os.fsync(file.fileno())  # the system drops only pages that are on the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speeds(tiers: Tiers) -> dict[str, float]:
    """GB/s of the copies alone, so far; of files those of all threads, one by one."""
    flows = {way: getattr(tiers.counters, way) for way in ("from_host", "from_disk")}
    return {
        f"{way}_gbps": flow.bytes / flow.seconds / 1e9 for way, flow in flows.items() if flow.pages
    }


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
        whole = medians.get((place, "none"))
        if codec != "none" and whole and median > 1.1 * whole:
            line += "; slower than without the codec, whose gain is room alone"
        lines.append(line)
    return "\n".join(lines)
