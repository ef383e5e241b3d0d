"""The plan interface of baracuda-kernels, as an adapter of ops: select once, then run many times.

    plan = PagedAppendPlan.select(PagedAppendDescriptor(batch, cache), np.float16)
    plan.run(PagedAppendArgs(key, value, k_data, v_data, indices, indptr, last_page_len))

A descriptor says what stays the same over the calls, arguments are the arrays of one call. `select`
refuses what no kernel covers, `can_implement` what does not fit the plan, each with one error, in a
fixed order; `run` does so first, and then calls the op. Plans keep no arrays. A loop over the same
arrays, as in decoding, is cheaper by `call = pykv.prepare(plan.run, args)`.

The protocol and the order of checks are those of baracuda-kernels' plans. These cover more: rows of
any float kind go into pages of any kind, of head sizes that are multiples of 8, at any strides, in
both layouts; a plan's `sku` says so. Its errors have these names here:

    Unsupported        UnsupportedError
    InvalidProblem     ParameterError for sizes, ShapeError for arrays
    MisalignedOperand  ShapeError
    WorkspaceTooSmall  CapacityError, with the bytes needed and those given
    Driver             CudaError

>>> from pykv.plan import PagedAppendArgs, PagedAppendDescriptor, PagedAppendPlan
>>> from pykv.plan import PagedCacheDescriptor
>>> cache = PagedCacheDescriptor(page_size=2, num_total_pages=4, num_kv_heads=1, head_dim=8)
>>> plan = PagedAppendPlan.select(PagedAppendDescriptor(1, cache), np.float16)
>>> k_data, v_data = np.zeros((2, 4, 1, 2, 8), np.float16)  # HND
>>> row = np.ones((1, 1, 8), np.float16)
>>> lists = [np.array(x, np.int32) for x in ([3], [0, 1], [1])]  # page 3, which has one token
>>> plan.run(PagedAppendArgs(row, row, k_data, v_data, *lists))
>>> k_data[3, 0, :, 0]
array([0., 1.], dtype=float16)
"""

from pykv.plan.append import (
    ContiguousAppendArgs,
    ContiguousAppendDescriptor,
    ContiguousAppendPlan,
    PagedAppendArgs,
    PagedAppendDescriptor,
    PagedAppendPlan,
)
from pykv.plan.base import PagedCacheDescriptor, PrecisionGuarantee, Preference, Sku
from pykv.plan.decode import PagedDecodeArgs, PagedDecodeDescriptor, PagedDecodePlan

__all__ = [
    "ContiguousAppendArgs",
    "ContiguousAppendDescriptor",
    "ContiguousAppendPlan",
    "PagedAppendArgs",
    "PagedAppendDescriptor",
    "PagedAppendPlan",
    "PagedCacheDescriptor",
    "PagedDecodeArgs",
    "PagedDecodeDescriptor",
    "PagedDecodePlan",
    "PrecisionGuarantee",
    "Preference",
    "Sku",
]
