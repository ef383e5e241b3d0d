"""weight_kernels: all that products with a model's weights will ask for, and nothing else."""

from itertools import product

import numpy as np
import pytest

from pykv import cuda, gemv_cuts, planes
from pykv.llm import weight_kernels
from pykv.ops import block_linear as op
from pykv.ops import (
    block_rows,
    linear_mma,
    linear_small,
    linear_split,
    linear_tiles,
    linear_wgmma,
)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "F16", "BF16"])
@pytest.mark.parametrize(
    "sm, num_sms, lengths",
    [(52, 20, [576]), (90, 132, [576, 1024, 4096]), (90, 132, [256, 576]), (90, 16, [1024, 4096])],
)
def test_a_model_that_is_loaded_finds_its_kernels_compiled(monkeypatch, kind, sm, num_sms, lengths):
    """Whatever its matrices, whole GPUs and parts of them; nothing else."""
    made = []
    monkeypatch.setattr(cuda, "current_arch", lambda: f"sm_{sm}")
    monkeypatch.setattr(cuda, "current_sm", lambda: sm)
    monkeypatch.setattr(cuda, "compile", lambda *stem, **defines: made.append((*stem, defines)))
    weight_kernels.compile_all({kind: lengths}, [kind], "geglu", num_sms)
    floats = np.dtype("f4"), np.dtype("f4")
    sizes = []
    for T in range(1, 5 if linear_mma.has_kernel(kind, sm) else 9):
        rows = min(8, 1 << (T - 1).bit_length())
        outs = gemv_cuts.outs_of(kind, rows)
        for R, I in ((576, 576), (4096, 576), (49152, 576), (49152, 32)):
            block = gemv_cuts.blocks_of(kind, rows, sm)[-1 if R * I > gemv_cuts.LARGE else 0]
            chosen = gemv_cuts._warps(
                R, I, gemv_cuts.ways_of(kind, outs, rows, block, sm), block, 132
            )[:1]
            taken = outs if rows == 2 else chosen
            sizes += [dict(ROWS=rows, OUTS=n, BLOCK=block) for n in taken]
    ways = [("block_linear", op._defines(kind, *floats, **size)) for size in sizes]
    if kind not in planes.PLAIN:
        ways.append(("block_rows", block_rows.defines(kind, floats[0])))
    if linear_mma.has_kernel(kind, sm):
        ways += [("linear_split", one) for one in linear_split.all_defines(kind, floats[0])]
    shapes = [
        (O, I) for I in lengths for O in (64, 576, 1536, (4 << 20) // I, 4096, 8192, 14336, 128256)
    ]
    for T, (O, I), gate in product(range(5, 200), shapes, (None, "geglu")) if sm > 75 else ():
        shape = kind, False, T
        if linear_small.multiplies(kind, False, (T, O, I), sm, num_sms):
            ways.append(("linear_small", linear_small.defines(kind, *floats)))
        elif linear_wgmma.multiplies(*shape, O, I, gate, f"sm_{sm}"):
            tiling = linear_wgmma.choose(kind, T, O, I, num_sms)
            ways.append(("linear_wgmma", linear_wgmma.defines(kind, *floats, tiling, gate)))
        elif linear_tiles.multiplies(*shape, sm):
            tiling = linear_tiles.choose(T, O, sm, num_sms)
            ways.append(("linear_tiles", linear_tiles.defines(kind, *floats, tiling, gate)))
        else:
            tiling = linear_mma.choose(kind, False, (T, O, I), sm, num_sms)
            ways.append(("linear_mma", linear_mma.defines(kind, *floats, False, tiling)))
    for stem, defines in ways:
        assert (stem, f"sm_{sm}", defines) in made
    assert {str((stem, defines)) for stem, _, defines in made} == {str(way) for way in ways}
