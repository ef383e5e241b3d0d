"""What KVTC costs at each ratio: errors of rows, and how texts go on.

Dimensions: T tokens, L layers, H KV heads, D head size, F = L * H * D features of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pykv import blocks
from pykv.arrays import module_of, to_host
from pykv.errors import ParameterError
from pykv.eval.changes import Change, Kept
from pykv.eval.replay import ExactCache
from pykv.kvtc.artefact import Artefact
from pykv.ops import rope


class Judged:
    """A change whose errors are counted, over all sequences that it is applied to.

    Args:
        change: see pykv.eval.changes.
        artefact: whose means and rotation errors are relative to. Rows that it exempts are left
            out: of the first tokens `sinks`, of the last `window`.
    """

    def __init__(self, change: Change, artefact: Artefact) -> None:
        self._change, self._artefact = change, artefact
        self._sums = np.zeros((2, 2))  # of K and of V: squared errors, squares

    @staticmethod
    def errors(some: Sequence[Judged]) -> dict[str, float]:
        """Of keys and of values the norm of (row - changed row) over that of (row - mean), both
        over all rows of `some`; means are the calibration's, of keys before their rotation. 0
        if no row differs from the mean."""
        lost, there = np.sqrt(sum(one._sums for one in some))
        found = np.divide(lost, there, where=there > 0, out=np.zeros(2))
        return {f"{side}_error": float(x) for side, x in zip("kv", found, strict=True)}

    def __call__(self, cache: ExactCache, pages: list[int], tokens: int) -> Kept:
        artefact = self._artefact
        some = np.arange(artefact.sinks, tokens - artefact.window, dtype=np.int32)
        if not len(some):
            raise ParameterError(
                f"eval.coding: prefill is {tokens}, expected more than the {artefact.sinks} sinks "
                f"and the window of {artefact.window} that the artefact exempts"
            )
        slots = blocks.slots(pages, 0, tokens, cache.page_size)[some]
        at = module_of(cache.k).asarray(slots)

        def rows() -> list[list[Any]]:
            """[n, H, D] of keys and of values, of each layer, on the host."""
            return [
                [to_host(x.reshape(-1, *x.shape[2:])[at]) for x in pair] for pair in cache.layers
            ]

        before = rows()
        kept = self._change(cache, pages, tokens)
        for layer, (exact, changed) in enumerate(zip(before, rows(), strict=True)):
            lost = [_squares(x - y) for x, y in zip(exact, changed, strict=True)]
            keys, inv_freq = exact[0], artefact.model.inv_freq[layer]
            rope.rotate(keys, keys[:, :0], -some, inv_freq, pairing=artefact.model.pairing)
            means = _means(artefact, layer)
            self._sums += lost, [_squares(x - mean) for x, mean in zip(exact, means, strict=True)]
        return kept


def _squares(x: np.ndarray) -> float:
    return float((x.astype(np.float64) ** 2).sum())


def _means(artefact: Artefact, layer: int) -> list[np.ndarray]:
    """The mean key and value [H, D] of a layer, float64, as the calibration found them."""
    (group,) = (group for group in artefact.groups if layer in group.layers)
    model, at = artefact.model, group.layers.index(layer)
    shape = len(group.layers), model.kv_heads, model.head_dim
    return [side.mean.reshape(shape)[at].astype(np.float64) for side in (group.k, group.v)]
