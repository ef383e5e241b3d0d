"""Permutes of KV blocks between layouts, on the device and fused with a transfer over the link.

A case moves N blocks of `BlockShape` from layout `src` to layout `dst`; over the link the
universal side is in pinned memory. Chunks and blocks lie scattered on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pykv import cuda
from pykv.bench import Work, memory, report
from pykv.layout import AXES, STACKS, BlockShape
from pykv.ops import permute
from pykv.ranges import address_of
from pykv.testing import caches

MIB = 1 << 20
LLAMA_70B = BlockShape(H=8, L=80, O=2, P=16, D=128, itemsize=2)
TINY = BlockShape(H=4, L=3, O=2, P=16, D=16, itemsize=2)

_UNIVERSAL = [pair for name in STACKS for pair in ((name, "universal"), ("universal", name))]
_OTHERS = [
    *(("NHD", "HND"), ("HND", "NHD")),
    *(("NHD", "operational_NHD"), ("operational_NHD", "NHD")),
]


def _case(src: str, dst: str, direction: str, N: int, shape: BlockShape) -> dict[str, Any]:
    return dict(src=src, dst=dst, direction=direction, N=N, **shape._asdict())


def _blocks(shape: BlockShape) -> int:
    """Of 48, as many as make a side several times as large as an L2, and not much larger."""
    N = 48
    while N * int(np.prod(shape)) < 240 * MIB:
        N *= 2
    while N * int(np.prod(shape)) > 512 * MIB:
        N //= 2
    return N


def _cases(shape: BlockShape, head_sizes: tuple[int, ...], N: int | None) -> list[dict[str, Any]]:
    shapes = [shape._replace(D=D, itemsize=size) for D in head_sizes for size in (1, 2, 4, 8)]
    made = [
        _case(src, dst, "d2d", N or _blocks(one), one) for one in shapes for src, dst in _UNIVERSAL
    ]
    made += [_case(src, dst, "d2d", N or _blocks(shape), shape) for src, dst in _OTHERS]
    return made + [
        _case(src, dst, "d2h" if dst == "universal" else "h2d", N or _blocks(shape), shape)
        for src, dst in _UNIVERSAL
    ]


CASES, QUICK = _cases(LLAMA_70B, (128, 64, 80), None), _cases(TINY, (TINY.D,), 3)


@dataclass(frozen=True)
class Side:
    """N blocks of one layout: a row of `memory` for each chunk or block, in any order."""

    name: str
    N: int
    shape: BlockShape
    memory: Any  # [rows, elements]
    order: Any  # [rows]: the row of chunk l * O + o of block n, or of block n

    @property
    def addresses(self) -> Any:
        base = address_of(self.memory)
        return (base + self.order * self.memory[0].nbytes).astype(np.uint64)

    @property
    def arrays(self) -> list[Any]:
        """An array for each block, or a list of its chunks."""
        sizes = self._sizes() | {"I": self.shape.P * self.shape.H * self.shape.D}
        is_stack = self.name in STACKS
        dims = [sizes[letter] for letter in AXES[self.name][3 if is_stack else 1 :]]
        arrays = [self.memory[row].reshape(dims) for row in self.order]
        chunks = len(arrays) // self.N
        return (
            [arrays[i : i + chunks] for i in range(0, len(arrays), chunks)] if is_stack else arrays
        )

    def elements(self, xp: Any) -> Any:
        """[N, H, L, O, P, D], by the layouts' definitions."""
        axes = AXES[self.name].replace("I", AXES[self.name.removeprefix("operational_")][3:])
        sizes = self._sizes()
        ordered = memory.on_device(xp, self.memory)[xp.asarray(self.order)]
        ordered = ordered.reshape([sizes[letter] for letter in axes])
        return ordered.transpose([axes.index(letter) for letter in "NHLOPD"])

    def _sizes(self) -> dict[str, int]:
        return {"N": self.N, **self.shape._asdict()}


def make(case: dict[str, Any], xp: Any, rng: np.random.Generator) -> Work | None:
    direction, N = case["direction"], case["N"]
    shape = BlockShape(*(case[name] for name in BlockShape._fields))
    size = N * int(np.prod(shape))
    if (xp is np and direction != "d2d") or not memory.fits(xp, 6 * size):  # checked with copies
        return None

    def side(name: str, words: Any, on_host: bool) -> Side:
        rows = N * shape.L * shape.O if name in STACKS else N
        elements = words.view(f"u{shape.itemsize}").reshape(rows, -1)
        placed = memory.place(xp, elements, on_host)
        return Side(name, N, shape, placed, rng.permutation(rows))

    words = caches.words(xp, size, int(rng.integers(2**32)))
    src = side(case["src"], words, direction == "h2d")
    dst = side(case["dst"], memory.poison(xp, size), direction == "d2h")
    if xp is np:
        sides: tuple[Any, ...] = (dst.arrays, dst.name, src.arrays, src.name)
    else:
        sides = (dst.addresses, dst.name, src.addresses, src.name, shape)
    return Work(
        run=cuda.prepare(permute.permute, *sides),
        check=lambda: bool((dst.elements(xp) == src.elements(xp)).all()),
        bytes=size * (2 if direction == "d2d" else 1),  # read and written; over the link, once
        ceiling="copy" if direction == "d2d" else direction,
    )


def conclude(records: list[report.Record]) -> str:
    """What a permute costs beside a copy, and whether to fuse it with the transfer."""
    timed = [one for one in records if one["ok"] and one["share"] is not None]
    lines = []
    inside = [one for one in timed if one["case"]["direction"] == "d2d"]
    if inside:
        slowest = min(inside, key=lambda one: float(one["share"]))
        case = slowest["case"]
        lines.append(
            f"on the device: {slowest['share']:.0%} of a copy's rate or more; least from "
            f"{case['src']} to {case['dst']}, {case['itemsize']}-byte elements, D={case['D']}"
        )
    for fused in timed:
        case = fused["case"]
        alone = next((one for one in inside if one["case"] == {**case, "direction": "d2d"}), None)
        if case["direction"] == "d2d" or alone is None:
            continue
        apart = alone["median"] + fused["bytes"] / fused["ceiling_gbps"] / 1e3
        where = "in flight" if fused["median"] < apart else "on the device, not in flight"
        saved = 1 - min(fused["median"], apart) / max(fused["median"], apart)
        lines.append(
            f"{case['direction']} from {case['src']} to {case['dst']}: {fused['share']:.0%} of "
            f"the link; permute {where}, which saves {saved:.1%}"
        )
    return "\n".join(lines) or "permute: nothing to conclude"
