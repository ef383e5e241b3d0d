"""Rows of GGUF blocks with codes and scales in planes, as kernels read them.

GGUF stores a matrix by blocks of 17 to 210 bytes, which begin at odd addresses: a GPU thread could
load two bytes at a time. `pack` moves the bits of each row so that codes lie together, 16 bytes of
nibbles for 32 elements, and scales behind them. A row keeps its bytes, up to the next multiple of
16. C is the columns of the matrix, a group is 32 of them; of element e = 16 h + 4 s + b in a group
(half h, quad s, byte b) a row holds, in this order, where its kind has such bits:

    bytes    32 a group: byte e is the code                                       Q8_0
    nibbles  16 a group: byte 4 s + b has the low four bits in its half h; where codes are places
             in a table, nibble 4 h + b of word s                                 4 to 6 bits
    pairs    8 a group: byte 4 h + b has two bits at 2 ((s + 2) % 4)              2, 3 and 6 bits
    ones     4 a group: byte b has one bit at (4 h + s + 4) % 8                   3 and 5 bits
    scales   the block's bytes that `FORMATS` names, of all blocks, range after range

So a word of each plane gives the codes of four elements, one in each byte, by a shift and a mask.
Codes are not negative: Q8_0 adds 128, and `ZEROS` says what stands for zero. kernels_cu/planes.cuh
is the same for the GPU. Source of the formats: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import FLOATS, module_of

ALIGNMENT = 16  # bytes that a row is a multiple of
GROUP = 32  # elements whose codes lie together


class Format(NamedTuple):
    """A type of GGUF tensors: elements and bytes of a block, bits of a code, the ranges of a
    block's bytes that hold scales, and what codes mean if they are places in a table."""

    elements: int
    nbytes: int
    bits: int
    scales: tuple[tuple[int, int], ...]
    table: tuple[int, ...] = ()


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the number

FORMATS = {
    "Q4_0": Format(32, 18, 4, ((0, 2),)),
    "Q4_1": Format(32, 20, 4, ((0, 4),)),
    "Q5_0": Format(32, 22, 5, ((0, 2),)),
    "Q5_1": Format(32, 24, 5, ((0, 4),)),
    "Q8_0": Format(32, 34, 8, ((0, 2),)),
    "Q2_K": Format(256, 84, 2, ((0, 16), (80, 84))),
    "Q3_K": Format(256, 110, 3, ((96, 108), (108, 110))),
    "Q4_K": Format(256, 144, 4, ((0, 16),)),
    "Q5_K": Format(256, 176, 5, ((0, 16),)),
    "Q6_K": Format(256, 210, 6, ((192, 208), (208, 210))),
    "IQ4_NL": Format(32, 18, 4, ((0, 2),), _IQ4),
    "IQ4_XS": Format(256, 136, 4, ((0, 8),), _IQ4),
    "MXFP4": Format(32, 17, 4, ((0, 1),), _E2M1),
}
# Types of floats, which are no blocks, and their dtypes.
PLAIN = dict(zip(("F32", "F16", "BF16"), FLOATS, strict=True))
ZEROS = dict(Q4_0=8, Q5_0=16, Q8_0=128, Q3_K=4, Q6_K=32)  # the code that means 0; others: 0


def row_bytes(kind: str, C: int) -> int:
    """Bytes of a row of C elements."""
    form = FORMATS[kind]
    return -(-(C // form.elements * form.nbytes) // ALIGNMENT) * ALIGNMENT


def pack(blocks: Any, kind: str) -> Any:
    """[R, W] GGUF blocks as rows of planes, [R, row_bytes], both uint8; where the blocks are."""
    xp, form = module_of(blocks), FORMATS[kind]
    R, num_blocks = len(blocks), blocks.shape[1] // form.nbytes
    rows = xp.zeros((R, row_bytes(kind, num_blocks * form.elements)), np.uint8)
    if not rows.size:
        return rows
    block = blocks.reshape(R, num_blocks, form.nbytes)
    q = _codes(xp, block, kind).reshape(R, num_blocks * form.elements // GROUP, 2, 4, 4)  # h s b
    planes = []
    if form.bits == 8:
        planes.append(q)
    if form.bits in (4, 5, 6):
        low = q & 15
        if form.table:  # the nibbles of a word in the order of elements
            low = low.transpose(0, 1, 3, 2, 4)
            planes.append(low[..., ::2] | low[..., 1::2] << 4)
        else:
            planes.append(low[:, :, 0] | low[:, :, 1] << 4)
    if form.bits in (2, 3, 6):
        pairs = q >> 4 if form.bits == 6 else q & 3
        planes.append(
            pairs[..., 2, :] | pairs[..., 3, :] << 2 | pairs[..., 0, :] << 4 | pairs[..., 1, :] << 6
        )
    if form.bits in (3, 5):
        ones = (q >> (form.bits - 1)).reshape(*q.shape[:2], 8, 4)
        planes.append(_any(ones[:, :, i] << (i + 4) % 8 for i in range(8)))
    planes += [block[:, :, first:last] for first, last in form.scales]
    start = 0
    for plane in planes:
        plane = plane.reshape(R, -1)
        rows[:, start : start + plane.shape[1]] = plane
        start += plane.shape[1]
    return rows


def _any(parts: Any) -> Any:
    """All bits that any of the arrays has."""
    first, *others = parts
    for part in others:
        first = first | part
    return first


def _codes(xp: Any, block: Any, kind: str) -> Any:
    """The codes of [R, N] blocks, [R, N, elements] uint8."""

    def fields(raw: Any, bits: int, run: int) -> Any:
        """Fields of bytes, the lowest of `run` bytes first, then those above."""
        mask, runs = (1 << bits) - 1, raw.reshape(*raw.shape[:2], -1, run)
        parts = tuple(runs >> shift & mask for shift in range(0, 8, bits))
        return xp.stack(parts, axis=3).reshape(*raw.shape[:2], -1)

    if kind == "Q8_0":
        return block[:, :, 2:] ^ 128
    if kind in ("Q4_0", "Q4_1", "IQ4_NL", "MXFP4"):
        return fields(block[:, :, -16:], 4, 16)
    if kind in ("Q5_0", "Q5_1"):
        fifth = block[:, :, -20:-16]  # bit i of the word is of element i
        ones = xp.stack(tuple(fifth >> i & 1 for i in range(8)), axis=3)
        ones = ones.reshape(*block.shape[:2], 32)
        return fields(block[:, :, -16:], 4, 16) | ones << 4
    if kind == "IQ4_XS":
        return fields(block[:, :, 8:], 4, 16)
    if kind == "Q4_K":
        return fields(block[:, :, 16:], 4, 32)
    if kind == "Q5_K":
        return fields(block[:, :, 48:], 4, 32) | fields(block[:, :, 16:48], 1, 32) << 4
    if kind == "Q6_K":
        return fields(block[:, :, :128], 4, 64) | fields(block[:, :, 128:192], 2, 32) << 4
    if kind == "Q2_K":
        return fields(block[:, :, 16:80], 2, 32)
    return fields(block[:, :, 32:96], 2, 32) | fields(block[:, :, :32], 1, 32) << 2  # Q3_K


def values(rows: Any, kind: str, C: int) -> Any:
    """What rows of planes stand for, [R, C] float32, in NumPy: bit for bit as the package gguf."""
    form, R, G = FORMATS[kind], len(rows), C // GROUP
    if not R * G:
        return np.zeros((R, C), np.float32)
    start = 0

    def take(nbytes: int, *shape: int) -> Any:
        nonlocal start
        plane = rows[:, start : start + nbytes].reshape(R, *shape)
        start += nbytes
        return plane

    q = np.zeros((R, G, 2, 4, 4), np.uint8)
    if form.bits == 8:
        q[...] = take(32 * G, G, 2, 4, 4)
    if form.bits in (4, 5, 6):
        low = take(16 * G, G, 4, 4)
        if form.table:
            q[...] = np.stack([low & 15, low >> 4], -1).reshape(R, G, 4, 2, 4).swapaxes(2, 3)
        else:
            q[:, :, 0], q[:, :, 1] = low & 15, low >> 4
    if form.bits in (2, 3, 6):
        pairs = take(8 * G, G, 2, 4)
        for s in range(4):
            q[..., s, :] |= (pairs >> 2 * ((s + 2) % 4) & 3) << (4 if form.bits == 6 else 0)
    if form.bits in (3, 5):
        ones = take(4 * G, G, 4)
        for i in range(8):
            q[:, :, i // 4, i % 4] |= (ones >> (i + 4) % 8 & 1) << (form.bits - 1)
    num_blocks = C // form.elements
    parts = [take(num_blocks * (b - a), num_blocks, b - a) for a, b in form.scales]
    with np.errstate(over="ignore", invalid="ignore"):  # infinite scales
        d, m = _scales(kind, *(np.ascontiguousarray(part) for part in parts))
        codes = q.reshape(R, d.shape[1], -1)
        wide = np.array(form.table, np.float32)[codes] if form.table else codes.astype(np.float32)
        out = d[:, :, None] * (wide - np.float32(ZEROS.get(kind, 0)))
        return (out if m is None else out + m[:, :, None]).reshape(R, C)


def _scales(kind: str, first: Any, second: Any = None) -> tuple[Any, Any]:
    """Scale and addend, float32, of each run of elements that shares them; None if all are 0."""
    R, N = first.shape[:2]

    def halves(raw: Any) -> Any:
        return raw.view(np.float16).astype(np.float32)

    def runs(d: Any, scales: Any) -> Any:
        return (d * scales.astype(np.float32)).reshape(R, -1)

    if kind == "MXFP4":  # 2^(e - 128), whose two least are subnormal
        e = first[:, :, 0].astype(np.uint32)
        return np.where(e < 2, 0x00200000 << e, (e - 1) << 23).astype(np.uint32).view("f4"), None
    if kind in ("Q4_1", "Q5_1"):
        return halves(first)[:, :, 0], halves(first)[:, :, 1]
    if first.shape[2] == 2:
        return halves(first)[:, :, 0], None
    if kind == "Q6_K":
        return runs(halves(second), first.view(np.int8)), None
    if kind == "Q2_K":
        return runs(halves(second)[:, :, :1], first & 15), -runs(
            halves(second)[:, :, 1:], first >> 4
        )
    if kind == "Q3_K":  # low nibbles of 16 scales in 8 bytes, then the high pairs in 4
        low = np.concatenate([first[:, :, :8] & 15, first[:, :, :8] >> 4], 2)
        high = np.concatenate([first[:, :, 8:] >> i & 3 for i in (0, 2, 4, 6)], 2)
        return runs(halves(second), (low | high << 4).astype(np.int8) - np.int8(32)), None
    if kind == "IQ4_XS":
        d, high = halves(first[:, :, :2].copy()), first[:, :, 2:4].copy().view(np.uint16)
        low = np.stack([first[:, :, 4:] & 15, first[:, :, 4:] >> 4], -1).reshape(R, N, 8)
        two = (high >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
        return runs(d, (low | two << 4).astype(np.int8) - np.int8(32)), None
    # Q4_K and Q5_K: six-bit scales and minima, whose last four share bytes with the first.
    d, (a, b, c) = halves(first[:, :, :4].copy()), np.split(first[:, :, 4:], 3, 2)
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], 2)
    minima = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], 2)
    return runs(d[:, :, :1], scales), -runs(d[:, :, 1:], minima)
