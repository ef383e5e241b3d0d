"""Caches of small tests in memory of three forms, with poison wherever nobody may write."""

import numpy as np

from pykv.testing import paged
from tests.helpers import assert_same_bits, to_numpy


class Cache:
    """The arrays of a cache, by the names that ops have for them.

    Args:
        spec: what they hold.
        memory: arrays by name, None for scales that there are not.
        places: by name of an array of the cache, the memory that it is a part of, and the index.
    """

    def __init__(self, spec, memory, places):
        self.spec, self.memory, self.places = spec, memory, places
        self.arrays = {
            name: None if memory[where] is None else memory[where][index]
            for name, (where, index) in places.items()
        }

    @property
    def pools(self):
        return self.arrays["k_pool"], self.arrays["v_pool"]

    @property
    def options(self):
        """What ops take beside the pools."""
        return {name: self.arrays[name] for name in ("k_scales", "v_scales")} | {"spec": self.spec}

    def on(self, xp):
        """A copy, all memory included, on a machine."""
        memory = {n: x if x is None else xp.array(to_numpy(x)) for n, x in self.memory.items()}
        return Cache(self.spec, memory, self.places)

    def write(self, pages, offsets, k, v):
        """Encode rows by hand, of a cache in NumPy; see paged.write."""
        paged.write(self.spec, self.arrays, pages, offsets, k, v)

    def rows(self):
        """What keys and values mean: two arrays [N, P, H, D] float32."""
        arrays = self.on(np).arrays
        N, P, *_ = paged.nhd(self.spec, arrays["k_pool"]).shape
        where = *np.ogrid[:N, :P], np.float32
        return [paged.read(self.spec, arrays, side, *where) for side in "kv"]

    def assert_same(self, want):
        """All memory has the bits of another cache's."""
        for name, x in self.memory.items():
            assert (x is None) == (want.memory[name] is None)
            if x is not None:
                assert_same_bits(x, want.memory[name])


def placed(spec, arrays, form):
    """A cache in NumPy of arrays as pykv.testing.paged makes them: in "two" arrays for keys and
    values, in "one" for both, or in "loose" memory with a gap in every stride."""
    memory, places = {}, {}
    for name, x in arrays.items():
        where, index = name, ...
        if x is None or x.ndim < 3 or form == "two":  # scales that rows share are dense
            pass
        elif form == "one":
            where, index = f"k{name[1:]}", (slice(None), "kv".index(name[0]))
            x = np.stack([arrays[f"{side}{name[1:]}"] for side in "kv"], 1)
        else:
            N, a, b, *W = x.shape
            wide = (N + 2, a + 1, b + 3, *(n + 16 // x.itemsize for n in W))
            index = slice(1, -1), slice(1, None), slice(2, -1), *map(slice, W)
            whole = np.full(wide, 0x7F if x.dtype.kind in "iu" else np.nan, x.dtype)
            whole[index] = x
            x = whole
        memory[where], places[name] = x, (where, index)
    return Cache(spec, memory, places)


def blank(spec, N, P, H, D, form="two"):
    """A cache full of poison; some scales that rows share are too small for them."""
    return placed(spec, paged.blank(spec, N, P, H, D, reach=2.0), form)


def filled(xp, rng, spec, N, P, H, D, form="loose"):
    """A cache of random rows on a machine."""
    cache = placed(spec, paged.blank(spec, N, P, H, D, reach=4.0), form)
    cache.write(*np.ogrid[:N, :P], *rng.standard_normal((2, N, P, H, D)).astype(np.float32))
    return cache.on(xp)
