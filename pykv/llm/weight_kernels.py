"""The kernels of a model's weights, compiled before the first token needs them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pykv import cuda
from pykv.arrays import FLOATS
from pykv.ops import (
    block_linear,
    block_rows,
    linear_mma,
    linear_small,
    linear_split,
    linear_tiles,
    linear_wgmma,
)
from pykv.planes import FORMATS

_Job = tuple[str, dict[str, Any]]  # the stem of a kernel's file, and its defines
_FLOATS = FLOATS[0], FLOATS[0]  # of activations and biases


def compile_all(
    kinds: Mapping[str, Collection[int]], gated: Collection[str], gate: str, num_sms: int
) -> None:
    """Compile the kernels of these kinds for the current GPU, on all cores, where the cache folder
    lacks them; of activations in float32 that need not be exact on tensor cores.

    Args:
        kinds: of matrices, each with the elements that their rows have.
        gated: the kinds of which products end in this gate as well.
        gate: as of block_linear.multiply.
        num_sms: of the GPU.
    """
    arch, sm = cuda.current_arch(), cuda.current_sm()
    jobs: list[_Job] = []
    for kind, lengths in sorted(kinds.items()):
        jobs += [("block_linear", one) for one in block_linear.all_defines(kind, sm)]
        if kind in FORMATS:
            jobs.append(("block_rows", block_rows.defines(kind, FLOATS[0])))
        gates = (None, gate) if kind in gated else (None,)
        if linear_mma.has_kernel(kind, sm):
            jobs += _tensor_core_jobs(kind, lengths, gates, num_sms)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda job: cuda.compile(job[0], arch, **job[1]), jobs):
            pass


def _tensor_core_jobs(
    kind: str, lengths: Collection[int], gates: tuple[str | None, ...], num_sms: int
) -> list[_Job]:
    arch, sm = cuda.current_arch(), cuda.current_sm()
    tilings = linear_mma.tilings(kind, False, sm)
    few = linear_tiles.most_of_registers(kind, sm)
    jobs = [("linear_split", one) for one in linear_split.all_defines(kind, FLOATS[0])]
    if linear_small.multiplies(kind, False, (1, 1, 1), sm, 1):
        jobs.append(("linear_small", linear_small.defines(kind, *_FLOATS)))
    if few is not None:
        tilings = [one for one in tilings if one.TILE_T < 2 * few]
        jobs += [
            ("linear_tiles", linear_tiles.defines(kind, *_FLOATS, tiling, end))
            for tiling in linear_tiles.tilings(sm)
            for end in gates
        ]
    if linear_wgmma.multiplies(kind, False, 1, 1, 1, None, arch):
        # linear_mma keeps more tokens, and small matrices: MOST and SMALL_MATRIX bound its tiles.
        most, elements = linear_wgmma.MOST, linear_wgmma.SMALL_MATRIX
        shapes = [(most, elements // I, I) for I in lengths]
        largest = max(linear_mma.choose(kind, False, x, sm, num_sms).TILE_T for x in shapes)
        tilings = [one for one in tilings if 8 < one.TILE_T <= largest]
        every = {one for some in linear_wgmma.tilings(kind).values() for one in some}
        jobs += [
            ("linear_wgmma", linear_wgmma.defines(kind, *_FLOATS, tiling, end))
            for tiling in sorted(every)
            for end in gates
        ]
    jobs += [("linear_mma", linear_mma.defines(kind, *_FLOATS, False, one)) for one in tilings]
    return jobs
