"""Commands from the host to a launch of ops/resident_program.py.

A command is up to 8 integers of 32 bits, a message of host_rings.py:

    STOP    row                                 end the row's sequence
    GRANT   tokens                              draw so many more tokens
    PAGES   row, place, count, words            write up to 4 entries of `page_table`,
    ENDS    row, place, count, words            of `ends`,
    PARAMS  0, place, count, words              or of `params`, from `place` on
    START   row, token, length, pages,          start a sequence in a free row
            ends, limit, epoch

Starting a sequence may take many commands. START is the last of them and has the numbers of pages
and ends; as commands are taken in order, a launch that finds a START has everything it needs.
PARAMS and START wait until all blocks have computed the token under way, because blocks read what
they change. A launch that ends after that token ignores the START.

`epoch` counts the sequences that the host has started in the row during this launch. Results repeat
the epoch of the row's sequence, so the host can tell results of the sequence before.

Dimensions: T rows; M pages a sequence at most; E tokens that end a sequence; N words of `params`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.errors import DtypeError, ParameterError, a_type, quoted
from pykv.number_texts import counted
from pykv.options import check_whole
from pykv.programs.resident_tokens import Inputs, clear

STOP, GRANT, PAGES, ENDS, PARAMS, START = range(1, 7)
MOST_ENDS = 32  # tokens that may end a sequence
_WORDS_OF_COMMAND = 4
MOST = 2**31 - 1

Command = list[int]


def of_launch(op: str, T: int, limits: Any, ends: Any) -> np.ndarray:
    """The words that a launch begins with, int32: limits [T], then ends [T, MOST_ENDS]."""
    for name, given in (("limits", limits), ("ends", ends)):
        if len(listed(op, name, given)) != T:
            raise ParameterError(
                f"{op}: {name} has {counted(len(given), 'entry')}, expected {T} of the sequences"
            )
    words = np.full(T * (1 + MOST_ENDS), -1, np.int32)
    for i, (limit, of_sequence) in enumerate(zip(limits, ends, strict=True)):
        words[i] = check_whole(op, "limits", limit, 0, MOST)
        tokens, at = of_ends(op, of_sequence), T + i * MOST_ENDS
        words[at : at + len(tokens)] = tokens
    return words


def of_pages(op: str, pages: Any, table: tuple[int, ...], num_pages: int) -> list[Command]:
    """Commands that write page ids into a table [T, M].

    Args:
        pages: (row, place, ids) for each run of entries.
        num_pages: of the pool, a bound of the ids.
    """
    (T, M), commands = table, []
    for given in listed(op, "pages", pages):
        is_three = isinstance(given, (list, tuple)) and len(given) == 3
        if not is_three or not isinstance(given[2], (list, tuple)):
            raise DtypeError(f"{op}: pages has {quoted(given)}, expected (row, place, pages)")
        row = check_whole(op, "a row of pages", given[0], 0, T - 1)
        ids = _wholes(op, "pages", given[2], num_pages - 1)
        place = check_whole(op, "a place of pages", given[1], 0, M - len(ids))
        commands += _writes(PAGES, row, place, ids)
    return commands


def of_start(
    op: str,
    inputs: Inputs,
    pool: tuple[int, int],
    epochs: list[int],
    row: int,
    token: int,
    length: int,
    limit: int,
    ends: Any,
    pages: Any,
    params: Any,
) -> list[Command]:
    """Commands that start a sequence, see ResidentProgram.start.

    Args:
        pool: number of pages, and tokens a page.
        epochs: [T], of the sequence started last in each row.
    """
    (T, M), (num_pages, page_size) = inputs.page_table.shape, pool
    row = check_whole(op, "row", row, 0, T - 1)
    token = check_whole(op, "token", token, 0, MOST)
    limit = check_whole(op, "limit", limit, 0, MOST)
    length = check_whole(op, "length", length, 1, M * page_size)
    tokens = of_ends(op, ends)
    ids = _wholes(op, "pages", listed(op, "pages", pages), num_pages - 1)
    least = -(-length // page_size)
    if not least <= len(ids) <= M:
        raise ParameterError(
            f"{op}: pages has {counted(len(ids), 'page')}, expected {least} to {M}"
        )
    if len(listed(op, "params", params)) > 0 and inputs.params is None:
        raise ParameterError(f"{op}: inputs has no params, expected some where a start has them")
    # PARAMS come last: a launch takes the others while blocks compute.
    commands = _writes(PAGES, row, 0, ids) + _writes(ENDS, row, 0, tokens)
    for given in params:
        is_two = isinstance(given, (list, tuple)) and len(given) == 2
        if not is_two or not isinstance(given[1], (list, tuple)):
            raise DtypeError(f"{op}: params has {quoted(given)}, expected (place, words)")
        words = [check_whole(op, "params", word, -MOST - 1, MOST) for word in given[1]]
        most = len(inputs.params) - len(words)
        place = check_whole(op, "a place of params", given[0], 0, most)
        commands += _writes(PARAMS, 0, place, words)
    counts = len(ids), len(tokens)
    return [*commands, [START, row, token, length, *counts, limit, epochs[row] + 1]]


def of_ends(op: str, given: Any) -> list[int]:
    """The tokens that end a sequence."""
    if len(tokens := listed(op, "ends", given)) > MOST_ENDS:
        raise ParameterError(
            f"{op}: ends has {counted(len(tokens), 'token')}, expected up to {MOST_ENDS}"
        )
    return _wholes(op, "ends", tokens)


def listed(op: str, name: str, given: Any) -> Any:
    """`given`, which must be a list or tuple."""
    if not isinstance(given, (list, tuple)):
        raise DtypeError(f"{op}: {name} is {a_type(given)}, expected a list")
    return given


def _wholes(op: str, name: str, given: Any, most: int = MOST) -> list[int]:
    return [check_whole(op, name, x, 0, most) for x in given]


def _writes(kind: int, row: int, place: int, words: list[int]) -> list[Command]:
    parts = range(0, len(words), _WORDS_OF_COMMAND)
    return [
        [kind, row, place + at, len(part), *part]
        for at in parts
        if (part := words[at : at + _WORDS_OF_COMMAND])
    ]


def reference(command: Command, inputs: Inputs, page_size: int, limits: Any, ends: Any) -> None:
    """What the kernel does at a command, in NumPy; a GRANT changes none of these arrays.

    Args:
        limits, ends: [T] and [T, E] int32.
    """
    kind, row, *words = command
    if kind == STOP:
        clear(inputs, row)
    elif kind == START:
        token, length, pages, count, limits[row], _ = words
        inputs.page_table[row, pages:], ends[row, count:] = -1, -1
        page, at = divmod(length - 1, page_size)
        slot = inputs.page_table[row, page] * page_size + at
        for array, value in zip(inputs, (token, length - 1, slot, length), strict=False):
            array[row] = value
    elif kind != GRANT:
        arrays = {PAGES: inputs.page_table, ENDS: ends, PARAMS: inputs.params}
        place, count, *values = words
        np.atleast_2d(arrays[kind])[row, place : place + count] = values
