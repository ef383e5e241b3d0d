"""How `gemv` of kernels_cu/block_linear.cu cuts a product between blocks, warps and rounds, as was
measured on an H200.

Dimensions: T tokens, I features in, R rows of weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pykv import cuda
from pykv.planes import FORMATS, PLAIN

BLOCK, _LARGE_BLOCK = 256, 512  # threads; of small matrices, and of those that fill all SMs
LARGE = 2 << 20  # elements
_THREADS = 512  # of an SM, as registers allow
OUTS = {1: 4, 2: 4, 4: 2, 8: 2}  # rows of w of a warp, by the tokens that share one reading of w
_FEW_OUTS = 2  # of floats, of which a lane holds 32 elements of each row, and of small matrices
_SLICE = 1024  # elements of a row that a warp multiplies at a time
_SLICE_BYTES = 4608
_SLICES = 8  # of a round, of all tokens that share one reading of w


class Cut(NamedTuple):
    """How `gemv` cuts a product."""

    rows: int  # of x that share one reading of w
    outs: int  # rows of w of a warp
    parts: int  # warps that share those
    held: int  # rounds of x in shared memory, a slice for each part
    tiles: int  # of rows of w
    block: int  # threads
    copied: int  # bytes of w on their way through shared memory
    has_one_round: bool  # of slices, of each block

    @property
    def shared_bytes(self) -> int:
        """Of dynamic shared memory."""
        return self.held * self.parts * self.rows * _SLICE_BYTES + self.copied


def cut_of(
    x: Any,
    w: Any,
    kind: str,
    *,
    rows: int | None = None,
    outs: int | None = None,
    block: int | None = None,
) -> Cut:
    """How `gemv` cuts a product, where it has the choice as asked. A `block` is that of a program,
    whose blocks have any number of tiles."""
    (T, I), R, sm = x.shape, len(w), cuda.current_sm()
    is_alone = block is None
    rows = rows or next(rows for rows in OUTS if rows >= T or rows == max(OUTS))
    choice = (outs,) if outs else outs_of(kind, rows)
    block = block or (max if R * I > LARGE else min)(blocks_of(kind, rows, sm))
    num_sms = cuda.num_sms(x.data.device_id)
    outs, parts = _warps(R, I, ways_of(kind, choice, rows, block, sm), block, num_sms)
    tiles, rounds = -(-R // (outs * (block // 32 // parts))), -(-I // (parts * _SLICE))
    has_one_round = is_alone and rounds == 1 and tiles <= _THREADS // block * num_sms
    copied = _copied_bytes(kind, outs, rows, block, sm) // (2 if has_one_round else 1)
    held = _held(_room(sm) * block // _THREADS - copied, rows * parts, rounds)
    return Cut(rows, outs, parts, held, tiles, block, copied, has_one_round)


def outs_of(kind: str, rows: int) -> tuple[int, ...]:
    """Rows of w that a warp may have, the largest number first."""
    most = _FEW_OUTS if kind in PLAIN else OUTS[rows]
    return (most,) if most == _FEW_OUTS else (most, _FEW_OUTS)


def most_outs(kind: str, rows: int) -> int:
    """Rows of w that a warp may have at most."""
    return outs_of(kind, rows)[0]


def blocks_of(kind: str, rows: int, sm: int) -> tuple[int, ...]:
    """Threads that a block may have: the larger takes registers that some kernels do not leave, as
    those of old SMs do not, which multiply integers one by one, and shared memory."""
    is_small = rows > 4 or kind == "F32" or sm < 75
    is_small = is_small or not ways_of(kind, outs_of(kind, rows), rows, _LARGE_BLOCK, sm)
    return (BLOCK,) if is_small else (BLOCK, _LARGE_BLOCK)


def ways_of(
    kind: str, outs: tuple[int, ...], rows: int, block: int, sm: int
) -> list[tuple[int, int]]:
    """Rows of w of a warp, and warps that share them, for which there is shared memory."""
    left = {n: _room(sm) - _copied_bytes(kind, n, rows, block, sm) for n in outs}
    parts = [n for n in (1, 2, 4, 8) if n <= block // 32 and n * rows <= _SLICES]
    return [(n, p) for n in outs for p in parts if p * rows * _SLICE_BYTES <= left[n]]


def _room(sm: int) -> int:
    """Bytes of shared memory of an SM: 64 KB and more, from sm_80 on 99, in data centres 160."""
    return (152 if sm in (80, 90, 100, 103) else 96 if sm >= 80 else 48) << 10


def _copied_bytes(kind: str, outs: int, rows: int, block: int, sm: int) -> int:
    """Of two slices of the rows of w of each warp, which SMs from sm_80 on copy by themselves:
    those of F32 would take too much, and of 16 bits beside 8 rows of x."""
    bits = FORMATS[kind].bits if kind in FORMATS else 8 * PLAIN[kind].itemsize
    is_copied = sm >= 80 and bits < (16 if rows == 8 else 32)
    return block // 32 * 2 * outs * _SLICE * bits // 8 if is_copied else 0


def _held(left: int, slices: int, rounds: int) -> int:
    """Rounds of x, of so many slices, for which `left` bytes are enough: where it is not even one,
    fewer blocks share an SM."""
    return max(1, min(left // (slices * _SLICE_BYTES), rounds))


def _warps(
    R: int, I: int, ways: list[tuple[int, int]], block: int, num_sms: int
) -> tuple[int, int]:
    """One of `ways`, by which the block that is busy longest ends first. Times are those of a row
    of a slice: a round takes as long as four of them beside its rows, the end of a tile as five,
    telling other warps another."""

    def time(way: tuple[int, int]) -> int:
        n, parts = way
        tiles = -(-R // (n * (block // 32 // parts)))
        turns, rounds = -(-tiles // (_THREADS // block * num_sms)), -(-I // (parts * _SLICE))
        return turns * (rounds * (n + 4) + 5 + (parts > 1))

    slices = max(1, -(-I // _SLICE))  # no more parts than have something to do
    return min((way for way in ways if way[1] <= slices), key=time)
