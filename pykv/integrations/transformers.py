"""transformers on paged caches: `Cache` holds keys and values in pages of any kind, and
attn_implementation="pykv" attends to them in place.

With another implementation ("sdpa", "eager") a model gets the memory of the pages itself, if that
holds its keys and values unchanged: floats of its own dtype, on a CPU, contiguous pages for each
sequence. Otherwise each layer reads all of its keys and values back as floats, in each step.
Importing this module registers "pykv" with transformers.

Dimensions: B sequences, n new tokens of each, S all of them, H KV heads, HQ query heads, D head
size.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np

from pykv import install
from pykv.errors import DtypeError, ParameterError, UnsupportedError, a_type
from pykv.options import check_type, check_whole
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec, as_spec

install.require("transformers", "torch", "transformers")

from transformers import PretrainedConfig, cache_utils  # noqa: E402

import pykv.integrations.transformers_attention  # noqa: E402, F401  registers "pykv"
from pykv.integrations.transformers_layer import Layer, Store, refuse_copies  # noqa: E402

LAYERS = ("full_attention", "sliding_attention")  # layer types of a config that `Cache` supports
TAKES_LENGTH = "max_length" in signature(cache_utils.Cache.crop).parameters


class Cache(cache_utils.Cache):  # type: ignore[misc]
    """A paged cache for models of transformers, which grows with its sequences.

    Args:
        config: `model.config`, with the number of layers and the attention implementation.
        spec: a KVSpec or its text, "int8", "k8v4", ...; None: the dtype of the model's keys; the
            tokens then equal those with a DynamicCache.
        page_size: P, tokens a page.
        pages: of each layer; None: as many as needed, at least doubled when they are used up. On a
            CPU the first allocation is twice what the first tokens take; the system backs it with
            memory as it is written.
        margin: for scales that heads or tensors share, see PagedKVCache. Larger values are clamped;
            calls do not wait to report it: see `clamped`.

    Attributes:
        pool: the PagedKVCache; None before the first tokens.

    Raises:
        UnsupportedError: a layer has attention other than full or sliding; or later, in a call of
            the model, keys and values have different shapes, or need gradients.
        ParameterError: the spec is unknown, or a size is out of range.
        ShapeError: later; D is not a multiple of 8, or the batch has another size.
        DtypeError: later; keys or values are not float32, float16 or bfloat16; or, without a
            `spec`, differ in dtype from the first keys, even after `reset`.
        DeviceError: later; layers are on several devices.
        CapacityError: later; all `pages` or the memory is used up.

    Batch operations of transformers copy nothing: `reorder_cache` of a beam search,
    `batch_repeat_interleave` of a prompt, and `copy.deepcopy` of a prefix share pages until one
    side writes to them. Padding takes no pages with "pykv". A sliding window hides keys, but frees
    no pages.

    >>> import torch, transformers
    >>> cache = Cache(transformers.LlamaConfig(num_hidden_layers=2), "int8")
    >>> k = v = torch.ones(1, 2, 20, 16)  # B H n D; a model calls this in each of its layers
    >>> keys, values = cache.update(k, v, 0)
    >>> keys.shape, cache.get_seq_length(), cache.pool.bytes_per_token
    (torch.Size([1, 2, 20, 16]), 20, 144)
    """

    def __init__(
        self,
        config: Any,
        spec: KVSpec | str | None = None,
        *,
        page_size: int = 16,
        pages: int | None = None,
        margin: float | None = None,
    ):
        op = "Cache"
        check_type(op, "config", config, PretrainedConfig, "a model's config")
        config = config.get_text_config(decoder=True)
        for i, kind in enumerate(getattr(config, "layer_types", None) or ()):
            if kind not in LAYERS:
                raise UnsupportedError(
                    f"{op}: layer {i} of the model has {kind}, expected {' or '.join(LAYERS)}"
                )
        if pages is not None:
            pages = check_whole(op, "pages", pages, 1)
        self._store = Store(
            config.num_hidden_layers,
            config,
            None if spec is None else as_spec(op, spec),
            check_whole(op, "page_size", page_size, 1),
            pages,
            margin,
        )
        layers = [Layer(self._store, i) for i in range(self._store.layers)]
        super().__init__(layers=layers)

    def __repr__(self) -> str:
        batch = self._store.batch
        if batch is None:
            return "Cache(empty)"
        return f"Cache({max(batch.columns)} tokens of {batch.size} sequences, {batch.pool})"

    @property
    def pool(self) -> PagedKVCache | None:
        return self._store.pool

    def __reduce__(self) -> Any:
        return refuse_copies(self)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Append a layer's new rows; see the layer's `update`."""
        last = len(self.layers) - 1
        layer = self.layers[check_whole("Cache.update", "layer_idx", layer_idx, 0, last)]
        return layer.update(key_states, value_states)

    def __deepcopy__(self, memo: Any) -> Cache:
        """A copy of the cache, which shares pages until either writes to them."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        other._store = self._store.fork()
        other.layers = [Layer(other._store, i) for i in range(len(self.layers))]
        return other

    def clamped(self) -> Any:
        """PagedKVCache.clamped for the pages of all sequences: the shares of elements at the
        largest code, for shared scales. None before the first tokens. Waits for a GPU."""
        batch = self._store.batch
        return None if batch is None else batch.pool.clamped(batch.used_pages)

    def reset(self) -> None:
        """Forget all tokens; the pages stay with the cache for later sequences."""
        self._store.batch = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence.

        Args:
            tokens_to_remove: minus the number of tokens to remove. Before transformers 5.24, whose
                own caches take a length, 0 and above is the number of tokens to keep.

        Raises:
            ParameterError: it is positive, and this transformers takes no lengths.
        """
        batch, most = self._store.batch, 2**31
        count = check_whole("Cache.crop", "tokens_to_remove", tokens_to_remove, -most, most)
        if count > 0 and not TAKES_LENGTH:
            raise ParameterError(f"Cache.crop: tokens_to_remove is {count}, expected minus that")
        if batch is not None:
            is_length = TAKES_LENGTH and count >= 0
            batch.crop(count if is_length else max(max(batch.columns) + count, 0))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let sequence i continue sequence beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences `indices`, in this order.

        Raises:
            DtypeError: `indices` are not whole numbers; a mask would pass as 0 and 1.
            ShapeError: there is no such sequence.
        """
        op = "Cache.batch_select_indices"
        given = indices.tolist() if hasattr(indices, "tolist") else indices
        if not isinstance(given, list | tuple):
            raise DtypeError(f"{op}: indices is {a_type(indices)}, expected a vector")
        chosen = [check_whole(op, "indices", i, 0, 2**31 - 1) for i in given]
        if self._store.batch is not None:
            self._store.batch.select(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies next to each other."""
        repeats = check_whole("Cache.batch_repeat_interleave", "repeats", repeats, 0)
        if self._store.batch is not None:
            self._store.batch.select(np.arange(self._store.batch.size).repeat(repeats).tolist())

    def offload(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError("Cache.offload: pages stay where they are, see pykv.tiers")
