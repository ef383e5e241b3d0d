"""Parses a tier's options: "4GiB", "4GiB:lfu", "4GiB:int8", "DIR:50GiB:lfu:CODEC".

Sizes follow `docker run --memory`: K, M, G and T are powers of 1024, upper or lower case, with B,
iB or nothing after them. "64M", "64mb" and "64MiB" are the same size; "512" is in bytes.

A policy, one of POLICIES, says which page is evicted first; the default is the least recently used.
A codec is one of CODECS, or "FILE:RATIO" of an artefact of pykv.kvtc, such as "smollm2.kvtc:16".
"""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from pykv.errors import DtypeError, ParameterError, a_type, quoted
from pykv.number_texts import whole_of
from pykv.options import check_whole

CODECS = ("none", "int8", "int4")
POLICIES = ("lru", "lfu")  # least recently, or least frequently used
_POWERS = "BKMGT"  # of 1024
_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,9})?"
_UNIT = r"(?:[KMGTkmgt](?:[iI]?[bB])?|[bB])"
_SIZE = re.compile(rf"(?P<number>{_NUMBER})(?: ?(?P<unit>{_UNIT}))?")
# The unit is required: a plain number is the ratio of a codec "FILE:16".
_OPTION = re.compile(
    rf"(?:(?P<folder>.+):)?(?P<size>{_NUMBER} ?{_UNIT})"
    rf"(?::(?P<policy>{'|'.join(POLICIES)}))?(?::(?P<codec>.+))?",
    re.DOTALL,
)


_EXPECTED = "expected a size such as '4GiB' or '64M'"


class Limit(NamedTuple):
    """The options of a tier.

    Attributes:
        nbytes: its size at most.
        codec: "none" keeps a page bit for bit; "int8" and "int4" as codes with a scale for each
            token and head; "FILE:RATIO" codes it by that artefact of pykv.kvtc.
        folder: of the disk tier; None for the host tier.
        policy: which page is evicted first, one of POLICIES.
    """

    nbytes: int
    codec: str
    folder: Path | None = None
    policy: str = POLICIES[0]


def parse_bytes(op: str, name: str, value: Any) -> int:
    """A positive number of bytes, from an integer or a text such as "4GiB", "64M", "1.5 gb" or
    "512".

    Args:
        op, name: for messages.
        value: as given.

    Raises:
        DtypeError: it is neither an integer nor a text.
        ParameterError: the text is no size, or the size is not positive.
    """
    if not isinstance(value, str):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise DtypeError(f"{op}: {name} is {a_type(value)}, {_EXPECTED}")
        return check_whole(op, name, value, 1)
    found = _SIZE.fullmatch(value)
    if not found:
        raise ParameterError(f"{op}: {name} is {quoted(value)}, {_EXPECTED}")
    power = _POWERS.index((found["unit"] or "B")[0].upper())
    nbytes = int(Decimal(found["number"]) * 1024**power)
    return check_whole(op, name, nbytes, 1)


def parse_host(op: str, name: str, value: Any) -> Limit:
    """The options of the host tier: bytes, "4GiB", "64M", "4GiB:lfu" or "4GiB:int8".

    Raises: as `parse_bytes`; ParameterError also for an unknown codec.
    """
    if not isinstance(value, str) or _SIZE.fullmatch(value):
        return Limit(parse_bytes(op, name, value), "none")
    found = _OPTION.fullmatch(value)
    if not found or found["folder"]:
        expected = "expected SIZE, SIZE:lfu or SIZE:CODEC, such as '4GiB' or '64M'"
        raise ParameterError(f"{op}: {name} is {quoted(value)}, {expected}")
    nbytes, codec = parse_bytes(op, name, found["size"]), _codec(op, name, found["codec"])
    return Limit(nbytes, codec, None, found["policy"] or POLICIES[0])


def parse_disk(op: str, name: str, value: Any) -> Limit:
    """The options of the disk tier: "DIR:50GiB", "DIR:50GiB:lfu" or "DIR:50GiB:int8"; ~ is the
    user's home.

    Raises: as `parse_host`; ParameterError also if DIR is not a folder, or neither it nor its
    parent exists.
    """
    if not isinstance(value, str):
        raise DtypeError(f"{op}: {name} is {a_type(value)}, expected a text such as 'DIR:50GiB'")
    found = _OPTION.fullmatch(value)
    if not found or not found["folder"] or "\0" in value:
        expected = "expected DIR:SIZE, DIR:SIZE:lfu or DIR:SIZE:CODEC, such as 'tiers:50GiB'"
        raise ParameterError(f"{op}: {name} is {quoted(value)}, {expected}")
    nbytes = parse_bytes(op, name, found["size"])
    folder = Path(os.path.realpath(os.path.expanduser(found["folder"])))
    if folder.exists() and not folder.is_dir():
        raise ParameterError(f"{op}: {name} is {folder}, expected a folder")
    if not folder.parent.is_dir():  # a typing mistake, or a disk that is not mounted yet
        raise ParameterError(
            f"{op}: {name} is {folder}, expected a folder, or a new one in a folder that exists, "
            f"which {folder.parent} is not"
        )
    return Limit(nbytes, _codec(op, name, found["codec"]), folder, found["policy"] or POLICIES[0])


def artefact_of(codec: str) -> tuple[str, int] | None:
    """The file and the ratio of a codec "FILE:RATIO"; None for other codecs."""
    path, _, text = codec.rpartition(":")
    ratio = whole_of(text)
    return (path, ratio) if path and ratio is not None else None


def _codec(op: str, name: str, codec: str | None) -> str:
    codec = codec or "none"
    if codec not in CODECS and artefact_of(codec) is None:
        raise ParameterError(
            f"{op}: {name}'s codec is {quoted(codec)}, expected one of {', '.join(CODECS)}, or "
            "FILE:RATIO of an artefact, such as 'smollm2.kvtc:16'"
        )
    return codec
