"""Tokens of ops/resident_program.py: inputs of the phases, and what follows a token.

Dimensions: T rows, each of a sequence or free; M pages a sequence at most; N words of `params`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv.arrays import INT32, on_gpu
from pykv.checker import checker, optional
from pykv.errors import (
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
    a_type,
)
from pykv.overlaps import place_of, share
from pykv.programs.phases import Argmax, Attention

TOKEN_BITS, _WHY_BITS, _EPOCH_BITS = 24, 3, 5  # fields of a result's word, from the lowest bit on


class Inputs(NamedTuple):
    """Inputs and outputs of the phases of a token, int32.

    Attributes:
        ids, positions, slots, lengths: [T], of the token to compute, as phases read them; then
            overwritten with those of the next token. A row of length 0 is free.
        page_table: [T, M], -1 where a sequence has no page.
        peaks: [T], the token drawn for each row, -1 if the logits are not finite.
        params: [N], sampling parameters that phases read, as words; a sequence that starts during a
            launch may set them. None: phases read none.
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
    """Check inputs, of which phases must write `peaks` and nothing else. Returns their sizes.

    Raises: as ResidentProgram.
    """
    if not isinstance(inputs, Inputs):
        raise DtypeError(f"{op}: inputs is {a_type(inputs)}, expected Inputs")
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
    """Why a sequence goes on or ends after a token."""

    NEXT = 0  # it goes on
    ENDED = 1  # the token is one that ends it
    FULL = 2  # it has reached its limit
    OUT_OF_PAGES = 3  # it has no page for the next token; this ends the launch
    TAKEN_BACK = 4  # the host had stopped it; there is no token
    NOT_FINITE = 5  # its logits are not finite; there is no token
    NOBODY = 6  # the row is free; there is no token


class Drawn(NamedTuple):
    """A token drawn for a row; meaningless if `why` says that there is none.

    Attributes:
        epoch: how many sequences this launch had started in the row, the token's own included; 0 of
            the sequence that the launch began with.
        logprob, top: with a Logprobs among the phases: the token's log probability, and those of
            the likeliest tokens, likeliest first.
    """

    token: int
    why: Why
    epoch: int = 0
    logprob: Any = None  # a float
    top: Any = None  # a dict of floats by token


def of_word(word: int, epoch: int) -> Drawn:
    """Decode a row's word of a result.

    Args:
        epoch: of the sequence that the host started last in the row. A word written before the
            launch took up that sequence belongs to the one before.
    """
    token, why = word & (1 << TOKEN_BITS) - 1, word >> TOKEN_BITS & (1 << _WHY_BITS) - 1
    is_of_it = word >> TOKEN_BITS + _WHY_BITS == epoch % (1 << _EPOCH_BITS)
    return Drawn(token, Why(why), epoch if is_of_it else epoch - 1)


def reference(inputs: Inputs, page_size: int, limits: Any, ends: Any) -> list[Drawn]:
    """What the kernel does after a token, in NumPy: writes the inputs of the next one."""
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
    """Results with their log probabilities, from the [T, 1 + 2 K] int32 of a Logprobs."""
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
    """Make a row free: phases neither read nor write for it."""
    for array, value in zip(inputs, (0, 0, -1, 0), strict=False):
        array[row] = value
