"""KV-cache software for NVIDIA GPUs: paged caches, attention and a small LLM runtime.

NumPy arrays run the NumPy reference, CuPy arrays run CUDA kernels that NVRTC compiles on first
import and keeps as cubins; no compiler is installed and none is needed.

    from pykv.ops import paged_append   one module for each operation
    pykv.PagedKVCache                   the arrays of one cache
    pykv.LLM("smollm2-135m")            a model that answers through it

Environment: PYKV_CACHE_DIR (where cubins and models are kept) and PYKV_COMPILE=lazy (compile at
first use instead of at import).
"""

__version__ = "0.1.0"

import os as _os
from typing import Any as _Any

from pykv import blocks
from pykv.arrays import asarray, from_pointer
from pykv.errors import PykvError
from pykv.kinds import KVSpec
from pykv.pool import PagedKVCache
from pykv.sequence_cache import SequenceCache

_RUNTIME = ("LLM", "Completion", "SamplingParams")  # need the extra `llm`, so imported when used

__all__ = [
    "KVSpec",
    "PagedKVCache",
    "PykvError",
    "SequenceCache",
    "asarray",
    "blocks",
    "from_pointer",
    *_RUNTIME,
]


def __getattr__(name: str) -> _Any:
    if name in _RUNTIME:
        from pykv import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'pykv' has no attribute {name!r}")


def _prepare() -> None:
    """Compile the usual kernels for the GPUs present; without a driver, do nothing at all."""
    from pykv import cuda

    if _os.environ.get("PYKV_COMPILE") == "lazy" or not cuda.has_driver():
        return
    archs = cuda.architectures()
    if archs:
        cuda.warmup(archs)


_prepare()
