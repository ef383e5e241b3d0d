"""The static coder: components of a row to bits and back, with fixed steps and widths.

A row has C components, with widths that fall from 8 bits to 1. `widths` holds the numbers of
components with 8, 7, ..., 1 bits, each a multiple of 32. A component x of width b and step s gets
the code

    clip(floor(x / s), -h, h - 1), h = 2^(b-1),    which decodes to (code + 0.5) * s

in float32, with a true division. Components of one width are packed in groups of 32. A group is b
little-endian uint32 words; bits [j * b, (j + 1) * b) of the integer that they form are code + h of
component j. So every row takes `row_bytes(widths)` bytes.

A group whose 32 components all have the lowest code (all bits zero) decodes to NaN: it encodes a
group with a component that is not finite. If finite components would give such a group, its first
component gets the next code.

These functions are the definition, in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from pykv.arrays import is_numpy
from pykv.errors import DtypeError, ParameterError, ShapeError, quoted
from pykv.options import check_whole

WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1)  # bits, in the order of `widths`
GROUP = 32  # components that are packed together
MOST = GROUP * 0xFFFF  # components of one width: the kernel counts groups in 16 bits


def check_widths(op: str, widths: Any) -> tuple[int, ...]:
    """Check the `widths` of an op, the number of components of each width; returns ints.

    Raises:
        DtypeError: one is not a whole number.
        ParameterError: they are not eight multiples of 32, or one is above MOST, 2 million.
    """
    try:
        given = tuple(islice(widths, len(WIDTHS) + 1))
    except TypeError:  # no sequence
        given = ()
    if len(given) != len(WIDTHS):
        raise ParameterError(f"{op}: widths is {quoted(widths)}, expected {len(WIDTHS)} numbers")
    counts = tuple(check_whole(op, "widths", count, 0, MOST) for count in given)
    if any(count % GROUP for count in counts):
        raise ParameterError(f"{op}: widths is {counts}, expected multiples of {GROUP}")
    return counts


def bits_of(widths: Sequence[int]) -> Any:
    """The bits of each component, uint8 [C], descending, from `widths`."""
    return np.repeat(np.array(WIDTHS, np.uint8), widths)


def row_bytes(widths: Sequence[int]) -> int:
    """Bytes of a packed row with these `widths`, a multiple of 4."""
    return sum(bits * count for bits, count in zip(WIDTHS, widths, strict=True)) // 8


def quantise(x: Any, steps: Any, widths: Sequence[int]) -> Any:
    """Components [n, C] float32 to codes, int8 [n, C].

    Args:
        x: [n, C] float32.
        steps: [C] float32, positive.
        widths: numbers of components with 8, 7, ..., 1 bits, C in all.

    Raises:
        ShapeError: sizes disagree.
        DtypeError: an array is not a NumPy array of its dtype.
        ParameterError: `widths` are not eight multiples of 32, or a step is not a positive finite
            number.

    >>> x = np.array([[0.9] * 32 + [-3.0] * 32], np.float32)
    >>> steps = np.full(64, 0.5, np.float32)
    >>> codes = pykv.kvtc.coder.quantise(x, steps, (0, 0, 0, 0, 0, 0, 32, 32))
    >>> codes[0, 0], codes[0, -1]
    (np.int8(1), np.int8(-1))
    """
    widths = _check("quantise", widths, x=x, steps=steps)
    lowest = _lowest(widths)
    with np.errstate(over="ignore"):  # clipped anyway
        codes = np.fmin(np.fmax(np.floor(x / steps), lowest), -lowest - 1)
    groups, is_finite = _grouped(codes), _grouped(np.isfinite(x)).all(-1)
    groups[_grouped(codes == lowest).all(-1), 0] += 1
    np.copyto(groups, _grouped(lowest[None]), where=~is_finite[..., None])
    return codes.astype(np.int8)


def dequantise(codes: Any, steps: Any, widths: Sequence[int]) -> Any:
    """Codes int8 [n, C] to components, float32 [n, C]; arguments and errors as in `quantise`."""
    widths = _check("dequantise", widths, codes=codes, steps=steps)
    with np.errstate(over="ignore"):
        x = (codes + np.float32(0.5)) * steps
    _grouped(x)[_grouped(codes == _lowest(widths)).all(-1)] = np.nan
    return x


def pack(codes: Any, widths: Sequence[int]) -> Any:
    """Codes int8 [n, C] to packed rows, uint8 [n, row_bytes]; errors as in `quantise`."""
    widths = _check("pack", widths, codes=codes)
    n = len(codes)
    packed = np.empty((n, row_bytes(widths)), np.uint8)
    for bits, _, of_codes, of_bytes in _sections(widths):
        fields = (codes[:, of_codes] + np.int16(1 << bits >> 1)).astype(np.uint8)
        packed[:, of_bytes] = pack_fields(fields, bits)
    return packed


def unpack(packed: Any, widths: Sequence[int]) -> Any:
    """Packed rows uint8 [n, row_bytes] to codes, int8 [n, C]; errors as in `quantise`."""
    widths = _check("unpack", widths, packed=packed)
    n = len(packed)
    codes = np.empty((n, sum(widths)), np.int8)
    for bits, count, of_codes, of_bytes in _sections(widths):
        fields = unpack_fields(packed[:, of_bytes], bits, count)
        codes[:, of_codes] = fields.astype(np.int16) - (1 << bits >> 1)
    return codes


def pack_fields(fields: Any, bits: int) -> Any:
    """Pack `fields` uint8 [n, size] of `bits` bits each into rows of bytes, lowest bit first."""
    planes = np.unpackbits(fields[..., None], axis=2, count=bits, bitorder="little")
    return np.packbits(
        planes.reshape(len(fields), fields.shape[1] * bits), axis=1, bitorder="little"
    )


def unpack_fields(packed: Any, bits: int, size: int) -> Any:
    """The fields uint8 [n, `size`] of `packed` rows, `bits` bits each."""
    planes = np.unpackbits(packed, axis=1, count=size * bits, bitorder="little")
    fields = np.packbits(planes.reshape(len(packed), size, bits), axis=2, bitorder="little")
    return np.ascontiguousarray(fields[..., 0])


def _lowest(widths: Sequence[int]) -> Any:
    """The lowest code of each component, float32 [C]."""
    return -np.ldexp(np.float32(0.5), bits_of(widths).astype(np.int32))


def _grouped(x: Any) -> Any:
    """A view [n, groups, 32] of rows [n, C]."""
    return x.reshape(len(x), x.shape[1] // GROUP, GROUP)


def _sections(widths: Sequence[int]) -> Iterator[tuple[int, int, slice, slice]]:
    """For each width that occurs: bits, component count, and slices of components and bytes."""
    component = byte = 0
    for bits, count in zip(WIDTHS, widths, strict=True):
        if count:
            size = bits * count // 8
            yield bits, count, slice(component, component + count), slice(byte, byte + size)
            component, byte = component + count, byte + size


def _check(name: str, widths: Any, **arrays: Any) -> tuple[int, ...]:
    """Check arrays against widths; returns the widths as ints."""
    op = f"kvtc.coder.{name}"
    counts = check_widths(op, widths)
    C = sum(counts)
    rules = {"x": (np.float32, C), "codes": (np.int8, C), "steps": (np.float32, C)}
    rules["packed"] = np.uint8, row_bytes(counts)
    for argument, array in arrays.items():
        dtype, size = rules[argument]
        if not is_numpy(array) or array.dtype != dtype:
            given = getattr(array, "dtype", type(array).__name__)
            expected = f"a NumPy array of {np.dtype(dtype)}"
            raise DtypeError(f"{op}: {argument} is of {given}, expected {expected}")
        if array.ndim != (1 if argument == "steps" else 2) or array.shape[-1] != size:
            expected = f"[{size}]" if argument == "steps" else f"[n, {size}]"
            raise ShapeError(f"{op}: {argument} has shape {array.shape}, expected {expected}")
        if argument == "steps":
            check_steps(op, steps=array)
    return counts


def check_steps(op: str, **steps: Any) -> None:
    """Check arrays of steps on the host.

    Args:
        op: for messages.
        steps: arrays [C], by name.

    Raises:
        ParameterError: a step is not a positive finite number.
    """
    for name, array in steps.items():
        wrong = ~((array > 0) & (array < np.inf))
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ParameterError(
                f"{op}: {name}[{i}] is {array[i]}, expected a positive finite number"
            )
