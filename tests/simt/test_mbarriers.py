"""Barriers in shared memory, whose phases wait for copies too: planted faults are caught."""

import numpy as np
import pytest

from tests.simt import cupy as simt
from tests.simt import machine
from tests.simt.test_machine import add_kernel

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("hopper")]

# Two warps add up six stages of 64, which a third one copies to a ring of two: half of each by
# lanes, half in bulk.
KERNEL = """
extern "C" __global__ void faulty(int* out, const int* in) {
    __shared__ __align__(16) int ring[2][64];
    __shared__ u64 filled[2], emptied[2];
    const int t = threadIdx.x, lane = t % WARP;
    if (t < 2) {
        mbarrier_init(filled + t, 33);
        mbarrier_init(emptied + t, 2);
        fence_async_proxy();
    }
    __syncthreads();
    if (t >= 64) {
        for (int n = 0; n < 6; n++) {
            if (n >= 2) mbarrier_wait(emptied + n % 2, n / 2 % 2 ^ 1);
            if (lane < 8) cp_async16(ring[n % 2] + lane * 4, in + n * 64 + lane * 4);
            mbarrier_arrive_behind_copies(filled + n % 2);
            if (lane == 0) {
                mbarrier_arrive_expecting(filled + n % 2, 128);
                copy_bulk(ring[n % 2] + 32, in + n * 64 + 32, 128, filled + n % 2);
            }
        }
        return;
    }
    int sum = 0;
    for (int n = 0; n < 6; n++) {
        mbarrier_wait(filled + n % 2, n / 2 % 2);
        sum += ring[n % 2][t] - 2 * ring[n % 2][63 - t];
        __syncwarp();
        mbarrier_arrive(emptied + n % 2, lane == 0);
    }
    out[t] = sum;
}
"""
FILLED, EMPTIED = "mbarrier_wait(filled + n % 2, n / 2 % 2);", "if (n >= 2) mbarrier_wait"
READ = "sum += ring[n % 2][t] - 2 * ring[n % 2][63 - t];"
RELEASE = "__syncwarp();\n        mbarrier_arrive(emptied + n % 2, lane == 0);"
BEHIND = "mbarrier_arrive_behind_copies(filled + n % 2);"
COPYING = "of ring, which an asynchronous copy writes"
RACE = "of ring, which .* reads without a barrier between"
ENDLESS = r"waits in mbarrier_wait at faulty.cu:\d+ for a phase that nobody is left to end"
FAULTS = {  # what stands in the place of a line or less, and its error
    "no wait for what is copied": (FILLED, "", f"{COPYING}|no thread has written|{RACE}"),
    "a wait for the phase before": (
        FILLED,
        FILLED.replace("% 2)", "% 2 ^ 1)"),
        f"{COPYING}|written",
    ),
    "no wait for readers": (
        EMPTIED,
        "if (n >= 6) mbarrier_wait",
        f"{RACE}|{COPYING}|has all arrivals",
    ),
    "readers that nobody tells of": ("__syncwarp();", "", RACE),
    "an arrival ahead of reads": (f"{READ}\n        {RELEASE}", f"{RELEASE} {READ}", RACE),
    "one of two warps is waited for": ("(emptied + t, 2)", "(emptied + t, 1)", f"{RACE}|{ENDLESS}"),
    "an arrival ahead of copies": (BEHIND, "mbarrier_arrive(filled + n % 2, true);", COPYING),
    "fewer arrivals": ("(filled + t, 33)", "(filled + t, 34)", ENDLESS),
    "more bytes than are copied": ("% 2, 128);", "% 2, 144);", ENDLESS),
    "bytes that nobody expects": (
        "mbarrier_arrive_expecting(filled + n % 2, 128);",
        "mbarrier_arrive(filled + n % 2, true);",
        ENDLESS,
    ),
    "no barrier behind those that make it": (
        "__syncthreads();",
        "",
        r"of (filled|emptied), which .* (without a barrier between|has written)",
    ),
    "no fence behind those that make it": (
        "fence_async_proxy();",
        "",
        "made without fence_async_proxy",
    ),
    "a copy of no whole 16 bytes": (
        "n * 64 + 32, 128, f",
        "n * 64 + 33, 128, f",
        "no whole aligned",
    ),
}


def run(folder, text):
    out, given = simt.zeros(64, np.int32), simt.asarray(np.arange(6 * 64 + 4, dtype="i4") ** 2)
    machine.launch(add_kernel(folder, text), 1, 96, out, given)
    return out.get()


@pytest.mark.parametrize("line, instead, error", FAULTS.values(), ids=FAULTS)
def test_faults_of_mbarriers(kernel_folder, monkeypatch, line, instead, error):
    assert KERNEL.count(line) == 1
    for seed in range(3):
        monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
        with pytest.raises(machine.SimtError, match=error):
            run(kernel_folder, KERNEL.replace(line, instead))


def test_phases_follow_each_other(kernel_folder, monkeypatch):
    stages = np.arange(6 * 64).reshape(6, 64) ** 2
    want = (stages - 2 * stages[:, ::-1]).sum(0)
    for seed in range(4):
        monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
        assert (run(kernel_folder, KERNEL) == want).all()


def test_products_read_what_bulk_copies_write_without_a_fence(kernel_folder):
    text = """
    extern "C" __global__ void faulty(float* out, const u16* in) {
        __shared__ __align__(1024) u16 tile[8 * 64];
        __shared__ u64 filled;
        if (threadIdx.x == 0) mbarrier_init(&filled, 1), fence_async_proxy();
        __syncthreads();
        if (threadIdx.x == 0) {
            mbarrier_arrive_expecting(&filled, 1024);
            copy_bulk(tile, in, 1024, &filled);
        }
        mbarrier_wait(&filled, 0);
        float sums[4] = {};
        const u32 a[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
        wgmma_fence();
        wgmma_m64k16(sums, a, wgmma_matrix(tile, 0));
        wgmma_commit();
        wgmma_wait<0>();
        for (int n = 0; n < 4; n++) out[threadIdx.x * 4 + n] = sums[n];
    }
    """
    out, given = simt.zeros(512, np.float32), simt.asarray(np.full(512, 0x3C00, np.uint16))
    machine.launch(add_kernel(kernel_folder, text), 1, 128, out, given)
    assert (out.get() == 16).all()
    fenced = text.replace(
        "mbarrier_wait(&filled, 0);", "mbarrier_wait(&filled, 0); tile[threadIdx.x] = 0;"
    )
    with pytest.raises(machine.SimtError, match="without (fence_async_proxy|a barrier)"):
        machine.launch(add_kernel(kernel_folder, fenced), 1, 128, out, given)
