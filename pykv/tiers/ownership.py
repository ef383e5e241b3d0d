"""What a file belongs to: the identity of its contents, and which heads of a model it holds."""

from __future__ import annotations

from typing import Any

from pykv.errors import DtypeError, ParameterError, quoted
from pykv.options import check_whole
from pykv.pool import PagedKVCache
from pykv.tiers.coded import CodedForm
from pykv.tiers.disk import Heads
from pykv.tiers.forms import Form

MOST_HEADS = 1 << 16  # limit: lookups try the files of every world size


def check_identity(given: Any) -> None:
    """Check that an identity maps names to texts, and that no name is reserved.

    Raises:
        DtypeError: it is no dict of texts.
        ParameterError: a name is reserved for tiers.
    """
    if given is None:
        return
    if not isinstance(given, dict) or not all(
        isinstance(text, str) for text in (*given, *given.values())
    ):
        raise DtypeError(f"Tiers: identity is {quoted(given)}, expected a dict of texts")
    if taken := {"form", "host"} & given.keys():
        raise ParameterError(f"Tiers: identity names {min(taken)!r}, which tiers set themselves")


def heads_of(
    cache: PagedKVCache, given: tuple[int, int] | None, form: Form | CodedForm
) -> Heads | None:
    """The heads of a cache; None where files do not store heads separately.

    Raises:
        ParameterError: `given` is out of range, or files do not store heads separately.
        DtypeError: it is not two whole numbers.
    """
    _, count, _ = cache.sizes
    is_coded = isinstance(form, CodedForm)
    if given is None:
        return None if is_coded else Heads(0, count, count)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise DtypeError(f"Tiers: heads is {quoted(given)}, expected (first, total)")
    first = check_whole("Tiers", "heads[0]", given[0], 0, MOST_HEADS - count)
    total = check_whole("Tiers", "heads[1]", given[1], first + count, MOST_HEADS)
    if is_coded or cache.spec.has_given_scales:
        why = "a codec that mixes heads" if is_coded else f"scales that are shared ({cache.spec})"
        raise ParameterError(f"Tiers: heads is {given}, expected None with {why}")
    return Heads(first, count, total)
