"""The tensor-core kernel of `pykv.ops.paged_decode`: its coverage, sizes and launch.

Dimensions: as in pykv/ops/paged_decode.py; T queries of a sequence, TILES tiles of eight query rows
(heads of a group, times queries), W workspace elements.
Kernel: kernels_cu/paged_decode_mma.cu.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from pykv import attention, cuda
from pykv.arrays import BFLOAT16, FLOATS
from pykv.specs import KVSpec

STEM = "paged_decode_mma"
ROWS = 8  # query rows of a tile
WARPS = 4
BLOCK = 32 * WARPS
MIN_KEYS = 128  # of a range of keys; fewer are not worth a merge
BLOCKS_OF_SM = (1, 2, 3)  # blocks an SM may run, by kind; more need not mean more ranges
CLUSTER = 8  # blocks that join the states of one sequence through each other's shared memory
CLUSTER_KEYS = 4096  # limit of a cluster; for more keys more blocks pay
COUNTERS = 4096  # at the start of the workspace, zero before and after each call


class Sizes(NamedTuple):
    """The dimensions of a call; `capacity` is M * P."""

    B: int
    T: int
    HQ: int
    H: int
    D: int
    P: int
    M: int

    @property
    def rows(self) -> int:
        """Query rows of a KV head."""
        return self.HQ // self.H * self.T

    @property
    def tiles(self) -> int:
        return self.H * -(-self.rows // ROWS)

    @property
    def capacity(self) -> int:
        return min(self.M * self.P, 2**31 - 1)


def covers(sm: int, spec: KVSpec, D: int) -> bool:
    """Whether the kernel takes pools of this kind and head size on this SM.

    Four lanes share a row of K and eight a row of V, in whole words of 32 bits.
    """
    k, v = spec.kinds
    if 32 in (k.bits, v.bits) or sm < (80 if "bf16" in (k.name, v.name) else 75):
        return False
    return D % 16 == 0 and D <= 256 and k.bits * D % 128 == 0 and v.bits * D % 256 == 0


@cache
def block_sizes(sm: int, spec: KVSpec, q_dtype: Any, D: int) -> dict[str, int]:
    """The sizes that the kernel is told as defines, which it holds against those that it computes.

    Stages are of keys and of values from sm_80 on, where copies run by themselves, else of one or
    the other. Rows of up to 128 bytes are padded to a power of two, so that none crosses a line.
    Long queries stay in shared memory, with the terms that rounding to the mma's type leaves. More
    keys a tile would spill registers; conversion of codes takes longer than their loads, so an SM
    runs more such blocks.
    """
    keys = 32 if spec.has_scales and D <= 128 else 16
    row_bytes = [kind.row_bytes(D) for kind in spec.kinds]
    stages = [keys * (n if n > 128 else 1 << (n - 1).bit_length()) for n in row_bytes]
    terms = 1 + (q_dtype.itemsize == 4) + (spec.k == "bf16" and q_dtype != BFLOAT16)
    return dict(
        BLOCK=BLOCK,
        BLOCKS=3 if spec.has_scales and D <= 128 and q_dtype.itemsize == 2 and sm >= 80 else 2,
        ROWS=ROWS,
        KEYS=keys,
        MIN_KEYS=MIN_KEYS,
        COUNTERS=COUNTERS,
        STAGE_BYTES=sum(stages) if sm >= 80 else max(stages),
        Q_BYTES=terms * D * 16 if D > 128 else 0,
        STATE_PITCH=D + 16 if D % 32 == 0 else D,  # floats; two rows fall on different banks
    )


def shared_bytes(sm: int, spec: KVSpec, q_dtype: Any, sizes: Sizes) -> int:
    """Shared memory of a block: stages of the warps, long queries, and the warps' states."""
    block = block_sizes(sm, spec, q_dtype, sizes.D)
    states = min(sizes.rows, ROWS) * (4 * block["STATE_PITCH"] + 8)
    if sm < 80 and sizes.D <= 128:
        return WARPS * max(block["STAGE_BYTES"], states)
    return WARPS * (block["STAGE_BYTES"] + block["Q_BYTES"] + states)


def fits(sm: int, spec: KVSpec, q_dtype: Any, sizes: Sizes, more_bytes: int = 0) -> bool:
    """Whether the kernel takes such pools, and a block may have the shared memory that it needs.

    Args:
        more_bytes: of shared memory that qkv_decode needs beside.
    """
    if not covers(sm, spec, sizes.D):
        return False
    limit = 64 << 10 if sm == 75 else cuda.sm_shared_bytes(sm) - 1024
    # And static variables.
    return shared_bytes(sm, spec, q_dtype, sizes) + more_bytes + 128 <= limit


def takes_strides(scalars: dict[str, Any], k_pool: Any, v_pool: Any) -> bool:
    """Whether the kernel takes pools on a GPU that lie like this; it counts elements from a page or
    token to the next in 32 bits.

    Args:
        scalars: of a kernel, with strides of the pools.
    """
    steps = [n for name, n in scalars.items() if name.endswith(("page", "token"))]
    return all(0 <= n < 2**30 for n in steps) and attention.whole_vectors(k_pool, v_pool)


def num_ranges(sizes: Sizes, blocks: int, fixed_split: int | None) -> int:
    """Parts into which the keys of all sequences are cut, for each tile.

    As many as run at once, or a small multiple of them where that wastes less, but no more than
    there can be work for. Lengths do not enter, so a captured graph stays valid.
    """
    tiles = sizes.tiles
    best = max(1, min(blocks, COUNTERS) // tiles)
    for waves in range(1, 9):
        ranges = min(waves * blocks, COUNTERS) // tiles
        if ranges * tiles >= 0.9 * waves * blocks:
            best = ranges
            break
    unit = fixed_split or MIN_KEYS
    return max(1, min(best, sizes.B * max(1, -(-sizes.capacity // unit))))


def num_slots(sizes: Sizes, ranges: int, fixed_split: int | None) -> int:
    """States that rows may leave in the workspace, for each tile; 0 where no row is ever cut."""
    if fixed_split:
        pieces = -(-sizes.capacity // fixed_split)
        return sizes.B * pieces if pieces > 1 else 0
    return 2 * ranges if ranges > 1 else 0


def workspace_size(sizes: Sizes, slots: int) -> int:
    """Elements of a workspace of so many slots, counters included."""
    return slots and COUNTERS + slots * sizes.tiles * min(sizes.rows, ROWS) * (sizes.D + 2)


def launch(
    spec: KVSpec,
    q_dtype: Any,
    sizes: Sizes,
    defines: dict[str, Any],
    scalars: dict[str, Any],
    fixed_split: int | None = None,
    *,
    stem: str = STEM,
    more_bytes: int = 0,
    early: bool = False,
) -> tuple[cuda.Launch, int]:
    """The launch on the current GPU, and the elements of workspace that it needs.

    One sequence alone needs no search for the work of a block. Where clusters are, and one is
    enough, its blocks join their states directly: a turn through the L2 cache takes longer than few
    keys take to read.

    Args:
        defines, scalars: those that the plain kernel has as well.
        stem: of this kernel, or of qkv_decode, which does more.
        more_bytes: as of `fits`.
        early: see cuda.Launch.
    """
    sm, num_sms = cuda.current_sm(), cuda.num_sms(cuda.current_device())
    block, shared = block_sizes(sm, spec, q_dtype, sizes.D), shared_bytes(sm, spec, q_dtype, sizes)
    in_sm = cuda.sm_shared_bytes(sm) // (
        shared + more_bytes + 1024
    )  # blocks; 1 KiB is the system's
    blocks = num_sms * max(1, min(block["BLOCKS"], in_sm))
    ranges, cluster = num_ranges(sizes, blocks, fixed_split), None
    slots = num_slots(sizes, ranges, fixed_split)
    defines = defines | block | dict(PAGE=sizes.P)
    if spec.has_scales and spec.granularity != "token":
        defines["ROW_SCALES"] = 0
    if sizes.B == 1 and not fixed_split:
        defines["ALONE"] = 1
        if sm >= 90 and 1 < ranges and sizes.capacity <= CLUSTER_KEYS:
            joined = cuda.kernel(stem, stem, **defines, CLUSTER=CLUSTER)
            shape = (1, 1, CLUSTER)
            if sizes.tiles <= cuda.active_clusters(joined, BLOCK, shape, shared):
                defines["CLUSTER"], ranges, cluster, slots = CLUSTER, CLUSTER, shape, 0
    scalars = scalars | dict(B=sizes.B, G=sizes.HQ // sizes.H, num_slots=slots)
    scalars |= dict(piece_tiles=(fixed_split or 0) // block["KEYS"])
    made = cuda.Launch(
        cuda.kernel(stem, stem, **defines),
        grid=(sizes.tiles // sizes.H, sizes.H, ranges),
        block=BLOCK,
        scalars=scalars,
        shared_bytes=shared,
        cluster=cluster,
        early=early,
    )
    return made, workspace_size(sizes, slots)


VARIANTS: list[dict[str, Any]] = [
    dict(HEAD_DIM=D, PAGE=16, Q_T="float", **spec.type_defines)
    | cuda.by_sm(block_sizes, spec, FLOATS[0], D)
    for spec, D in ((KVSpec(), 64), (KVSpec(), 128), (KVSpec("int8", "int8"), 128))
]
VARIANTS_SMS = range(75, 1000)  # with tensor cores
