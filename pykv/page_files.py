"""Pages of a cache in files: save some, load them into another cache.

A file is a safetensors file: 8 bytes with the size of a JSON header, the header, and the arrays
[L, n, ...] (those of given scales [L, ...]), each contiguous, bfloat16 as its bits. The header's
"__metadata__" holds the fingerprint and a SHA-256 of it and of all bytes of the arrays. Source:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pykv import cuda, whole_files
from pykv.arrays import load_cupy, on_gpu, to_host
from pykv.errors import DtypeError, FormatError
from pykv.page_arrays import (
    Ids,
    check_may_write,
    check_targets,
    facts_of,
    given_scales,
    moving_arrays,
    page_ids,
    same_values,
)
from pykv.pages import host_pages, swap_in, swap_out

FORMAT = "pykv.pages.1"
_MAX_HEADER = 1 << 20  # bytes; ours take less than 1 KiB
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "U16", "int8": "I8", "uint8": "U8"}


def save(
    path: str | os.PathLike[str], cache: Any, pages: Ids | None = None, *, model: str = ""
) -> None:
    """Write pages to a file, which any reader of safetensors opens.

    Args:
        path: of the file. One that exists is replaced at once, when all is on the disk, and keeps
            its permissions; of a symbolic link the target is. A process that is killed leaves the
            old file, and a hidden `.pykv-*` beside it, which the next save to `path` removes.
        cache: see pykv.pages.
        pages: page ids; None: all.
        model: whatever tells whose cache this is; `load` compares it.

    Raises:
        ParameterError: a page does not exist, or `path` is a folder, a pipe or a device.
        DtypeError: `cache` is no cache, `path` no path, or `model` no text.
        OSError: the file cannot be written; what was there before is still there.

    Several threads and processes may save to one path: one of their files is there in the end, and
    readers find a whole file at any time. Waits for CuPy's current stream. Needs host memory for
    the pages.

    >>> import tempfile
    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=1, head_dim=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pykv.page_files.save(f"{folder}/prefix", cache, [1, 2], model="mine")
    ...     pykv.page_files.load(f"{folder}/prefix", cache, [0, 3], model="mine")
    2
    """
    op = "page_files.save"
    cuda.refuse_prepare(op, "it writes a file; pages.swap_out can be prepared")
    facts, path = facts_of(op, "cache", cache), whole_files.regular_path(op, path)
    if not isinstance(model, str):
        raise DtypeError(f"{op}: model is a {type(model).__name__}, expected a text")
    ids = page_ids(op, "pages", range(facts["pages"]) if pages is None else pages, facts["pages"])
    store = swap_out(cache, ids)
    if on_gpu(cache.k):
        load_cupy().cuda.get_current_stream().synchronize()
    tensors = {
        **moving_arrays(store),
        **{name: to_host(x) for name, x in given_scales(store).items()},
    }
    metadata, table = _metadata(facts, len(ids), model), _table(tensors)
    metadata["sha256"] = _digest(metadata, table, tensors)
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8
    whole_files.replace(
        path, [len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())]
    )


def load(
    path: str | os.PathLike[str], cache: Any, pages: Ids | None = None, *, model: str | None = None
) -> int:
    """Read what `save` wrote into pages of a cache.

    Args:
        path: of the file.
        cache: of the spec and sizes that the file was saved with, but any N.
            Scales that heads or tensors share must be those of the file, or all zero, which is
            unset; then they become the file's. Others would be wrong for the cache's other pages,
            and for those that were swapped out: whoever needs neither sets them to zero before.
        pages: page ids, as many as the file has; its page i becomes page pages[i]. None: the file
            has all N pages of the cache.
        model: what the file must have been saved with; None: anything.

    Returns:
        How many pages there are.

    Raises:
        FormatError: this is no such file, it is damaged, or of another spec, size or model. The
            cache is as before.
        ParameterError: a page does not exist, or is listed twice; or `path` is a folder, a pipe or
            a device.
        DtypeError: `cache` is no cache, or `path` no path.
        OSError: the file cannot be read.

    Waits for CuPy's current stream. Needs host memory for the pages.
    """
    op = "page_files.load"
    if model is not None and not isinstance(model, str):
        raise DtypeError(f"{op}: model is a {type(model).__name__}, expected a text")
    cuda.refuse_prepare(op, "it reads a file; pages.swap_in can be prepared")
    facts, path = facts_of(op, "cache", cache), whole_files.regular_path(op, path)
    with open(path, "rb") as file:
        metadata, table, begin = _read_header(op, file, path)
        count = _check_metadata(op, path, metadata, facts, model)
        if pages is None and count != facts["pages"]:
            raise FormatError(
                f"{op}: {path} has {count} pages, expected all {facts['pages']}, or a list of pages"
            )
        ids = page_ids(op, "pages", range(count) if pages is None else pages, facts["pages"])
        check_targets(op, ids, facts["pages"])
        check_may_write(op, "cache", cache)
        if len(ids) != count:
            raise FormatError(f"{op}: {path} has {count} pages, expected {len(ids)} like pages")
        store = host_pages(cache, count)
        given = {name: to_host(x).copy() for name, x in given_scales(cache).items()}
        tensors = {**moving_arrays(store), **given}
        expected = _table(tensors)
        for name in {**expected, **table}:
            if table.get(name) != expected.get(name):
                has = f"{_shown(name)}={_shown(table.get(name))}"
                raise FormatError(f"{op}: {path} has {has}, expected {expected.get(name)}")
        size = os.fstat(file.fileno()).st_size
        want = begin + sum(x.nbytes for x in tensors.values())
        if size != want:
            raise FormatError(f"{op}: {path} has {size} bytes, expected {want}")
        for x in tensors.values():
            file.readinto(_bytes(x))  # too few show in the checksum
    if _digest(metadata, table, tensors) != metadata["sha256"]:
        raise FormatError(f"{op}: {path} is damaged: its checksum does not hold")
    for name, x in given.items():
        known = to_host(getattr(cache, name))
        if known.any() and not same_values(x, known):
            raise FormatError(f"{op}: {path} has other {name}, expected those of the cache, or 0")
    for name, x in given.items():
        scales = getattr(cache, name)
        scales[...] = load_cupy().asarray(x) if on_gpu(scales) else x
    swap_in(cache, ids, store)
    if on_gpu(cache.k):
        load_cupy().cuda.get_current_stream().synchronize()
    return count


def _bytes(x: Any) -> memoryview:
    return memoryview(x.reshape(-1).view(np.uint8))


def _table(tensors: dict[str, Any]) -> dict[str, Any]:
    """The header of a file with these arrays."""
    table: dict[str, Any] = {}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        table[name] = dict(
            dtype=_CODES[x.dtype.name], shape=list(x.shape), data_offsets=[begin, end]
        )
    return table


def _metadata(facts: dict[str, Any], count: int, model: str) -> dict[str, str]:
    """The fingerprint; safetensors takes text alone."""
    found = {name: str(fact) for name, fact in facts.items()}
    return {**found, "format": FORMAT, "pages": str(count), "model": model}


def _digest(metadata: dict[str, str], table: dict[str, Any], tensors: dict[str, Any]) -> str:
    facts = {name: text for name, text in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([facts, table], sort_keys=True).encode())
    for x in tensors.values():
        digest.update(_bytes(x))
    return digest.hexdigest()


def _read_header(op: str, file: BinaryIO, path: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """Metadata, tensors, and where the arrays begin."""
    first = file.read(8)
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > _MAX_HEADER:
        raise FormatError(f"{op}: {path} is no file of pages: its header has {size} bytes")
    try:
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__")
        found = metadata["format"]
        is_text = all(isinstance(fact, str) for fact in metadata.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{op}: {path} is no file of pages: its header is damaged") from error
    if found != FORMAT:
        raise FormatError(f"{op}: {path} has format {_shown(found)!r}, expected {FORMAT!r}")
    if not is_text:
        raise FormatError(f"{op}: {path} has metadata that is no text")
    return metadata, header, 8 + size


def _check_metadata(
    op: str, path: Path, metadata: dict[str, str], facts: dict[str, Any], model: str | None
) -> int:
    """Hold the fingerprint against the cache; returns the number of pages."""
    wanted = {name: str(fact) for name, fact in facts.items() if name != "pages"}
    if model is not None:
        wanted["model"] = model
    for name, want in wanted.items():
        if metadata.get(name) != want:
            has = _shown(metadata.get(name))
            raise FormatError(f"{op}: {path} has {name}={has}, expected {want}")
    count = metadata.get("pages", "")
    if not (re.fullmatch("[0-9]{1,9}", count) and "sha256" in metadata):
        raise FormatError(f"{op}: {path} is no file of pages: its header is damaged")
    return int(count)


def _shown(value: Any) -> str:
    """What a file holds, for a message of one line: a terminal must not obey it."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
