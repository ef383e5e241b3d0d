"""The cache of a model: the arrays of all layers and sequences."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda, forks, interrupts, kinds
from pykv.arrays import footprint, load_cupy, on_gpu, to_host
from pykv.blocks import BlockManager
from pykv.errors import CapacityError, ParameterError, UnsupportedError
from pykv.kinds import SCALE_DTYPES
from pykv.number_texts import counted
from pykv.ops import paged_append, paged_decode, paged_qkv, prefill, qkv_decode
from pykv.options import check_number, check_whole, page_ids
from pykv.page_arrays import check_may_write, moving_arrays
from pykv.shared_scales import SharedScales
from pykv.specs import POOLS, KVSpec, as_spec

# One for all caches: first appends are rare.
_first_append = forks.waits_for(threading.Lock())


class PagedKVCache:
    """Keys and values of every layer, in pages of P tokens.

    Args:
        layers, heads, head_dim: L, H and D of the model; H counts KV heads, D is a multiple of 8.
        pages: N, pages in each layer's pools.
        page_size: P, tokens a page.
        spec: what the pools hold, a KVSpec or a text that KVSpec.parse takes: "fp16", "int8", ...
        margin: where heads or tensors share a scale, each is found from the first rows that are
            appended to it and are not all zero, as `margin` times what their largest finite
            magnitude needs, and stays; what later exceeds it is clamped, see `clamped`. None: the
            caller sets them before the first append.
        xp: the array module that decides where the cache lives, `numpy` or `cupy`.

    Attributes:
        spec: a KVSpec.
        sizes: L, H and D.
        k, v: [L, N, P, H, W], one array each, or [L, N, H, P, W] where the spec says HND.
        k_scales, v_scales: None for kinds of floats; [L, N, P, H], or [L, N, H, P], where each
            token and head has a scale; else [L, H] or [L, 1], zero until it is set: by the caller,
            by page_files.load, or from rows, see `margin`. Who sets them to zero again has others
            found on the host alone: a GPU is not waited for once they were set.
        layers: (k, v) views of each layer, as the ops take them.
        scales: (k_scales, v_scales) of each layer, or (None, None).
        manager: who holds which page.

    Raises:
        ParameterError: a size or `margin` is not positive, `head_dim` no multiple of 8, the spec
            is unknown, or `xp` another module.
        DtypeError: the spec is neither a KVSpec nor a text, a size no whole number, or `margin` no
            number.
        CapacityError: the memory cannot be had.

    >>> cache = pykv.PagedKVCache(layers=2, pages=4, heads=2, head_dim=64, spec="int8")
    >>> cache
    PagedKVCache(layers=2, pages=4, heads=2, head_dim=64, page_size=16, spec="int8", 33.8 kB on cpu)
    >>> pages = cache.manager.allocate(tokens=20)
    >>> slots = pykv.blocks.slots(pages, 0, 20, cache.page_size)
    >>> k = v = np.ones((20, 2, 64), np.float32)
    >>> cache.append(0, k, v, slots)
    >>> table, lengths = pykv.blocks.page_table([pages], len(pages)), np.array([20], np.int32)
    >>> cache.decode(0, np.ones((1, 8, 64), np.float32), table, lengths).shape
    (1, 8, 64)
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        heads: int,
        head_dim: int,
        *,
        page_size: int = 16,
        spec: KVSpec | str = "fp16",
        margin: float | None = None,
        xp: Any = np,
    ):
        op = "PagedKVCache"
        sizes = dict(layers=layers, heads=heads, head_dim=head_dim)
        self.sizes = tuple(check_whole(op, name, size, 1) for name, size in sizes.items())
        pages = check_whole(op, "pages", pages, 1)
        self.page_size = check_whole(op, "page_size", page_size, 1)
        if head_dim % 8:
            raise ParameterError(f"{op}: head_dim is {head_dim}, expected a multiple of 8")
        if margin is not None:
            margin = check_number(op, "margin", margin, positive=True)
        if xp is not np and (xp is None or xp is not sys.modules.get("cupy")):  # jax.numpy is none
            raise ParameterError(f"{op}: xp is {xp!r}, expected the module numpy or cupy")
        self.spec = as_spec(op, spec)
        self._shared = SharedScales(self.spec, layers, margin, xp)
        self._xp: Any = xp
        self._set_arrays(self._zeros(pages))
        self.manager = BlockManager(pages, page_size)

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: without views of arrays, which would become arrays."""
        state = {name: x for name, x in vars(self).items() if name not in ("layers", "scales")}
        return state | dict(_xp=self._xp.__name__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._xp = np if state["_xp"] == "numpy" else load_cupy()
        self._set_arrays([self.k, self.v, self.k_scales, self.v_scales])

    def __copy__(self) -> None:
        raise UnsupportedError("PagedKVCache: copy.copy would share its arrays, expected deepcopy")

    def __repr__(self) -> str:
        layers, heads, head_dim = self.sizes
        return (
            f"PagedKVCache(layers={layers}, pages={self.k.shape[1]}, heads={heads}, "
            f'head_dim={head_dim}, page_size={self.page_size}, spec="{self.spec}", '
            f"{footprint(self.k, self.v, self.k_scales, self.v_scales)})"
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V, scales included, that one token takes in all layers."""
        layers, heads, head_dim = self.sizes
        return layers * self.spec.bytes_per_token(heads, head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        arrays = (self.k, self.v, self.k_scales, self.v_scales)
        return sum(int(array.nbytes) for array in arrays if array is not None)

    def pools(self, layer: int) -> dict[str, Any]:
        """A layer's k_pool, v_pool, k_scales and v_scales, and `spec`, as ops take them by name.

        Raises:
            ParameterError: there is no such layer.
        """
        return self._of_layer("pools", layer, {})[1]

    @interrupts.finished
    def extend(self, pages: list[int], start: int, stop: int, *, stream: Any = None) -> None:
        """Make positions start ... stop - 1 of a sequence ready to be written, and copy the page
        that it shared, if any.

        Args:
            pages, start, stop: as of BlockManager.extend.
            stream: see pykv.cuda.on_stream.

        Raises:
            ParameterError: the cache's arrays are read-only.
            UnsupportedError: the call is being prepared or captured.
            As BlockManager.extend else.

        Only enqueues on a GPU.
        """
        why = "each call takes pages of its own"
        cuda.refuse_repeat("PagedKVCache.extend", why, self.k, stream)
        check_may_write("PagedKVCache.extend", "cache", self)
        copy = self.manager.extend(pages, start, stop)
        if copy is not None:
            source, destination = copy

            def copy_page() -> None:
                for array in moving_arrays(self).values():
                    array[:, destination] = array[:, source]

            do_in(self._xp, copy_page, stream)

    def grow(self, pages: int, *, stream: Any = None) -> None:
        """Make room for so many pages in each layer; those there are keep numbers and contents.

        Old and new arrays take memory together until the old are copied; views of the old ones,
        which `layers` and `scales` had, hold what they held. Scales that heads or tensors share
        stay the same arrays.

        Args:
            pages: of each layer.
            stream: see pykv.cuda.on_stream. Where one is given, waits for it: the memory of the old
                arrays goes back to the stream that they were made on, which must not reuse it
                before it is copied.

        Raises:
            CapacityError: the memory cannot be had.
            ParameterError: the cache has more pages.
            UnsupportedError: the call is being prepared or captured.
        """
        cuda.refuse_repeat("PagedKVCache.grow", "it makes new arrays", self.k, stream)
        num_pages = self.k.shape[1]
        pages = check_whole("PagedKVCache.grow", "pages", pages, num_pages)
        old = (self.k, self.v, self.k_scales, self.v_scales)
        with cuda.on_stream(stream, self.k):
            new = self._zeros(pages)
            if self.spec.has_given_scales:  # not of pages; stores of swapped pages share them
                new[2:] = old[2:]

            def copy_pages() -> None:
                for array, larger in zip(old, new, strict=True):
                    # The system has not made memory of the host's zeros yet, and huge pages are
                    # many for the first page of each layer.
                    is_blank = self._xp is np and array is not None and not array.view("u1").any()
                    if larger is not array and not is_blank:
                        larger[:, :num_pages] = array

            do_in(self._xp, copy_pages)
            if stream is not None and on_gpu(self.k):
                cuda.synchronize()
        with interrupts.held():
            self._set_arrays(new)
            self.manager.grow(pages)

    def clamped(self, pages: Sequence[int]) -> Any:
        """The share of the elements of pages that stand at the largest code, [L, 2] float64 for K
        and V of each layer, on the host.

        Rows that exceed a shared scale are clamped, which no append waits to see. Scales that were
        found with a `margin` above 1 leave the largest code to such rows; a share of more than a
        thousandth says that they were found from other rows than those that came. Then make a cache
        with a larger margin and append again, or take one with a scale for each token ("int8" in
        place of "int8:head"). Zero for kinds of floats; of no meaning where each token has a scale,
        whose largest element gets the largest code.

        Args:
            pages: page ids.

        Raises:
            ParameterError: a page does not exist.
            UnsupportedError: the call is being prepared or captured.

        Waits for the GPU, and copies the pages to the host.
        """
        op = "PagedKVCache.clamped"
        cuda.refuse_repeat(op, "it counts on the host")
        ids = page_ids(op, "pages", pages, 0, self.k.shape[1] - 1)
        shares = np.zeros((len(self.layers), 2))
        for layer, pools in enumerate(self.layers):
            for i, (kind, pool) in enumerate(zip(self.spec.kinds, pools, strict=True)):
                if kind.largest and len(ids):
                    codes = to_host(pool[self._xp.asarray(ids)])
                    elements = codes.nbytes * 8 // kind.bits
                    shares[layer, i] = kinds.count_largest(codes, kind) / elements
        return shares

    def append(
        self, layer: int, k: Any, v: Any, slots: Any, *, stream: Any = None, **options: Any
    ) -> None:
        """Write rows of one layer to flat slots, see pykv.blocks.slots.

        Args:
            layer: from 0 on.
            k, v: [T, H, D] float32, float16 or bfloat16.
            slots: [T] int32 or int64; page * P + offset, or negative to skip the row.
            stream: see pykv.cuda.on_stream.
            options: further ones of paged_append.append.

        On a GPU only enqueues, but waits where it checks, and while a layer lacks shared scales.

        Raises:
            ParameterError: there is no such layer, or its shared scales are unset and the cache has
                no `margin`.
            UnsupportedError: the call is being prepared or captured while scales are unset.
            As paged_append.append else. Scales that were unset stay unset then.
        """
        layer, options = self._of_layer("append", layer, options)
        if self._shared.may_lack(layer, self.scales[layer]):
            append = partial(paged_append.append, k, v, slots=slots, **options)
            self._append_first("append", layer, slots, append, lambda: (k, v), stream)
        else:
            paged_append.append(k, v, slots=slots, stream=stream, **options)

    def append_qkv(
        self, layer: int, qkv: Any, slots: Any, *, stream: Any = None, **options: Any
    ) -> Any:
        """Write K and V of a fused projection [T, (HQ + 2H) * D] to flat slots [T] of one layer and
        return the queries [T, HQ, D], in the dtype of `qkv`: float32, float16 or bfloat16. Slots
        are as of `append`, options those of paged_qkv.append.

        On a GPU only enqueues, but waits where `append` does. Raises what `append` does.
        """
        layer, full = self._of_layer("append_qkv", layer, options)
        if self._shared.may_lack(layer, self.scales[layer]):
            append = partial(paged_qkv.append, qkv, slots=slots, **full)
            rows_of = partial(self._rows_of, qkv, options)
            return self._append_first("append_qkv", layer, slots, append, rows_of, stream)
        return paged_qkv.append(qkv, slots=slots, stream=stream, **full)

    def decode(self, layer: int, q: Any, page_table: Any, lengths: Any, **options: Any) -> Any:
        """Attention of the last queries of each sequence over its keys in one layer.

        Args:
            layer: from 0 on.
            q: [B, HQ, D], or [B, T, HQ, D] of the last T tokens; float32, float16 or bfloat16.
            page_table: [B, M] int32; the pages of each sequence, see pykv.blocks.page_table.
            lengths: [B] int32; keys of each sequence, those of the queries included.
            options: further ones of paged_decode.decode.

        Returns:
            Shape and dtype of `q`; with `return_lse` also [B, HQ], or [B, T, HQ], float32.

        Raises: as paged_decode.decode. ParameterError: there is no such layer.
        """
        _, options = self._of_layer("decode", layer, options)
        return paged_decode.decode(q, page_table=page_table, lengths=lengths, **options)

    def decode_qkv(
        self, layer: int, qkv: Any, slots: Any, page_table: Any, lengths: Any, **options: Any
    ) -> Any:
        """`append_qkv` of the last token [B, (HQ + 2H) * D] of each sequence, and `decode` of its
        queries, of which [B, HQ, D] are returned; see qkv_decode.decode, whose options these are.
        Raises what both do."""
        layer, of_layer = self._of_layer("decode_qkv", layer, options)
        where = dict(page_table=page_table, lengths=lengths)
        if not self._shared.may_lack(layer, self.scales[layer]):
            return qkv_decode.decode(qkv, slots=slots, **where, **of_layer)
        return append_and_decode(self, layer, qkv, slots, page_table, lengths, **options)

    def prefill(
        self, layer: int, q: Any, page_table: Any, lengths: Any, q_starts: Any, **options: Any
    ) -> Any:
        """Attention of the last tokens of each sequence, of any number, over its keys in one layer.

        Args:
            layer, page_table, lengths: as of `decode`.
            q: [T, HQ, D] float32, float16 or bfloat16; one sequence's queries behind the other's.
            q_starts: [B + 1] int32; where each sequence's queries begin in `q`: 0, ..., T.
            options: further ones of prefill.prefill.

        Returns:
            Shape and dtype of `q`; with `return_lse` also [T, HQ] float32.

        Raises: as prefill.prefill. ParameterError: there is no such layer.
        """
        where = dict(page_table=page_table, lengths=lengths, q_starts=q_starts)
        _, options = self._of_layer("prefill", layer, options)
        return prefill.prefill(q, **where, **options)

    def _rows_of(self, qkv: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """K and V [T, H, D] float32 that paged_qkv.append would encode, from pages of a token."""
        _, heads, head_dim = self.sizes
        k, v = (self._xp.empty((len(qkv), 1, heads, head_dim), np.float32) for _ in range(2))
        slots = self._xp.arange(len(qkv), dtype=np.int32)
        paged_qkv.append(qkv, k, v, slots, **options | dict(q_out=None, check=False))
        return k[:, 0], v[:, 0]

    def _append_first(
        self,
        name: str,
        layer: int,
        slots: Any,
        append: partial[Any],
        rows_of: Callable[[], tuple[Any, Any]],
        stream: Any,
    ) -> Any:
        """`append` to a layer that may lack scales; those that it lacks are found first, and taken
        back if it fails: by one thread at a time, or others would have appended with them."""
        op = f"PagedKVCache.{name}"
        with _first_append, cuda.on_stream(stream, self.k):
            cuda.refuse_capture(op, "scales are looked at first; append to the layer before")
            if self._shared.margin is None:
                self._shared.require(op, layer, self.k_scales, self.v_scales)
            else:
                self._shared.look(self.k_scales, self.v_scales)
            if layer not in self._shared.unset:
                return append()
            cuda.refuse_prepare(op, "a layer's first rows set its scales")
            # Prepared, not run: raises if an array is wrong, and writes nothing.
            cuda.prepare(append.func, *append.args, **append.keywords)
            scales = [x for x in self.scales[layer] if x is not None]
            before = [to_host(x).copy() for x in scales]
            if len(slots):
                self._shared.find(self.scales[layer], rows_of(), to_host(slots) >= 0)
            try:
                result = append()
            except BaseException:
                for x, known in zip(scales, before, strict=True):
                    x[...] = self._xp.asarray(known)
                raise
            self._shared.look(self.k_scales, self.v_scales)
            return result

    def require_scales(self, op: str, layer: int) -> None:
        """Check for `op` that a layer has all scales that heads or tensors share.

        Raises:
            ParameterError: they are unset.
            UnsupportedError: a CUDA graph is being captured before they were found to be set.

        Waits for a GPU until they were found to be set.
        """
        if self._shared.may_lack(layer, self.scales[layer]):
            self._shared.require(op, layer, self.k_scales, self.v_scales)

    def _of_layer(self, op: str, layer: int, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A layer, and options of an op with its pools."""
        layer = check_whole(f"PagedKVCache.{op}", "layer", layer, 0, len(self.layers) - 1)
        arrays = (*self.layers[layer], *self.scales[layer])
        own = dict(zip(POOLS, arrays, strict=True), spec=self.spec)
        if given := own.keys() & options.keys():
            raise ParameterError(
                f"PagedKVCache.{op}: {', '.join(sorted(given))} given, expected none: they are the "
                "cache's own"
            )
        return layer, options | own

    def _set_arrays(self, arrays: list[Any]) -> None:
        self.k, self.v, self.k_scales, self.v_scales = arrays
        self.layers = list(zip(self.k, self.v, strict=True))
        none = [None] * len(self.layers)
        k_scales, v_scales = (none if x is None else x for x in arrays[2:])
        self.scales = list(zip(k_scales, v_scales, strict=True))

    def _zeros(self, pages: int) -> list[Any]:
        """New arrays for K, V and their scales."""
        layers, heads, head_dim = self.sizes
        spec, xp = self.spec, self._xp if self._xp is np else load_cupy()
        scales = (layers, *spec.scale_shape(pages, self.page_size, heads))
        dtype = SCALE_DTYPES[spec.scale_dtype]
        shapes = spec.pool_shapes(pages, self.page_size, heads, head_dim)
        pools = zip(spec.kinds, shapes, strict=True)
        need = pages * self.page_size * self.bytes_per_token
        try:
            if need > sys.maxsize:
                raise MemoryError("more than addresses reach")
            made = [xp.zeros((layers, *shape), kind.dtype) for kind, shape in pools]
            return made + [xp.zeros(scales, dtype) if kind.largest else None for kind in spec.kinds]
        except MemoryError as error:
            raise CapacityError(
                f"PagedKVCache: {counted(pages, 'page')} of "
                f"{counted(self.page_size, 'token')} need {need:,} "
                f"bytes: {error}"
            ) from error


def do_in(xp: Any, step: Callable[[], None], stream: Any = None) -> None:
    """Do work on the arrays of a cache in `xp`, on a GPU by enqueuing it."""
    if xp is np:
        cuda.run_on_host(step, stream=stream)
    else:
        cuda.enqueue(step, stream)


def append_and_decode(
    cache: Any, layer: int, qkv: Any, slots: Any, page_table: Any, lengths: Any, **options: Any
) -> Any:
    """`decode_qkv` by the cache's own `append_qkv` and `decode`, one after the other."""
    names = ("scale", "window", "logits_soft_cap", "out", "workspace")
    of_decode = {name: options.pop(name) for name in names if name in options}
    of_decode |= {name: options[name] for name in ("check", "stream") if name in options}
    options["q_out"] = options.pop("q_scratch", None)
    options.pop("early", None)  # of the one launch
    q = cache.append_qkv(layer, qkv, slots, **options)
    return cache.decode(layer, q, page_table, lengths, **of_decode)
