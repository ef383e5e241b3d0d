"""Chunks through LMCache's own storage, with codes by pykv's serde, on a CPU.

    pip install torch  # of the index that has builds for the CPU
    pip install --no-deps lmcache==0.5.6   # with what its wheel asks for, gigabytes of CUDA
    pip install numba prometheus_client aiofiles aiohttp cachetools cryptography msgspec pyzmq
    pip install sortedcontainers psutil
    python tools/try_lmcache.py

LMCache's first level holds chunks in memory, its adapter "fs" writes them to files, and its wrapper
lets a serde that is registered by name pass them on. What comes back must be what the kind's
definition gives, bit for bit, and files as large as pykv says.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from lmcache.v1.distributed import config, l1_manager
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2AdapterConfig
from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper
from lmcache.v1.distributed.serde import base, factory

import pykv
from pykv.integrations import lmcache
from pykv.kinds import KINDS, dequantize, quantize

SHAPE = (2, 4, 256, 128)  # K and V, layers, tokens, heads * D
KEYS = [ObjectKey(bytes([i]) * 16, "model", 0) for i in range(3)]


def wait(ask):
    """What `ask` returns once it is something."""
    end = time.monotonic() + 30
    while not (found := ask()):
        assert time.monotonic() < end, "LMCache does not answer"
        time.sleep(0.01)
    return found


def coded(chunk, kind):
    """What is left of a chunk behind a kind's codes."""
    codes, scales = quantize(pykv.asarray(chunk), KINDS[kind])
    return torch.from_numpy(dequantize(codes, KINDS[kind], scales)).to(chunk.dtype)


def there_and_back(memory, kind, dtype, folder):
    """Chunks go to files and come back; bytes of a file."""
    words = base.SerdeConfig(type=f"pykv-{kind}", kwargs={"max_workers": 2})
    inner = create_l2_adapter(FSL2AdapterConfig(base_path=folder))
    adapter = SerdeL2AdapterWrapper(inner, factory.create_serde_processor(words), memory)
    layout = MemoryLayoutDesc(shapes=[torch.Size(SHAPE)], dtypes=[dtype])
    reserved = memory.reserve_write(KEYS, [False] * len(KEYS), layout, tag="try")
    objects = [reserved[key][1] for key in KEYS]
    chunks = [torch.randn(SHAPE).to(dtype) for _ in KEYS]
    for given, chunk in zip(objects, chunks, strict=True):
        given.tensor.copy_(chunk)
    adapter.submit_store_task(KEYS, objects)
    wait(adapter.pop_completed_store_tasks)
    for given in objects:
        given.tensor.zero_()
    task = adapter.submit_load_task(KEYS, objects)
    wait(lambda: adapter.query_load_result(task))
    for given, chunk in zip(objects, chunks, strict=True):
        assert torch.equal(given.tensor, coded(chunk, kind)), (kind, dtype)
    memory.finish_write(KEYS, tag="try")
    memory.delete(KEYS)
    adapter.close()
    (size,) = {os.path.getsize(path) for path in Path(folder).rglob("*") if path.is_file()}
    assert size == lmcache.Serde(kind).nbytes([SHAPE])
    return size, chunks[0].nbytes


if __name__ == "__main__":
    lmcache.register()
    sizes = config.L1MemoryManagerConfig(64 << 20, False, shm_name="")
    memory = l1_manager.L1Manager(config.L1ManagerConfig(sizes))
    for kind in ("int8", "int4"):
        for dtype in (torch.bfloat16, torch.float16):
            with tempfile.TemporaryDirectory() as folder:
                size, whole = there_and_back(memory, kind, dtype, folder)
            print(f"pykv-{kind}: {len(KEYS)} chunks of {dtype}, {size:,} bytes of {whole:,} each")
