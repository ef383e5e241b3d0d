"""Cooperative launches: blocks that wait for each other, and for the host."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from tests.simt import cupy as simt
from tests.simt import machine
from tests.simt.test_machine import add_kernel, both

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("hopper")]

BLOCKS, THREADS = 4, 64
N = BLOCKS * THREADS
REVERSED = list(range(N - 1, -1, -1))
WAIT = "while (load_acquire(counter) < 1) { }"
TAKE = f"if (b) {{ {WAIT} out[i] = out[0]; }}"
PASS = "if (t == 0) add_release(counter, 1);"


def fault(body, error, want):
    """Bodies with and without a fault, the pattern of its error, what `out` begins with without."""
    wrong, right = both(body)
    return SimpleNamespace(wrong=wrong, right=right, error=error, want=want)


RACE = r"(reads|writes) byte \d+ of out, which thread \(\d+, 0, 0\) of block"
PLACE = r"(faulty.cu|grid_barrier.cuh):\d+"
STUCK = f"waits in load_acquire at {PLACE} for a change that nobody is left to make"
FAULTS = {
    "the barrier of a block where one of the grid is due": fault(
        "out[i] = i; «__syncthreads();|ARRIVE; grid_wait(counter, 1);»"
        " out[N + i] = out[N - 1 - i];",
        RACE,
        [*range(N), *REVERSED],
    ),
    "a buffer is written again before all have read it": fault(
        "out[i] = i; ARRIVE; grid_wait(counter, 1); int x = out[N - 1 - i]; «|ARRIVE;"
        " grid_wait(counter, 2);» out[i] = x;",
        RACE,
        REVERSED,
    ),
    "a barrier that waits for the one before": fault(
        "out[i] = i; ARRIVE; grid_wait(counter, 1); out[N + i] = out[N - 1 - i]; ARRIVE;"
        " grid_wait(counter, «1|2»); out[i] = out[N + (i + 64) % N];",
        RACE,
        [REVERSED[(i + 64) % N] for i in range(N)],
    ),
    "arrival before the block's other threads have written": fault(
        f"if (b == 0) {{ out[t] = t; «|__syncthreads();» {PASS} }} else {{ {WAIT}"
        f" out[i] = out[t ^ 1]; }}",
        RACE,
        [*range(64), *[t ^ 1 for t in range(64)] * 3],
    ),
    "signal before its data": fault(
        f"if (i == 0) {{ «add_release(counter, 1); out[0] = 7;|"
        f"out[0] = 7; add_release(counter, 1);» }} {TAKE}",
        RACE,
        [7],
    ),
    "a signal without a fence": fault(
        f"if (i == 0) {{ out[0] = 7; «|__threadfence();» atomicAdd(counter, 1); }} {TAKE}",
        RACE,
        [7],
    ),
    "the fence of another thread": fault(
        f"if (b == 0) {{ out[t] = t; «__threadfence();|» __syncthreads();"
        f" if (t == 0) «|{{ __threadfence();» atomicAdd(counter, 1); «|}}» }} else {{ {WAIT}"
        f" out[i] = out[t ^ 1]; }}",
        RACE,
        [*range(64), *[t ^ 1 for t in range(64)] * 3],
    ),
    "a fence of the block alone": fault(
        f"if (i == 0) {{ out[0] = 7; «__threadfence_block|__threadfence»();"
        f" atomicAdd(counter, 1); }} {TAKE}",
        RACE,
        [7],
    ),
    "a relaxed wait": fault(
        f"if (i == 0) {{ out[0] = 7; {PASS} }} if (b) {{ while (!load_host(word)) {{ }}"
        f" «|__threadfence();» out[i] = out[0]; }}",
        RACE,
        [7],
    ),
    "a plain wait": fault(
        f"if (i == 0) {{ out[0] = 7; {PASS} }} if (b) {{ «while (!*(volatile u32*)counter) {{ }}"
        f" out[i] = 7|{WAIT} out[i] = out[0]»; }}",
        r"(byte 0 of counter, which thread|reads byte \d+ of counter|writes byte \d+ of counter)",
        [7],
    ),
    "a lost wake-up": fault(
        f"if (b) for (int k = 0; k < 16; k++) «if (t == 0) {{ u32 x = load_acquire(counter);"
        f" store_host(word, x + 1); }} if (i == 0)|{PASS} if (i == 0) {{»"
        f" while (load_acquire(counter) < 48) {{ }} «|out[0] = 48; }}»",
        STUCK,
        [48],
    ),
    "counters are set back while some still wait": fault(
        "ARRIVE; «if (i == 0) counter[0] = 0;|» grid_wait(counter, 1); out[i] = i;"
        " «|grid_leave(counter);»",
        r"(byte 0 of counter, which thread|reads byte \d+ of counter|writes byte \d+ of counter)",
        range(N),
    ),
    "a block that has ended is waited for": fault(
        "«|ARRIVE;» if (b == 3) return; out[i] = i; «ARRIVE;|» grid_wait(counter, 1);",
        STUCK,
        range(192),
    ),
    "blocks wait in a circle": fault(
        "if (t == 0) { «|add_release(counter, 1);» "
        " while (load_acquire(counter) < «1|4») { } «add_release(counter, 1)|out[b] = b»; }",
        STUCK,
        range(4),
    ),
    "mapped memory by a plain load": fault(
        "out[i] = (int)«host[0]|load_host(host)»;",
        r"reads byte 0 of host, mapped memory of the host, by a plain access",
        [5] * N,
    ),
}


def run(folder, body):
    text = (
        '#include "grid_barrier.cuh"\n'
        "#define ARRIVE __syncthreads(), grid_arrive(counter)\n"
        'extern "C" __global__ void faulty(int* out, u32* counter, u64* host) {\n'
        "    constexpr int N = 256;\n"
        "    const int t = threadIdx.x, b = blockIdx.x, i = b * 64 + t;\n"
        "    u64* const word = (u64*)counter;\n"
        f"    (void)N; (void)word; (void)host; (void)i; {body} }}"
    )
    kernel = add_kernel(folder, text)
    out, counter = simt.asarray(np.full(2 * N, -1, np.int32)), simt.zeros(2, np.uint32)
    host = simt.ndarray(simt.cuda.alloc_pinned_memory(8).view(np.uint64))
    host.host[0] = 5
    machine.launch(kernel, BLOCKS, THREADS, out, counter, host, cooperative=True)
    simt.Stream(non_blocking=True).synchronize()
    return out.get()


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(kernel_folder, monkeypatch, case):
    for seed in range(4):
        monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
        with pytest.raises(machine.SimtError, match=case.error) as caught:
            run(kernel_folder, case.wrong)
        text = str(caught.value)
        assert re.match(r"faulty.cu faulty, block \(\d, 0, 0\), thread \(\d+, 0, 0\) ", text), text
        got = run(kernel_folder, case.right)
        assert got[: len(case.want)].tolist() == list(case.want)


@pytest.mark.parametrize(
    "grid, block, options, most",
    [(9, 32, {}, 8), (3, 512, {}, 2), (2, 64, dict(cluster=(2,)), 8)],
    ids=str,
)
def test_grids_that_do_not_fit(kernel_folder, grid, block, options, most):
    kernel = add_kernel(kernel_folder, 'extern "C" __global__ void faulty(int* out) { *out = 1; }')
    with pytest.raises(machine.SimtError, match=f"cooperative grid is .*at most {most} blocks"):
        machine.launch(kernel, grid, block, simt.zeros(1, "i4"), cooperative=True, **options)


def test_the_host_talks_to_a_kernel_that_runs(kernel_folder):
    """Words of mapped memory go both ways while it runs; a clock ends it without a host."""
    text = (
        'extern "C" __global__ void faulty(u64* host, u64 limit) {\n'
        "    u64 next = 1; const u64 start = global_timer();\n"
        "    while (next <= 5 && global_timer() - start < limit) {\n"
        "        if (load_host(host) != next) continue;\n"
        "        store_host(host + 8, next * next); next++; } }"
    )
    kernel = add_kernel(kernel_folder, text)
    host = simt.ndarray(simt.cuda.alloc_pinned_memory(128).view(np.uint64))
    host.host[:] = 0
    stream = simt.Stream(non_blocking=True)
    machine.launch(kernel, 1, 1, host, np.uint64(10**10), cooperative=True)
    for i in range(1, 6):
        assert not stream.done
        host.host[0] = i
        while host.host[8] != i * i:
            pass
    stream.synchronize()
    assert stream.done
    machine.launch(kernel, 1, 1, host, np.uint64(10**7), cooperative=True)
    stream.synchronize()
