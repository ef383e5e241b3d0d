"""Write new key and value rows into a paged KV pool.

Dimensions: T new tokens, H KV heads, D head size, N pages in the pool, P tokens a page.
Kernel: kernels_cu/paged_append.cu.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, INT32, check, on_gpu
from pykv.errors import ShapeError

VARIANTS = [dict(NEW_T="float", KV_T="f16", ROW=row) for row in (192, 256, 1024)]


def append(k: Any, v: Any, k_pool: Any, v_pool: Any, slots: Any, *, stream: Any = None) -> None:
    """Write row t of `k` and `v` to slot `slots[t]` of the pools, in place.

    Args:
        k, v: [T, H, D] float32, float16 or bfloat16; the new rows, tokens at any stride.
        k_pool, v_pool: [N, P, H, D] float32, float16 or bfloat16; rows are rounded to their dtype.
        slots: [T] int32; page * P + offset, or negative to skip the row. Distinct where not
            negative.
        stream: see pykv.cuda.on_stream.

    Raises:
        ShapeError: dimensions disagree, or H * D is no multiple of 8.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.

    Runs where the arrays are. On a GPU it only enqueues, and slots are not range-checked.
    Rounds to nearest even, bit-exact. Source: vLLM's slot mapping.
    """
    op = "paged_append.append"
    dims = check(
        op,
        k=(k, "T | H D", FLOATS),
        v=(v, "T | H D", k.dtype),
        k_pool=(k_pool, "N P H D", FLOATS),
        v_pool=(v_pool, "N P H D", k_pool.dtype),
        slots=(slots, "T", INT32),
    )
    if dims["H"] * dims["D"] % 8:
        raise ShapeError(
            f"{op}: a row has {dims['H']} x {dims['D']} elements, expected a multiple of 8"
        )
    if dims["T"] == 0 or dims["H"] * dims["D"] == 0:
        return
    if on_gpu(k):
        _cuda(k, v, k_pool, v_pool, slots, stream)
    else:
        reference(k, v, k_pool, v_pool, slots)


def reference(k: Any, v: Any, k_pool: Any, v_pool: Any, slots: Any) -> None:
    """The definition, in NumPy: what `append` computes, and what the kernel is tested against."""
    N, P, H, D = k_pool.shape
    keep = slots >= 0
    k_pool.reshape(N * P, H, D)[slots[keep]] = k[keep]
    v_pool.reshape(N * P, H, D)[slots[keep]] = v[keep]


def _cuda(k: Any, v: Any, k_pool: Any, v_pool: Any, slots: Any, stream: Any) -> None:
    T, H, D = k.shape
    kernel = cuda.kernel(
        "paged_append",
        "paged_append",
        NEW_T=cuda.TYPE_NAMES[k.dtype],
        KV_T=cuda.TYPE_NAMES[k_pool.dtype],
        ROW=H * D,
    )
    k_stride, v_stride = (np.int64(x.strides[0] // x.itemsize) for x in (k, v))
    with cuda.on_stream(stream):
        cuda.launch(kernel, T, 128, k_pool, v_pool, k, v, slots, k_stride, v_stride)
