"""Plants: each makes a faulty function of a right one, for `pykv verify` to notice.

A family's faults stand in tests/ops/test_<stem>.py, or in tests/planted.py, as

    FAULTS = {"norm: no offset": (norm, "rms_norm", with_option(offset=0.0)), ...}
    REFERENCE_FAULTS = [(norm, "reference", fixed(2, lambda eps: 0.0)), ...]

the first in public functions, which run on every machine, the second in what runs on a CPU alone.
"""

import inspect
from functools import partial

import numpy as np

from pykv.arrays import module_of

F16, F32 = np.float16, np.float32


def planted(faulty):
    """The plant of a function that takes the right one before its arguments."""
    return lambda op: partial(faulty, op)


def scaled(by):
    """The result, or the first of several, is off by a fraction of itself."""

    @planted
    def faulty(op, *args, **kwargs):
        out = op(*args, **kwargs)
        return (out[0] * F32(1 + by), *out[1:]) if isinstance(out, tuple) else out * F32(1 + by)

    return faulty


def with_option(**change):
    """An option that the caller gives is not obeyed."""
    return lambda op: lambda *args, **kwargs: op(*args, **{**kwargs, **change})


def with_argument(index, change, **options):
    """One positional argument is misread, with options that let it pass."""

    @planted
    def faulty(op, *args, **kwargs):
        given = list(args)
        given[index] = change(given[index])
        return op(*given, **kwargs, **options)

    return faulty


@planted
def last_bit(op, *args, **kwargs):
    """One code of one row is off by one."""
    out = op(*args, **kwargs)
    out.view("u2")[-1, -1] ^= 1
    return out


def keys_for_values(op):
    return lambda k, v, *rest, **options: op(k, k, *rest, **options)


@planted
def half_the_scales(op, *args, **options):
    """The scales that are stored are half of what codes were made with."""
    op(*args, **options)
    if options["k_scales"] is not None:
        options["k_scales"][...] = options["k_scales"] * F16(0.5)


@planted
def truncated(op, k, v, *rest, **options):
    """Rows are cut to what sixteen bits less hold, before they become codes."""
    bits = k.view("u4") if k.itemsize == 4 else k.view("u2")
    op((bits >> 3 << 3).view(k.dtype), v, *rest, **options)


def ties_to_the_last(op):
    return lambda logits: (logits.shape[1] - 1 - op(logits[:, ::-1].copy())).astype(np.int32)


def as_int64(op):
    return lambda *args: op(*args).astype(np.int64)


def without_the_last_byte(op):
    return lambda *lists: op(*([x[:-1] for x in arrays] for arrays in lists))


def misread(**changes):
    """Options are taken for what these functions make of their values."""

    @planted
    def faulty(op, *args, **options):
        taken = {name: change(options.get(name)) for name, change in changes.items()}
        return op(*args, **options | taken)

    return faulty


def halved(x):
    return x if x is None else x * F16(0.5)


def without_the_first_state(op):
    return lambda values, lse, **options: op(values[1:], lse[1:], **options)


@planted
def hnd_in_reverse(op, k, *rest, **options):
    """Heads trade places where they come before tokens."""
    return op(k[:, ::-1].copy() if options.get("layout") == "HND" else k, *rest, **options)


def into_new_arrays(op):
    return lambda *args, **options: op(*args, **options | dict(k_out=None, v_out=None))


@planted
def not_in_place(op, **options):
    """Pools that are read are not written."""
    if options["k_out"] is not options["k_pool"]:
        op(**options)


@planted
def finite_lse(op, *args, **options):
    """Arrays that are given get 0 for the log-sum-exp of no keys."""
    result, lse = op(*args, **options), options.get("lse")
    if lse is not None:
        lse[lse == -np.inf] = 0
    return result


@planted
def heads_together(op, x, weight, *rest, **options):
    """A token's heads are normalised as one row."""
    if x.ndim == 2:
        return op(x, weight, *rest, **options)
    wide = x.reshape(len(x), -1), weight[None].repeat(x.shape[1], 0).reshape(-1)
    return op(*wide, *rest, **options).reshape(x.shape)


def nan_is_large(logits):
    changed = logits.copy()
    changed[changed != changed] = 99
    return changed


# --- Of references --------------------------------------------------------------------------------


def does_nothing(op):
    return lambda *args, **options: None


@planted
def zeros(op, *args, **options):
    """Zeros, like what is returned, alone or the first of several."""
    out = op(*args, **options)
    first, *others = out if isinstance(out, tuple) else (out,)
    blank = module_of(first).zeros_like(first)  # what nobody wrote may be no number
    return (blank, *others) if isinstance(out, tuple) else blank


def fixed(index, change):
    """The argument of one position is misread."""

    @planted
    def faulty(op, *args, **options):
        bound = inspect.signature(op).bind(*args, **options)
        name = list(bound.signature.parameters)[index]
        bound.arguments[name] = change(bound.arguments[name])
        return op(*bound.args, **bound.kwargs)

    return faulty


@planted
def second_halved(op, *args, **options):
    """The log-sum-exp is off."""
    out, lse = op(*args, **options)
    return out, lse / 2


def toward_zero(op):
    """Codes are cut instead of rounded."""
    return lambda y, kind: op(np.trunc(y), kind)


def an_eighth_more(op):
    return lambda *args: op(*args) * F32(1.125)


@planted
def all_alike(op, *args, **options):
    """Every key that is seen gets the same score."""
    scores = op(*args, **options)
    return np.where(np.isneginf(scores), scores, 0)
