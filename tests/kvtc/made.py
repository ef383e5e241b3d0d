"""A model that has never been: rows of few directions, a cache full of them, and their artefact;
and the artefact of a tiny model that is one."""

import numpy as np

from pykv import PagedKVCache, blocks
from pykv.kvtc import Artefact, Fingerprint, Group, Plan, Side, plans
from pykv.kvtc.rows import collect
from pykv.ops import paged_qkv, rope

L, H, D, P = 3, 2, 16, 4
F = H * D  # of a layer
RATIOS = (4, 8)


def rows(rng, n, side):
    """[n, L, H, D] float32 of falling variance about a mean, the same directions every time."""
    fixed = np.random.default_rng(side)
    scales = 3 * 0.93 ** np.arange(L * F)
    directions = np.linalg.qr(fixed.standard_normal((L * F, L * F)))[0]
    mean = fixed.standard_normal(L * F)
    x = rng.standard_normal((n, L * F)) * scales @ directions.T + mean
    return x.astype(np.float32).reshape(n, L, H, D)


def artefact(rng, layers=((0, 1, 2),), sinks=2, window=3):
    """Calibrated on rows of its own; of the middle layer keys turn otherwise."""
    inv_freq = np.stack([rope.frequencies(D, base) for base in (1e4, 1e2, 1e4)])
    model = Fingerprint("llama", L, H, D, "half", inv_freq, "5a" * 32)
    groups = []
    for group in layers:
        sides = []
        for side in range(2):
            x = rows(rng, 600, side)[:, list(group)].reshape(600, -1).astype(np.float16)
            seen, held = (lambda x=x: iter([x[:400]])), (lambda x=x: iter([x[400:]]))
            rank = min(64, len(group) * F)
            weights = np.geomspace(0.5, 2, len(group) * F)[:: 1 - 2 * side].astype(np.float16)
            sides.append(plans.fit(seen, held, weights, RATIOS, rank, np))
        groups.append(Group(tuple(group), *sides))
    return Artefact(model, tuple(groups), (), sinks, window)


def artefact_of(llm):
    """Of a tiny model on the CPU: all components of its rows, 8 bits each, as ratio 2."""
    layers, ids = llm.model.config.num_layers, np.random.default_rng(5).integers(3, 250, 128)
    sides = []
    for x in (of_side.reshape(128, -1) for of_side in collect(llm.model, ids.tolist(), np)):
        mean = x.mean(0)
        basis = np.linalg.svd(x - mean, full_matrices=False)[2].T
        steps = 5 * np.abs((x - mean) @ basis).max(0) / 256
        plan = Plan((len(steps), *[0] * 7), steps.astype(np.float32), 0.01)
        ones = np.ones(len(mean), np.float16)
        sides.append(Side(mean.astype(np.float16), ones, basis.astype(np.float16), {2: plan}))
    group = Group(tuple(range(layers)), *sides)
    return Artefact(llm.fingerprint, (group,), (), sinks=4, window=8)


def sequence(rng, xp, made, n, *, spec="fp16", hadamard=False, start=0):
    """A cache with a sequence of n tokens from `start` on, its page table, positions, and the keys
    without rotation and values [n, L, H, D] that it was filled with."""
    k, v = (rows(rng, n, side) for side in range(2))
    positions = np.arange(start, start + n, dtype=np.int32)
    pages = -(-(start + n) // P)
    table = rng.permutation(pages + 1)[:pages].astype(np.int32)
    cache = PagedKVCache(L, pages + 1, H, D, page_size=P, spec=spec, margin=1.5, xp=xp)
    fill(xp, made, cache, table, positions, k, v, hadamard)
    return cache, xp.asarray(table), xp.asarray(positions), k, v


def fill(xp, made, cache, table, positions, k, v, hadamard=False):
    slots = blocks.slots(table.tolist(), 0, len(table) * P, P)[positions]
    for i in range(L):
        keys, values = k[:, i].copy(), v[:, i].copy()
        rope.rotate(keys, keys[:, :0], positions, made.model.inv_freq[i])
        if hadamard:
            keys, values = (paged_qkv.hadamard_transform(x) for x in (keys, values))
        cache.append(i, *(xp.asarray(x) for x in (keys, values, slots)))
