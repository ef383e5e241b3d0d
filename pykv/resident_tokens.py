"""What a launch of ops/resident_program.py does between two tokens: the inputs of phases, and what
follows a token.

Dimensions: T rows, each of a sequence or of nobody; M pages of each at most; N words.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import INT32, on_gpu
from pykv.checker import checker, optional
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.overlaps import place_of, share
from pykv.phases import Argmax, Attention

TOKEN_BITS, _WHY_BITS, _EPOCH_BITS = 24, 3, 5  # of a word that tells of a token, from the lowest on


class Inputs(NamedTuple):
    """What phases of a token read and leave, int32.

    Attributes:
        ids, positions, slots, lengths: [T], of the token that is computed, as phases have them;
            a sequence of length 0 is none. Those of the next one are written here.
        page_table: [T, M], -1 where a sequence has no page.
        peaks: [T], the token that phases draw for each, -1 where none can be.
        params: [N], words that phases read of how a sequence's tokens are drawn, which one that
            starts in the midst of a launch may set; None: there are none.
    """

    ids: Any
    positions: Any
    slots: Any
    lengths: Any
    page_table: Any
    peaks: Any
    params: Any = None


_ROWS = ("T", INT32)
_check = checker(
    "resident_program.ResidentProgram",
    ("ids", "positions", "slots", "lengths", "page_table", "peaks", "params"),
    ids=_ROWS,
    positions=_ROWS,
    slots=_ROWS,
    lengths=_ROWS,
    page_table=("T M", INT32),
    peaks=_ROWS,
    params=optional("N", INT32),
)


def check_inputs(op: str, inputs: Any, phases: Sequence[Any], page_size: int) -> dict[str, int]:
    """The sizes of inputs of phases, of which one leaves `peaks` and none writes another.

    Raises: as ResidentProgram.
    """
    if not isinstance(inputs, Inputs):
        raise DtypeError(f"{op}: inputs is a {type(inputs).__name__}, expected Inputs")
    dims = _check(*inputs)
    first = phases[0].inputs
    if len(first) != dims["T"]:
        raise ShapeError(f"{op}: ids has T={dims['T']}, expected T={len(first)} as the phases")
    if on_gpu(first) != on_gpu(inputs.ids):
        raise DeviceError(f"{op}: phases and inputs are of host and device, expected one")
    written = [rows for p in phases for rows in p.touched().writes]
    for name, array in inputs._asdict().items():
        if array is None:
            continue
        is_written = any(share(place_of(array), rows) for rows in written)
        if is_written != (name == "peaks"):
            expected = "a phase to write it" if name == "peaks" else "no phase to write it"
            raise ParameterError(f"{op}: inputs has a {name}, expected {expected}")
    for p in phases:
        if isinstance(p, Attention) and (P := p.checked(op).dims["P"]) != page_size:
            raise ParameterError(f"{op}: page_size is {page_size}, expected {P} as the pools")
        if isinstance(p, Argmax) and p.logits.shape[1] > 1 << TOKEN_BITS:
            raise UnsupportedError(
                f"{op}: logits has V={p.logits.shape[1]}, expected up to {1 << TOKEN_BITS}"
            )
    return dims


class Why(enum.IntEnum):
    """What follows a token for its sequence."""

    NEXT = 0  # another token
    ENDED = 1  # it was one that ends the sequence
    FULL = 2  # it was the last up to the sequence's limit
    OUT_OF_PAGES = 3  # no page for the next one, which ends the launch
    TAKEN_BACK = 4  # the host had stopped the sequence
    NOT_FINITE = 5  # there is no token
    NOBODY = 6  # the sequence has ended before, or there is none


class Drawn(NamedTuple):
    """A token of a sequence, of no meaning if `why` says that there is none.

    Attributes:
        epoch: how many sequences were started in the row before in this launch, this one among
            them: 0 of the one that it began with.
        logprob, top: if the phases have a Logprobs: the token's log probability, and those of the
            likeliest tokens, likeliest first.
    """

    token: int
    why: Why
    epoch: int = 0
    logprob: Any = None  # a float
    top: Any = None  # a dict of floats by token


def of_word(word: int, epoch: int) -> Drawn:
    """What a word of a result tells of a row.

    Args:
        epoch: of the sequence that the host has started last in the row; the word may have been
            written before the launch took it up, and then is the last one's.
    """
    token, why = word & (1 << TOKEN_BITS) - 1, word >> TOKEN_BITS & (1 << _WHY_BITS) - 1
    is_of_it = word >> TOKEN_BITS + _WHY_BITS == epoch % (1 << _EPOCH_BITS)
    return Drawn(token, Why(why), epoch if is_of_it else epoch - 1)


def reference(inputs: Inputs, page_size: int, limits: Any, ends: Any) -> list[Drawn]:
    """What follows a token, in NumPy: writes the inputs of the next one."""
    drawn = []
    for row, length in enumerate(inputs.lengths.tolist()):
        token, page = int(inputs.peaks[row]), -1
        if length // page_size < inputs.page_table.shape[1]:
            page = int(inputs.page_table[row, length // page_size])
        why = Why.NEXT
        if length == 0:
            why = Why.NOBODY
        elif token < 0:
            why = Why.NOT_FINITE
        elif token in ends[row]:
            why = Why.ENDED
        elif length + 1 >= limits[row]:
            why = Why.FULL
        elif page < 0:
            why = Why.OUT_OF_PAGES
        drawn.append(Drawn(max(token, 0) if why < Why.TAKEN_BACK else 0, why))
        clear(inputs, row)
        if why == Why.NEXT:
            inputs.ids[row], inputs.positions[row] = token, length
            inputs.lengths[row] = length + 1
            inputs.slots[row] = page * page_size + length % page_size
    return drawn


def with_logprobs(drawn: list[Drawn], found: Any) -> list[Drawn]:
    """Results with their log probabilities, as a Logprobs left them in [T, 1 + 2 K] int32."""
    K = found.shape[1] // 2
    rows = zip(drawn, found.tolist(), found.view(np.float32).tolist(), strict=True)
    return [
        x._replace(
            logprob=values[0],
            top={i: v for i, v in zip(ids[1 : 1 + K], values[1 + K :], strict=True) if i >= 0},
        )
        for x, ids, values in rows
    ]


def clear(inputs: Inputs, row: int) -> None:
    """Nobody's inputs, of which nothing is written or read."""
    for array, value in zip(inputs, (0, 0, -1, 0), strict=False):
        array[row] = value
