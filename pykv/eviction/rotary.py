"""Future queries, predicted by rotating past ones to later positions.

Dimensions: as in pykv/eviction; F rotated pairs of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import FLOAT32, module_of
from pykv.checker import checker
from pykv.errors import DeviceError, ParameterError
from pykv.number_texts import counted
from pykv.ops import linear, paged_qkv, rope
from pykv.options import check_flag, check_type


class Rotary(NamedTuple):
    """How a model rotates queries and keys, see `rope.rotate`.

    Attributes:
        inv_freq: by layer, [F] float32 on the host, radians a position; F = 0: no rotation.
        pairing: of the elements of a head.
        hadamard: whether heads are then multiplied by `paged_qkv.hadamard_matrix`.

    >>> pykv.eviction.Rotary([pykv.ops.rope.frequencies(64, 10000.0)] * 2).pairing
    'half'
    """

    inv_freq: Sequence[Any]
    pairing: str = "half"
    hadamard: bool = False


def check_rotary(op: str, rotary: Any, layers: Iterable[int], D: int) -> None:
    """Check for `op` that a `rotary` fits these layers, with heads of D elements.

    Raises:
        DtypeError: it is no Rotary, or its frequencies are no list of float arrays.
        DeviceError: frequencies are on a GPU.
        ShapeError: frequencies are no vector, or rotate more elements than heads have.
        ParameterError: a layer has no frequencies, or the pairing is unknown.
    """
    check_type(op, "rotary", rotary, Rotary, "a pykv Rotary")
    check_flag(op, "rotary.hadamard", rotary.hadamard)
    check_type(op, "rotary.inv_freq", rotary.inv_freq, list | tuple, "a list of arrays")
    for layer in layers:
        if layer >= len(rotary.inv_freq):
            raise ParameterError(
                f"{op}: rotary.inv_freq has {counted(len(rotary.inv_freq), 'layer')}, "
                f"expected one for layer {layer}"
            )
        dims = _check(rotary.inv_freq[layer])
        if not isinstance(rotary.inv_freq[layer], np.ndarray):
            raise DeviceError(f"{op}: rotary.inv_freq[{layer}] is on a GPU, expected the host")
        rope.check_pairs(op, rotary.pairing, dims["F"], D)


_check = checker("eviction.evict", **{"rotary.inv_freq": ("F", FLOAT32)})


def ahead(q: Any, layer: int, rotary: Rotary, future: int) -> Any:
    """The last T queries of sequences, each rotated on from its position to the next `future`
    positions, on average over these.

    Args:
        q: [N, T, G, D] float32, rotated, of T consecutive positions up to that of the last token.
        layer: selects the frequencies of `rotary`.
        future: number of positions.

    Returns:
        The mean over j = 1 ... future of R(j + T - 1 - t) q[:, t], where R(n) rotates by n
        positions. As rotations add up, absolute positions do not matter. Mean and covariance of the
        result are those of the unrotated queries, times the mean rotation.
    """
    xp, (T, D) = module_of(q), (q.shape[1], q.shape[3])
    frequencies = np.asarray(rotary.inv_freq[layer], np.float64)
    mixing = None
    if rotary.hadamard:
        mixing = xp.asarray(paged_qkv.hadamard_matrix(D).astype(np.float32))
        q = linear.linear(q.reshape(-1, D), mixing).reshape(q.shape)
    mean = np.exp(1j * frequencies * np.arange(1, future + 1)[:, None]).mean(0)
    turned = np.exp(1j * frequencies * np.arange(T - 1, -1, -1)[:, None]) * mean  # [T, F]
    real, imaginary = (
        xp.asarray(np.ascontiguousarray(x, np.float32))[:, None] for x in (turned.real, turned.imag)
    )
    found = q.copy()
    first, second = rope.pair_slices(rotary.pairing, len(frequencies))
    a, b = q[..., first], q[..., second]
    found[..., first] = a * real - b * imaginary
    found[..., second] = a * imaginary + b * real
    return found if mixing is None else linear.linear(found.reshape(-1, D), mixing).reshape(q.shape)
