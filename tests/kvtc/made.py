"""A model that has never been: rows of few directions, a cache full of them, and their artefact;
and the artefact of a tiny model that is one."""

import numpy as np

from pykv import PagedKVCache, blocks
from pykv.kvtc import Artefact, Fingerprint, Group, Plan, Side, plans
from pykv.kvtc.rows import collect
from pykv.ops import paged_qkv, rope

L, H, D, P = 3, 2, 16, 4
F = H * D  # features of a layer
RATIOS = (4, 8)


def rows(rng, n, side):
    """[n, L, H, D] float32 of falling variance about a mean, the same directions every time."""
    fixed = np.random.default_rng(side)
    scales = 3 * 0.93 ** np.arange(L * F)
    directions = np.linalg.qr(fixed.standard_normal((L * F, L * F)))[0]
    mean = fixed.standard_normal(L * F)
    x = rng.standard_normal((n, L * F)) * scales @ directions.T + mean
    return x.astype(np.float32).reshape(n, L, H, D)


def weights(rng, heads, head_dim):
    """Symmetric matrices float16 of heads, with eigenvalues from a half to two."""
    turns = np.linalg.qr(rng.standard_normal((heads, head_dim, head_dim)))[0]
    found = (turns * np.geomspace(0.5, 2, head_dim)) @ turns.transpose(0, 2, 1)
    return (found / 2 + found.transpose(0, 2, 1) / 2).astype(np.float16)


def block_diagonal(matrices):
    """The matrix [F, F] of rows that weights [F / D, D, D] of heads stand for."""
    n, D, _ = matrices.shape
    whole = np.zeros((n, D, n, D))
    whole[np.arange(n), :, np.arange(n)] = matrices
    return whole.reshape(n * D, n * D)


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
            sides.append(plans.find(seen, held, weights(rng, len(group) * H, D), rank, np))
        groups.append(Group(tuple(group), *plans.plan(*sides, (1.0, 2.0), RATIOS, np)))
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
        D = llm.model.config.head_dim
        even = np.tile(np.eye(D, dtype=np.float16), (len(mean) // D, 1, 1))
        sides.append(Side(mean.astype(np.float16), even, basis.astype(np.float16), {2: plan}))
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
