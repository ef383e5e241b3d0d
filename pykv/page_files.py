"""Pages of a cache in files: save some, load them into another cache.

A file is one of pykv.tensor_files with the arrays [L, n, ...] of the pages and those of given
scales [L, ...]; its facts are those in which two caches must agree, how many pages there are, and
`model`. With a codec it is a stream of pykv.kvtc.stream.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv import cuda, stored_pages, tensor_files, whole_files
from pykv.arrays import load_cupy, on_gpu
from pykv.errors import FormatError, ParameterError
from pykv.number_texts import counted
from pykv.options import check_type
from pykv.page_arrays import Ids, check_codec, check_may_write, check_targets, facts_of, page_ids

if TYPE_CHECKING:
    from pykv.kvtc import Codec

FORMAT = "pykv.pages.1"


def save(
    path: str | os.PathLike[str],
    cache: Any,
    pages: Ids | None = None,
    *,
    model: str = "",
    codec: Codec | None = None,
    tokens: int | None = None,
    hadamard: bool = False,
) -> None:
    """Write pages to a file, which any reader of safetensors opens.

    Args:
        path: of the file. One that exists is replaced at once, when all is on the disk, and keeps
            its permissions; of a symbolic link the target is. A process that is killed leaves the
            old file, and a hidden `.pykv-*` beside it, which the next save to `path` removes.
        cache: see pykv.pages.
        pages: page ids; None: all.
        model: whatever tells whose cache this is; `load` compares it. Left out with a codec,
            whose artefact tells.
        codec, tokens, hadamard: as of pages.swap_out; the file is then a stream of pykv.kvtc.

    Raises:
        ParameterError: a page does not exist, `path` is a folder, a pipe or a device, or an option
            is of no meaning with, or without, a codec.
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
    check_type(op, "model", model, str, "a text")
    ids = page_ids(op, "pages", range(facts["pages"]) if pages is None else pages, facts["pages"])
    check_codec(op, codec, hadamard, tokens)
    if codec is not None and model:
        raise ParameterError(f"{op}: model is {model!r}, expected none with a codec")
    arrays = stored_pages.fetch(cache, ids, codec, tokens, hadamard)
    if codec is not None:
        whole_files.replace(path, [memoryview(arrays["stream"])])
        return
    tensor_files.write(path, _metadata(facts, len(ids), model), arrays)


def load(
    path: str | os.PathLike[str],
    cache: Any,
    pages: Ids | None = None,
    *,
    model: str | None = None,
    codec: Codec | None = None,
    hadamard: bool = False,
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
        codec, hadamard: as of pages.swap_in; the cache may then be of any spec, and pages those of
            the sequence, which may be more than the file needs.

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
    if model is not None:
        check_type(op, "model", model, str, "a text")
    cuda.refuse_prepare(op, "it reads a file; pages.swap_in can be prepared")
    facts, path = facts_of(op, "cache", cache), whole_files.regular_path(op, path)
    check_codec(op, codec, hadamard)
    if codec is not None:
        if model is not None:
            raise ParameterError(f"{op}: model is {model!r}, expected none with a codec")
        ids = page_ids(
            op, "pages", range(facts["pages"]) if pages is None else pages, facts["pages"]
        )
        check_targets(op, "pages", ids, facts["pages"])
        return _load_coded(op, path, cache, ids, codec, hadamard)
    with open(path, "rb") as file:
        header = tensor_files.read_header(op, file, path, "file of pages", FORMAT)
        free = ("pages",) if model is not None else ("pages", "model")
        tensor_files.check_facts(op, path, header, _metadata(facts, 0, model or ""), free)
        count = header.number(op, path, "pages")
        if pages is None and count != facts["pages"]:
            raise FormatError(
                f"{op}: {path} has {counted(count, 'page')}, expected all {facts['pages']}, or a "
                "list of pages"
            )
        ids = page_ids(op, "pages", range(count) if pages is None else pages, facts["pages"])
        check_targets(op, "pages", ids, facts["pages"])
        check_may_write(op, "cache", cache)
        if len(ids) != count:
            raise FormatError(
                f"{op}: {path} has {counted(count, 'page')}, expected {len(ids)} like pages"
            )
        stored = stored_pages.take(op, file, path, header, cache, count, {})
    stored_pages.check_scales(op, path, stored, cache)
    stored_pages.put(cache, ids, stored)
    return count


def _load_coded(op: str, path: Path, cache: Any, ids: Any, codec: Codec, hadamard: bool) -> int:
    """Read a stream into pages of a sequence."""
    from pykv.kvtc import parse  # here: few callers have a codec

    try:
        coded = parse(path.read_bytes())
    except FormatError as error:
        raise FormatError(f"{op}: {path}: {error}") from None
    there = coded.to(load_cupy() if on_gpu(cache.k) else np)
    tokens, page_size = coded.header.tokens, int(facts_of(op, "cache", cache)["page_size"])
    table = ids.astype(np.int32)
    codec.decompress(there, cache, table, positions=range(tokens), hadamard=hadamard)
    stored_pages.wait(cache)
    return -(-tokens // page_size)


def _metadata(facts: dict[str, Any], count: int, model: str) -> dict[str, str]:
    """The fingerprint; safetensors takes text alone."""
    found = {name: str(fact) for name, fact in facts.items()}
    return {**found, "format": FORMAT, "pages": str(count), "model": model}
