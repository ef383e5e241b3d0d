"""Where the elements of a KV block lie: layout names and index formulas.

A logical block holds the keys and values of P tokens in all layers: elements (h, l, o, t, d) of H
KV heads, L layers, O outer parts (2: keys and values; 1: MLA, or keys alone), P tokens and head
size D. A chunk is the part of one layer and one outer index. In elements, (h, l, o, t, d) lies at

    NHD              (t*H + h)*D + d                      of chunk l*O + o
    HND              (h*P + t)*D + d                      of chunk l*O + o
    operational_NHD  (((l*O + o)*P + t)*H + h)*D + d      of the block
    operational_HND  (((l*O + o)*H + h)*P + t)*D + d      of the block
    universal        (((h*L + l)*O + o)*P + t)*D + d      of the block

NHD and HND blocks are stacks: each chunk is an allocation of its own, as vLLM makes them. The
others are one allocation a block; in the universal one the heads of a tensor-parallel rank lie
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pykv.errors import DtypeError, ParameterError, a_type
from pykv.options import check_type, check_whole, hold_python_numbers

STACKS = ("NHD", "HND")
NAMES = (*STACKS, *(f"operational_{order}" for order in STACKS), "universal")

ITEMSIZES = (1, 2, 4, 8)  # bytes of elements that blocks may have

# The dimensions of arrays that hold N blocks. I = P * H * D elements, ordered as in a chunk.
AXES = {
    "NHD": "NLOPHD",
    "HND": "NLOHPD",
    "operational_NHD": "NLOI",
    "operational_HND": "NLOI",
    "universal": "NHLOPD",
}


class BlockShape(NamedTuple):
    """Sizes of a logical block, H, L, O, P and D as above, and `itemsize`, bytes of an element."""

    H: int
    L: int
    O: int
    P: int
    D: int
    itemsize: int


@dataclass(frozen=True)
class Layout:
    """How blocks are stored, and which part of them.

    Args:
        name: one of `NAMES`.
        heads, layers: (first, end) of what is stored; the formulas then count from `first`, and H
            and L are what is stored. None: all. A tensor-parallel rank stores some heads, a
            pipeline stage some layers.
        token_stride, head_stride: elements between tokens and heads inside a chunk of a stack,
            such as a view into a larger pool has them. None: dense.
    """

    name: str
    heads: tuple[int, int] | None = None
    layers: tuple[int, int] | None = None
    token_stride: int | None = None
    head_stride: int | None = None

    def __post_init__(self) -> None:
        hold_python_numbers(self)

    @property
    def is_stack(self) -> bool:
        return self.name in STACKS


class Strides(NamedTuple):
    """Bytes from a chunk, head or token to the next; `chunk` is 0 in a stack: a table tells."""

    chunk: int
    head: int
    token: int


def check_layout(op: str, name: str, layout: Any, known: tuple[str, ...] = NAMES) -> None:
    """Check a Layout, and that its own name is one of `known`.

    Args:
        op, name: of who is given it, for messages.
        layout: what is given.

    Raises:
        ParameterError: the name is unknown, a stride negative, or given where there are no stacks.
        DtypeError: it is no Layout, or a part of it has another type.
    """
    check_type(op, name, layout, Layout)
    if layout.name not in known:
        raise ParameterError(f"{op}: {name} is {layout.name!r}, expected {' or '.join(known)}")
    for part in ("heads", "layers"):
        if getattr(layout, part) is not None:
            check_pair(op, f"{part} of {name}", getattr(layout, part))
    for stride in ("token_stride", "head_stride"):
        if getattr(layout, stride) is None:
            continue
        if not layout.is_stack:
            raise ParameterError(f"{op}: {name} has {stride}, expected it for NHD or HND alone")
        check_whole(op, f"{stride} of {name}", getattr(layout, stride), 0, 2**62)


def check_pair(op: str, name: str, given: Any) -> tuple[int, int]:
    """Check that a range is two whole numbers, and return them; `op`, `name` and `given` as of
    `check_layout`."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise DtypeError(f"{op}: {name} is {given!r}, expected (first, end)")
    first, end = (check_whole(op, name, n, -(2**63)) for n in given)
    return first, end


def check_shape(op: str, name: str, shape: Any) -> BlockShape:
    """Check the sizes of a block and return them as ints.

    Args:
        op, name, shape: as of `check_layout`.

    Raises:
        ParameterError: a size is negative, or elements are not of 1, 2, 4 or 8 bytes.
        DtypeError: it is no BlockShape, or a size no integer.
    """
    if not isinstance(shape, tuple) or len(shape) != len(BlockShape._fields):
        raise DtypeError(f"{op}: {name} is {a_type(shape)}, expected a BlockShape")
    sizes = zip(BlockShape._fields, shape, strict=True)
    checked = BlockShape(*(check_whole(op, f"{name}.{n}", size, 0, 2**62) for n, size in sizes))
    if checked.itemsize not in ITEMSIZES:
        raise ParameterError(f"{op}: {name}.itemsize is {checked.itemsize}, expected 1, 2, 4 or 8")
    return checked


def strides(layout: Layout, stored: BlockShape) -> Strides:
    """The formulas of this module as strides; `stored` counts what the layout stores.

    >>> shape = pykv.layout.BlockShape(H=8, L=2, O=2, P=16, D=64, itemsize=2)
    >>> pykv.layout.strides(pykv.layout.Layout("NHD"), shape)
    Strides(chunk=0, head=128, token=1024)
    >>> pykv.layout.strides(pykv.layout.Layout("universal"), shape)
    Strides(chunk=2048, head=8192, token=128)

    Raises:
        ParameterError, DtypeError: the layout is unknown, a size negative, or one of another type.
    """
    check_layout("layout.strides", "layout", layout)
    H, L, O, P, D, itemsize = check_shape("layout.strides", "stored", stored)
    if layout.name == "universal":
        token, head, chunk = D, L * O * P * D, P * D
    elif layout.name.endswith("NHD"):
        head = D if layout.head_stride is None else layout.head_stride
        token = H * head if layout.token_stride is None else layout.token_stride
        chunk = P * token
    else:
        token = D if layout.token_stride is None else layout.token_stride
        head = P * token if layout.head_stride is None else layout.head_stride
        chunk = H * head
    return Strides(0 if layout.is_stack else chunk * itemsize, head * itemsize, token * itemsize)
