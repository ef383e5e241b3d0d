"""The machine itself: planted faults are caught, and their mended twins run."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from pykv import cuda, verify
from pykv.ops import compaction
from tests.helpers import swept
from tests.simt import cupy as simt
from tests.simt import machine

pytestmark = pytest.mark.simt

OPTIONS = ("shared_bytes", "cluster")
# `in` and `out` have n int32: out[i] = -1, in[i] = i.
SIZES = dict(grid=1, block=128, n=1000, shared="__shared__ int s[128];")


def both(body):
    """A kernel's body with a fault and without: what differs stands in it as «wrong|right»."""
    return (re.sub(r"«(.*?)\|(.*?)»", rf"\{i}", body, flags=re.S) for i in (1, 2))


def fault(body, error, want=range(128), **sizes):
    """Bodies with and without a fault, the pattern of its error, and what `out` begins with when
    the mended one has run."""
    wrong, right = both(body)
    return SimpleNamespace(**SIZES | sizes, wrong=wrong, right=right, error=error, want=want)


# Bodies for clusters of two blocks: `part` is the block's half of `out`, `peer` the other block.
BARRIER = "cluster_arrive(); cluster_wait();"
WRITTEN = f"s[t] = 128 * peer + t; {BARRIER}"
READ = "part[t] = map_shared_rank(s, peer)[t];"
IN_CLUSTER = dict(
    shared="__shared__ int s[128]; const u32 peer = blockIdx.x ^ 1; int* part = out + 128 *"
    " blockIdx.x;",
    grid=2,
    cluster=(2,),
)
GATHER = (  # by the cluster that comes last of two, what the other one has written
    f"if (t == 0) s[0] = blockIdx.x % 2 ? -1 : atomicAdd(out + 999, 1); {BARRIER}"
    " if (map_shared_rank(s, 0)[0] == 0) out[512 + 128 * (blockIdx.x % 2) + t] ="
    f" out[(blockIdx.x ^ 2) * 128 + 127 - t]; {BARRIER}"
)
OTHER_BLOCK = r"(of s|of s of block \(\d, 0, 0\)|of out), which thread \(\d+, 0, 0\) of block"
EXITED = r"of block \(\d, 0, 0\), which (has|may have) exited"


def cluster_fault(body, error, want=range(256), **changes):
    return fault(body, error, want, **IN_CLUSTER | changes)


FAULTS = {
    "barrier missing": fault(
        "s[t] = in[t]; «|__syncthreads();» out[t] = s[127 - t];",
        r"of s, which (thread \(\d+, 0, 0\) (reads or )?writes without|no thread has written)",
        range(127, -1, -1),
    ),
    "barrier missing before shared memory is used again": fault(
        "s[t] = in[t]; __syncthreads(); int x = s[127 - t]; «|__syncthreads();» s[t] = x;"
        " out[t] = x;",
        r"(writes|reads) byte \d+ of s, which thread .* without a barrier",
        range(127, -1, -1),
    ),
    "read before another warp has read and written": fault(
        "if (t < 32) s[t] = t; __syncthreads(); out[t] = s[t % 32]; «|__syncthreads();»"
        " if (t < 32) s[t] = 0;",
        r"(writes byte .* which .*(thread|warp).* reads|reads byte .* writes without)",
        list(range(32)) * 4,
        shared="__shared__ int s[32];",
    ),
    "race between warps": fault(
        "«|if (t == 0)» s[0] = 0; __syncthreads(); «s[0] += 1|atomicAdd(s, 1)»; __syncthreads();"
        " out[t] = s[0];",
        r"(writes|reads) byte 0 of s, which ",
        [128] * 128,
        shared="__shared__ int s[1];",
    ),
    "lost updates": fault(
        "if (t == 0) s[0] = 0; __syncthreads(); «s[0] += 1|atomicAdd(s, 1)»; __syncthreads();"
        " out[t] = s[0];",
        r"(writes|reads) byte 0 of s, which ",
        [128] * 128,
        shared="__shared__ int s[1];",
    ),
    "plain read beside atomics": fault(
        "if (t == 0) s[0] = 0; __syncthreads(); atomicAdd(s, 1); «|__syncthreads();»"
        " out[t] = s[0];",
        r"byte 0 of s, which ",
        [128] * 128,
        shared="__shared__ int s[1];",
    ),
    "shared memory by an instruction for global memory": fault(
        "if (t == 0) s[0] = 5; __syncthreads(); out[t] = «load_eager(s)|s[0]»;",
        "takes s for global memory",
        [5] * 128,
        shared="__shared__ int s[1];",
    ),
    "global memory by an instruction for shared memory": fault(
        "«cp_async<4>(out + t, in + t)|cp_async<4>(s + t, in + t)»; cp_async_commit();"
        " cp_async_wait<0>(); out[t] = s[t];",
        "takes out for shared memory",
    ),
    "race between blocks": fault(
        "out[«|blockIdx.x * 128 +» t] = blockIdx.x;",
        r"writes byte \d+ of out, which another block (reads|writes)",
        [0] * 128 + [1] * 128,
        grid=2,
    ),
    "atomic before the block's writes": fault(
        "out[blockIdx.x * 128 + t] = t; «|__syncthreads();»"
        " if (t == 0) s[0] = atomicAdd(out + 999, 1);"
        " __syncthreads(); if (s[0] == 0) out[256 + t] = out[127 - t] + out[255 - t];",
        r"reads byte \d+ of out, which another block writes",
        [*range(128), *range(128), *(254 - 2 * t for t in range(128))],
        grid=2,
        shared="__shared__ int s[1];",
    ),
    "race through global memory": fault(
        "out[t] = in[t]; «|__syncthreads();» out[200 + t] = out[127 - t];",
        r"(reads|writes) byte \d+ of out, which thread",
    ),
    "an atomic where a barrier of the block is due": fault(
        "out[t] = in[t]; «|__syncthreads();» atomicAdd(out + 999, 1); out[200 + t] = out[127 - t];",
        r"(reads|writes) byte \d+ of out, which thread",
    ),
    "syncwarp missing": fault(
        "s[t] = in[t]; «|__syncwarp();» out[t] = s[t ^ 1];",
        r"of s, which (thread|no thread)",
        [i ^ 1 for i in range(128)],
    ),
    "syncwarp where a barrier is due": fault(
        "s[t] = in[t]; «__syncwarp|__syncthreads»(); out[t] = s[t ^ 32];",
        r"of s, which (thread|no thread)",
        [i ^ 32 for i in range(128)],
    ),
    "a shuffle orders no memory": fault(
        "s[t] = in[t]; __shfl_sync(~0u, t, 0); «|__syncwarp();» out[t] = s[t ^ 1];",
        r"of s, which (thread|no thread)",
        [i ^ 1 for i in range(128)],
    ),
    "uninitialised shared memory": fault(
        "if (t < «127|128») s[t] = in[t]; __syncthreads(); out[t] = s[t];",
        r"thread \(127, 0, 0\) reads byte 508 of s, which no thread has written",
    ),
    "shared memory of the block before": fault(
        "«if (blockIdx.x == 0)|» s[t] = in[t]; __syncthreads(); out[blockIdx.x * 128 + t] = s[t];",
        r"block \(1, 0, 0\).* of s, which no thread has written",
        [*range(128), *range(128)],
        grid=2,
    ),
    "uninitialised dynamic shared memory": fault(
        "«|s[t] = in[t];» out[t] = s[t];",
        r"of dynamic shared memory, which no thread has written",
        shared="extern __shared__ __align__(16) int s[];",
        shared_bytes=512,
    ),
    "write past the end": fault(
        "«|if (t < 125)» out[t * 8] = t;",
        r"thread \(\d+, 0, 0\) writes 4 bytes at byte 40\d\d of out, which has 4000 bytes",
        [0, -1, -1, -1, -1, -1, -1, -1, 1],
    ),
    "write one past the end": fault(
        "for (int i = t; i <«=|» n; i += 128) out[i] = i;",
        r"writes 4 bytes at byte 4000 of out, which has 4000 bytes",
        range(1000),
    ),
    "read before the beginning": fault(
        "out[t] = in[t «- 1|? t - 1 : 0»];",
        r"thread \(0, 0, 0\) reads 4 bytes at byte -4 of in, which has 4000 bytes",
        [0, *range(127)],
    ),
    "write far away": fault(
        "out[«(1ll << 33) +|» t] = t;", r"writes 4 bytes at byte \d{11} of (in|out)"
    ),
    "index past a shared array": fault(
        "s[t «+ 1|»] = t; __syncthreads(); out[t] = s[t];",
        r"thread \(127, 0, 0\) indexes past an array's end at faulty.cu:\d+",
    ),
    "past dynamic shared memory": fault(
        "s[t «+ 1|»] = t; __syncthreads(); out[t] = s[t];",
        r"thread \(127, 0, 0\) writes 4 bytes at byte 512 of dynamic shared memory",
        shared="extern __shared__ int s[];",
        shared_bytes=512,
    ),
    "write to a const array": fault(
        "«const_cast<int*>(in)|out»[t] = t;", r"writes in, which is const"
    ),
    "null pointer": fault(
        "int* p = n «>|<» 0 ? nullptr : out; p[t] = t;",
        r"writes 4 bytes at 0x\w+, outside of every array|dereferences a null or mis",
    ),
    "misaligned 16-byte load": fault(
        "int4 x = *reinterpret_cast<const int4*>(in + «|4 *» t); out[t] = x.x + x.y - x.z + x.w;",
        r"dereferences a null or misaligned pointer at faulty.cu:\d+",
        range(2, 1026, 8),
    ),
    "divergent barrier": fault(
        "«if (t < 64) __syncthreads();\n|»__syncthreads(); out[t] = t;",
        r"thread .* waits in __syncthreads at faulty.cu:\d+, but thread .* waits in __syncthreads",
    ),
    "barrier within half a warp": fault(
        "«if (t % 32 < 16)|» __syncthreads(); «else|» __shfl_sync(~0u, t, 0); out[t] = t;",
        r"waits in __shfl_sync at faulty.cu:\d+ .* for lane \d+, which waits in __syncthreads",
    ),
    "shuffle mask with absent lanes": fault(
        "if (t % 32 < 16) out[t] = __shfl_xor_sync(«~0u|0xffffu», t, 1);",
        r"waits in __shfl_xor_sync at .* with mask ffffffff for lane \d+, which has exited",
        [i ^ 1 for i in range(16)] + [-1] * 16,
    ),
    "shuffle mask without the caller": fault(
        "out[t] = __shfl_xor_sync(«0xffffu|~0u», t, 1);",
        r"calls __shfl_xor_sync at faulty.cu:\d+ with mask 0000ffff, in which it is not",
        [i ^ 1 for i in range(128)],
    ),
    "shuffle from a lane outside the mask": fault(
        "if (t % 32 < 16) out[t] = __shfl_sync(0xffffu, t, «16|15»);",
        r"calls __shfl_sync at faulty.cu:\d+ with mask 0000ffff to read lane 16, not in it",
        [15] * 16 + [-1] * 16 + [47] * 16,
    ),
    "lanes at different shuffles": fault(
        "out[t] = «t & 1 ? __shfl_sync(~0u, t, 0) : __shfl_up_sync(~0u, t, 1)|"
        "__shfl_sync(~0u, t, 0)»;",
        r"waits in __shfl\w+ at .* for lane \d+, which waits in __shfl",
        [0] * 32 + [32] * 32,
    ),
    "signed overflow of an index": fault(
        "out[«(n * n * n)|(i64)n * n * n * n» % 1000 + t] = t;",
        r"overflows a signed product at faulty.cu:\d+",
        n=2000,
    ),
    "shift by too much": fault(
        "out[t] = 1 << t «|% 32»;",
        r"thread \(\d+, 0, 0\) shifts by a negative or too large number at faulty.cu:\d+",
        [1 << i for i in range(31)],
    ),
    "division by zero": fault(
        "out[t] = n / «t|(t + 1)»;",
        r"thread \(0, 0, 0\) divides by zero, or overflows at faulty.cu:\d+",
        [1000 // (i + 1) for i in range(128)],
    ),
    "float that no integer holds": fault(
        "out[t] = (int)(n * «1e9f|1e6f»);",
        r"casts a float to an integer that cannot hold it at faulty.cu:\d+",
        [10**9] * 128,
    ),
    "asynchronous copy of rows that are not aligned": fault(
        "cp_async16(s + t, in + «t|4 * t»); cp_async_commit(); cp_async_wait<0>();"
        " out[t] = s[t].x;",
        "copies 16 bytes that are not aligned to as many",
        range(0, 512, 4),
        shared="__shared__ uint4 s[128];",
    ),
    "asynchronous copy not waited for": fault(
        "cp_async16(s + t, in + 4 * t); cp_async_commit(); «|cp_async_wait<0>();» out[t] = s[t].x;",
        r"reads byte \d+ of s, which an asynchronous copy",
        range(0, 512, 4),
        shared="__shared__ uint4 s[128];",
    ),
    "asynchronous copies waited for one too few": fault(
        "cp_async16(s + t, in + 4 * t); cp_async_commit(); cp_async16(s + t + 128, in + 4 * t);"
        " cp_async_commit(); cp_async_wait<1>(); out[t] = s[t].x «+|; cp_async_wait<0>();"
        " out[t] +=» s[t + 128].x;",
        r"reads byte \d+ of s, which an asynchronous copy",
        range(0, 1024, 8),
        shared="__shared__ uint4 s[256];",
    ),
    "asynchronous copy, barrier missing": fault(
        "cp_async16(s + t, in + 4 * t); cp_async_commit(); cp_async_wait<0>();"
        " «|__syncthreads();» out[t] = s[t ^ 32].x;",
        r"of s, which (thread|no thread|an asynchronous copy)",
        [4 * (i ^ 32) for i in range(128)],
        shared="__shared__ uint4 s[128];",
    ),
    "no barrier before another block is read": cluster_fault(
        f"«s[t] = 128 * peer + t;|{WRITTEN}» {READ} {BARRIER}",
        r"reads byte \d+ of s of block \(\d, 0, 0\), which no thread has written",
    ),
    "a barrier of the block where the cluster's is due": cluster_fault(
        f"{WRITTEN} s[t] = t; «__syncthreads();|{BARRIER}» {READ} {BARRIER}",
        rf"{OTHER_BLOCK} \(\d, 0, 0\) (reads|writes) without a barrier",
        [*range(128)] * 2,
    ),
    **{
        f"block {peer} is read behind a barrier of the block alone": cluster_fault(
            f"{WRITTEN} if (peer != {peer}) s[t] = t; «__syncthreads();|{BARRIER}»"
            f" if (peer == {peer}) {READ} {BARRIER}",
            rf"{OTHER_BLOCK} \(\d, 0, 0\) (reads|writes) without a barrier",
            [-1] * 128 * (peer ^ 1) + [*range(128)],
        )
        for peer in (0, 1)
    },
    "written again before all have read": cluster_fault(
        f"{WRITTEN} {READ} «s[t] = 0; {BARRIER}|{BARRIER} s[t] = 0;»",
        rf"writes byte \d+ of s, which thread .* of block .* reads without|{OTHER_BLOCK}",
    ),
    "written between arrival and wait": cluster_fault(
        "«cluster_arrive();|» s[t] = 128 * peer + t; «|cluster_arrive();» cluster_wait();"
        f" {READ} {BARRIER}",
        rf"reads byte \d+ {OTHER_BLOCK} \(\d, 0, 0\) writes without a barrier",
    ),
    "read before the wait": cluster_fault(
        f"s[t] = 128 * peer + t; cluster_arrive(); «{READ} cluster_wait();|cluster_wait();"
        f" {READ}» {BARRIER}",
        rf"which no thread has written|reads byte \d+ {OTHER_BLOCK} .* writes without a barrier",
    ),
    "no barrier before the end": cluster_fault(f"{WRITTEN} {READ} «|{BARRIER}»", EXITED),
    "only arrival before the end": cluster_fault(
        f"{WRITTEN} {READ} cluster_arrive(); «|if (t >= 96) cluster_wait();»", EXITED
    ),
    "read after the last arrival": cluster_fault(
        f"{WRITTEN} «|{READ}» cluster_arrive(); «{READ}|» cluster_wait();", EXITED
    ),
    **{
        f"block {peer} ends while block {peer ^ 1} reads": cluster_fault(
            f"{WRITTEN} if (peer == {peer}) {READ} «|{BARRIER}»",
            EXITED,
            [-1] * 128 * (peer ^ 1) + [*range(128 * (peer ^ 1), 128 * (peer ^ 1) + 128)],
        )
        for peer in (0, 1)
    },
    "rank outside of the cluster": cluster_fault(
        f"{WRITTEN} part[t] = map_shared_rank(s, «2|1»)[t]; {BARRIER}",
        r"calls map_shared_rank at faulty.cu:\d+ with rank 2, but its cluster has 2",
        [*range(128), *range(128)],
    ),
    "rank outside of a cluster that is not there": cluster_fault(
        "s[t] = t; __syncthreads(); out[t] = map_shared_rank(s, «1|0»)[t];",
        r"calls map_shared_rank at faulty.cu:\d+ with rank 1, but its cluster has 1",
        range(128),
        grid=1,
        cluster=None,
    ),
    "write through map_shared_rank": cluster_fault(
        f"{WRITTEN} «const_cast<int*>(map_shared_rank(s, peer))|s»[t] = t; {BARRIER} «|{READ}"
        f" {BARRIER}»",
        r"writes s of block \(\d, 0, 0\), which map_shared_rank makes const",
        [*range(128), *range(128)],
    ),
    "write to its own memory through map_shared_rank": cluster_fault(
        f"{WRITTEN} «const_cast<int*>(map_shared_rank(s, blockIdx.x))[t] = t|s[t] = t;"
        f" __syncwarp(); part[t] = map_shared_rank(s, blockIdx.x)[t ^ 1]»; {BARRIER}",
        r"writes s, which map_shared_rank makes const",
        [i ^ 1 for i in range(128)] * 2,
    ),
    "barrier missing before its own memory is read through map_shared_rank": cluster_fault(
        f"{WRITTEN} s[t] = t; «|__syncthreads();» "
        f" part[t] = map_shared_rank(s, blockIdx.x)[127 - t]; «{BARRIER}|»",
        r"byte \d+ of s, which thread \(\d+, 0, 0\) (reads|writes) without a barrier",
        [*range(127, -1, -1)] * 2,
    ),
    "atomic through map_shared_rank": cluster_fault(
        f"{WRITTEN} atomicAdd(«const_cast<int*>(map_shared_rank(s, peer))|s» + t, 1);"
        f" «|{BARRIER} {READ}» {BARRIER}",
        r"writes s of block \(\d, 0, 0\), which map_shared_rank makes const",
        range(1, 257),
    ),
    "map_shared_rank of global memory": cluster_fault(
        f"{WRITTEN} «part[t] = map_shared_rank(in, peer)[t];|{READ}» {BARRIER}",
        r"calls map_shared_rank at faulty.cu:\d+ for what is not in shared memory",
    ),
    "past the end of another block's memory": cluster_fault(
        f"{WRITTEN} part[t] = map_shared_rank(s «|+ 1», peer)[t «+|-» 1]; {BARRIER}",
        r"thread \(127, 0, 0\) reads 4 bytes at byte 512 of s of block \(\d, 0, 0\), which has 512",
    ),
    "unwritten bytes of another block's dynamic shared memory": cluster_fault(
        f"«if (t < 127)|» {WRITTEN} {READ} {BARRIER}",
        r"reads byte 508 of dynamic shared memory of block \(\d, 0, 0\), which no thread has",
        shared=IN_CLUSTER["shared"].replace("__shared__ int s[128]", "extern __shared__ int s[]"),
        shared_bytes=512,
    ),
    "wait without arrival": cluster_fault(
        f"{WRITTEN} {READ} «cluster_wait();|{BARRIER}»",
        r"calls cluster_wait at faulty.cu:\d+ without having arrived",
    ),
    "arrival twice": cluster_fault(
        f"{WRITTEN} {READ} cluster_arrive(); «|cluster_wait();» {BARRIER}",
        r"calls cluster_arrive at faulty.cu:\d+ twice without a wait between",
    ),
    "barrier of a part of the warps": cluster_fault(
        f"if (t «< 64) {{ {BARRIER} }}|>= 64) return; {BARRIER}» __syncthreads(); part[t] = t;",
        r"waits in cluster_wait at faulty.cu:\d+, but thread \(\d+, 0, 0\).* waits in __syncthreads"
        r" at faulty.cu:\d+ and has not arrived",
        [*range(64), *[-1] * 64] * 2,
    ),
    "arrival of half a warp": cluster_fault(
        "«if (t & 1) cluster_arrive();\nelse cluster_arrive();\n|cluster_arrive();»"
        " cluster_wait(); part[t] = t;",
        r"calls cluster_arrive at faulty.cu:\d+ without lane \d+, which waits in cluster_arrive",
        [*range(128)] * 2,
    ),
    "race through global memory in a cluster": cluster_fault(
        f"part[t] = t; «|{BARRIER}» out[256 + 128 * peer + t] = out[128 * peer + t];",
        rf"{OTHER_BLOCK} \(\d, 0, 0\) (reads|writes) without a barrier",
        [*range(128)] * 4,
    ),
    "clusters are told what a barrier has gathered before an atomic": cluster_fault(
        f"part[t] = t; «__syncthreads();|{BARRIER}» {GATHER}",
        r"reads byte \d+ of out, which (another block|thread .* of block .*) writes",
        [*range(128)] * 4 + [*range(127, -1, -1)] * 2,
        grid=4,
    ),
    "an atomic in a cluster where a barrier of the block is due": cluster_fault(
        f"{BARRIER} part[t] = t; atomicAdd(out + 999, 1); «|__syncthreads();»"
        " part[256 + t] = part[127 - t];",
        r"(reads|writes) byte \d+ of out, which thread",
        [*range(128)] * 2 + [*range(127, -1, -1)] * 2,
    ),
    "an atomic tells nothing of later ones": cluster_fault(
        f"if (t == 0) atomicAdd(out + 999, 1); {BARRIER} if (peer == 1) {{ part[t] = t;"
        f" __syncthreads(); if (t == 0) atomicAdd(out + 999, 1); }} «else|{BARRIER}"
        " if (peer == 0)» part[t] = out[t];",
        rf"{OTHER_BLOCK} \(\d, 0, 0\) (reads|writes) without a barrier",
        [*range(128)] * 2,
    ),
    **{
        f"read of block {peer} between arrival and wait, beside its own": cluster_fault(
            f"{WRITTEN} if (peer == {peer}) {{ «|{READ}» cluster_arrive(); «{READ}|» }}"
            f" else {{ part[t] = s[t]; cluster_arrive(); }} cluster_wait(); s[t] = 0; {BARRIER}",
            r"writes byte \d+ of s, which threads of several blocks reads without a barrier",
            [*range(128 * (peer ^ 1), 128 * (peer ^ 1) + 128)] * 2,
        )
        for peer in (0, 1)
    },
    "wait of one warp, and no barrier of the block": cluster_fault(
        "s[t] = 128 * peer + t; cluster_arrive(); if (t < 32) cluster_wait();"
        f" «|__syncthreads();» {READ} if (t >= 32) cluster_wait(); {BARRIER}",
        rf"which no thread has written|{OTHER_BLOCK} \(\d, 0, 0\) (reads|writes) without",
    ),
    "asynchronous copy under way at the barrier": cluster_fault(
        "cp_async<4>(s + t, in + 128 * peer + t); cp_async_commit(); «|cp_async_wait<0>();»"
        f" {BARRIER} {READ} «cp_async_wait<0>();|» {BARRIER}",
        r"of s of block \(\d, 0, 0\), which an asynchronous copy writes",
    ),
}


def add_kernel(folder, text, name="faulty"):
    (folder / f"{name}.cu").write_text(f'#include "ptx.cuh"\n{text}\n')
    cuda.source.cache_clear()
    return machine.load(machine.ARCH, name, name)


def run(folder, body, case):
    """`out` after the launch of a kernel with this body."""
    kernel = add_kernel(
        folder,
        'extern "C" __global__ void faulty(int* out, const int* in, int n) {\n'
        f"    {case.shared}\n    const int t = threadIdx.x;\n    {body}\n}}",
    )
    out, given = (
        simt.asarray(np.full(1000, -1, np.int32)),
        simt.asarray(np.arange(1000, dtype="i4")),
    )
    options = {name: getattr(case, name) for name in OPTIONS if hasattr(case, name)}
    machine.launch(kernel, case.grid, case.block, out, given, np.int32(case.n), **options)
    return out.get()


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(kernel_folder, monkeypatch, case):
    if case is FAULTS["misaligned 16-byte load"] and "clang" in machine.version():
        pytest.skip("clang++ does not check the address of a struct that is copied")
    if hasattr(case, "cluster"):
        monkeypatch.setattr(machine, "ARCH", "sm_90")  # the first with clusters
    for seed in range(3):
        monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
        with pytest.raises(machine.SimtError, match=case.error) as caught:
            run(kernel_folder, case.wrong, case)
        text = str(caught.value)
        assert re.match(r"faulty.cu faulty, block \(\d, 0, 0\), thread \(\d+, 0, 0\) ", text), text
        assert " at faulty.cu:" in text, text
        got = run(kernel_folder, case.right, case)
        assert got[: len(case.want)].tolist() == list(case.want)


def test_an_index_beyond_32_bits(kernel_folder):
    """4.5 GB of which a page or two are touched: a wrapped index would land elsewhere in it."""
    body = "out[(u64)blockIdx.x * stride + threadIdx.x] = threadIdx.x + 1;"
    text = f'extern "C" __global__ void rows(u8* out, u32 stride) {{ {body} }}'
    stride, blocks = 1_500_000_000, 3
    out = simt.ndarray(np.zeros(blocks * stride + 32, np.uint8))
    machine.launch(add_kernel(kernel_folder, text, "rows"), blocks, 32, out, np.uint32(stride))
    wrapped = 2 * stride - 2**32 % (2 * stride)
    rows = [out.host[b * stride : b * stride + 32].tolist() for b in range(blocks)]
    assert rows == [list(range(1, 33))] * blocks and wrapped != 0

    wrong = text.replace("(u64)", "(int)").replace("u32 stride", "int stride")
    kernel = add_kernel(kernel_folder, wrong, "rows")
    with pytest.raises(machine.SimtError, match="overflows a signed product at rows.cu:2"):
        machine.launch(kernel, blocks, 32, out, np.int32(stride))


def test_locals_are_poisoned(kernel_folder):
    if not machine.takes(machine.POISON):
        pytest.skip(f"{machine.version()} has no {machine.POISON}")
    text = (
        'extern "C" __global__ void faulty(float* out, int n) {\n'
        "    float x[4]; for (int i = 0; i < n; i++) x[i] = 1; out[threadIdx.x] = x[threadIdx.x]; }"
    )
    out = simt.zeros(4, np.float32)
    machine.launch(add_kernel(kernel_folder, text), 1, 4, out, np.int32(3))
    got = out.get().tolist()
    assert got[:3] == [1, 1, 1] and not abs(got[3]) < 1e30  # or NaN


def test_variants_of_a_kernel_share_no_shared_memory(kernel_folder):
    """Statics of an inline function are one in a process, if libraries are linked as usual."""
    (kernel_folder / "faulty.cu").write_text(
        '#include "ptx.cuh"\n'
        "__device__ __forceinline__ int* buffer() { __shared__ int s[SIZE]; return s; }\n"
        'extern "C" __global__ void faulty(int* out) {\n'
        "    buffer()[threadIdx.x] = threadIdx.x; __syncthreads();\n"
        "    out[threadIdx.x] = buffer()[SIZE - 1 - threadIdx.x]; }"
    )
    cuda.source.cache_clear()
    for size in (32, 64):
        kernel, out = (
            machine.load(machine.ARCH, "faulty", "faulty", SIZE=size),
            simt.zeros(64, "i4"),
        )
        machine.launch(kernel, 1, size, out)
        assert out.get()[:size].tolist() == [*reversed(range(size))]


def test_defines_that_change_nothing_share_a_build(kernel_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "cache"))
    (kernel_folder / "faulty.cu").write_text(
        'extern "C" __global__ void faulty(int* out) { *out = SIZE; }'
    )
    cuda.source.cache_clear()

    def builds(arch, **defines):
        machine.load(arch, "faulty", "faulty", **defines)
        return len(list((cuda.cache_dir() / "simt").glob("faulty-*.so")))

    before = builds("sm_52", SIZE=17)
    assert builds("sm_89", SIZE=17, UNUSED=1) == before
    assert builds("sm_89", SIZE=18, UNUSED=1) == before + 1


def test_the_seed_decides_the_order(kernel_folder, monkeypatch):
    """Tickets are drawn in the order of the threads: another for each seed, the same twice."""
    text = (
        'extern "C" __global__ void faulty(int* out, int* next) {\n'
        "    out[blockIdx.x * 64 + threadIdx.x] = atomicAdd(next, 1); }"
    )
    kernel = add_kernel(kernel_folder, text)

    def tickets(seed):
        monkeypatch.setenv("PYKV_SIMT_SEED", str(seed))
        out = simt.zeros(4 * 64, np.int32)
        machine.launch(kernel, 4, 64, out, simt.zeros(1, np.int32))
        return out.get().tolist()

    orders = [tickets(seed) for seed in range(4)]
    assert all(sorted(order) == list(range(256)) for order in orders)
    assert len(set(map(tuple, orders))) == 4 and tickets(2) == orders[2]


LIMITED = (
    'extern "C" __global__ void __launch_bounds__(64) faulty(float* out, const f16* in, int n) {\n'
    "    __shared__ int s[1024]; extern __shared__ int d[];\n"
    "    if (n < 0) { s[threadIdx.x] = n; __syncthreads(); out[0] = s[n & 31] + d[0]; } }"
)
ARRAYS = dict(out=("zeros", "f4"), given=("zeros", "f2"), n=np.int32(1))


@pytest.mark.parametrize(
    "change, error",
    [
        ({}, None),
        ({"block": 64}, None),
        ({"block": (8, 8)}, None),
        ({"grid": 0}, r"grid is \(0, 1, 1\), expected 1 to \(2147483647, 65535, 65535\)"),
        ({"grid": (1, 65536)}, r"grid is \(1, 65536, 1\)"),
        ({"block": (1, 1, 128)}, r"block is \(1, 1, 128\), expected 1 to \(1024, 1024, 64\)"),
        ({"block": 65}, r"block is \(65, 1, 1\), expected at most 64 threads"),
        ({"shared_bytes": 60 << 10}, None),
        ({"shared_bytes": (60 << 10) + 4}, r"4096 bytes of static and 61444 of dynamic .*sm_75"),
        ({"out": ("zeros", "f8")}, r"out is a ndarray of float64, expected an array of float32"),
        ({"out": np.float32(1)}, r"out is a float32 of float32, expected an array of float32"),
        ({"given": None}, None),
        ({"n": np.int64(1)}, r"n is an int64 of int64, expected a scalar of int32"),
        ({"n": 1}, r"n is an int of no dtype, expected a scalar of int32"),
    ],
    ids=str,
)
def test_launches_that_no_gpu_takes(kernel_folder, monkeypatch, change, error):
    monkeypatch.setattr(machine, "ARCH", "sm_75")
    sizes = dict(grid=1, block=32, shared_bytes=0)
    options = {**sizes, **ARRAYS, **change}
    args = [
        getattr(simt, value[0])(8, value[1]) if isinstance(value, tuple) else value
        for value in (options[name] for name in ARRAYS)
    ]
    options = {name: options[name] for name in sizes}
    kernel = add_kernel(kernel_folder, LIMITED)
    if error is None:
        machine.launch(kernel, options.pop("grid"), options.pop("block"), *args, **options)
        return
    with pytest.raises(machine.SimtError, match=f"^faulty.cu faulty: {error}"):
        machine.launch(kernel, options.pop("grid"), options.pop("block"), *args, **options)


@pytest.mark.parametrize(
    "arch, grid, block, cluster, error",
    [
        ("sm_90", (2, 3, 8), 128, (1, 1, 8), None),
        ("sm_90", 8, 32, (4,), None),
        ("sm_90", (4, 6), 100, (2, 3, 1), None),  # four warps each
        ("sm_89", 8, 32, (8,), "none on sm_89: sm_90 is the first with clusters"),
        ("sm_90", (8, 1, 12), 32, (1, 1, 8), r"sizes that divide those of the grid, \(8, 1, 12\)"),
        ("sm_90", 8, 32, (1, 1, 8), r"sizes that divide those of the grid, \(8, 1, 1\)"),
        ("sm_90", 8, 32, (0,), r"sizes that divide those of the grid, \(8, 1, 1\)"),
        ("sm_90", (4, 4), 32, (4, 4), "at most 8 blocks"),
        ("sm_90", 8, 129, (8,), r"at most 1024 threads here, with blocks of \(129, 1, 1\)"),
    ],
    ids=str,
)
def test_clusters_that_no_gpu_takes(kernel_folder, monkeypatch, arch, grid, block, cluster, error):
    monkeypatch.setattr(machine, "ARCH", arch)
    text = 'extern "C" __global__ void faulty(int* out) { atomicAdd(out, 1); }'
    kernel, out = add_kernel(kernel_folder, text), simt.zeros(1, np.int32)
    if error is None:
        machine.launch(kernel, grid, block, out, cluster=cluster)
        assert out.get().tolist() == [np.prod(grid) * block]
        return
    sizes = (*cluster, 1, 1)[:3]
    expected = rf"^faulty.cu faulty: cluster is {re.escape(str(sizes))}, expected {error}$"
    with pytest.raises(machine.SimtError, match=expected):
        machine.launch(kernel, grid, block, out, cluster=cluster)


def test_barriers_have_a_limit(kernel_folder, hopper):
    text = (
        'extern "C" __global__ void faulty(int* out, int n) {\n'
        "    for (int i = 0; i < n; i++) { cluster_arrive(); cluster_wait(); } out[0] = n; }"
    )
    kernel, out = add_kernel(kernel_folder, text), simt.zeros(1, np.int32)
    machine.launch(kernel, 1, 1, out, np.int32(511))
    assert out.get().tolist() == [511]
    with pytest.raises(machine.SimtError, match="more often than this machine counts"):
        machine.launch(kernel, 1, 1, out, np.int32(512))


def test_tables_of_addresses(kernel_folder):
    """What a table names belongs to the launch; what it does not name is out of bounds."""
    text = (
        'extern "C" __global__ void faulty(const u64* table, int at) {\n'
        "    ((int*)table[threadIdx.x])[at] += threadIdx.x; }"
    )
    kernel = add_kernel(kernel_folder, text)
    arrays = [simt.zeros(4, np.int32) for _ in range(3)]
    named = [arrays[0][1:], arrays[2]]
    table = simt.asarray(np.array([x.data.ptr for x in named], np.uint64))
    machine.launch(kernel, 1, 2, table, np.int32(2))
    assert [x.get().tolist() for x in arrays] == [[0, 0, 0, 0], [0] * 4, [0, 0, 1, 0]]
    with pytest.raises(machine.SimtError, match=r"at byte (16|20) of memory that table names"):
        machine.launch(kernel, 1, 2, table, np.int32(4))
    del arrays, named
    with pytest.raises(machine.SimtError, match="outside of every array|which has"):
        machine.launch(kernel, 1, 2, table, np.int32(0))


def test_a_kernel_is_loaded_while_another_runs(kernel_folder):
    """By another thread of the host, whose accesses are none of the launch."""
    waits = (
        'extern "C" __global__ void waits(u64* host) {\n'
        "    store_host(host, 1); while (load_host(host) == 1) {} store_host(host, 3); }"
    )
    kernel = add_kernel(kernel_folder, waits, "waits")
    host = simt.ndarray(simt.cuda.alloc_pinned_memory(8).view(np.uint64))
    host.host[0] = 0
    machine.launch(kernel, 1, 1, host, cooperative=True)
    while host.host[0] == 0:
        pass
    loaded = add_kernel(kernel_folder, LIMITED)
    assert loaded.parameters == [("out", "Pf"), ("in", "PK3f16"), ("n", "i")]
    host.host[0] = 2
    simt.Stream(non_blocking=True).synchronize()
    assert host.host[0] == 3


def test_a_wrong_number_of_arguments(kernel_folder):
    kernel = add_kernel(kernel_folder, LIMITED)
    with pytest.raises(machine.SimtError, match="faulty.cu faulty takes 3 arguments, not 1"):
        machine.launch(kernel, 1, 32, simt.zeros(8))


def test_static_shared_memory_has_a_limit(kernel_folder):
    kernel = add_kernel(kernel_folder, LIMITED.replace("s[1024]", "s[12289]"))
    with pytest.raises(machine.SimtError, match="49156 bytes of static .* expected at most 49152"):
        machine.launch(kernel, 1, 32, simt.zeros(8), None, np.int32(1))


def test_text_that_does_not_compile_shows_the_line(kernel_folder):
    with pytest.raises(machine.SimtError, match=r"faulty does not compile:[^$]*faulty.cu:3"):
        add_kernel(kernel_folder, LIMITED.replace("int s[1024]", "int s[x]"))


def test_device_arrays_do_not_become_numpy_arrays_unasked():
    x = simt.zeros(3)
    for mix in (lambda: np.asarray(x), lambda: x + np.ones(3), lambda: np.ones(3) + x):
        with pytest.raises(TypeError):
            mix()
    assert (x + x).get().tolist() == [0, 0, 0]


# --- The kernels of pykv --------------------------------------------------------------------------


# Long; tests of their ops run these kernels always.
IN_SWEEP = [
    *("attention_scores", "block_linear", "kv_scores", "kvtc_rows", "linear", "linear_mma"),
    *("linear_small", "linear_split", "linear_tiles", "linear_wgmma"),
    *("paged_append", "paged_convert", "paged_decode", "paged_decode_mma", "prefill"),
    *("prefill_mma", "sample"),
]


WITH_TENSOR_CORES = {
    *("attention_scores_mma", "linear_mma", "linear_small", "linear_split", "qkv_decode"),
}


@pytest.mark.parametrize("device", [pytest.param("simt", marks=pytest.mark.simt)], indirect=True)
@pytest.mark.parametrize(
    "stem", [*(stem for stem in cuda.stems() if stem not in IN_SWEEP), *swept(IN_SWEEP)]
)
def test_every_kernel_runs(device, stem):
    """`pykv verify` on the machine: the op is right, and no kernel of its file is left out."""
    machine.launched.clear()
    rows = verify.families()[stem](np.random.default_rng(0), device)
    assert not [row for row in rows if not row[1] <= row[2]]
    text = strip_bounds(cuda.compiler.source(stem))
    declared = set(re.findall(r"__global__[^;{]*?(\w+)\(", text))
    sm = int(machine.ARCH[3:])
    if sm < 75:  # where tensor cores begin that it knows
        declared -= {"paged_decode_mma", "prefill_mma"}
        declared = set() if stem in WITH_TENSOR_CORES else declared
    declared = set() if stem == "linear_tiles" and sm < 80 else declared
    declared = set() if stem == "linear_wgmma" and sm != 90 else declared
    declared = set() if stem in ("phase_program", "resident_program") and sm < 70 else declared
    # Of the two ways of compaction an SM takes one; its tests run both.
    looks_back = sm >= compaction.LOOK_BACK_SM
    declared -= {"compaction_scatter" if looks_back else "compaction"}
    assert {kernel for file, kernel in machine.launched if file == stem} == declared


def strip_bounds(text):
    return re.sub(r"__launch_bounds__\([^)]*\)", "", text)
