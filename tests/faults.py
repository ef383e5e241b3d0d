"""Plants: each makes a faulty function of a right one, for `pykv verify` to notice.

A family's faults stand in tests/ops/test_<stem>.py, or in tests/planted.py, as

    FAULTS = {"norm: no offset": (norm, "rms_norm", with_option(offset=0.0)), ...}
    REFERENCE_FAULTS = [(norm, "reference", fixed(2, lambda eps: 0.0)), ...]

the first in public functions, which run on every machine, the second in what runs on a CPU alone.
"""

import inspect

import numpy as np

from pykv.arrays import module_of

F16, F32 = np.float16, np.float32


def scaled(by):
    """The result, or the first of several, is off by a fraction of itself."""

    def plant(op):
        def faulty(*args, **kwargs):
            out = op(*args, **kwargs)
            return (out[0] * F32(1 + by), *out[1:]) if isinstance(out, tuple) else out * F32(1 + by)

        return faulty

    return plant


def with_option(**change):
    """An option that the caller gives is not obeyed."""
    return lambda op: lambda *args, **kwargs: op(*args, **{**kwargs, **change})


def with_argument(index, change, **options):
    """One positional argument is misread, with options that let it pass."""

    def plant(op):
        def faulty(*args, **kwargs):
            given = list(args)
            given[index] = change(given[index])
            return op(*given, **kwargs, **options)

        return faulty

    return plant


def last_bit(op):
    """One code of one row is off by one."""

    def faulty(*args, **kwargs):
        out = op(*args, **kwargs)
        out.view("u2")[-1, -1] ^= 1
        return out

    return faulty


def keys_for_values(op):
    return lambda k, v, *rest, **options: op(k, k, *rest, **options)


def half_the_scales(op):
    """The scales that are stored are half of what codes were made with."""

    def faulty(*args, **options):
        op(*args, **options)
        if options["k_scales"] is not None:
            options["k_scales"][...] = options["k_scales"] * F16(0.5)

    return faulty


def truncated(op):
    """Rows are cut to what sixteen bits less hold, before they become codes."""

    def faulty(k, v, *rest, **options):
        bits = k.view("u4") if k.itemsize == 4 else k.view("u2")
        op((bits >> 3 << 3).view(k.dtype), v, *rest, **options)

    return faulty


def ties_to_the_last(op):
    return lambda logits: (logits.shape[1] - 1 - op(logits[:, ::-1].copy())).astype(np.int32)


def as_int64(op):
    return lambda *args: op(*args).astype(np.int64)


def without_the_last_byte(op):
    return lambda *lists: op(*([x[:-1] for x in arrays] for arrays in lists))


def with_changed_option(name, change):
    return lambda op: (
        lambda *args, **options: op(*args, **{**options, name: change(options.get(name))})
    )


def halved(x):
    return x if x is None else x * F16(0.5)


def without_the_first_state(op):
    return lambda values, lse, **options: op(values[1:], lse[1:], **options)


def hnd_in_reverse(op):
    """Heads trade places where they come before tokens."""

    def faulty(k, *rest, **options):
        return op(k[:, ::-1].copy() if options.get("layout") == "HND" else k, *rest, **options)

    return faulty


def into_new_arrays(op):
    return lambda *args, **options: op(*args, **options | dict(k_out=None, v_out=None))


def not_in_place(op):
    """Pools that are read are not written."""

    def faulty(**options):
        if options["k_out"] is not options["k_pool"]:
            op(**options)

    return faulty


def finite_lse(op):
    """Arrays that are given get 0 for the log-sum-exp of no keys."""

    def faulty(*args, **options):
        result, lse = op(*args, **options), options.get("lse")
        if lse is not None:
            lse[lse == -np.inf] = 0
        return result

    return faulty


def heads_together(op):
    """A token's heads are normalised as one row."""

    def faulty(x, weight, *rest, **options):
        if x.ndim == 2:
            return op(x, weight, *rest, **options)
        wide = x.reshape(len(x), -1), weight[None].repeat(x.shape[1], 0).reshape(-1)
        return op(*wide, *rest, **options).reshape(x.shape)

    return faulty


def nan_is_large(logits):
    changed = logits.copy()
    changed[changed != changed] = 99
    return changed


# --- Of references --------------------------------------------------------------------------------


def does_nothing(op):
    return lambda *args, **options: None


def zeros(op):
    """Zeros, like what is returned, alone or the first of several."""

    def faulty(*args, **options):
        out = op(*args, **options)
        first, *others = out if isinstance(out, tuple) else (out,)
        blank = module_of(first).zeros_like(first)  # what nobody wrote may be no number
        return (blank, *others) if isinstance(out, tuple) else blank

    return faulty


def fixed(index, change):
    """The argument of one position is misread."""

    def plant(op):
        signature = inspect.signature(op)
        name = list(signature.parameters)[index]

        def faulty(*args, **options):
            bound = signature.bind(*args, **options)
            bound.arguments[name] = change(bound.arguments[name])
            return op(*bound.args, **bound.kwargs)

        return faulty

    return plant


def second_halved(op):
    """The log-sum-exp is off."""

    def faulty(*args, **options):
        out, lse = op(*args, **options)
        return out, lse / 2

    return faulty


def without(option):
    return lambda op: lambda *args, **options: op(*args, **options | {option: None})


def toward_zero(op):
    """Codes are cut instead of rounded."""
    return lambda y, kind: op(np.trunc(y), kind)


def an_eighth_more(op):
    return lambda *args: op(*args) * F32(1.125)


def all_alike(op):
    """Every key that is seen gets the same score."""

    def faulty(*args, **options):
        scores = op(*args, **options)
        return np.where(np.isneginf(scores), scores, 0)

    return faulty
