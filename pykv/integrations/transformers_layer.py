"""The layers of a transformers cache, which models call one after the other.

Dimensions: B sequences, n new tokens of each, S all of them, H KV heads, D head size.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np

from pykv import install
from pykv.arrays import load_cupy
from pykv.errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from pykv.foreign import named_array
from pykv.integrations.batch import Batch, Step, rows_of
from pykv.options import check_type
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec

install.require("transformers", "torch", "transformers")

import torch  # noqa: E402
from transformers.cache_utils import CacheLayerMixin  # noqa: E402

from pykv.integrations.tensors import place_of  # noqa: E402

FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Store:
    """The state that the layers of a cache share: options of the pool, the pool, and the batch.

    Args:
        layers: L.
        config: of the model, with its attention implementation; None: "pykv".
        spec, page_size, pages, margin: as in transformers.Cache.
    """

    def __init__(
        self,
        layers: int,
        config: Any = None,
        spec: KVSpec | None = None,
        page_size: int = 16,
        pages: int | None = None,
        margin: float | None = None,
    ):
        self.layers, self.config, self.spec = layers, config, spec
        self.page_size, self.pages, self.margin = page_size, pages, margin
        self.pool: PagedKVCache | None = None
        self.batch: Batch | None = None
        self.device: Any = None

    @property
    def attends(self) -> bool:
        """Whether the model's attention is "pykv", which reads pages."""
        return self.config is None or self.config._attn_implementation == "pykv"

    def fork(self) -> Store:
        other = copy(self)
        other.batch = None if self.batch is None else self.batch.fork()
        return other

    def batch_for(self, k: Any, v: Any) -> Batch:
        """The batch for keys and values [B, H, n, D]; the first ones create it."""
        op = "Cache.update"
        B, H, n, D = k.shape
        if k.shape != v.shape:
            raise UnsupportedError(
                f"{op}: value_states are {tuple(v.shape)}, expected {tuple(k.shape)} as keys"
            )
        if k.dtype not in FLOATS:
            raise DtypeError(f"{op}: key_states are {k.dtype}, expected one of {list(FLOATS)}")
        kind = FLOATS[k.dtype] if self.pool is None else self.pool.spec.k
        if self.spec is None and not FLOATS[k.dtype] == FLOATS.get(v.dtype) == kind:
            raise DtypeError(
                f"{op}: key_states and value_states are {k.dtype} and {v.dtype}, expected {kind} "
                "like the first keys, or a Cache with a spec"
            )
        if self.pool is None:
            # On the host, zeros take hardly any memory until they are written.
            ahead = n if k.device.type == "cpu" else 1
            num_pages = B * -(-(n + ahead) // self.page_size) if self.pages is None else self.pages
            self.device, self.pool = (
                k.device,
                PagedKVCache(
                    *(self.layers, num_pages, H, D),
                    page_size=self.page_size,
                    spec=kind if self.spec is None else self.spec,
                    margin=self.margin,
                    xp=np if k.device.type == "cpu" else load_cupy(),
                ),
            )
        if k.device != self.device:
            raise DeviceError(f"{op}: key_states are on {k.device}, expected {self.device}")
        if self.batch is None:
            grows = self.pages is None
            in_runs = grows and self.keeps(k, v) and not self.attends
            self.batch = Batch(self.pool, B, grows=grows, in_runs=in_runs)
        expected = (self.batch.size, *self.pool.sizes[1:])
        if (B, H, D) != expected:
            raise ShapeError(
                f"{op}: key_states have B, H, D = {B, H, D}, expected {expected} as the cache has"
            )
        return self.batch

    def keeps(self, k: Any, v: Any) -> bool:
        """Whether pages hold keys and values unchanged, in memory that torch can read."""
        assert self.pool is not None  # the first keys made it
        spec, kinds = self.pool.spec, (FLOATS[k.dtype], FLOATS.get(v.dtype))
        return k.device.type == "cpu" and spec.layout == "NHD" and (spec.k, spec.v) == kinds


def refuse_copies(x: Any) -> Any:
    """`__reduce__` of classes that pickle and copy.copy must not copy."""
    raise UnsupportedError(
        f"transformers.{type(x).__name__}: pickle and copy.copy would part or share its pages, "
        "expected deepcopy of a Cache, or its pool"
    )


class Handle(torch.Tensor):  # type: ignore[misc]
    """A reference to a layer's pages for "pykv": a tensor [B, H, 0, D] without memory, in place of
    keys or values. Computing with it is refused, since the result would be lost.

    Attributes:
        layer: of the cache.
        part: "key" or "value".
    """

    @staticmethod
    def of(layer: Layer, part: str, new: Any) -> Handle:
        B, H, _, D = new.shape
        made: Handle = torch.empty((B, H, 0, D), dtype=new.dtype, device="meta").as_subclass(Handle)
        made.layer, made.part = layer, part
        return made

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), words: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__":  # an attribute, or a tensor that is no handle
                return function(*args, **(words or {}))
            try:
                result = function(*args, **(words or {}))
            except RuntimeError:  # because it has no rows
                result = None
        if result is args[0] and not name.endswith("_"):  # the handle itself, not written
            return result
        made = result if isinstance(result, list | tuple) else [result]
        if result is not None and not any(map(torch.is_tensor, made)):
            return result
        raise UnsupportedError(
            f"Cache.update: the model calls {name} on keys or values that lie in pages, expected "
            "that it only attends to them: take 'sdpa' or 'eager' for this model"
        )


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `Cache`, as transformers calls it."""

    is_croppable = True  # read by transformers from 5.24 on
    is_sliding = False
    supports_early_init = False

    def __init__(self, store: Store, index: int):
        super().__init__()
        self.store, self.index = store, index
        self.new: tuple[Any, Any] | None = None  # keys and values that `attention` will append
        self.step: Step | None = None  # where the last rows were appended

    def __reduce__(self) -> Any:
        return refuse_copies(self)

    @property
    def keys(self) -> Any:
        raise UnsupportedError("Cache.layers: keys and values lie in pages, see Cache.pool")

    @keys.setter
    def keys(self, _: None) -> None:
        """Ignored: CacheLayerMixin's constructor sets None."""

    values = keys

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing: the first keys create the pool."""

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append [B, H, n, D]; returns the keys and values for the model's attention: all of them,
        or for "pykv" handles of this layer. They may be views of pages, which later calls write
        to."""
        k, v, store = key_states, value_states, self.store
        for name, x in (("key_states", k), ("value_states", v)):
            check_type("Cache.update", name, x, torch.Tensor, "a tensor [B, H, n, D]")
            if x.ndim != 4:
                given = tuple(x.shape)
                raise ShapeError(f"Cache.update: {name} has shape {given}, expected [B, H, n, D]")
        with place_of("Cache.update", key_states=k, value_states=v):
            batch = store.batch_for(k, v)
            B, H, n, D = k.shape
            if store.attends:
                self.new = k, v
                return Handle.of(self, "key", k), Handle.of(self, "value", v)
            step = batch.begin("Cache.update", self.index, n)
            if not step.is_whole:
                raise UnsupportedError(
                    "Cache.update: the cache holds no rows of padding, expected "
                    "attn_implementation='pykv' as before"
                )
            needs_gradient = k.requires_grad or v.requires_grad  # refused below
            if store.keeps(k, v) and not needs_gradient:
                keys, values = _append_kept(step, batch.pool, self.index, k, v)
                batch.columns[self.index] = step.stop
                return keys, values
            batch.append(self.index, *_rows(k, v, None), step)
            P = batch.pool.page_size
            out = [k.new_empty((B, -(-step.stop // P), P, H, D)) for _ in range(2)]
            k_out, v_out = (named_array("Cache.update", "out", x) for x in out)
            batch.gather(self.index, k_out, v_out, step)
        keys, values = (x.flatten(1, 2)[:, : step.stop].transpose(1, 2) for x in out)
        return keys, values

    def append(self, op: str, n: int, seen: Any) -> Step:
        """Append the keys and values that `update` kept; `seen` [B, S] is False for padding. A
        later layer that shares this layer's keys calls this again, and gets the same step."""
        if self.new is None and self.step is not None and np.array_equal(seen, self.step.seen):
            return self.step
        if self.new is None:
            raise UnsupportedError(f"{op}: key was used before, expected one of Cache.update")
        batch = self.store.batch_for(*self.new)
        start = batch.columns[self.index]
        if seen.shape != (batch.size, start + n):
            failed = "; after a failed call crop or reset the cache"
            raise ShapeError(
                f"{op}: attention_mask has shape {seen.shape}, expected "
                f"{batch.size, start + n} for {n} tokens behind {start}"
                f"{failed if start < max(batch.columns) else ''}"
            )
        step = batch.begin(op, self.index, n, seen[:, start:], past=seen[:, :start])
        batch.append(self.index, *_rows(*self.new, step.rows), step)
        self.new, self.step = None, step
        return step

    @property
    def pool(self) -> PagedKVCache:
        assert self.store.pool is not None  # the first keys made it
        return self.store.pool

    def get_seq_length(self, *_: Any) -> int:
        batch = self.store.batch
        return 0 if batch is None else batch.columns[self.index]

    def reset(self) -> None:
        """Forget the layer's tokens. As layers share pages it takes others once each was reset,
        which is what `Cache.reset` does."""
        self.new = self.step = None
        batch = self.store.batch
        if batch is not None:
            batch.reset(self.index)
            if not any(batch.columns):
                self.store.batch = None

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """The number of keys and the index of the first, for a number of queries, or before 5.0 for
        their positions."""
        return self.get_seq_length() + (query if isinstance(query, int) else len(query)), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before 5.0


def _append_kept(step: Step, pool: PagedKVCache, layer: int, *new: Any) -> list[Any]:
    """Append keys and values [B, H, n, D] to a host pool that keeps them unchanged; returns all
    [B, H, S, D]: a view of the pages if these are contiguous, else a copy."""
    step.tensors = step.tensors or [
        _layers(step, *x) for x in zip((pool.k, pool.v), new, strict=True)
    ]
    out = []
    for layers, x in zip(step.tensors, new, strict=True):
        B, H, _, D = x.shape
        held = layers[layer]
        if step.run is not None:
            held[:, :, step.start :] = x
        else:
            held.view(-1, H, D)[torch.from_numpy(step.slots)] = x.transpose(1, 2).flatten(0, 1)
            held = held.index_select(0, torch.from_numpy(step.pages)).view(B, -1, H, D)
            held = held[:, : step.stop].transpose(1, 2)
        out.append(held)
    return out


def _layers(step: Step, array: Any, new: Any) -> Any:
    """For each layer of a pool's array, a tensor that is a view of it, with the dtype of `new`:
    [B, H, S, D] if the pages of the step are contiguous, else [N, P, H, D]."""
    L, _, P, H, D = array.shape
    x = torch.from_numpy(array.view(f"i{array.itemsize}")).view(new.dtype)  # NumPy has no bfloat16
    if step.run is not None:
        first, gap = step.run
        strides = x.stride(0), gap * P * H * D, D, H * D, 1
        x = x.as_strided((L, len(step.seen), H, step.stop, D), strides, first * P * H * D)
    return x.unbind(0)


def _rows(k: Any, v: Any, rows: Any) -> tuple[Any, Any]:
    """Keys and values [B, H, n, D] as arrays [T, H, D]; `rows` of them, or all if None."""

    def some(name: str, x: Any) -> Any:
        array = named_array("Cache.update", name, x.transpose(1, 2).flatten(0, 1))
        return array if rows is None else rows_of(array, rows)

    return some("key_states", k), some("value_states", v)
