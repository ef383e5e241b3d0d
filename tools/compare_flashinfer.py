"""Attention over paged caches beside other libraries' kernels, in one process on one GPU.

    python tools/compare_flashinfer.py --json tools/results/h200/flashinfer.json
    python tools/compare_flashinfer.py --only decode --batch 64,4096 1,1024

Needs torch with CUDA; runs FlashInfer's kernels (FA2 on CUDA cores, FA2 on tensor cores, XQA) where
it is installed, and torch's scaled_dot_product_attention over contiguous keys and values. Every
kernel is captured in a CUDA graph and replayed on the same pages, the L2 cache being flushed before
each replay; what it leaves is held to pykv's result first. Its host time is that of a call without
the graph, right behind another, after `pykv.prepare` or FlashInfer's `plan`. Prints
microseconds, and pykv's over those of the best peer that pages as well; a kernel that refuses a
case or disagrees is named with its reason.
"""

import argparse
import math
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pykv
from pykv import KVSpec, cuda
from pykv.bench import report
from pykv.bench.decode import BATCHES, KINDS, MIXED, SHAPES, SIZES
from pykv.ops import bandwidth, paged_decode, prefill

PEER_KINDS = ("bf16", "e4m3")  # only pykv has the others
TORCH_TYPES = {"bf16": "bfloat16", "e4m3": "float8_e4m3fn"}
# Largest error, root mean square, of a peer against pykv, as a share of the values: sums of 16-bit
# weights differ by 2^-8; XQA takes queries and weights of fp8 caches to fp8, which costs 2^-4.5.
TOLERANCES = {"bf16": 2.0**-6, "e4m3": 2.0**-3.5}
WARMUP = 3
FLUSH_BYTES, CEILING_BYTES = 256 << 20, 4 << 30
SCRATCH_BYTES = 512 << 20  # workspace of a peer
PARTS = ("decode", "prefill", "shapes")


def cases(parts=PARTS, batches=BATCHES):
    """What is measured; L = MIXED stands for lengths of 1 to 16384."""
    listed = []
    if "decode" in parts:
        listed += [dict(op="decode", B=B, L=L, kv=kv) for B, L in batches for kv in KINDS]
    if "prefill" in parts:
        listed += [dict(op="prefill", B=8, L=2048, kv=kv) for kv in ("bf16", "e4m3", "int8")]
    if "shapes" in parts:
        shapes = [dict(B=64, L=4096, **shape) for shape in SHAPES]
        shapes += [dict(B=64, L=MIXED), dict(B=16, L=4096, HQ=4, H=1, D=256)]
        listed += [dict(op="decode", kv=kv, **shape) for shape in shapes for kv in PEER_KINDS]
    return [{**SIZES, **case} for case in listed]


class Problem:
    """A case's queries, and its keys and values on random pages, as torch tensors."""

    def __init__(self, torch, case, device="cuda"):
        self.B, self.L, self.HQ, self.H, self.D, self.P = (case[x] for x in "B L HQ H D P".split())
        self.op, self.kind = case["op"], case["kv"]
        rng = np.random.default_rng(0)
        lengths = np.full(self.B, self.L) if self.L else rng.integers(1, 16385, self.B)
        counts = lengths if self.op == "prefill" else np.ones_like(lengths)  # of queries
        pages = -(-lengths // self.P)
        N, self.M = int(pages.sum()), int(pages.max())
        table = np.zeros((self.B, self.M), np.int32)
        used = np.arange(self.M) < pages[:, None]
        table[used] = rng.permutation(N)

        def int32(x):
            return torch.from_numpy(np.asarray(x, np.int32)).to(device)

        self.table, self.lengths, self.indices = int32(table), int32(lengths), int32(table[used])
        self.starts, self.indptr = (int32(np.cumsum([0, *x])) for x in (counts, pages))
        self.last = int32(lengths - (pages - 1) * self.P)  # tokens of each last page

        torch.manual_seed(0)
        shape, bf16 = (N, self.P, self.H, self.D), torch.bfloat16
        self.q = torch.randn(int(counts.sum()), self.HQ, self.D, dtype=bf16, device=device)
        if self.kind in TORCH_TYPES:
            dtype = getattr(torch, TORCH_TYPES[self.kind])
            self.k, self.v = (
                torch.randn(shape, dtype=bf16, device=device).to(dtype) for _ in range(2)
            )
        else:
            width = self.D if self.kind == "int8" else self.D // 2
            self.k, self.v = (
                torch.randint(-127, 128, (*shape[:3], width), dtype=torch.int8, device=device)
                for _ in range(2)
            )
            self.scales = torch.full(shape[:3], 1 / 64, dtype=torch.float16, device=device)
        row = {"bf16": 2 * self.D, "e4m3": self.D, "int8": self.D + 2, "int4": self.D // 2 + 2}
        # Bytes of keys, values and scales, which every kernel has to read.
        self.nbytes = int(2 * lengths.sum()) * self.H * row[self.kind]
        seen = int((counts * (2 * lengths - counts + 1) // 2).sum())  # keys seen, over all queries
        self.flops = 4 * self.HQ * self.D * seen


# --- Kernels: each takes torch and a problem, and returns a call that returns its output ----------


def ours(torch, problem):
    import cupy

    def share(x):
        return cupy.from_dlpack(x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x)

    spec = KVSpec.parse({"e4m3": "e4m3:tensor:fp32"}.get(problem.kind, problem.kind))
    pools = [share(problem.k), share(problem.v)]
    given = {"spec": spec}
    if problem.kind == "e4m3":
        given |= dict.fromkeys(("k_scales", "v_scales"), cupy.ones(1, np.float32))
    elif problem.kind != "bf16":
        given |= dict.fromkeys(("k_scales", "v_scales"), share(problem.scales))
    if problem.kind == "int4":
        pools = [pool.view(np.uint8) for pool in pools]
    out = torch.empty_like(problem.q)
    given["out"] = share(out)
    arrays = [share(problem.q), *pools, share(problem.table), share(problem.lengths)]
    if problem.op == "decode":
        capacity = problem.M * problem.P
        size = paged_decode.workspace_size(problem.B, problem.HQ, problem.H, problem.D, capacity)
        given["workspace"] = cupy.zeros(size, np.float32)
        # Not timed, like the others' `plan`.
        attend = pykv.prepare(paged_decode.decode, *arrays, **given)
    else:
        attend = partial(prefill.prefill, *arrays, share(problem.starts), **given)

    def run():
        attend()
        return out

    return run


def fa2_decode(torch, problem, tensor_cores):
    import flashinfer

    if problem.D not in (64, 128, 256):  # at other sizes their merge faults the device
        raise NotImplementedError("head sizes of 64, 128 and 256 alone")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device="cuda"),
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=problem.indptr.clone(),
        paged_kv_indices_buffer=problem.indices.clone(),
        paged_kv_last_page_len_buffer=problem.last.clone(),
        backend="fa2",
    )
    wrapper.plan(
        *(problem.indptr, problem.indices, problem.last),
        *(problem.HQ, problem.H, problem.D, problem.P),
        q_data_type=torch.bfloat16,
        kv_data_type=problem.k.dtype,
    )
    out = torch.empty_like(problem.q)
    return lambda: wrapper.run(problem.q, (problem.k, problem.v), out=out)


def fa2_prefill(torch, problem):
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device="cuda"), backend="fa2"
    )
    wrapper.plan(
        *(problem.starts, problem.indptr, problem.indices, problem.last),
        *(problem.HQ, problem.H, problem.D, problem.P),
        causal=True,
        q_data_type=torch.bfloat16,
        kv_data_type=problem.k.dtype,
    )
    out = torch.empty_like(problem.q)
    return lambda: wrapper.run(problem.q, (problem.k, problem.v), out=out)


def xqa(torch, problem):
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    out = torch.empty_like(problem.q)
    scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    pages = problem.table, problem.lengths.view(torch.uint32), problem.M * problem.P
    return lambda: xqa_batch_decode_with_kv_cache(
        *(problem.q, (problem.k, problem.v), scratch, *pages),
        bmm1_scale=1 / math.sqrt(problem.D),
        bmm2_scale=1.0,
        out=out,
    )


def sdpa(torch, problem):
    """Over keys and values that lie one after another, [B, H, L, D]."""
    if problem.kind != "bf16" or problem.L == MIXED:
        raise NotImplementedError("float keys and values of equal lengths alone")
    B, L = problem.B, problem.L
    pages = problem.table.long().reshape(-1)
    k, v = (
        x[pages].reshape(B, -1, problem.H, problem.D)[:, :L].transpose(1, 2).contiguous()
        for x in (problem.k, problem.v)
    )
    q = problem.q.reshape(B, -1, problem.HQ, problem.D).transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    options = dict(is_causal=problem.op == "prefill", enable_gqa=True)
    return lambda: attend(q, k, v, **options).transpose(1, 2)


KERNELS = {
    "decode": {
        "pykv": ours,
        "FA2 CUDA cores": lambda torch, problem: fa2_decode(torch, problem, False),
        "FA2 tensor cores": lambda torch, problem: fa2_decode(torch, problem, True),
        "XQA": xqa,
        "torch SDPA": sdpa,
    },
    "prefill": {"pykv": ours, "FA2 tensor cores": fa2_prefill, "torch SDPA": sdpa},
}
PAGED = ("FA2 CUDA cores", "FA2 tensor cores", "XQA")  # the peers that pykv is held to


# --- Measuring ------------------------------------------------------------------------------------


def measure(torch, run, samples, flush):
    """Median microseconds of a replay on the device and of a call on the host, and the output."""
    host, device = [], []
    for _ in range(WARMUP + samples):
        torch.cuda.synchronize()
        run()  # the first run compiles, which a capture forbids; each pays for the wait before it
        started = time.perf_counter()
        run()
        host.append(1e6 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), cuda.on_stream(torch.cuda.current_stream()):
        out = run()
    for _ in range(WARMUP + samples):
        flush.zero_()
        flush.sum()  # reading leaves clean lines in the L2
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        device.append(1e3 * start.elapsed_time(end))
    return *(statistics.median(times[WARMUP:]) for times in (device, host)), out


def read_ceiling(torch, samples, flush):
    """The rate, in 1e9 bytes a second, at which this GPU reads its memory."""
    import cupy

    x = cupy.zeros((CEILING_BYTES // 16, 4), np.uint32)
    sums = cupy.zeros(len(x) // 4096, np.uint32)  # eight tiles of 4 * 128 vectors a block
    us, *_ = measure(torch, lambda: bandwidth.read(x, sums, vectors=4), samples, flush)
    return CEILING_BYTES / us / 1e3


def compare(torch, case, samples, flush):
    """The record of a case: medians by kernel, and the reasons of those that gave none."""
    problem = Problem(torch, case)
    us = dict.fromkeys(KERNELS[case["op"]])  # keeps this order; None where a kernel gave no time
    host_us, refused, want = dict(us), {}, None
    for name, make in KERNELS[case["op"]].items():
        if name != "pykv" and problem.kind not in PEER_KINDS:
            break
        try:
            device, host, out = measure(torch, make(torch, problem), samples, flush)
        except Exception as error:  # whatever a kernel may raise: its reason goes into the record
            torch.cuda.synchronize()  # a fault of the device raises here and ends the run
            reason = re.sub(r"/\S*/", "", str(error))  # without the folders of this machine
            refused[name] = f"{type(error).__name__}: {reason}".splitlines()[0][:160]
            continue
        out = out.reshape(problem.q.shape).float()
        want = out if want is None else want
        error = float((out - want).norm() / want.norm())
        if error <= TOLERANCES.get(problem.kind, 0.0):
            us[name], host_us[name] = round(device, 3), round(host, 3)
        else:
            refused[name] = f"differs by {error:.1e} of the values"
    return dict(
        **dict(bench="flashinfer", case=case, ok=us["pykv"] is not None, unit="us"),
        **dict(us=us, host_us=host_us, refused=refused),
        **dict(bytes=problem.nbytes, flops=problem.flops),
    )


def line(record):
    """A record on one line."""
    case, us, host_us = record["case"], record["us"], record["host_us"]
    shape = " ".join(f"{case[name]:>5}" for name in ("HQ", "H", "D", "P"))
    peers = [us[name] for name in PAGED if us.get(name)]
    rate, ratio = "", ""
    if record["ok"]:
        rate = f"{record['bytes'] / us['pykv'] / 1e3:.0f}"
        ratio = f"{us['pykv'] / min(peers):.2f}" if peers else ""
    found = [f"{name} {x:.1f} ({host_us[name]:.0f})" for name, x in us.items() if x]
    found += [f"{name}: {reason}" for name, reason in record["refused"].items()]
    batch = f"{case['op']:>8} {case['B']:>4} {case['L']:>6} {shape} {case['kv']:>5}"
    return f"{batch} {rate:>6} {ratio:>6}  {', '.join(found)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="file for the records")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts")
    parser.add_argument("--batch", nargs="*", help="B,L of part decode, instead of the usual ones")
    parser.add_argument("--samples", type=int, default=20)
    options = parser.parse_args(argv)
    batches = [tuple(map(int, text.split(","))) for text in options.batch or ()] or BATCHES
    try:
        import torch
    except ImportError:
        sys.exit("compare_flashinfer needs torch with CUDA")
    if not torch.cuda.is_available():
        sys.exit("compare_flashinfer needs a GPU")
    import cupy

    facts = report.environment(cupy) | dict(torch=torch.__version__, flashinfer=None)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    facts["read_gbps"] = read_ceiling(torch, options.samples, flush)
    print(f"{facts['device']}, reads {facts['read_gbps']:.0f} GB/s; us (and host's us)")
    head = f"{'':8} {'B':>4} {'L':>6} {'HQ':>5} {'H':>5} {'D':>5} {'P':>5} {'kind':>5}"
    print(f"{head} {'GB/s':>6} {'/ best':>6}")
    records = []
    for case in cases(options.only, batches):
        records.append(compare(torch, case, options.samples, flush))
        print(line(records[-1]), flush=True)
        torch.cuda.empty_cache()
        cupy.get_default_memory_pool().free_all_blocks()
        if "flashinfer" in sys.modules:
            facts["flashinfer"] = sys.modules["flashinfer"].__version__
        if options.json:  # after each case: a kernel's fault may end the process
            report.write_json(options.json, [one | facts for one in records])
    return int(not all(one["ok"] for one in records))


if __name__ == "__main__":
    sys.exit(main())
