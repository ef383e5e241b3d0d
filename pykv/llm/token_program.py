"""A decode step as the phases of one launch: the next token of each of a few sequences.

Dimensions: as in pykv/llm/model.py; T is the number of sequences.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import like, on_gpu
from pykv.errors import UnsupportedError
from pykv.llm import matrices
from pykv.llm.drawing import Asked, DrawPhases
from pykv.llm.model import Batch
from pykv.llm.weights import Layer, Model
from pykv.ops.phase_program import OLDEST_SM, PhaseProgram
from pykv.ops.resident_program import ResidentProgram
from pykv.pool import PagedKVCache
from pykv.programs.phases import AddNorm, Append, Argmax, Attend, Attention, Embed, Product
from pykv.programs.resident_tokens import Inputs

TOKENS = 8  # limit of a step, one for each sequence


class TokenPhases(NamedTuple):
    """The phases of a step, in order, and what they leave: logits [T, V] float32, and, by the last
    one, the index of the largest of each row, [T] int32, -1 where it is not finite."""

    phases: list[Any]
    logits: Any
    peaks: Any


def check(op: str, model: Model) -> None:
    """Whether a step of a model is made of phases that there are, and its GPU runs them.

    Raises:
        UnsupportedError: it does not; the text names what lacks.
    """
    if on_gpu(model.output_norm) and cuda.current_sm() < OLDEST_SM:
        raise UnsupportedError(
            f"{op}: decode is 'persistent' on sm_{cuda.current_sm()}, expected sm_{OLDEST_SM} or "
            "newer"
        )
    lacks = "expected another decode than 'persistent', as no phase"
    if model.config.logit_cap is not None:
        raise UnsupportedError(f"{op}: the model caps its logits, {lacks} does that")
    if len({len(layer.inv_freq) for layer in model.layers}) > 1:
        raise UnsupportedError(
            f"{op}: layers rotate different numbers of pairs, {lacks} takes more than one"
        )
    for i, layer in enumerate(model.layers):
        if len(matrices.parts_of(layer.gate_up)) > 1:
            raise UnsupportedError(
                f"{op}: gate and up of layer {i} are of several types, {lacks} gates alone"
            )


def token_phases(model: Model, batch: Batch, cache: PagedKVCache) -> TokenPhases:
    """The phases of model.forward on a batch of one token a sequence, on arrays of their own.

    Args:
        model: one that `check` passes.
        batch: up to TOKENS tokens; the phases go by what its arrays contain when they run.
        cache: its pages; not to be grown as long as the phases are used.
    """
    config = model.config
    T, HQ, H, D = len(batch.ids), config.heads, config.kv_heads, config.head_dim
    array = partial(like, batch.ids, dtype=np.float32)
    x, qkv = array(shape=(T, config.embedding)), array(shape=(T, (HQ + 2 * H) * D))
    q, attended = array(shape=(T, HQ, D)), array(shape=(T, HQ, D))
    normed = array(shape=x.shape)
    hidden, logits = array(shape=(T, config.feed_forward)), array(shape=(T, config.vocab))
    peaks = like(batch.ids, (T,), np.int32)

    def add_product(y: Any, weight: Any, bias: Any, post_norm: Any) -> list[Any]:
        """x += y @ weight.T + bias, normalised first where the model has a post norm."""
        if post_norm is None:
            return _products(y, weight, x, bias=bias, accumulate=True)
        products = _products(y, weight, normed, bias=bias)
        return [*products, AddNorm(x, normed, post_norm, config.eps)]

    ((kind, table),) = matrices.parts_of(model.embedding)
    phases: list[Any] = [Embed(batch.ids, table, kind, x, config.embedding_scale)]
    for i, layer in enumerate(model.layers):
        of_norm = dict(eps=config.eps, norm=layer.attention_norm)
        phases += _products(x, layer.qkv, qkv, bias=layer.qkv_bias, **of_norm)
        phases.append(_attention(model, i, layer, batch, cache, (qkv, q, attended)))
        rows, bias = attended.reshape(T, -1), layer.attention_out_bias
        phases += add_product(rows, layer.attention_out, bias, layer.post_attention_norm)
        of_gate = dict(eps=config.eps, norm=layer.ffn_norm, gate=config.kind.activation)
        phases += _products(x, layer.gate_up, hidden, bias=layer.gate_up_bias, **of_gate)
        phases += add_product(hidden, layer.down, layer.down_bias, layer.post_ffn_norm)
    phases += _products(x, model.head, logits, norm=model.output_norm, eps=config.eps)
    return TokenPhases([*phases, Argmax(logits, peaks)], logits, peaks)


def _products(x: Any, w: Any, out: Any, *, bias: Any = None, **options: Any) -> list[Any]:
    """One for each type of a matrix's rows."""
    options |= dict(exact=False)  # as a model's other steps have it
    return [
        Product(x, part.rows, part.kind, part.out, bias=part.bias, **options)
        for part in matrices.products_of(w, out, bias)
    ]


def _attention(
    model: Model,
    i: int,
    layer: Layer,
    batch: Batch,
    cache: PagedKVCache,
    arrays: tuple[Any, Any, Any],
) -> Attention:
    """Queries and new rows of a layer, and attention over its pages."""
    config, (qkv, q, attended) = model.config, arrays
    pools = cache.pools(i)
    append = Append(
        qkv=qkv,
        slots=batch.slots,
        q_out=q,
        positions=batch.positions,
        inv_freq=layer.inv_freq,
        pairing=config.kind.pairing,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        eps=config.eps,
        hadamard=model.hadamard,
        **pools,
    )
    attend = Attend(
        q=q,
        page_table=batch.page_table,
        lengths=batch.lengths,
        out=attended,
        scale=config.attention_scales[i],
        window=config.windows[i],
        logits_soft_cap=config.attention_cap,
        **pools,
    )
    return Attention(append, attend)


class TokenStep:
    """A step as one launch, or as a launch that goes on to the next tokens.

    Args:
        model, batch, cache: as of token_phases.
        blocks: limit of a launch; None: as many as the GPU runs at once and have work.

    Attributes:
        peaks: where a step leaves the likeliest token of each row.

    Raises:
        UnsupportedError: layers differ in what phases of a kind must share.

    Called, it does one step and returns its logits, the same array at each call.
    """

    def __init__(
        self, model: Model, batch: Batch, cache: PagedKVCache, blocks: int | None = None
    ) -> None:
        self._phases, self._logits, self.peaks = token_phases(model, batch, cache)
        self._blocks, self._batch, self._page_size = blocks, batch, cache.page_size
        self._resident: dict[Asked, tuple[ResidentProgram, DrawPhases]] = {}

    @cached_property
    def _program(self) -> PhaseProgram:
        return PhaseProgram(self._phases, blocks=self._blocks)

    def __call__(self) -> Any:
        self._program()
        return self._logits

    def resident(self, asked: Asked) -> tuple[ResidentProgram, DrawPhases]:
        """The program that goes on from the batch that is there and draws as asked, without leaving
        logits; and its phases that draw, to be filled before each launch."""
        if asked not in self._resident:
            b = self._batch
            draw = DrawPhases(asked, self._logits, b, self.peaks)
            inputs = Inputs(b.ids, b.positions, b.slots, b.lengths, b.page_table, self.peaks)
            phases = [*self._phases[:-1], *draw.phases]
            program = ResidentProgram(phases, inputs, self._page_size, blocks=self._blocks)
            self._resident[asked] = program, draw
        return self._resident[asked]
