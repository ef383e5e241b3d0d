"""Measure what a user waits for, on this machine: import, first token, decode, calls of two ops.

    python tools/measure_runtime.py OUT.json [--model smollm2-135m]

Every time is the median of several runs; imports and the first token are processes of their own, so
that interpreter start counts where it is said. The model must have been fetched before.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pykv
from pykv import cuda
from pykv.bench import report
from pykv.ops import paged_append, paged_decode

PROMPT = "The capital of France is"
IMPORT = "import time; t = time.perf_counter(); import pykv; "
FIRST = f"import pykv; next(pykv.LLM({{model!r}}).stream({PROMPT!r}))"


def seconds(run, repeat):
    """Median wall time of `run`."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def python(code, **env):
    """What Python code prints that finds the pykv of this tree."""
    paths = filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return done.stdout


def imports(on_gpu):
    """Seconds of `import pykv`, with CuPy's on a GPU; cold: with an empty cache folder."""
    code = IMPORT + ("import cupy; " if on_gpu else "") + "print(time.perf_counter() - t)"
    python(code)
    found = {"import_warm_s": statistics.median(float(python(code)) for _ in range(5))}
    if on_gpu:
        cold = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                cold.append(float(python(code, PYKV_CACHE_DIR=folder)))
        found["import_cold_s"] = statistics.median(cold)
    return found


def model_speed(model):
    """Tokens a second of one sequence, and the time from process start to the first text."""
    llm = pykv.LLM(model, prefix_cache=False)  # else a prompt would be computed only once
    params = pykv.SamplingParams(max_tokens=128, ignore_eos=True)
    long = llm.tokenize(PROMPT) * 100
    llm.generate(PROMPT, params)
    decode, prompt = [], []
    for _ in range(3):
        llm.generate(PROMPT, params)
        decode.append(llm.stats.decode_tokens / llm.stats.decode_seconds)
        llm.generate([long], pykv.SamplingParams(max_tokens=1))
        prompt.append(llm.stats.prompt_tokens / llm.stats.prompt_seconds)
    return {
        "model": model,
        "device": llm.device,
        "decode_tokens_per_s": statistics.median(decode),
        f"prompt_{len(long)}_tokens_per_s": statistics.median(prompt),
        "first_token_from_process_start_s": seconds(lambda: python(FIRST.format(model=model)), 3),
    }


def call_times():
    """Host microseconds of one call at the shapes of SmolLM2, arrays ready and kernels compiled."""
    import cupy

    qkv = cupy.zeros((1, 15, 64), np.float32)
    q, k, v = qkv[:, :9], qkv[:, 9:12], qkv[:, 12:]
    k_pool, v_pool = (cupy.zeros((64, 16, 3, 64), np.float16) for _ in range(2))
    slots, lengths = cupy.zeros(1, np.int32), cupy.full(1, 100, np.int32)
    out = cupy.empty((1, 9, 64), np.float32)
    found = {}
    for name, pages in (("256", 16), ("1024", 64)):
        table = cupy.zeros((1, pages), np.int32)
        scratch = cupy.zeros(paged_decode.workspace_size(1, 9, 3, 64, 16 * pages), np.float32)

        def decode(table=table, scratch=scratch):
            paged_decode.decode(q, k_pool, v_pool, table, lengths, out=out, workspace=scratch)

        found[f"paged_decode_{name}_keys_us"] = 1e6 * per_call(decode)
    append = partial(paged_append.append, k, v, k_pool, v_pool, slots)
    found["paged_append_us"] = 1e6 * per_call(append)
    return found


def per_call(run, calls=100):
    """Seconds of one call, from batches that the queue of launches can hold."""
    import cupy

    def batch():
        for _ in range(calls):
            run()

    batch()
    times = []
    for _ in range(9):
        cupy.cuda.Device().synchronize()
        times.append(seconds(batch, 1) / calls)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    on_gpu = bool(cuda.architectures())
    record = {
        **report.environment(cuda.array_module("auto")),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **imports(on_gpu),
        **model_speed(args.model),
        **(call_times() if on_gpu else {}),
    }
    with open(args.out, "w") as file:
        json.dump(record, file, indent=1)
    for name, value in record.items():
        print(f"{name:<36}{value:.4g}" if isinstance(value, float) else f"{name:<36}{value}")


if __name__ == "__main__":
    main()
