"""The memory that a model and its steps take, reckoned from the numbers of its file, and what is
free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pykv.errors import CapacityError
from pykv.llm import matrices, steps, tensors
from pykv.llm.config import Config
from pykv.llm.gguf import ModelFile
from pykv.specs import KVSpec

# On a GPU a step has as many tokens as both bounds allow, and never fewer than one on the host:
# products of more tokens are faster, a prompt needs fewer launches, and answers, which wait for
# each step, fewer passes over the weights meanwhile.
STEP_TOKENS = 2048
STEP_BYTES = 384 << 20
_ROOT = Path("/")
# Control groups of versions 2 and 1, by their controllers in /proc/self/cgroup: their folder, files
# of the limit and of what is used, and what memory.stat calls cached pages of files, which are part
# of that and make room when memory is needed.
_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
}


class Needed(NamedTuple):
    """Bytes of a model's weights, of a cache for so many tokens, and of a step's activations."""

    weights: int
    cache: int
    tokens: int
    step: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.cache + self.step


def needed(
    file: ModelFile, config: Config, dtype: Any, spec: KVSpec, tokens: int, xp: Any
) -> Needed:
    """What a model takes.

    Args:
        file, config: the model, as read_config has checked it.
        dtype: of the matrices on a GPU, of which the host keeps float32; None: as stored.
        spec: what the cache stores.
        tokens: that the cache holds.
        xp: `numpy` or `cupy`.
    """
    weights = weight_bytes(file, dtype, spec, xp is np)
    per_token = config.num_layers * spec.bytes_per_token(config.kv_heads, config.head_dim)
    step = step_bytes(config, min(tokens, most_tokens(config, xp)))
    return Needed(weights, per_token * tokens, tokens, step)


def step_bytes(config: Config, tokens: int) -> int:
    """Bytes that `forward` holds at most for so many tokens, without logits: float32 activations,
    what a gate of its own reads, and up to two 16-bit pieces of a product's operand."""
    E, F, of_heads = config.embedding, config.feed_forward, config.heads * config.head_dim
    qkv = of_heads + 2 * config.kv_heads * config.head_dim
    elements = 2 * E + qkv + 2 * of_heads + 3 * F + max(E, of_heads, F)
    return 4 * elements * tokens


def most_tokens(config: Config, xp: Any) -> int:
    """Limit of tokens of a step."""
    few = steps.PREFILL_TOKENS
    tokens = few if xp is np else STEP_TOKENS
    while tokens > few and step_bytes(config, tokens) > STEP_BYTES:
        tokens //= 2
    return max(few, tokens)


def weight_bytes(file: ModelFile, dtype: Any, spec: KVSpec, on_host: bool) -> int:
    """Bytes of a model's weights, see `needed`; vectors are float32. With a cache that wants
    Hadamard-rotated heads, attention's output matrix is float32, see weights.load."""
    total = 0
    for name, info in file.tensors.items():
        is_rotated = spec.wants_hadamard and tensors.is_role(name, "attention_out")
        if len(info.shape) != 2 or is_rotated:
            total += prod(info.shape) * 4
        elif dtype is None:
            total += matrices.stored_bytes(info.kind, *info.shape)
        else:
            total += prod(info.shape) * (4 if on_host else np.dtype(dtype).itemsize)
    return total


def free(xp: Any) -> int | None:
    """Bytes that this process may still take of CuPy's current GPU, or of the host: on Linux what
    the kernel says is available, within the limits of control groups; None elsewhere."""
    if xp is not np:
        pool = xp.get_default_memory_pool()
        return int(xp.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes())
    lines = [line.split() for line in _lines("proc/meminfo")]
    available = [int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    groups = [line.split(":", 2) for line in _lines("proc/self/cgroup")]
    left = [each for _, controllers, path in groups for each in _left(controllers, path)]
    return min([*available, *left], default=None)


def _lines(path: str) -> list[str]:
    """Lines of a file of the kernel's; none where there is no such file."""
    try:
        return (_ROOT / path).read_text().splitlines()
    except OSError:
        return []


def _left(controllers: str, path: str) -> Iterator[int]:
    """Bytes left of the limits of a control group and of those that hold it."""
    if controllers not in _GROUPS:
        return
    top, limit, used, cached = _GROUPS[controllers]
    parts = [part for part in path.split("/") if part]
    for n in range(len(parts) + 1):
        group = "/".join([top, *parts[:n]])
        facts = [_lines(f"{group}/{name}") for name in (limit, used)]
        stat = dict(line.split() for line in _lines(f"{group}/memory.stat"))
        with suppress(IndexError, ValueError, KeyError):  # no limit ("max"), or one we cannot see
            yield int(facts[0][0]) - int(facts[1][0]) + int(stat[cached])


def require(need: Needed, xp: Any, dtype: Any = None) -> None:
    """CapacityError if that much memory is not free, before anything is read; `dtype` as of
    `needed`."""
    has, total = free(xp), need.total
    if has is not None and total > has:
        where, other = ("the host", "") if xp is np else ("the GPU", ', device="cpu"')
        if dtype is not None:
            other = f', weights="{matrices.STORED}"{other}'
        raise CapacityError(
            f"LLM: the model needs {total / 1e9:.2f} GB ({need.weights / 1e9:.2f} GB of weights, "
            f"{need.cache / 1e9:.2f} GB of cache for {need.tokens:,} tokens, "
            f"{need.step / 1e9:.2f} GB of activations), but {where} has "
            f"{has / 1e9:.2f} GB free. What helps: a smaller context (--ctx), "
            f'kv_dtype="int8"{other}, or a smaller model'
        )
