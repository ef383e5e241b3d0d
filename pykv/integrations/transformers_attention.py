"""attn_implementation="pykv": attention of transformers models to keys and values in pages.

A model calls `mask` once for all layers, then each layer calls `attention`. Dimensions: B
sequences, n new tokens of each, S all of them, HQ query heads, H KV heads, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv import install
from pykv.errors import ShapeError, UnsupportedError
from pykv.foreign import named_array

install.require("transformers", "torch", "transformers")

import torch  # noqa: E402
from transformers import AttentionInterface, masking_utils  # noqa: E402

from pykv.integrations.batch import Step, rows_of, set_rows  # noqa: E402
from pykv.integrations.tensors import place_of  # noqa: E402
from pykv.integrations.transformers_layer import Layer, Store  # noqa: E402

# Options that models pass to every attention implementation and that do not affect attention.
IGNORED = {
    *("position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict"),
    *("output_router_logits", "position_embeddings", "layer_idx", "num_items_in_batch"),
}


def mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    **_: Any,
) -> Any:
    """The mask that `attention` gets, made once for all layers: the mask function that transformers
    calls for "pykv".

    Args:
        batch_size, kv_length: B and S.
        kv_offset: of the first key; 0.
        mask_function: which keys a query sees, see transformers.masking_utils.
        attention_mask: [B, S] bool; False for padding, on either side. None: no padding.

    Returns:
        [B, S] bool on the CPU, with attributes `window`, and `seen`, the mask as an array.

    Raises:
        UnsupportedError: the mask is not causal, with or without a window; or there is a window,
            and padding after tokens.
        ShapeError: `attention_mask` has another shape.

    Waits for the GPU if there is an `attention_mask`.
    """
    op = "mask"
    window = _window_of(op, mask_function)
    shape = batch_size, kv_length
    if kv_offset:
        raise UnsupportedError(f"{op}: kv_offset is {kv_offset}, expected 0 as of a pykv Cache")
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.bool)
    if tuple(attention_mask.shape) != shape:
        given = tuple(attention_mask.shape)
        raise ShapeError(f"{op}: attention_mask has shape {given}, expected [B, S] = {shape}")
    told = attention_mask.to("cpu", torch.bool, copy=True)  # a copy: it gets attributes
    told.seen, told.window = told.numpy(), window
    if window is not None and (np.diff(told.seen.astype(np.int8)) < 0).any():
        raise UnsupportedError(
            f"{op}: attention_mask has padding behind tokens, expected it before them where "
            "attention is sliding"
        )
    return told


def _window_of(op: str, function: Any) -> int | None:
    """The window of a mask function, which must be causal. Inspects its parts, since no sample of
    results could prove that it hides nothing else."""
    window, parts = None, _parts(function)
    is_known = any(part is masking_utils.causal_mask_function for part in parts)
    for part in parts:
        made_by = getattr(part, "__qualname__", "").partition(".")[0]
        if made_by == "sliding_window_overlay" and window is None:
            window = int(_closure(part)["sliding_window"])
        elif made_by == "packed_sequence_mask_function":  # before 5.0 also for a single sequence
            packed = _closure(part)["packed_sequence_mask"]
            is_known &= packed is not None and bool((packed == packed[:, :1]).all())
        elif part is not masking_utils.causal_mask_function:
            is_known = False
    if is_known:
        return window
    name = getattr(function, "__qualname__", function)
    raise UnsupportedError(
        f"{op}: mask_function is {name}, expected a causal one, with or without a sliding window: "
        "pykv knows no chunks, blocks, packed sequences or attention to both sides"
    )


def _parts(function: Any) -> list[Any]:
    """The functions that a mask function combines by "and"."""
    if getattr(function, "__qualname__", "").partition(".")[0] != "and_masks":
        return [function]
    return [part for each in _closure(function)["mask_functions"] for part in _parts(each)]


def _closure(function: Any) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {n: x.cell_contents for n, x in zip(names, function.__closure__ or (), strict=True)}


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Any = None,
    is_causal: bool | None = None,
    **words: Any,
) -> tuple[Any, None]:
    """Append a layer's new keys and values to its pages, and attend to all keys in them: the
    attention function that transformers calls for "pykv".

    Args:
        module: the attention layer.
        query: [B, HQ, n, D].
        key, value: from `Cache.update`; without a cache [B, H, n, D].
        attention_mask: from `mask`.
        scaling: factor of q.k; 1 / sqrt(D) if None.
        dropout: must be 0.
        softcap, sliding_window: see prefill; None for none.
        s_aux: [HQ] attention sinks: for each head, the score of an additional key without a value.
        is_causal: True or None.
        words: other options; none may change the result.

    Returns:
        [B, n, HQ, D] of the dtype of `query`, zeros for padding; and None for the weights.

    Raises:
        UnsupportedError: pykv does not support an argument, or tensors need gradients.
        Otherwise as the ops.

    Runs where the tensors are; on a GPU it only enqueues, on torch's current stream.
    """
    op = "attention"
    given = {n: x for n, x in words.items() if n not in IGNORED}
    refused = {n: x for n, x in given.items() if x is not None and x is not False}
    if dropout:
        refused["dropout"] = dropout
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        refused["is_causal"] = False
    if refused:
        raise UnsupportedError(f"{op}: given {refused}, expected none of them with 'pykv'")
    seen = getattr(attention_mask, "seen", None)
    if seen is None:
        given = getattr(attention_mask, "shape", attention_mask)
        raise UnsupportedError(
            f"{op}: attention_mask is {given}, expected one of the model's own making, from a mask "
            "[B, S] of its tokens"
        )
    if sliding_window != attention_mask.window:
        raise UnsupportedError(
            f"{op}: sliding_window is {sliding_window}, expected {attention_mask.window} as the "
            "mask has it"
        )
    options = dict(scale=scaling, window=sliding_window, logits_soft_cap=softcap)
    layer = _layer_of(op, query, key, value)
    with place_of(op, query=query, sinks=s_aux):
        return _attend(layer, query, seen, s_aux, options), None


def _layer_of(op: str, query: Any, key: Any, value: Any) -> Layer:
    """The layer of a `Cache` that the handles `key` and `value` refer to; for plain tensors, a new
    layer of its own."""
    parts = [getattr(x, "part", None) for x in (key, value)]
    if parts == ["key", "value"] and key.layer is value.layer:
        found: Layer = key.layer
        return found
    if parts != [None, None]:
        raise UnsupportedError(
            f"{op}: key or value was changed behind Cache.update, expected what that gave"
        )
    if key.shape[2] != query.shape[2]:
        raise UnsupportedError(
            f"{op}: key has {key.shape[2]} tokens for {query.shape[2]} queries, from another cache "
            "than pykv's: expected a pykv Cache, or 'sdpa' for a model that makes its own, as "
            "generate has it for an assistant_model or guidance_scale"
        )
    layer = Layer(Store(1), 0)
    layer.new = key, value
    return layer


def _attend(layer: Layer, query: Any, seen: Any, sinks: Any, options: dict[str, Any]) -> Any:
    """The output [B, n, HQ, D] of queries [B, HQ, n, D] on all keys of a layer, new ones too."""
    op, (B, HQ, n, D) = "attention", query.shape
    step = layer.append(op, n, seen)
    q = query.transpose(1, 2).flatten(0, 1).contiguous()  # flatten keeps strides if B is 1
    q = named_array(op, "query", q)
    make = query.new_empty if step.rows is None else query.new_zeros
    out, lse = make((B * n, HQ, D)), make((B * n, HQ), dtype=torch.float32)
    arrays = [named_array(op, "out", x) for x in (out, lse)]
    if step.rows is None:
        given = dict(out=arrays[0], lse=None if sinks is None else arrays[1])
        _attend_rows(layer, q, step, given | options)
    else:
        results = _attend_rows(layer, rows_of(q, step.rows), step, dict(return_lse=True) | options)
        for array, result in zip(arrays, results, strict=True):
            set_rows(array, step.rows, result)
    if sinks is not None:  # one more term in each row's softmax sum
        out *= torch.sigmoid(lse - sinks.float())[..., None]
    return out.view(B, n, HQ, D)


def _attend_rows(layer: Layer, q: Any, step: Step, options: dict[str, Any]) -> Any:
    """Attention of the queries [T, HQ, D] of a step."""
    pool, places = layer.pool, (step.table, step.lengths)
    if step.rows is None and len(q) == len(step.lengths):
        return pool.decode(layer.index, q, *places, **options)
    return pool.prefill(layer.index, q, *places, step.starts, **options)


AttentionInterface.register("pykv", attention)
masking_utils.AttentionMaskInterface.register("pykv", mask)
