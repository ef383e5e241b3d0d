"""Change logits before a token is drawn: penalties, biases and masks.

Dimensions: B sequences, V vocabulary, N rows of tallies, E biases, M masks, W words of a mask.
Kernel: kernels_cu/adjust_logits.cu.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pykv import cuda
from pykv.arrays import FLOAT32, INT32, like, on_gpu
from pykv.checker import checker, optional
from pykv.errors import ParameterError, ShapeError, quoted
from pykv.ops import paged_check
from pykv.options import check_entries
from pykv.overlaps import Written

_BLOCK, _ITEMS = 256, 4  # threads, and tokens of each; many blocks share a row

VARIANTS = [dict(BLOCK=_BLOCK, ITEMS=_ITEMS)]
VARIANTS_SMS = range(0)  # none at import: few programs call it, and they compile what they need

# Groups of arguments: all of a group are given, or none.
_PENALTIES = ("tallies", "penalties", "tally_rows", "tokens")
_BIASES = ("bias_indptr", "bias_ids", "bias_values")
_MASKS = ("masks", "mask_rows")


def adjust(
    logits: Any,
    *,
    tallies: Any = None,
    penalties: Any = None,
    tally_rows: Any = None,
    tokens: Any = None,
    bias_indptr: Any = None,
    bias_ids: Any = None,
    bias_values: Any = None,
    masks: Any = None,
    mask_rows: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Apply repetition, presence and frequency penalties, then biases, then masks, in one launch.

    A sequence is penalised for what its row of `tallies` says: a token that occurs in prompt or
    answer has its logit divided by the repetition penalty if it is positive, else multiplied; one
    that occurs c > 0 times in the answer then loses presence + frequency * c. A bias is added
    behind the penalties, so that it counts in full whatever they are; vLLM and llama.cpp add it
    before them, which differs where the repetition penalty is not 1. A token that the mask does not
    allow gets -inf.

    Tallies stay on the device, a row for each sequence, and this call counts the token that was
    drawn last: a step brings one integer a row, and no shape depends on the length of a sequence,
    so that a CUDA graph can hold the step. Lists of tokens and counts would be shorter to read, but
    to be put together on the host and sent at each step.

    Args:
        logits: [B, V] float32.
        tallies: [N, V] int32; twice how often a token occurs in the answer, plus 1 if it occurs in
            the prompt. Updated in place. Needs `penalties`, `tally_rows` and `tokens`.
        penalties: [B, 3] float32; repetition (positive, 1 is none), presence and frequency (0 are
            none).
        tally_rows: [B] int32; the row of `tallies` of a sequence, no row twice, or -1: no
            penalties.
        tokens: [B] int32; counted in the sequence's answer before its logits are judged, or -1.
        bias_indptr: [B+1] int32; biases bias_indptr[b] to bias_indptr[b+1] are of sequence b. Needs
            `bias_ids` and `bias_values`.
        bias_ids: [E] int32; tokens, none twice for a sequence.
        bias_values: [E] float32; what is added, finite or -inf.
        masks: [M, W] int32, W = ceil(V / 32); bit i % 32 of word i / 32 allows token i, as
            llguidance and XGrammar write them. Needs `mask_rows`.
        mask_rows: [B] int32; the mask of a sequence, or -1: all tokens are allowed.
        out: [B, V] float32; may be `logits`, whose rows that ask for nothing are not touched then.
            Allocated if None.
        stream: see pykv.cuda.on_stream.

    Returns:
        `out`, or a new array. NaN that a mask does not hide stay as they are.

    Raises:
        ShapeError: dimensions disagree.
        DtypeError: an array has another dtype.
        DeviceError: host and device arrays are mixed.
        ParameterError: an argument is given without those that it needs; or, on the host, an index
            lies outside its array, comes twice, a penalty or bias is no such number, or a mask
            allows no token.

    Runs where the arrays are; on a GPU it only enqueues, and contents are not checked there: rows
    outside their arrays count as -1, tokens outside the vocabulary as none. Host and GPU give the
    same bits: each operation is rounded once to float32, in the order above. Sources: CTRL (Keskar
    et al., 2019) for the repetition penalty, the OpenAI API for the others and for biases.

    >>> logits = np.array([[2, -1, 0.5]], np.float32)
    >>> tallies = np.array([[1, 2, 0]], np.int32)  # token 0 is in the prompt, 1 once in the answer
    >>> pykv.ops.adjust_logits.adjust(
    ...     logits,
    ...     tallies=tallies,
    ...     penalties=np.array([[2, 0.25, 0.5]], np.float32),
    ...     tally_rows=np.array([0], np.int32),
    ...     tokens=np.array([1], np.int32),  # drawn since: twice in the answer now
    ... )
    array([[ 1.  , -3.25,  0.5 ]], dtype=float32)
    """
    op = "adjust_logits.adjust"
    given = dict(tallies=tallies, penalties=penalties, tally_rows=tally_rows, tokens=tokens)
    given |= dict(bias_indptr=bias_indptr, bias_ids=bias_ids, bias_values=bias_values)
    given |= dict(masks=masks, mask_rows=mask_rows)
    dims = _check(logits, *given.values(), out)
    for group in (_PENALTIES, _BIASES, _MASKS):
        missing = [name for name in group if given[name] is None]
        if 0 < len(missing) < len(group):
            there = next(name for name in group if given[name] is not None)
            raise ParameterError(f"{op}: {missing[0]} is missing, expected it with {there}")
    B, V = dims["B"], dims["V"]
    if masks is not None:
        _check_width(op, masks, V)
    out = like(logits, (B, V), np.float32) if out is None else out
    if out.size == 0:
        return out
    if on_gpu(logits):
        key = tuple(x is not None for x in (tallies, bias_ids, masks))
        launch = dims.keep(key, lambda: _launch(B, V, tallies, bias_ids, masks))
        launch(dict(out=out, logits=logits, **given), stream)
    else:
        cuda.look(lambda: _check_contents(op, V, given))
        cuda.run_on_host(partial(reference, logits, **given), out, stream)
    return out


_check = checker(
    "adjust_logits.adjust",
    ("tallies", Written("out", may_be=("logits",))),
    logits=("B V", FLOAT32, 4),
    tallies=optional("N V", INT32),
    penalties=optional("B 3", FLOAT32, 4),
    tally_rows=optional("B", INT32),
    tokens=optional("B", INT32),
    bias_indptr=optional("B+1", INT32),
    bias_ids=optional("E", INT32),
    bias_values=optional("E", FLOAT32),
    masks=optional("M W", INT32),
    mask_rows=optional("B", INT32),
    out=optional("B V", FLOAT32, 4),
)


def reference(logits: Any, **given: Any) -> Any:
    """The definition of `adjust`, in NumPy, of its other arrays by their names, which may be None;
    tests hold the kernel against it."""
    tallies, penalties, tally_rows, tokens = (given[name] for name in _PENALTIES)
    bias_indptr, bias_ids, bias_values = (given[name] for name in _BIASES)
    masks, mask_rows = (given[name] for name in _MASKS)
    out = logits.copy()
    V = logits.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        for b, row in enumerate(out):
            if tallies is not None and tally_rows[b] >= 0:
                tally = tallies[tally_rows[b]]
                if tokens[b] >= 0:
                    tally[tokens[b]] += 2
                known = np.flatnonzero(tally)
                row[known] = _penalised(row[known], tally[known] >> 1, *penalties[b])
            if bias_indptr is not None:
                span = slice(bias_indptr[b], bias_indptr[b + 1])
                ids, values = bias_ids[span], bias_values[span]
                row[ids] = np.where(values == 0, row[ids], row[ids] + values)
            if masks is not None and mask_rows[b] >= 0:
                row[~_allowed(masks[mask_rows[b]], V)] = -np.inf
    return np.where(np.isnan(logits) & (out != -np.inf), logits, out)


def _penalised(logits: Any, counts: Any, repetition: Any, presence: Any, frequency: Any) -> Any:
    logits = np.where(logits > 0, logits / repetition, logits * repetition)
    lost = presence + frequency * counts.astype(np.float32)
    return np.where(counts > 0, logits - lost, logits)


def _allowed(mask: Any, V: int) -> Any:
    """Which tokens a mask [W] allows, [V] bool."""
    octets = mask.astype("<i4").view(np.uint8)
    return np.unpackbits(octets, bitorder="little")[:V].astype(bool)


def check_masks(op: str, masks: Any, V: int) -> None:
    """Check that masks [M, W] of the host are of V tokens, and that each allows one.

    Raises:
        ShapeError: the number of words is another.
        ParameterError: a mask allows no token.
    """
    _check_width(op, masks, V)
    for m, mask in enumerate(masks):
        if not _allowed(mask, V).any():
            raise ParameterError(f"{op}: masks[{m}] allows no token, expected at least one")


def _check_width(op: str, masks: Any, V: int) -> None:
    if masks.shape[1] != -(-V // 32):
        raise ShapeError(
            f"{op}: masks has W={masks.shape[1]}, expected {-(-V // 32)} words for V={V} tokens"
        )


def _check_contents(op: str, V: int, given: dict[str, Any]) -> None:
    tallies, penalties, tally_rows, tokens = (given[name] for name in _PENALTIES)
    bias_indptr, bias_ids, bias_values = (given[name] for name in _BIASES)
    masks, mask_rows = (given[name] for name in _MASKS)
    if tallies is not None:
        check_entries(op, "tally_rows", tally_rows, -1, len(tallies) - 1)
        check_entries(op, "tokens", tokens, -1, V - 1)
        rows = tally_rows[tally_rows >= 0]
        if len(np.unique(rows)) < len(rows):
            raise ParameterError(f"{op}: tally_rows is {tally_rows}, expected no row twice")
        penalised = penalties[tally_rows >= 0]
        if not (np.isfinite(penalised).all() and (penalised[:, 0] > 0).all()):
            raise ParameterError(
                f"{op}: penalties is {quoted(penalties.tolist())}, expected finite numbers, of "
                "which the first of a row is positive"
            )
    if bias_indptr is not None:
        E, B = len(bias_ids), len(bias_indptr) - 1
        paged_check.check_starts(bias_indptr, E, op=op, name="bias_indptr")
        check_entries(op, "bias_indptr", bias_indptr[B:], E, E, f"{E=}", first=B)
        check_entries(op, "bias_ids", bias_ids, 0, V - 1)
        places = np.repeat(np.arange(B), np.diff(bias_indptr)) * V + bias_ids
        if len(np.unique(places)) < E:
            raise ParameterError(f"{op}: bias_ids has a token twice for a sequence, expected once")
        is_usable = bias_values < np.inf
        if not is_usable.all():
            e = int(is_usable.argmin())
            raise ParameterError(
                f"{op}: bias_values[{e}] is {bias_values[e]}, expected a finite number, or -inf"
            )
    if masks is not None:
        check_entries(op, "mask_rows", mask_rows, -1, len(masks) - 1)
        check_masks(op, masks, V)


def _launch(B: int, V: int, tallies: Any, bias_ids: Any, masks: Any) -> cuda.Launch:
    """The launch for arrays that are checked."""
    N, E, M = (0 if x is None else len(x) for x in (tallies, bias_ids, masks))
    return cuda.Launch(
        cuda.kernel("adjust_logits", "adjust_logits", BLOCK=_BLOCK, ITEMS=_ITEMS),
        grid=B * -(-V // (_BLOCK * _ITEMS)),
        block=_BLOCK,
        scalars=dict(V=V, N=N, E=E, M=M),
    )
