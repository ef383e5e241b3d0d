"""Keys of published pages: a hash of all tokens from the start of the sequence to the page's end.

The key of a page is the 128-bit BLAKE2b hash of the key of the page before and the page's own
tokens. Tokens are not kept: to make two prefixes meet takes 2^64 attempts, even on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from struct import Struct
from struct import error as StructError
from typing import Any

from pykv.errors import DtypeError, ParameterError, a_type
from pykv.number_texts import counted
from pykv.options import check_type

_BYTES = 16


def root(op: str, salt: str | bytes) -> bytes:
    """The key before the first page."""
    check_type(op, "salt", salt, str | bytes, "a text or bytes")
    if not salt:
        return bytes(_BYTES)
    salt = salt.encode("utf-8", "surrogatepass") if isinstance(salt, str) else salt
    # The hash is personalised, so that no salt can give the key of a page.
    return blake2b(salt, digest_size=_BYTES, person=b"salt").digest()


def after(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page with these tokens, behind the page or root with the key `parent`."""
    try:
        data = _packer(len(tokens))(parent, *tokens)
    except (StructError, TypeError) as error:
        expected = "expected integers of 64 bits with a sign"
        raise ParameterError(f"BlockManager: tokens are {tokens}, {expected}: {error}") from error
    return blake2b(data, digest_size=_BYTES).digest()


@cache
def _packer(count: int) -> Callable[..., bytes]:
    return Struct(f"<{_BYTES}s{count}q").pack


def of_pages(
    op: str, tokens: Sequence[int], page_size: int, salt: str | bytes = b""
) -> Iterator[bytes]:
    """The keys of the full pages of tokens, in order, each hashed when it is asked for."""
    key = root(op, salt)
    for start in range(0, count(op, tokens) - page_size + 1, page_size):
        key = after(key, tokens[start : start + page_size])
        yield key


def check(op: str, keys: list[bytes]) -> None:
    """Check that these may be keys; `op` is for messages."""
    check_type(op, "keys", keys, list)
    for i, key in enumerate(keys):
        if type(key) is not bytes:
            check_type(op, f"keys[{i}]", key, bytes)
        if len(key) != _BYTES:
            has = counted(len(key), "byte")
            raise ParameterError(f"{op}: keys[{i}] has {has}, expected the {_BYTES} of a key")


def count(op: str, tokens: Sequence[Any]) -> int:
    """The number of tokens, of a sequence that can be sliced."""
    try:
        tokens[:0]
        return len(tokens)
    except (TypeError, IndexError, KeyError, OverflowError):
        pass  # a dict, an array without dimensions, or a range without an end
    raise DtypeError(f"{op}: tokens is {a_type(tokens)}, expected a sequence of token ids")
