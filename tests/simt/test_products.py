"""Products of warpgroups, which go on beside their threads: planted faults are caught."""

import numpy as np
import pytest

from tests.simt import cupy as simt
from tests.simt import machine
from tests.simt.test_machine import add_kernel

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("hopper")]

KERNEL = """
extern "C" __global__ void faulty(float* out, const u16* in) {
    __shared__ __align__(1024) u16 tile[192 * 64];
    for (int i = threadIdx.x; i < 192 * 64; i += 128) tile[i] = in[i];
    fence_async_proxy();
    __syncthreads();
    float sums[64] = {};
    wgmma_fence();
    wgmma_m64n128k16<false, false>(sums, wgmma_matrix(tile, 0), wgmma_matrix(tile + 64 * 64, 0));
    wgmma_commit();
    wgmma_wait<0>();
    for (int n = 0; n < 64; n++) out[threadIdx.x * 64 + n] = sums[n];
}
"""
PROXY, FENCE, COMMIT = "fence_async_proxy();", "wgmma_fence();", "wgmma_commit();"
BARRIER, WAIT = "__syncthreads();", "wgmma_wait<0>();"
UNFENCED = r"wgmma at faulty.cu:\d+ to read byte \d+ of tile, which thread .* wrote without fence"
NOT_WAITED = "ends before it has waited for its products"
OVERWRITTEN = r"a product that reads byte \d+ of tile, which thread .* has written meanwhile at"
FAULTS = {  # what stands in the place of a line or two
    "operands in no order with the proxy": (PROXY, "", UNFENCED),
    "fence behind the barrier": (f"{PROXY}\n    {BARRIER}", f"{BARRIER} {PROXY}", UNFENCED),
    "operands written behind the fence": (PROXY, f"{PROXY} tile[threadIdx.x] = 0;", UNFENCED),
    "no barrier": (BARRIER, "", "of tile, which .* without a barrier|no thread has written|wrote"),
    "no fence of registers": (FENCE, "", r"wgmma at faulty.cu:\d+ without wgmma_fence before"),
    "sums that are used, and no fence": (
        WAIT,
        f"{WAIT} const WgmmaMatrix a = wgmma_matrix(tile, 0);"
        " wgmma_m64n128k16<false, false>(sums, a, a);",
        "without wgmma_fence before",
    ),
    "products of no group": (COMMIT, "", NOT_WAITED),
    "no wait": (WAIT, "", NOT_WAITED),
    "a wait for older groups": (WAIT, "wgmma_wait<1>();", NOT_WAITED),
    "operands overwritten": (WAIT, f"{BARRIER} tile[threadIdx.x] = 0; {WAIT}", OVERWRITTEN),
    "operands overwritten by another warp": (
        WAIT,
        f"{BARRIER} if (threadIdx.x >= 96) tile[threadIdx.x - 96] = 0; {BARRIER} {WAIT}",
        OVERWRITTEN,
    ),
    "operands overwritten by a copy": (
        WAIT,
        f"{BARRIER} cp_async16(tile + threadIdx.x * 8, in); cp_async_commit(); {WAIT}",
        OVERWRITTEN,
    ),
    "sums written": (WAIT, f"sums[3] = 1; {WAIT}", "product whose sums were written meanwhile at"),
}


def run(folder, text):
    """`out` of a kernel; in[i] is the float16 number 1."""
    kernel = add_kernel(folder, text)
    out = simt.asarray(np.zeros(128 * 64, np.float32))
    given = simt.asarray(np.full(192 * 64, 0x3C00, np.uint16))
    machine.launch(kernel, 1, 128, out, given)
    return out.get()


@pytest.mark.parametrize("line, instead, error", FAULTS.values(), ids=FAULTS)
def test_faults_of_products(kernel_folder, monkeypatch, line, instead, error):
    assert KERNEL.count(line) == 1
    for seed in range(3):
        monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
        with pytest.raises(machine.SimtError, match=error):
            run(kernel_folder, KERNEL.replace(line, instead))


def test_sums_are_there_behind_the_wait(kernel_folder):
    assert (run(kernel_folder, KERNEL) == 16).all()
    early = KERNEL.replace(WAIT, f"const float early = sums[5]; {WAIT} sums[6] = early;")
    got = run(kernel_folder, early).reshape(128, 64)
    assert np.isnan(got[:, 6]).all() and (got[:, 7] == 16).all()


OF_REGISTERS = """
extern "C" __global__ void faulty(float* out, const u16* in) {
    __shared__ __align__(1024) u16 tile[8 * 64];
    for (int i = threadIdx.x; i < 8 * 64; i += 128) tile[i] = in[i];
    fence_async_proxy();
    __syncthreads();
    float sums[4] = {};
    u32 a[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    wgmma_fence();
    wgmma_m64k16(sums, a, wgmma_matrix(tile, 0));
    wgmma_commit();
    wgmma_wait<0>();
    for (int n = 0; n < 4; n++) out[threadIdx.x * 4 + n] = sums[n];
}
"""


def test_registers_of_products_are_nobody_s_before_the_wait(kernel_folder):
    assert (run(kernel_folder, OF_REGISTERS)[: 128 * 4] == 16).all()
    early = OF_REGISTERS.replace(WAIT, f"a[2] = 0; {WAIT}")
    with pytest.raises(machine.SimtError, match="whose registers were written meanwhile"):
        run(kernel_folder, early)
