"""KV-cache software for NVIDIA GPUs: paged caches, attention and a small LLM runtime.

NumPy arrays run the NumPy reference, CuPy arrays run CUDA kernels that NVRTC compiles on first
import and keeps as cubins; no compiler is installed and none is needed.

    from pykv.ops import paged_append   one module for each operation
    pykv.PagedKVCache                   the arrays of one cache
    pykv.LLM("smollm2-135m")            a model that answers through it

Environment: PYKV_CACHE_DIR (where cubins and models are kept) and PYKV_COMPILE=lazy (compile at
first use instead of at import). README.md lists all; a value that it does not name is warned of.
"""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import pykv.terminal as _terminal  # noqa: F401 - first: then Ctrl-C ends the command quietly
from pykv import blocks, errors
from pykv.cuda import graph, prepare
from pykv.errors import PykvError
from pykv.foreign import asarray, from_pointer
from pykv.options import chosen as _chosen
from pykv.pool import PagedKVCache
from pykv.sequence_cache import SequenceCache
from pykv.specs import KVSpec

if _TYPE_CHECKING:
    from pykv import (
        cuda,
        elastic,
        eviction,
        kinds,
        kvtc,
        layout,
        ops,
        page_files,
        pages,
        plan,
        transfer,
    )
    from pykv.llm import LLM, Completion, SamplingParams

__all__ = [
    "LLM",
    "Completion",
    "KVSpec",
    "PagedKVCache",
    "PykvError",
    "SamplingParams",
    "SequenceCache",
    "asarray",
    "blocks",
    "cuda",
    "elastic",
    "errors",
    "eviction",
    "from_pointer",
    "graph",
    "kinds",
    "kvtc",
    "layout",
    "ops",
    "page_files",
    "pages",
    "plan",
    "prepare",
    "transfer",
]

_RUNTIME = ("LLM", "Completion", "SamplingParams")  # need the extra `llm`, so imported when used


def __getattr__(name: str) -> _Any:
    if name in _RUNTIME:
        return getattr(_import_module("pykv.llm"), name)
    if name in __all__:  # a module that nobody has imported yet
        return _import_module(f"pykv.{name}")
    raise AttributeError(f"module 'pykv' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public; modules of this folder that others import are not."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _compile_kernels() -> None:
    """Compile the usual kernels for the GPUs present; without a driver, do nothing at all."""
    from pykv import cuda

    if _chosen("PYKV_COMPILE", "lazy") == "lazy" or not cuda.has_driver():
        return
    archs = cuda.architectures()
    if archs:
        cuda.warmup(archs)


_compile_kernels()
