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
from typing import NamedTuple

from pykv.errors import DtypeError, ParameterError

STACKS = ("NHD", "HND")
NAMES = (*STACKS, *(f"operational_{order}" for order in STACKS), "universal")

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

    @property
    def is_stack(self) -> bool:
        return self.name in STACKS


class Strides(NamedTuple):
    """Bytes from a chunk, head or token to the next; `chunk` is 0 in a stack: a table tells."""

    chunk: int
    head: int
    token: int


def strides(layout: Layout, stored: BlockShape) -> Strides:
    """The formulas of this module as strides; `stored` counts what the layout stores.

    >>> shape = pykv.layout.BlockShape(H=8, L=2, O=2, P=16, D=64, itemsize=2)
    >>> pykv.layout.strides(pykv.layout.Layout("NHD"), shape)
    Strides(chunk=0, head=128, token=1024)
    >>> pykv.layout.strides(pykv.layout.Layout("universal"), shape)
    Strides(chunk=2048, head=8192, token=128)

    Raises:
        DtypeError: an argument is something else.
        ParameterError: the layout's name is unknown.
    """
    if not isinstance(layout, Layout):
        raise DtypeError(f"layout.strides: layout is a {type(layout).__name__}, expected a Layout")
    if layout.name not in NAMES:
        raise ParameterError(f"layout.strides: layout is {layout.name!r}, expected one of {NAMES}")
    if not isinstance(stored, tuple) or len(stored) != len(BlockShape._fields):
        given = type(stored).__name__
        raise DtypeError(f"layout.strides: stored is a {given}, expected a BlockShape")
    H, L, O, P, D, itemsize = stored
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
