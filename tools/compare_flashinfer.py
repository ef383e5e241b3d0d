"""Paged decode beside other libraries' kernels, in one process on one GPU.

    python tools/compare_flashinfer.py [--json FILE] [--batch B,L ...] [--samples N]

Needs torch with CUDA; runs FlashInfer's kernels (FA2 on CUDA cores, FA2 on tensor cores, XQA) where
it is installed, and torch's scaled_dot_product_attention over contiguous keys and values. Every
kernel is captured in a CUDA graph and replayed on the same pages, the L2 cache being flushed before
each replay; what it leaves is held to pykv's result first. Prints a table, in microseconds, and the
best peer's time over pykv's; a kernel that refuses a case or disagrees is named with its reason.
"""

import argparse
import json
import math
import statistics
import sys

import numpy as np

HQ, H, D, P = 32, 8, 128, 16
BATCHES = ((64, 4096), (256, 1024), (16, 4096), (1, 131072), (1, 8192), (1, 1024))
KINDS = ("bf16", "e4m3", "int8", "int4")  # pykv's; peers know the first two
TOLERANCE = 2.0**-5  # of the largest value: roundings to bf16, and of probabilities to fp8
WARMUP = 3


class Problem:
    """One batch on random pages, as torch tensors."""

    def __init__(self, torch, kind, B, L, seed=0):
        self.kind, self.B, self.L, self.M = kind, B, L, -(-L // P)
        torch.manual_seed(seed)
        N = B * self.M
        self.q = torch.randn(B, HQ, D, dtype=torch.bfloat16, device="cuda")
        self.table = torch.randperm(N, device="cuda").to(torch.int32).reshape(B, self.M)
        self.lengths = torch.full((B,), L, dtype=torch.int32, device="cuda")
        if kind == "bf16" or kind == "e4m3":
            self.k, self.v = (
                torch.empty(N, P, H, D, dtype=torch.bfloat16, device="cuda") for _ in "kv"
            )
            for pool in (self.k, self.v):
                pool.normal_()
            if kind == "e4m3":
                self.k, self.v = (x.to(torch.float8_e4m3fn) for x in (self.k, self.v))
        else:
            width = D if kind == "int8" else D // 2
            self.k, self.v = (
                torch.randint(-127, 128, (N, P, H, width), dtype=torch.int8, device="cuda")
                for _ in "kv"
            )
            self.scales = torch.full((N, P, H), 1 / 64, dtype=torch.float16, device="cuda")

    @property
    def nbytes(self):
        """Of keys, values and their scales, which every kernel has to read."""
        row = {"bf16": 2 * D, "e4m3": D, "int8": D + 2, "int4": D // 2 + 2}[self.kind]
        return 2 * self.B * self.L * H * row


def ours(torch, problem):
    """A call of pykv, and its output."""
    import cupy

    from pykv import KVSpec
    from pykv.ops import paged_decode

    def share(x):
        return cupy.from_dlpack(x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x)

    spec = KVSpec.parse({"e4m3": "e4m3:tensor:fp32"}.get(problem.kind, problem.kind))
    pools = [share(problem.k), share(problem.v)]
    scales = {}
    if problem.kind == "e4m3":
        scales = dict.fromkeys(("k_scales", "v_scales"), cupy.ones(1, np.float32))
    elif problem.kind != "bf16":
        scales = dict.fromkeys(("k_scales", "v_scales"), share(problem.scales))
    if problem.kind == "int4":
        pools = [pool.view(np.uint8) for pool in pools]
    size = paged_decode.workspace_size(problem.B, HQ, H, D, problem.M * P)
    workspace = cupy.zeros(size, np.float32)
    out = torch.empty_like(problem.q)
    q, table, lengths, given = map(share, (problem.q, problem.table, problem.lengths, out))

    def run():
        paged_decode.decode(
            *(q, *pools, table, lengths),
            **scales,
            spec=spec,
            out=given,
            workspace=workspace,
            stream=torch.cuda.current_stream(),
        )

    return run, out


def fa2(torch, problem, tensor_cores):
    import flashinfer

    B, M = problem.B, problem.M
    indptr = torch.arange(B + 1, dtype=torch.int32, device="cuda") * M
    last = torch.full((B,), problem.L - (M - 1) * P, dtype=torch.int32, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=problem.table.reshape(-1).clone(),
        paged_kv_last_page_len_buffer=last.clone(),
        backend="fa2",
    )
    wrapper.plan(
        *(indptr, problem.table.reshape(-1), last, HQ, H, D, P),
        q_data_type=torch.bfloat16,
        kv_data_type=problem.k.dtype,
    )
    out = torch.empty_like(problem.q)
    return lambda: wrapper.run(problem.q, (problem.k, problem.v), out=out), out


def xqa(torch, problem):
    import flashinfer

    out = torch.empty_like(problem.q)
    scratch = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
    lengths = problem.lengths.view(torch.uint32)

    def run():
        flashinfer.decode.xqa_batch_decode_with_kv_cache(
            *(problem.q, (problem.k, problem.v), scratch, problem.table, lengths, problem.L),
            bmm1_scale=1 / math.sqrt(D),
            bmm2_scale=1.0,
            out=out,
        )

    return run, out


def sdpa(torch, problem):
    """Over keys and values that lie one after another, [B, H, L, D]."""
    if problem.kind != "bf16":
        raise NotImplementedError("float keys and values alone")
    pages = problem.table.long().reshape(-1)
    k, v = (
        x[pages].reshape(problem.B, -1, H, D)[:, : problem.L].transpose(1, 2).contiguous()
        for x in (problem.k, problem.v)
    )
    q, out = problem.q[:, :, None], torch.empty_like(problem.q)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: out.copy_(attend(q, k, v, enable_gqa=True)[:, :, 0]), out


PEERS = {
    "FA2 CUDA cores": lambda torch, problem: fa2(torch, problem, False),
    "FA2 tensor cores": lambda torch, problem: fa2(torch, problem, True),
    "XQA": xqa,
    "torch SDPA": sdpa,
}


def measure(torch, run, samples, flush):
    """The median microseconds of a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles what a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times = []
    for _ in range(WARMUP + samples):
        flush.zero_()
        flush.sum()  # leaves the lines clean
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[WARMUP:])


def compare(torch, problem, samples, flush):
    """Microseconds by kernel, "pykv" first; a text in place of those that gave none."""
    run, want = ours(torch, problem)
    found = {"pykv": measure(torch, run, samples, flush)}
    want = want.float()
    for name, make in PEERS.items() if problem.kind in ("bf16", "e4m3") else ():
        try:
            run, out = make(torch, problem)
            us = measure(torch, run, samples, flush)
        except Exception as error:  # whatever a peer may raise: its reason goes into the table
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        error = float((out.float() - want).abs().max() / want.abs().max())
        found[name] = us if error <= TOLERANCE else f"differs by {error:.2e} of the largest value"
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--batch", nargs="*", help="B,L", default=[f"{B},{L}" for B, L in BATCHES])
    parser.add_argument("--samples", type=int, default=20)
    options = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        sys.exit("compare_flashinfer needs torch with CUDA")
    if not torch.cuda.is_available():
        sys.exit("compare_flashinfer needs a GPU")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    records = []
    print(f"{'B, L':>12} {'kind':>5} {'pykv':>8} {'GB/s':>6}  best peer / pykv, peers in us")
    for batch in options.batch:
        B, L = map(int, batch.split(","))
        for kind in KINDS:
            problem = Problem(torch, kind, B, L)
            found = compare(torch, problem, options.samples, flush)
            us = found.pop("pykv")
            peers = {name: x for name, x in found.items() if isinstance(x, float)}
            ratio = f"{min(peers.values()) / us:.2f}" if peers else "-"
            listed = ", ".join(
                f"{name} {x:.1f}" if isinstance(x, float) else f"{name}: {x}"
                for name, x in found.items()
            )
            gbps = problem.nbytes / us / 1e3
            print(f"{B:>5}, {L:>6} {kind:>5} {us:8.1f} {gbps:6.0f}  {ratio}  {listed}", flush=True)
            records.append(dict(B=B, L=L, kind=kind, pykv=us, bytes=problem.nbytes, peers=found))
            del problem
            torch.cuda.empty_cache()
    if options.json:
        facts = dict(device=torch.cuda.get_device_name(), torch=torch.__version__)
        if "flashinfer" in sys.modules:
            facts["flashinfer"] = sys.modules["flashinfer"].__version__
        with open(options.json, "w") as file:
            json.dump(dict(**facts, records=records), file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
