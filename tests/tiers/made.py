"""A cache whose contents anybody can tell: a page holds what its key says, in all its layers."""

import itertools
from functools import partial

import numpy as np

from pykv import PagedKVCache
from pykv.blocks import prefix_keys
from pykv.kvtc import Artefact, Codec, Fingerprint, Group, Plan, Side
from pykv.ops import rope
from pykv.page_arrays import moving_arrays
from pykv.tiers import Tiers

P = 2  # tokens a page
KVTC = "made.kvtc:2"  # a codec of `World`, of any sizes: of no file
# How far a page may be off that came back. Elements are whole numbers up to 63; those of integers
# are off by half a step of a row's largest, whatever how often; those of KVTC by half a STEP, which
# two more roundings to float16 and the rotation of two elements add to.
NEAR = {"none": 0.0, "int8": 0.3, "int4": 4.6, KVTC: 1.0}
STEP = 2 * 63 * 2**0.5 / 250


def open_codec(name, text, xp, cache):
    """KVTC without a transform: 8 bits for each element, of a token sinks."""
    assert text == KVTC
    L, H, D = cache.sizes
    F = L * H * D
    plan = {2: Plan((F, *[0] * 7), np.full(F, STEP, np.float32), 0.01)}
    zeros, even = np.zeros(F, np.float16), np.tile(np.eye(D, dtype=np.float16), (L * H, 1, 1))
    side = Side(zeros, even, np.eye(F, dtype=np.float16), plan)
    inv_freq = np.stack([rope.frequencies(D, 1e4)] * L)
    model = Fingerprint("made", L, H, D, "half", inv_freq, "5a" * 32)
    artefact = Artefact(model, (Group(tuple(range(L)), side, side),), (), sinks=3, window=8)
    return Codec(artefact, 2, xp)


def contents(key, x):
    """What a page of this key holds in an array of shape [L, ...]."""
    rng = np.random.default_rng(list(key))
    bits = rng.integers(0, 1 << 12, x.shape).astype(f"u{x.itemsize}")
    if x.dtype.kind == "f":  # small whole numbers, which int8 codes of rows hold nearly
        return (bits % 64).astype(x.dtype)
    return bits.astype(x.dtype)


class World:
    """A cache with tiers, and what a runtime does with both."""

    def __init__(self, pages=6, spec="fp16", xp=np, num_heads=1, head_dim=8, **options):
        sizes = 2, pages, num_heads, head_dim
        self.cache = PagedKVCache(*sizes, page_size=P, spec=spec, margin=1.5, xp=xp)
        if self.cache.spec.has_given_scales:
            self.cache.k_scales[...] = self.cache.v_scales[...] = 0.5
        given = [str(options.get(name)) for name in ("host", "disk")]
        self.near = max(near for codec, near in NEAR.items() if codec in f"none {given}")
        self.exact_pages = 2 if KVTC in f"{given}" else 0
        opened = partial(open_codec, cache=self.cache)
        self.tiers = Tiers(self.cache, open_codec=opened, **options)
        self.xp = xp

    def ask(self, tokens, salt=b""):
        """Compute a prompt; returns how many pages were found. Those that are must be right."""
        manager = self.cache.manager
        keys = list(prefix_keys.of_pages("test", tokens, P, salt))
        self.tiers.fetch(tokens, salt=salt)
        pages = manager.reuse(tokens, salt=salt)
        found = len(pages)
        for i, (key, page) in enumerate(zip(keys, pages, strict=False)):
            self.check(key, page, 0.0 if i < self.exact_pages else self.near)
        try:
            manager.extend(pages, found * P, len(tokens))
            for key, page in itertools.islice(zip(keys, pages, strict=False), found, None):
                for x in moving_arrays(self.cache).values():
                    x[:, page] = self.xp.asarray(contents(key, x[:, page]))
            manager.publish(pages, tokens, salt=salt)
        finally:
            manager.free(pages)
        return found

    def begin(self, tokens):
        """A sequence whose pages come back by and by: its pages, and the fetch, or None."""
        manager = self.cache.manager
        pages = manager.reuse(tokens)
        fetch, found = self.tiers.begin(tokens, pages), len(pages)
        manager.extend(pages, found * P, max(found * P, len(tokens)))
        return pages, fetch

    def end(self, tokens, pages, fetch, *, publish):
        """Give a sequence up. What came of it must be right, and may be found by others."""
        manager = self.cache.manager
        if fetch is not None:
            fetch.cancel()
            if publish:
                keys = list(prefix_keys.of_pages("test", tokens, P))[: fetch.done]
                for i, (key, page) in enumerate(zip(keys, pages, strict=False)):
                    self.check(key, page, 0.0 if i < self.exact_pages else self.near)
                manager.publish(pages, tokens[: fetch.done * P])
        manager.free(pages)

    def check(self, key, page, near=0.0):
        for name, x in moving_arrays(self.cache).items():
            got = x[:, page] if self.xp is np else x[:, page].get()
            want = contents(key, got)
            is_right = (got.view(np.uint8) == want.view(np.uint8)).all()
            if near:
                is_right = abs(got.astype(np.float32) - want.astype(np.float32)).max() <= near
            if not is_right:
                raise AssertionError(f"page {page} has other {name} than its key {key.hex()}")
