"""An artefact at one ratio, on the codec's device.

Dimensions: E layers of a group, F = E * H * D features of a row, C components of K or of V.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from pykv.kvtc.artefact import Artefact, Group, Side
from pykv.kvtc.basis import inverse, weigh
from pykv.options import check_type


class Loaded(NamedTuple):
    """A group of layers in the form that ops take.

    Attributes:
        layers: of the model, ascending.
        places, inv_freq, mean: as in kvtc_rows.gather.
        bases, back: for K and V, the matrices from rows to components, and back.
        steps, widths: for K and V, of the components that have bits.
        begin, end: this group's bytes in a coded token.
    """

    layers: tuple[int, ...]
    places: Any
    mean: Any
    inv_freq: Any
    bases: tuple[Any, Any]
    back: tuple[Any, Any]
    steps: tuple[Any, Any]
    widths: tuple[tuple[int, ...], tuple[int, ...]]
    begin: int
    end: int

    @property
    def frame(self) -> dict[str, Any]:
        """Arguments of kvtc_rows.gather and scatter."""
        return dict(places=self.places, mean=self.mean, inv_freq=self.inv_freq)

    @property
    def coder(self) -> dict[str, Any]:
        """Arguments of kvtc_code.encode and decode."""
        (k_steps, v_steps), (k_widths, v_widths) = self.steps, self.widths
        return dict(k_steps=k_steps, v_steps=v_steps, k_widths=k_widths, v_widths=v_widths)

    def part(self, layers: range, features: int) -> Loaded:
        """This group restricted to some `layers` of the model, with so many `features` each."""
        a, b = (sum(i < edge for i in self.layers) for edge in (layers.start, layers.stop))
        if (a, b) == (0, len(self.layers)):
            return self
        some = slice(a * features, b * features)
        return self._replace(
            places=self.places[a:b],
            mean=self.mean[:, some],
            bases=(self.bases[0][some], self.bases[1][some]),
            back=(self.back[0][some], self.back[1][some]),
        )


def load(xp: Any, group: Group, inv_freq: Any, ratio: int, begin: int) -> Loaded:
    """Load a group of an artefact that is checked.

    Args:
        xp: `numpy` or `cupy`.
        group, inv_freq: of the artefact.
        ratio: one of the artefact's ratios.
        begin: offset of the group's bytes in a coded token.
    """
    layers = tuple(group.layers)
    distinct, of_layer = np.unique(inv_freq[list(layers)], axis=0, return_inverse=True)
    places = np.stack([np.array(layers), of_layer.reshape(-1)], 1).astype(np.int32)
    sides = group.k, group.v
    plans = [side.plans[ratio] for side in sides]
    (k, k_back), (v, v_back) = (
        _both_ways(side, len(plan.steps), xp) for side, plan in zip(sides, plans, strict=True)
    )
    return Loaded(
        layers,
        xp.asarray(places),
        xp.asarray(np.stack([side.mean for side in sides])),
        xp.asarray(distinct.astype(np.float32)),
        (k, v),
        (k_back, v_back),
        (xp.asarray(plans[0].steps), xp.asarray(plans[1].steps)),
        (plans[0].widths, plans[1].widths),
        begin,
        begin + sum(plan.row_bytes for plan in plans),
    )


def _both_ways(side: Side, count: int, xp: Any) -> tuple[Any, Any]:
    """W @ basis and W^-1 @ basis, each [F, count] float16, of the first `count` columns; see Side.
    The second, transposed, turns components back into rows."""
    rows = np.ascontiguousarray(side.basis[:, :count].T, np.float32)
    to, back = (
        xp.asarray(np.ascontiguousarray(weigh(rows, x).T.astype(np.float16)))
        for x in (side.weights.astype(np.float32), inverse(side.weights))
    )
    return to, back


def identify(artefact: Artefact) -> str:
    """SHA-256 of all that coded tokens depend on, in hexadecimal: the model's SHA-256, sizes and
    rotation, the groups of layers, and each side's mean, weights, basis, widths and steps.

    Raises:
        DtypeError: `artefact` is no Artefact.
    """
    check_type("kvtc.identify", "artefact", artefact, Artefact, "a pykv.kvtc.Artefact")
    model = artefact.model
    facts = model.sha256, model.layers, model.kv_heads, model.head_dim, model.pairing
    digest = hashlib.sha256(repr(facts).encode())

    def add(x: Any, dtype: str) -> None:
        digest.update(np.ascontiguousarray(x, dtype).tobytes())

    add(model.inv_freq, "<f4")
    for group in artefact.groups:
        digest.update(repr(tuple(group.layers)).encode())
        for side in (group.k, group.v):
            add(side.mean, "<f2")
            add(side.weights, "<f2")
            add(side.basis, "<f2")
            for ratio, plan in side.plans.items():
                digest.update(repr((ratio, tuple(plan.widths))).encode())
                add(plan.steps, "<f4")
    return digest.hexdigest()
