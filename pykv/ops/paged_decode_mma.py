"""The tensor-core kernel of `pykv.ops.paged_decode`: what it covers, and how it is launched.

Dimensions: as in pykv/ops/paged_decode.py; T queries of a sequence, TILES tiles of eight query rows
(heads of a group, times queries), W workspace elements.
Kernel: kernels_cu/paged_decode_mma.cu.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pykv.kinds import KVSpec

VARIANTS: list[dict[str, Any]] = [
    dict(HEAD_DIM=d, PAGE=16, Q_T="float", K_T=kv, V_T=kv, SCALE_T="f16")
    for d, kv in ((64, "f16"), (128, "f16"), (128, "i8"))
]

ROWS = 8  # query rows of a tile
WARPS = 4
BLOCKS = 2  # on an SM, which registers and shared memory allow
MIN_KEYS = 128  # of a range
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


def tile_keys(spec: KVSpec) -> int:
    """Keys of a tile: the kernel's KEYS."""
    return 32 if spec.has_scales else 16


def stages(sm: int, spec: KVSpec, D: int) -> int:
    """Tiles that a warp has under way: the kernel's STAGES."""
    tile = tile_keys(spec) * sum(kind.row_bytes(D) for kind in spec.kinds)
    queue = 16 << 10 if sm in (80, 87) else 24 << 10 if 90 <= sm < 120 else 8 << 10
    return max(1, min(4, queue // tile))


def num_ranges(sizes: Sizes, spec: KVSpec, num_sms: int, fixed_split: int | None) -> int:
    """Parts into which the keys of all sequences are cut, for each tile.

    As many as run at once, or a small multiple of them where that wastes less, but no more than
    there can be work for. Lengths do not enter, so a captured graph stays valid.
    """
    at_once = BLOCKS * num_sms
    best = 1
    for waves in range(1, 9):
        ranges = min(waves * at_once, COUNTERS) // sizes.tiles
        if ranges and ranges * sizes.tiles >= 0.9 * waves * at_once:
            best = ranges
            break
        best = max(best, ranges if waves == 1 else 0)
    unit = fixed_split or max(MIN_KEYS, tile_keys(spec))
    return max(1, min(best, sizes.B * max(1, -(-sizes.capacity // unit))))


def workspace_size(sizes: Sizes, spec: KVSpec, num_sms: int, fixed_split: int | None = None) -> int:
    """Elements of workspace; 0 where no row is ever cut."""
    slots = _num_slots(sizes, spec, num_sms, fixed_split)
    return slots and COUNTERS + slots * sizes.tiles * min(sizes.rows, ROWS) * (sizes.D + 2)


def _num_slots(sizes: Sizes, spec: KVSpec, num_sms: int, fixed_split: int | None) -> int:
    if fixed_split:
        pieces = -(-sizes.capacity // fixed_split)
        return sizes.B * pieces if pieces > 1 else 0
    ranges = num_ranges(sizes, spec, num_sms, None)
    return 2 * ranges if ranges > 1 else 0


def launch(
    sm: int, spec: KVSpec, sizes: Sizes, window: int, num_sms: int, fixed_split: int | None
) -> tuple[int, int, int, tuple[int, ...]]:
    """Grid, bytes of shared memory of a block, elements of workspace, and the integer arguments."""
    ranges = num_ranges(sizes, spec, num_sms, fixed_split)
    keys = tile_keys(spec)
    queue = stages(sm, spec, sizes.D) * keys * sum(kind.row_bytes(sizes.D) for kind in spec.kinds)
    states = min(sizes.rows, ROWS) * (4 * sizes.D + 24)
    B, T, HQ, H, _, _, M = sizes
    slots = _num_slots(sizes, spec, num_sms, fixed_split)
    ints = (B, T, HQ, H, M, sizes.capacity, window, (fixed_split or 0) // keys, slots)
    size = workspace_size(sizes, spec, num_sms, fixed_split)
    return sizes.tiles * ranges, WARPS * (queue + states), size, ints
