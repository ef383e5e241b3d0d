"""A cache whose contents anybody can tell: a page holds what its key says, in all its layers."""

import itertools

import numpy as np

from pykv import PagedKVCache, prefix_keys
from pykv.page_arrays import moving_arrays
from pykv.tiers import Tiers

P = 2  # tokens a page


def contents(key, x):
    """What a page of this key holds in an array of shape [L, ...]."""
    rng = np.random.default_rng(list(key))
    bits = rng.integers(0, 1 << 12, x.shape).astype(f"u{x.itemsize}")
    if x.dtype.kind == "f":  # small whole numbers, which int8 codes of rows hold nearly
        return (bits % 64).astype(x.dtype)
    return bits.astype(x.dtype)


class World:
    """A cache with tiers, and what a runtime does with both."""

    def __init__(self, pages=6, spec="fp16", xp=np, head_dim=8, **options):
        sizes = 2, pages, 1, head_dim
        self.cache = PagedKVCache(*sizes, page_size=P, spec=spec, margin=1.5, xp=xp)
        if self.cache.spec.has_given_scales:
            self.cache.k_scales[...] = self.cache.v_scales[...] = 0.5
        self.tiers = Tiers(self.cache, **options)
        self.xp = xp

    def ask(self, tokens):
        """Compute a prompt; returns how many pages were found. Those that are must be right."""
        manager = self.cache.manager
        keys = list(prefix_keys.of_pages("test", tokens, P))
        self.tiers.fetch(tokens)
        pages = manager.reuse(tokens)
        found = len(pages)
        for key, page in zip(keys, pages, strict=False):
            self.check(key, page)
        try:
            manager.extend(pages, found * P, len(tokens))
            for key, page in itertools.islice(zip(keys, pages, strict=False), found, None):
                for x in moving_arrays(self.cache).values():
                    x[:, page] = self.xp.asarray(contents(key, x[:, page]))
            manager.publish(pages, tokens)
        finally:
            manager.free(pages)
        return found

    def check(self, key, page):
        for name, x in moving_arrays(self.cache).items():
            got = x[:, page] if self.xp is np else x[:, page].get()
            want = contents(key, got)
            if not (got.view(np.uint8) == want.view(np.uint8)).all():
                raise AssertionError(f"page {page} has other {name} than its key {key.hex()}")
